"""Post-processing: every step does what it says, and the commands carry it through."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import make_run
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter1d

import restore_brats
from preprocessing import brats, camcan
from preprocessing.phantom import PATIENT
from preprocessing.phantom.__main__ import subject_files, write_cohort
from tf_lesion.caches.slices import SliceCache
from tf_lesion.calibration import Calibration
from tf_lesion.cli import calibrate, evaluate
from tf_lesion.config import RestorationConfig
from tf_lesion.detection.postprocessing import (
    LEAST_BRIGHTNESS,
    MIRROR_LEAST,
    MIRROR_SMOOTHING_MM,
    RELATIVE_FLOOR,
    HealthyMaps,
    HealthyResidual,
    Postprocessing,
    anomaly_score,
    axes_mm,
    own_level,
)
from tf_lesion.files import InputError
from tf_lesion.prior import load
from tf_lesion.restoration import Restorer, restore
from tf_lesion.scans.volumes import MniGrid

VOXEL_MM = 4
MIDLINE_MM = 98.5  # from the left edge of the grid of 1 mm
STEPS = "seeds=2,flip,normalize,signed,median=3,erode=1"


def _volume(*, dark, bright):
    """Observed, restored and mask [5, 20, 20] of a flat brain with a dark and a bright cube."""
    mask = np.zeros((5, 20, 20), bool)
    mask[:, 2:18, 2:18] = True
    restored = np.where(mask, 0.5, 0).astype(np.float32)
    observed = restored.copy()
    observed[1:4, 4:8, 4:8] -= dark
    observed[1:4, 10:14, 10:14] += bright
    return observed, restored, mask


# The steps --------------------------------------------------------------------------------------


def test_steps_are_read_and_written_in_one_notation():
    steps = Postprocessing.parse(STEPS)
    assert steps == Postprocessing(
        seeds=2, flip=True, normalize=True, signed=True, median=3, erode=1
    )
    assert str(steps) == STEPS
    assert Postprocessing.parse("") == Postprocessing.parse("none") == Postprocessing()
    assert Postprocessing.parse(str(Postprocessing(median=5))) == Postprocessing(median=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blur", "got 'blur'"),
        ("median", "got 'median'"),
        ("signed=2", "got 'signed=2'"),
        ("erode=-1", "got 'erode=-1'"),
        ("median=2", "odd median, got 2"),
        ("seeds=0", "seeds of 1 or more"),
        ("normalize,relative", "normalize or relative"),
    ],
)
def test_steps_that_make_no_sense_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        Postprocessing.parse(text)


def test_without_steps_the_score_is_the_residual():
    images = _volume(dark=0.2, bright=0.3)
    score = anomaly_score(*images, settings=Postprocessing())
    np.testing.assert_array_equal(score, np.abs(images[0] - images[1]) * images[2])


def test_signed_keeps_what_is_bright_and_drops_what_is_dark():
    score = anomaly_score(*_volume(dark=0.2, bright=0.3), settings=Postprocessing(signed=True))
    assert score[2, 5, 5] == 0
    assert score[2, 11, 11] == pytest.approx(0.3, abs=1e-6)


def test_median_takes_out_a_speck_and_keeps_a_lesion():
    observed, restored, mask = _volume(dark=0, bright=0.3)
    observed[2, 5, 15] += 0.4
    score = anomaly_score(observed, restored, mask, settings=Postprocessing(median=3))
    assert score[2, 5, 15] == 0
    assert score[2, 11, 11] == pytest.approx(0.3, abs=1e-6)


def test_erode_clears_the_edge_of_every_slice_and_no_more():
    observed, restored, mask = _volume(dark=0, bright=0)
    score = anomaly_score(observed + 0.1 * mask, restored, mask, settings=Postprocessing(erode=2))
    inner = np.zeros_like(mask)
    inner[:, 4:16, 4:16] = True  # the first and the last slice too
    np.testing.assert_array_equal(score > 0, inner)


def test_normalize_measures_in_healthy_standard_deviations():
    images = _volume(dark=0.2, bright=0.3)
    shape = images[0].shape
    maps = HealthyMaps(*(np.full(shape, value) for value in (0.1, 0.15, np.hypot(0.1, 0.05))))
    score = anomaly_score(
        *images, settings=Postprocessing(normalize=True, signed=True), healthy=maps
    )
    assert score[2, 11, 11] == pytest.approx((0.3 - 0.1) / 0.05, rel=1e-5)
    assert score[2, 5, 5] == 0


def test_smooth_is_a_gaussian_within_the_brain_and_goes_by_position():
    rng = np.random.default_rng(0)
    score = rng.random((5, 24, 20)).astype(np.float32)
    mask = np.ones(score.shape, bool)
    mask[:, :6] = False
    z = np.array([0, 2, 4, 6, 30.0])  # the last slice lies apart
    axes = (np.arange(24) * 2.0, np.arange(20) * 2.0, z)
    found = anomaly_score(
        score, np.zeros_like(score), mask, settings=Postprocessing(smooth=4), axes=axes
    )
    assert not found[:, :6].any()
    alone = anomaly_score(
        score[4:],
        np.zeros_like(score[4:]),
        mask[4:],
        settings=Postprocessing(smooth=4),
        axes=(*axes[:2], z[4:]),
    )
    np.testing.assert_allclose(found[4], alone[0], rtol=1e-5)
    places = np.stack(np.meshgrid(z, axes[0], axes[1], indexing="ij"), axis=-1)
    weights = mask * np.exp(-0.5 * ((places - places[1, 12, 10]) ** 2).sum(axis=-1) / 4.0**2)
    expected = (weights * score).sum() / weights.sum()
    assert found[1, 12, 10] == pytest.approx(expected, rel=2e-3)


def test_smooth_keeps_a_constant_up_to_the_edge_of_the_brain():
    _, restored, mask = _volume(dark=0, bright=0)
    axes = axes_mm((20, 20, len(mask)), 1.0)
    score = anomaly_score(
        restored + 0.1 * mask, restored, mask, settings=Postprocessing(smooth=3), axes=axes
    )
    np.testing.assert_allclose(score, 0.1 * mask, rtol=1e-4)


def test_support_adds_the_geometric_mean_with_what_lies_around():
    rng = np.random.default_rng(0)
    score = rng.random((5, 24, 20)).astype(np.float32)
    mask = np.ones(score.shape, bool)
    mask[:, :6] = False
    axes = axes_mm((24, 20, 5), 2.0)
    smooth, found = (
        anomaly_score(
            score, 0 * score, mask, settings=Postprocessing.parse(f"signed,{step}"), axes=axes
        )
        for step in ("smooth=8", "support=8")
    )
    np.testing.assert_allclose(found, mask * (score + np.sqrt(score * smooth)), rtol=1e-5)


def test_relative_divides_by_what_the_other_side_and_healthy_brains_show():
    shape = (3, 60, 60)
    mask = np.ones(shape, bool)
    x = np.arange(60) + MIDLINE_MM - 30 + 0.5  # the midline lies in the middle
    change = np.full(shape, 0.1)
    change[:, 40:] = 0.3  # bright on the right side alone
    usual = np.full(shape, 0.2)
    score = anomaly_score(
        change,
        np.zeros(shape),
        mask,
        settings=Postprocessing(relative=True, signed=True),
        healthy=HealthyMaps(usual, usual, usual),
        axes=(x, np.arange(60.0), np.arange(3.0)),
    )
    floor = RELATIVE_FLOOR
    assert score[1, 55, 30] == pytest.approx(0.3 / (0.5 * 0.1 + 0.5 * 0.2 + floor), rel=0.02)
    assert score[1, 4, 30] == pytest.approx(0.1 / (0.5 * 0.3 + 0.5 * 0.2 + floor), rel=0.02)


def test_contralateral_counts_more_what_is_brighter_than_its_mirror_image():
    """Both sides bright, the right one alone, and tissue as dark as most of the brain."""
    mask = np.ones((3, 60, 60), bool)
    x = np.arange(60) + MIDLINE_MM - 30 + 0.5  # the midline lies in the middle
    observed = np.full(mask.shape, 0.2, np.float32)
    observed[:, :, 45:] = 0.7
    observed[:, 30:, :20] = 0.5
    observed[1, 10, 30] = 5  # a speck
    found = anomaly_score(
        observed,
        observed - 0.1,
        mask,
        settings=Postprocessing(contralateral=True),
        axes=(x, np.arange(60.0), np.arange(3.0)),
    )
    alike, alone, dark = (found[1, 50, column] for column in (55, 3, 30))
    floor, least = RELATIVE_FLOOR, LEAST_BRIGHTNESS
    assert alike == pytest.approx(0.1 * np.cbrt(0.5 / (0.5 + floor) + least), rel=0.02)
    assert alone == pytest.approx(0.1 * np.cbrt(0.3 / floor + least), rel=0.02)
    assert dark == pytest.approx(0.1 * np.cbrt(least), rel=1e-4)
    assert found[1, 10, 30] == pytest.approx(dark, rel=1e-4)


@pytest.mark.parametrize("voxel_mm", [1.0, 1.5, 2.0, 3.0])
def test_relative_looks_at_the_place_that_the_affine_mirrors(voxel_mm):
    grid = MniGrid(voxel_mm)
    count = grid.shape[0]
    opposite = -apply_affine(grid.affine, np.eye(3)[[0]] * np.arange(count)[:, None])[:, 0]
    index = (opposite - grid.affine[0, 3]) / voxel_mm
    sides = np.random.default_rng(0).uniform(0.1, 0.3, count)
    seen = (index > -0.5) & (index < count - 0.5)
    there = np.interp(index, np.arange(count), sides)
    change = np.broadcast_to(sides[:, None], (1, count, 40)).copy()
    usual = np.zeros_like(change)
    score = anomaly_score(
        change,
        usual,
        np.ones_like(change, bool),
        settings=Postprocessing(relative=True, signed=True),
        healthy=HealthyMaps(usual, usual, usual),
        axes=axes_mm((count, 40, 1), voxel_mm),
    )
    sigma = MIRROR_SMOOTHING_MM / voxel_mm
    total, weight = (
        gaussian_filter1d(part, sigma, mode="constant")
        for part in (np.where(seen, there, 0), 1.0 * seen)
    )
    middle = slice(int(30 / voxel_mm), count - int(30 / voxel_mm))
    expected = sides / (0.5 * total / (weight + MIRROR_LEAST) + RELATIVE_FLOOR)
    np.testing.assert_allclose(score[0, middle, 20], expected[middle], rtol=0.03)


def test_relative_takes_the_healthy_maps_where_the_other_side_is_missing():
    shape = (1, 80, 80)
    mask = np.zeros(shape, bool)
    mask[:, 60:] = True
    x = np.arange(80) + MIDLINE_MM - 40 + 0.5
    usual = np.full(shape, 0.2)
    score = anomaly_score(
        np.full(shape, 0.3),
        np.zeros(shape),
        mask,
        settings=Postprocessing(relative=True, signed=True),
        healthy=HealthyMaps(usual, usual, usual),
        axes=(x, np.arange(80.0), np.arange(1.0)),
    )
    np.testing.assert_allclose(score[mask], 0.3 / (0.2 + RELATIVE_FLOOR), rtol=1e-4)


# Healthy maps -----------------------------------------------------------------------------------


def test_healthy_maps_find_the_place_that_always_changes(tmp_path):
    collected, axes = HealthyResidual((80, 80, 40)), axes_mm((80, 80, 40), 1.0)
    mask = np.zeros((40, 80, 80), bool)
    mask[5:35, 10:70, 10:70] = True
    rng = np.random.default_rng(0)
    for _ in range(4):
        restored = np.where(mask, 0.5, 0.0)
        observed = restored + 0.01 * rng.normal(size=mask.shape) * mask
        observed[10:30, 30:50, 20:40] += 0.2  # x 30 to 50, y 20 to 40
        collected.add(observed, restored, mask, axes)
    Calibration("m1", {}, healthy=collected.maps()).save(tmp_path / "calibration.h5")
    maps = Calibration.load(tmp_path / "calibration.h5").healthy.at(axes)
    assert maps.size.shape == mask.shape
    assert 0.1 < maps.size[20, 40, 30] < 0.2  # smoothed
    assert maps.size[20, 30, 60] < 0.05  # x and y exchanged would be the place above
    bright = np.full(mask.shape, 0.2)
    usual = maps.normalize(bright, signed=False)
    assert abs(usual[20, 40, 30]) < 1 < 1.2 < usual[20, 20, 60]


# Averages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Caches of phantoms at 4 mm, a run, and its restored healthy slices and patients."""
    folder = tmp_path_factory.mktemp("work")
    scans = folder / "scans"
    write_cohort(scans, healthy=3, patients=1, seed=3, voxel_size=VOXEL_MM)
    healthy, patients = folder / "healthy.h5", folder / "patients.h5"
    size = ["--voxel-size", str(VOXEL_MM)]
    argv = ["--input", str(scans / "healthy"), "--out", str(healthy), "--test-subjects", "2"]
    assert camcan.main([*argv, *size, "--align", "none"]) == 0
    argv = ["--input", str(scans / "patients"), "--out", str(patients)]
    assert brats.main([*argv, "--reference", str(healthy), "--align", "none"]) == 0
    with SliceCache(healthy, "Train") as train:
        shape = train.shape
    run = make_run(
        folder / "run", healthy, network=dict(zip(("height", "width"), shape, strict=True))
    )
    return {
        "folder": folder,
        "run": run,
        "healthy": healthy,
        "patients": patients,
        "scan": scans / subject_files(PATIENT, 0)[0],
    }


