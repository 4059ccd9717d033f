"""An option that would have no effect is refused, before anything is read or written."""

import pytest

import restore_brats
import train_gmvae
from eval import benchmark, compare_tf1, twins
from preprocessing import brats, camcan
from preprocessing.finder import __main__ as finder
from preprocessing.phantom import __main__ as phantom
from tf_lesion.cli import calibrate, evaluate, export

INPUT = ("--input", "scans", "--out", "maps")
CACHE = ("--cache", "c.h5", "--out", "r.h5")
HEALTHY = ("--model", "run", "--cache", "c.h5")
MAPS = ("--results", "maps", "--out", "scores")
RESTORED = ("--restored", "r.h5", "--out", "scores")
COHORT = ("--input", "scans", "--out", "c.h5")
TRAINING = ("--cache", "c.h5", "--out", "run")
EXPORTED = ("--model", "run", "--out", "shipped")
HEALTHY_ONLY = ("--out", "cohort", "--healthy", "2", "--patients", "0", "--seed", "1")
SLICES = ("--restored", "r.h5", "--tf1-restored", "theirs")
NUMBERS = ("--tf1-checkpoint", "model", "--reference", "graph.npz")
FINDER = ("--out", "work", "--label-maps", "maps", "--stages")
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
    *[
        (restore_brats, CACHE, f"--postprocess {steps}", "--input, but for seeds and flip")
        for steps in ("median=3", "seeds=2,flip,signed")
    ],
    *[
        (export, (*EXPORTED, "--as", "run"), option, "--as savedmodel")
        for option in ("--precision bfloat16", "--solver huber", "--steps 3", "--verify")
    ],
    (export, EXPORTED, "--align none", "--as run"),
    (train_gmvae, (*TRAINING, "--model", "vae"), "--clusters 12", "--model gmvae"),
    (phantom, HEALTHY_ONLY, "--lesions ms", "--patients"),
    *[
        (benchmark, ["metrics"], option, wanted)
        for option, wanted in (
            ("--model run", "solver"),
            ("--cache c.h5", "solver"),
            ("--jobs 77", "preprocess"),
            ("--size 38 42", "restore or train"),
            ("--force", "--out"),
        )
    ],
    (benchmark, ["restore"], "--voxels 1000", "metrics"),
    *[
        (compare_tf1, SLICES, option, "--cache")
        for option in ("--labels l.h5", "--crop 0 38 0 42", "--tf1-statistics LGsta.npy")
    ],
    *[(compare_tf1, NUMBERS, option, "--restored") for option in ("--cache c.h5", "--out o.json")],
    (compare_tf1, SLICES, "--force", "--out"),
    (twins, ("--input", "cohort"), "--force", "--out"),
    (finder, (*FINDER, "train"), "--jobs 2", "--stages paint"),
    (finder, (*FINDER, "paint", "pack"), "--batch-size 2", "--stages train"),
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
