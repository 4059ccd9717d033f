"""Lambda and thresholds from healthy slices, and the lesion maps made with them."""

import json
import shutil

import h5py
import numpy as np
import pytest
from conftest import make_run
from tf_lesion.choices import read_lambda, restoration_of

import restore_brats
from eval import select_lambda, sweep, thresholds
from eval.select_lambda import measure_change
from eval.sweep import Kept, parse_grid
from eval.thresholds import load_thresholds, smallest_threshold
from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import SliceCache
from tf_lesion.evaluation.metrics import Curve, area
from tf_lesion.files import InputError
from tf_lesion.restoration import Restorer
from tf_lesion.training.runs import load

STEPS = 6


@pytest.fixture(scope="module")
def run(cache_path, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "gmvae", cache_path, restoration_steps=STEPS)


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run, to which files may be added."""
    return shutil.copytree(run, tmp_path / "run")


def choose(run, cache, *extra):
    argv = ["--model", run, "--cache", cache, "--grid", "0.6,1.8", *extra]
    return select_lambda.main(list(map(str, argv)))


def restore(run, cache, out, *extra):
    argv = ["--model", run, "--cache", cache, "--out", out, *extra]
    return restore_brats.main(list(map(str, argv)))


# Lambda ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("0:4:0.2", [round(0.2 * n, 10) for n in range(20)]),
        ("0.6:4.0:0.2", [round(0.6 + 0.2 * n, 10) for n in range(17)]),
        ("1.8", [1.8]),
        ("0,3,1.5", [0, 3, 1.5]),
    ],
)
def test_grid_is_read_as_the_released_one(text, grid):
    assert parse_grid(text) == grid


@pytest.mark.parametrize("text", ["", "a", "1:2", "0:1:0", "-1,2", "nan", "2:1:0.5", "1,1", "inf"])
def test_a_grid_that_is_none_is_refused(text):
    with pytest.raises(InputError, match=r"lambda|grid"):
        parse_grid(text)


def test_change_is_a_mean_over_subjects_and_a_mean_over_voxels():
    ones = np.ones((3, 2, 2), np.float32)
    mask = ones.astype(bool)
    mask[2, 0, 0] = False  # outside the brain: not counted
    batches = [
        (np.array([0, 1]), 2 * ones[:2], ones[:2], mask[:2]),
        (np.array([2]), 3 * ones[2:], ones[2:], mask[2:]),
    ]
    change = measure_change(batches, np.array([0, 0, 1]))
    assert change["change_per_subject"] == (8 + 6) / 2
    assert change["std_per_subject"] == 1
    assert change["change_per_voxel"] == (8 + 6) / 11


def test_chosen_lambda_changes_healthy_slices_least(run, cache_path, tmp_path, capsys):
    out = tmp_path / "lambda.json"
    assert choose(run, cache_path, "--out", out) == 0
    stored = json.loads(out.read_text())
    curve = {row["tv_weight"]: row["change_per_subject"] for row in stored["curve"]}
    assert list(curve) == [0.6, 1.8]
    assert stored["tv_weight"] == min(curve, key=curve.get)
    assert stored["at_end_of_grid"]
    assert "wider --grid" in capsys.readouterr().out
    assert stored["model_identity"] == load(run).identity
    assert stored["cohort"]["subjects"] == 2
    assert {"seed", "steps", "commit", "tf_lesion_version"} <= set(stored)
    assert not list(tmp_path.glob("*partial*"))


def test_curve_is_that_of_restored_files(run, cache_path, tmp_path):
    out = tmp_path / "lambda.json"
    assert choose(run, cache_path, "--out", out, "--batch-size", 3) == 0
    for row in json.loads(out.read_text())["curve"]:
        path = tmp_path / f"{row['tv_weight']}.h5"
        assert restore(run, cache_path, path, "--tv-weight", row["tv_weight"]) == 0
        with RestoredReader(path) as reader, SliceCache(cache_path) as cache:
            rows = np.arange(len(cache))
            change = np.abs(cache.read(rows) - reader.read(rows)).sum(axis=(1, 2, 3))
            subject = cache.index.subject
        sums = [change[subject == number].sum() for number in np.unique(subject)]
        assert row["change_per_subject"] == pytest.approx(np.mean(sums), rel=1e-4)


def test_a_killed_choice_goes_on_with_the_next_lambda(run, cache_path, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.json", tmp_path / "lambda.json"
    assert choose(run, cache_path, "--out", whole) == 0
    measured = []

    def killed(batches, subject_of_row):
        if measured:
            raise KeyboardInterrupt
        measured.append(measure_change(batches, subject_of_row))
        return measured[0]

    monkeypatch.setattr(select_lambda, "measure_change", killed)
    with pytest.raises(KeyboardInterrupt):
        choose(run, cache_path, "--out", out)
    assert not out.exists()
    assert (tmp_path / "lambda.partial.json").exists()
    again = []
    monkeypatch.setattr(
        select_lambda, "measure_change", lambda *given: again.append(1) or measure_change(*given)
    )
    assert choose(run, cache_path, "--out", out) == 0
    assert len(again) == 1
    assert out.read_text() == whole.read_text()
    assert not (tmp_path / "lambda.partial.json").exists()


def test_what_was_begun_with_other_settings_is_not_gone_on_with(run, cache_path, tmp_path, capsys):
    partial = tmp_path / "lambda.partial.json"
    Kept(partial, {"other": 1}).add("0.6", {})
    assert choose(run, cache_path, "--out", tmp_path / "lambda.json") == 2
    assert "begun with other settings" in capsys.readouterr().err
    assert choose(run, cache_path, "--out", tmp_path / "lambda.json", "--force") == 0


def test_a_subset_of_the_slices_is_drawn_by_the_seed(run, cache_path, tmp_path):
    def curve(seed):
        out = tmp_path / f"{seed}.json"
        choose(run, cache_path, "--out", out, "--max-slices", 3, "--seed", seed)
        stored = json.loads(out.read_text())
        assert stored["cohort"]["slices"] == 3
        out.unlink()
        return stored["curve"]

    assert curve(1) == curve(1) != curve(2)


def test_auto_takes_the_lambda_chosen_for_the_run(copied, cache_path, tmp_path, capsys):
    out = tmp_path / "restored.h5"
    assert restore(copied, cache_path, out, "--tv-weight", "auto") == 2
    assert "eval.select_lambda --model" in capsys.readouterr().err
    assert choose(copied, cache_path, "--grid", "0.7,1.1") == 0
    chosen = json.loads((copied / "lambda.json").read_text())["tv_weight"]
    assert restore(copied, cache_path, out, "--tv-weight", "auto") == 0
    with RestoredReader(out) as reader:
        assert reader.settings["tv_weight"] == chosen


def test_lambda_of_another_model_is_refused(copied, cache_path):
    assert choose(copied, cache_path) == 0
    path = copied / "lambda.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_identity": "other"}))
    with pytest.raises(InputError, match="chosen for model other"):
        read_lambda(load(copied))
    path.write_text("[]")
    with pytest.raises(InputError, match=r"choice of lambda in .*lambda.json"):
        read_lambda(load(copied))


@pytest.mark.parametrize("given", ["automatic", "-1", "nan"])
def test_a_lambda_that_is_none_is_refused(run, given):
    with pytest.raises(InputError, match="--tv-weight"):
        restoration_of(load(run), tv_weight=given)


def test_existing_choice_is_kept_without_force(copied, cache_path, capsys):
    (copied / "lambda.json").write_text("mine")
    assert choose(copied, cache_path) == 2
    assert "--force" in capsys.readouterr().err
    assert (copied / "lambda.json").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--max-slices", "--batch-size"])
def test_zero_slices_are_refused(run, cache_path, tmp_path, flag, capsys):
    assert choose(run, cache_path, "--out", tmp_path / "l.json", flag, 0) == 2
    assert f"{flag} 1 or more" in capsys.readouterr().err


def test_auc_by_lambda_is_that_of_the_restored_file(run, cache_path, tmp_path):
    loaded = load(run)
    restorer = Restorer(loaded.model, loaded.config.restoration)
    (found,) = sweep.auc_by_lambda(restorer, [{"path": cache_path}], [0.6], batch_size=4)
    out = tmp_path / "restored.h5"
    assert restore(run, cache_path, out, "--tv-weight", 0.6) == 0
    with RestoredReader(out) as reader, SliceCache(cache_path) as cache:
        rows = np.arange(len(cache))
        residual, mask = np.abs(cache.read(rows) - reader.read(rows)), cache.mask(rows)
        expected = area(Curve.from_scores(residual[mask], cache.label(rows)[mask]))
    assert found == pytest.approx(expected, abs=1e-4)


# Thresholds and lesion maps -------------------------------------------------------------------


def find(run, cache, out, *extra):
    return thresholds.main(list(map(str, ["--model", run, "--cache", cache, "--out", out, *extra])))


def test_thresholds_restore_healthy_slices_once_and_reuse_them(run, cache_path, tmp_path, capsys):
    out = tmp_path / "thresholds.json"
    assert find(run, cache_path, out, "--tv-weight", 0.6) == 0
    assert "Restored healthy" in capsys.readouterr().out
    first, restored = out.read_text(), tmp_path / "thresholds.healthy.h5"
    with RestoredReader(restored) as reader, SliceCache(cache_path) as cache:
        rows = np.arange(len(cache))
        residual = np.abs(cache.read(rows) - reader.read(rows))[cache.read(rows) > 0]
    stored = load_thresholds(out, model_id=load(run).identity, restoration={"tv_weight": 0.6})
    for point in stored.points["residual"]:
        assert point.threshold == smallest_threshold(residual, point.target_fpr)
    out.unlink()
    changed = restored.stat().st_mtime_ns
    assert find(run, cache_path, out, "--tv-weight", 0.6) == 0
    assert "Reused healthy" in capsys.readouterr().out
    assert restored.stat().st_mtime_ns == changed
    assert out.read_text() == first


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--tv-weight", 3), "restored with tv_weight 1.8, not 3.0"),
        (("--steps", 2), "restored with steps 6, not 2"),
        (("--seed", 4), "restored with seed 0, not 4"),
        (("--max-slices", 2), "holds 7 slices that are not the 2"),
    ],
)
def test_healthy_slices_restored_otherwise_are_not_reused(
    run, cache_path, tmp_path, capsys, extra, message
):
    out, restored = tmp_path / "thresholds.json", tmp_path / "mine.h5"
    assert restore(run, cache_path, restored) == 0
    assert find(run, cache_path, out, "--restored", restored, *extra) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_thresholds_need_a_model_or_restored_slices(cache_path, tmp_path, capsys):
    out = str(tmp_path / "thresholds.json")
    assert thresholds.main(["--cache", str(cache_path), "--out", out]) == 2
    assert "Expected --model" in capsys.readouterr().err
    restored = ["--restored", "restored.h5", "--tv-weight", "1"]
    assert thresholds.main(["--cache", str(cache_path), "--out", out, *restored]) == 2
    assert "--tv-weight needs --model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def detected(run, cache_path, tmp_path_factory):
    """(thresholds file, restored file with lesion maps)."""
    folder = tmp_path_factory.mktemp("detected")
    assert find(run, cache_path, folder / "thresholds.json") == 0
    extra = ("--thresholds", folder / "thresholds.json", "--batch-size", 3)
    assert restore(run, cache_path, folder / "restored.h5", *extra) == 0
    return folder / "thresholds.json", folder / "restored.h5"


def test_lesion_maps_are_the_residual_above_the_threshold_in_the_brain(detected, cache_path):
    stored = load_thresholds(detected[0])
    with RestoredReader(detected[1]) as reader, SliceCache(cache_path) as cache:
        rows = np.arange(len(cache))
        assert reader.detections == ["fpr_0.01", "fpr_0.05", "fpr_0.1"]
        residual = np.abs(cache.read(rows) - reader.read(rows))
        for name, point in zip(reader.detections, stored.points["residual"], strict=True):
            expected = (residual > point.threshold) & cache.mask(rows)
            assert expected.any()
            np.testing.assert_array_equal(reader.read_detection(name, rows), expected)
            assert reader.settings["thresholds"][name] == point.threshold


def test_lesion_maps_open_with_plain_h5py(detected, cache_path):
    with h5py.File(detected[1]) as file:
        stored = file["Detection/fpr_0.05"]
        assert stored.shape == file["Restore"].shape
        assert stored.dtype == np.uint8
        assert set(np.unique(stored[:])) == {0, 1}


def test_a_file_without_lesion_maps_says_so(run, cache_path, tmp_path):
    assert restore(run, cache_path, tmp_path / "restored.h5") == 0
    with RestoredReader(tmp_path / "restored.h5") as reader:
        assert reader.detections == []


@pytest.mark.parametrize("extra", [("--tv-weight", 3), ("--steps", 2)])
def test_thresholds_of_another_restoration_are_refused(
    run, cache_path, detected, tmp_path, capsys, extra
):
    out = tmp_path / "restored.h5"
    assert restore(run, cache_path, out, "--thresholds", detected[0], *extra) == 2
    assert "false positive rates hold only there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_thresholds_of_another_model_are_refused_before_restoring(
    run, cache_path, detected, tmp_path, capsys
):
    other = tmp_path / "thresholds.json"
    other.write_text(json.dumps(json.loads(detected[0].read_text()) | {"model_id": "other"}))
    out = tmp_path / "restored.h5"
    assert restore(run, cache_path, out, "--thresholds", other) == 2
    assert "belongs to model other" in capsys.readouterr().err
    assert not out.exists()