def test_a_score_in_multiples_of_its_own_level_is_the_same_whatever_the_prior_changes():
    rng = np.random.default_rng(3)
    mask = rng.random((9, 20, 22)) > 0.3
    change = 0.02 * rng.gamma(0.5, 1.0, mask.shape) * mask
    score = anomaly_score(
        change, np.zeros_like(change), mask, settings=Postprocessing(signed=True, scale=True)
    )
    stronger = anomaly_score(
        7 * change, np.zeros_like(change), mask, settings=Postprocessing(signed=True, scale=True)
    )
    np.testing.assert_allclose(stronger, score, rtol=1e-5)
    lower = np.sort(score[mask])[: int(0.8 * mask.sum())]
    assert lower.mean() == pytest.approx(1)
    assert Postprocessing.parse("signed,scale").unit == "multiples of the scan's own level"
    nothing = anomaly_score(0 * change, 0 * change, mask, settings=Postprocessing(scale=True))
    assert not nothing.any()


def test_a_lesion_of_a_twelfth_of_the_brain_leaves_the_level_nearly_as_it_is():
    rng = np.random.default_rng(4)
    mask = np.ones((12, 20, 22), bool)
    score = rng.gamma(0.5, 1.0, mask.shape)
    lesion = score.copy()
    lesion[:1] += 50
    healthy, with_lesion = own_level(score, mask), own_level(lesion, mask)
    assert healthy < with_lesion < 1.5 * healthy


