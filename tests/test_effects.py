"""An option that would have no effect is refused, before anything is read or written."""

import pytest

import restore_brats
import train_gmvae
from preprocessing import brats, camcan
from tf_lesion.cli import calibrate, evaluate

INPUT = ("--input", "scans", "--out", "maps")
CACHE = ("--cache", "c.h5", "--out", "r.h5")
HEALTHY = ("--model", "run", "--cache", "c.h5")
MAPS = ("--results", "maps", "--out", "scores")
RESTORED = ("--restored", "r.h5", "--out", "scores")
COHORT = ("--input", "scans", "--out", "c.h5")
IDLE = [
    *[
        (restore_brats, INPUT, option, "--cache")
        for option in ("--shard 1/3", "--save-every 5", "--max-slices 4", "--crop 0 38 0 42")
    ],
    *[
        (restore_brats, CACHE, option, "--input")
        for option in ("--mask m.nii", "--align none", "--bids-out", "--slice-step 2")
    ],
    *[
        (restore_brats, ("--merge", "--out", "r.h5"), option, what)
        for option, what in (("--shard 1/3", "--cache"), ("--steps 3", "--cache or --input"))
    ],
    *[
        (evaluate, MAPS, option, "--restored")
        for option in ("--crop 0 38 0 42", "--labels l.h5", "--compare signed", "--cache c.h5")
    ],
    (evaluate, RESTORED, "--seg-pattern x", "--results"),
    (evaluate, RESTORED, "--all-combinations", "--compare"),
    (train_gmvae, ("--cache", "c.h5", "--out", "run", "--resume"), "--force", "a new run"),
    (calibrate, HEALTHY, "--grid 0:1:0.5", "--tv-weight auto"),
    (calibrate, (*HEALTHY, "--tv-weight", "2"), "--grid-slices 4", "--tv-weight auto"),
    (calibrate, HEALTHY, "--chosen-by me", "--tv-weight or --postprocess"),
    (camcan, (*COHORT, "--test-list", "l.txt"), "--seed 3", "a split that is drawn"),
    (camcan, (*COHORT, "--mask-pattern", "m"), "--mask atlas", "scans without --mask-pattern"),
    (brats, (*COHORT, "--no-matching"), "--reference c.h5", "matching"),
    (brats, (*COHORT, "--no-matching", "--no-labels"), "--seg-pattern s", "labels"),
]


@pytest.mark.parametrize(("command", "given", "option", "wanted"), IDLE)
def test_an_option_without_effect_is_refused(
    command, given, option, wanted, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert command.main([*given, *option.split()]) == 2
    said = f"error: Expected {option.split()[0]} only with {wanted}: it has no effect, leave it out"
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
