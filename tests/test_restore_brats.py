"""Restoring caches through the command line: the file, resuming, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import GOLDEN, small_config, write_cache

import restore_brats
from tf_lesion.caches import restore as caches_restore
from tf_lesion.caches.restored import RestoredReader, RestoredWriter
from tf_lesion.caches.slices import SliceCache
from tf_lesion.cli import restore as restore_command
from tf_lesion.cli.command import EXIT_INTERRUPTED
from tf_lesion.files import InputError
from tf_lesion.training.runs import Run
from tf_lesion.training.trainer import Trainer

STEPS = 12


@pytest.fixture(scope="module")
def run(cache_path, tmp_path_factory):
    """A run with untrained but saved weights."""
    run = Run(tmp_path_factory.mktemp("runs") / "run")
    config = small_config(restoration={"steps": STEPS, "gradient_clip": 20.0})
    with SliceCache(cache_path, "Train") as train, SliceCache(cache_path, "Test") as test:
        run.write(config, train)
        Trainer(run, config, train=train, test=test).save()
    return run.folder


def _restore(run, cache, out, *options):
    argv = ["--model", str(run), "--cache", str(cache), "--out", str(out)]
    return restore_brats.main([*argv, *map(str, options)])


def _read(path):
    with RestoredReader(path) as restored:
        return restored.read(range(len(restored)))


def test_restored_slices_are_written_as_the_released_code_does(run, cache_path, tmp_path):
    out = tmp_path / "restored.h5"
    assert _restore(run, cache_path, out, "--batch-size", 3) == 0
    with h5py.File(out) as file, SliceCache(cache_path) as cache:
        assert file["Restore"].shape == (7, 38, 42)
        observed, mask = cache.read(range(7)), cache.mask(range(7))
        restored = file["Restore"][:][..., None]
        assert file["done"][:].all()
        settings = json.loads(file.attrs["settings"])
    np.testing.assert_array_equal(restored[~mask], observed[~mask])
    assert (np.abs(restored - observed)[mask] > 0).mean() > 0.9
    assert settings["steps"] == STEPS
    assert settings["tv_weight"] == 1.8
    assert settings["model"] == "gmvae"


@pytest.mark.slow
def test_batch_size_does_not_change_the_images(run, cache_path, tmp_path):
    for size in (1, 3, 7):
        assert _restore(run, cache_path, tmp_path / f"{size}.h5", "--batch-size", size) == 0
    reference = _read(tmp_path / "7.h5")
    for size in (1, 3):
        np.testing.assert_array_equal(_read(tmp_path / f"{size}.h5"), reference)


@pytest.mark.slow
def test_an_interrupted_restoration_goes_on_and_ends_with_the_same_images(
    run, cache_path, tmp_path, monkeypatch
):
    assert _restore(run, cache_path, tmp_path / "whole.h5", "--batch-size", 2) == 0
    real, calls = caches_restore.restore, []

    def interrupted(*args, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **options)

    out = tmp_path / "killed.h5"
    monkeypatch.setattr(caches_restore, "restore", interrupted)
    assert _restore(run, cache_path, out, "--batch-size", 2) == EXIT_INTERRUPTED
    assert not out.exists()
    with h5py.File(tmp_path / "killed.h5.partial") as file:
        assert file["done"][:].tolist() == [1, 1, 1, 1, 0, 0, 0]
    monkeypatch.setattr(caches_restore, "restore", real)
    assert _restore(run, cache_path, out, "--batch-size", 5) == 0
    np.testing.assert_array_equal(_read(out), _read(tmp_path / "whole.h5"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.h5", "whole.h5"]


def test_a_partial_file_of_other_settings_is_not_mixed_in(run, cache_path, tmp_path, capsys):
    out = tmp_path / "r.h5"
    with RestoredWriter(out, rows=[0, 1], shape=(38, 42), settings={"other": 1}):
        pass
    assert _restore(run, cache_path, out) == 2
    assert "was begun with other settings" in capsys.readouterr().err
    assert _restore(run, cache_path, out, "--force") == 0


@pytest.mark.slow
def test_trajectory_and_subset_are_stored(run, cache_path, tmp_path):
    out = tmp_path / "r.h5"
    assert _restore(run, cache_path, out, "--save-every", 5, "--max-slices", 4) == 0
    with RestoredReader(out) as restored:
        assert restored.trajectory_steps == [5, 10]
        assert len(restored) == 4
        assert (np.diff(restored.rows) > 0).all()
        rows, kept = restored.rows, restored.read([0, 3])
        early = restored.read([0, 3], "Trajectory/5")
    assert np.abs(early - kept).max() > 0
    assert _restore(run, cache_path, tmp_path / "all.h5") == 0
    np.testing.assert_array_equal(kept, _read(tmp_path / "all.h5")[rows[[0, 3]]])


def test_a_tf1_checkpoint_restores_a_cache_in_the_released_layout(tmp_path):
    path = tmp_path / "BraTSLGG_data.hdf5"
    slices = np.zeros((2, 197, 233))
    slices[:, 60:140, 60:180] = np.random.default_rng(0).uniform(0.3, 0.6, (2, 80, 120))
    with h5py.File(path, "w") as file:
        file["Test"], file["Mask"] = slices, slices > 0
    out = tmp_path / "restored_images.hdf5"
    assert _restore(GOLDEN / "gmvae_k6_ckpt", path, out, "--steps", 2) == 0
    with h5py.File(out) as file:
        assert file["Restore"].shape == (2, 158, 198)
        changed = file["Restore"][:] != slices[:, 22:180, 17:215].astype(np.float32)
    inside = slices[:, 22:180, 17:215] > 0
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tv-weight", -1), "a tv_weight of 0 or more, got -1"),
        (("--steps", -1), "steps of 0 or more, got -1"),
        (("--postprocess", "auto"), "--postprocess auto: .* has no calibration"),
        (("--postprocess", "sharp"), "got 'sharp'"),
        (("--calibration", "none.h5"), "No calibration at none.h5"),
        (("--pattern", "*.nii"), "Expected --pattern only with --input"),
        (("--crop", 0, 34, 0, 42), "restores 38 x 42 slices.*has 34 x 42"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    run, cache_path, tmp_path, capsys, options, message
):
    assert _restore(run, cache_path, tmp_path / "r.h5", *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_healthy_cache_without_masks_uses_the_intensity(run, tmp_path):
    path = tmp_path / "c.h5"
    source = write_cache(tmp_path / "source.h5")
    with h5py.File(source) as file, h5py.File(path, "w") as copy:
        copy["Test"] = file["Test"][:]
    assert _restore(run, path, tmp_path / "a.h5") == 0
    assert _restore(run, source, tmp_path / "b.h5") == 0
    np.testing.assert_array_equal(_read(tmp_path / "a.h5"), _read(tmp_path / "b.h5"))


def test_an_existing_result_is_kept_without_force(run, cache_path, tmp_path, capsys):
    out = tmp_path / "r.h5"
    out.write_text("precious")
    assert _restore(run, cache_path, out) == 2
    assert "pass --force" in capsys.readouterr().err
    assert out.read_text() == "precious"


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_no_result(run, cache_path, tmp_path):
    """A file size limit stands in for the full disk; it needs a process of its own."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "import restore_brats; sys.exit(restore_brats.main(sys.argv[1:]))"
    )
    out = tmp_path / "r.h5"
    command = [sys.executable, "-c", program, "--model", str(run), "--cache", str(cache_path)]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=Path(restore_brats.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "error:" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_names_without_a_suffix_and_half_a_shard_beside_them_are_merged(run, cache_path, tmp_path):
    out = tmp_path / "restored"
    for number in (1, 2):
        assert _restore(run, cache_path, out, "--shard", f"{number}/2", "--steps", 1) == 0
    (tmp_path / "restored.shard-1-of-3.partial").touch()
    assert restore_brats.main(["--merge", "--out", str(out)]) == 0
    assert len(_read(out)) == 7


def test_a_kill_before_the_last_rename_costs_nothing(run, cache_path, tmp_path, monkeypatch):
    out, partial = tmp_path / "r.h5", tmp_path / "r.h5.partial"
    assert _restore(run, cache_path, out) == 0
    expected = _read(out)
    out.rename(partial)
    with monkeypatch.context() as patch:
        patch.setattr(caches_restore, "restore", None)  # nothing is restored again
        assert _restore(run, cache_path, out) == 0
    np.testing.assert_array_equal(_read(out), expected)
    with h5py.File(out, "r+") as file:
        file["done"][3:5] = 0
    with pytest.raises(InputError, match=r"r\.h5: 2 of 7 slices are not restored yet"):
        RestoredReader(out)


@pytest.mark.parametrize("left", [b"", b"not HDF5", None])
def test_what_a_kill_left_of_another_version_is_one_line(run, cache_path, tmp_path, capsys, left):
    partial = tmp_path / "r.h5.partial"
    if left is None:
        h5py.File(partial, "w").close()
    else:
        partial.write_bytes(left)
    assert _restore(run, cache_path, tmp_path / "r.h5") == 2
    assert re.search("start over with --force|--force, which starts over", capsys.readouterr().err)
    assert _restore(run, cache_path, tmp_path / "r.h5", "--force", "--steps", 1) == 0


def test_a_file_that_another_process_writes_is_said_to_be_in_use(run, cache_path, tmp_path, capsys):
    program = (
        "import h5py, sys; f = h5py.File(sys.argv[1], 'a'); print('held', flush=True); input()"
    )
    cache, out = write_cache(tmp_path / "c.h5"), tmp_path / "r.h5"
    with RestoredWriter(out, rows=[0], shape=(38, 42), settings={}):
        pass
    for held, given in ((cache, cache), (tmp_path / "r.h5.partial", cache_path)):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(held)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as holder:
            assert holder.stdout.readline() == "held\n"
            assert _restore(run, given, out) == 2
            assert f"{held} is in use by another process" in capsys.readouterr().err
            holder.stdin.write("\n")


@pytest.mark.slow
def test_three_shards_merged_are_the_cache_restored_at_once(run, cache_path, tmp_path):
    whole, merged = tmp_path / "whole.h5", tmp_path / "merged.h5"
    assert _restore(run, cache_path, whole, "--save-every", 6) == 0
    for number in (3, 1, 2):
        options = ("--save-every", 6, "--shard", f"{number}/3")
        assert _restore(run, cache_path, merged, *options) == 0
    assert not merged.exists()
    assert restore_brats.main(["--merge", "--out", str(merged)]) == 0
    with h5py.File(whole) as expected, h5py.File(merged) as found:
        assert json.loads(found.attrs["settings"]) == json.loads(expected.attrs["settings"])
        for name in ("Restore", "rows", "Trajectory/6", "Trajectory/12"):
            np.testing.assert_array_equal(found[name][:], expected[name][:])


def test_merging_asks_for_every_shard_and_for_equal_settings(run, cache_path, tmp_path, capsys):
    out = tmp_path / "merged.h5"
    merge = ["--merge", "--out", str(out)]
    assert restore_brats.main(merge) == 2
    assert "Expected the shards of" in capsys.readouterr().err
    capsys.readouterr()
    assert _restore(run, cache_path, out, "--shard", "1/2") == 0
    path = tmp_path / "merged.shard-1-of-2.h5"
    assert f"slices: {path}\n" in capsys.readouterr().out
    assert path.exists()
    assert restore_brats.main(merge) == 2
    assert re.search(r"Not restored yet: .*shard-2-of-2", capsys.readouterr().err)
    assert _restore(run, cache_path, out, "--shard", "2/2", "--tv-weight", "0.5") == 0
    assert restore_brats.main(merge) == 2
    assert "(tv_weight)" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("shard", ["0/3", "4/3", "x", "2"])
def test_a_shard_that_is_none_is_refused(run, cache_path, tmp_path, shard):
    with pytest.raises(SystemExit, match="2"):
        _restore(run, cache_path, tmp_path / "out.h5", "--shard", shard)


@pytest.mark.parametrize("flag", ["--batch-size", "--max-slices", "--save-every", "--slice-step"])
def test_zero_is_refused_where_it_counts_something(run, cache_path, tmp_path, capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        _restore(run, cache_path, tmp_path / "out.h5", flag, 0)
    said = f"argument {flag}: expected a whole number of 1 or more, got 0"
    assert said in capsys.readouterr().err


def test_the_options_of_before_are_all_there():
    known = restore_command.parser().format_help()
    for flag in (
        *("--model", "--cache", "--merge", "--input", "--out", "--bids-out", "--mask", "--pattern"),
        *("--mask-pattern", "--seg-pattern", "--align", "--tv-weight", "--thresholds", "--steps"),
        *("--postprocess", "--solver", "--save-every", "--shard", "--max-slices", "--slice-step"),
        *("--crop", "--batch-size", "--precision", "--seed", "--force"),
    ):
        assert f"{flag} " in known or f"{flag}]" in known, flag