@pytest.mark.slow
def test_the_average_is_the_mean_of_the_restorations(work):
    loaded = load(work["run"])
    plain = loaded.config.restoration
    with SliceCache(work["patients"]) as cache:
        rows = np.arange(4, 7)
        observed, mask = cache.read(rows), cache.mask(rows)
    once = [
        restore(Restorer(loaded.model, plain, seed=seed), observed, mask, rows)[0]
        for seed in (5, 6)
    ]
    both, _, kept = restore(
        Restorer(loaded.model, replace(plain, seeds=2), seed=5), observed, mask, rows, save_every=3
    )
    np.testing.assert_allclose(both, np.mean(once, axis=0), atol=1e-6)
    np.testing.assert_array_equal(kept[plain.steps], both)
    mirrored = restore(
        Restorer(loaded.model, plain, seed=5), observed[:, ::-1], mask[:, ::-1], rows
    )[0][:, ::-1]
    flipped = restore(
        Restorer(loaded.model, replace(plain, flip=True), seed=5), observed, mask, rows
    )[0]
    np.testing.assert_allclose(flipped, (once[0] + mirrored) / 2, atol=1e-6)
    assert np.abs(flipped - once[0]).max() > 0


def test_repeats_count_restorations_for_the_progress_bar():
    assert RestorationConfig().repeats == 1
    assert RestorationConfig(seeds=3, flip=True).repeats == 6


# The commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(work):
    """A calibration with post-processing, healthy maps included."""
    path = work["folder"] / "calibration.h5"
    argv = ["--model", str(work["run"]), "--cache", str(work["healthy"]), "--out", str(path)]
    assert calibrate.main([*argv, "--postprocess", STEPS]) == 0
    assert path.stat().st_size < 1e6
    return path


def test_a_scan_gets_a_score_and_masks_at_its_thresholds(work, ready, tmp_path):
    argv = ["--model", str(work["run"]), "--input", str(work["scan"]), "--align", "none"]
    argv += ["--calibration", str(ready), "--postprocess", STEPS]
    assert restore_brats.main([*argv, "--out", str(tmp_path)]) == 0
    (facts_path,) = tmp_path.glob("*_restoration.json")
    facts = json.loads(facts_path.read_text())
    assert facts["postprocessing"] == STEPS
    assert (facts["seeds"], facts["flip"]) == (2, True)
    read = {name: nib.load(tmp_path / file).get_fdata() for name, file in facts["files"].items()}
    assert read["score"].shape == nib.load(work["scan"]).shape
    assert read["score"].max() > 0
    point = Calibration.load(ready).points["score"][2]
    found = read["fpr_0.1"] > 0
    assert found.any()
    # Masks are cut on the grid of the model, then brought back: near the threshold they may part.
    assert read["score"][found].mean() > point.threshold > read["score"][~found].mean()


def test_thresholds_of_other_steps_are_refused(work, ready, tmp_path, capsys):
    argv = ["--model", str(work["run"]), "--input", str(work["scan"]), "--out", str(tmp_path)]
    other = [*argv, "--calibration", str(ready), "--postprocess", "seeds=2,flip,signed"]
    assert restore_brats.main(other) == 2
    assert "was made with postprocessing" in capsys.readouterr().err


def test_auto_takes_the_steps_that_come_with_the_model(work, ready):
    prior = replace(load(work["run"]), calibration=Calibration.load(ready))
    assert str(prior.calibration.steps()) == STEPS
    assert prior.calibrated().seeds == 2


@pytest.mark.slow
def test_patients_are_measured_with_every_step_alone_and_together(work, ready, tmp_path):
    restored = tmp_path / "restored.h5"
    argv = ["--model", str(work["run"]), "--cache", str(work["patients"]), "--out", str(restored)]
    assert restore_brats.main([*argv, "--postprocess", "seeds=2,flip"]) == 0
    argv = ["--restored", str(restored), "--cache", str(work["patients"])]
    argv += ["--calibration", str(ready)]
    steps = "normalize,signed,median=3,erode=1"
    out = tmp_path / "compared"
    assert evaluate.main([*argv, "--compare", steps, "--out", str(out)]) == 0
    rows = pd.read_csv(out / "scores.csv").set_index("score")
    alone = ["normalize", "signed", "median=3", "erode=1"]
    names = ["residual", "plain", *alone, steps, "intensity", "equalized"]
    assert list(rows.index) == names
    assert rows.loc["plain", "pooled_auc"] == rows.loc["residual", "pooled_auc"]
    argv += ["--postprocess", f"seeds=2,flip,{steps}", "--out", str(tmp_path / "one")]
    assert evaluate.main(argv) == 0
    scores = json.loads((tmp_path / "one" / "metrics.json").read_text())["scores"]
    assert scores["score"]["threshold_dsc5"] == Calibration.load(ready).points["score"][1].threshold
    for name, row in (("residual", "plain"), ("score", steps), ("equalized", "equalized")):
        for number in ("pooled_auc", "pooled_auprc", "mean_auc", "mean_auprc"):
            assert rows.loc[row, number] == pytest.approx(scores[name][number])


def test_averages_that_were_not_restored_are_refused(work, tmp_path, capsys):
    restored = tmp_path / "restored.h5"
    argv = ["--model", str(work["run"]), "--cache", str(work["patients"]), "--out", str(restored)]
    assert restore_brats.main(argv) == 0
    argv = ["--restored", str(restored), "--cache", str(work["patients"])]
    argv += ["--out", str(tmp_path / "out"), "--postprocess", "seeds=4"]
    assert evaluate.main(argv) == 2
    assert "was restored with seeds 1, the post-processing asks for 4" in capsys.readouterr().err
