"""The evaluation of restored slices, from the files to the table and the picture."""

import json

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import count_at
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from sklearn.metrics import average_precision_score, roc_auc_score

from tf_lesion.caches.slices import CacheWriter
from tf_lesion.calibration import Calibration, Threshold
from tf_lesion.cli.evaluate import main
from tf_lesion.evaluation import metrics, plots
from tf_lesion.evaluation.measure import measure
from tf_lesion.evaluation.scans import Cohort, from_cache, largest_lesions
from tf_lesion.files import InputError

SHAPE = (38, 42)
SLICES = 4
EXACT = 1e-12
SETTINGS = {"model_identity": "m1", "tv_weight": 1.8, "steps": 500}


def brain():
    mask = np.zeros(SHAPE, bool)
    mask[4:-4, 5:-5] = True
    return mask


def made_up(seed, *, lesion=True, subjects=3, slices=SLICES):
    """Observed, restored [subjects, slices, H, W] and labels; lesions shine a little."""
    generator = np.random.default_rng(seed)
    restored = generator.uniform(0.3, 0.6, (subjects, slices, *SHAPE)) * brain()
    label = np.zeros(restored.shape, bool)
    for subject in range(subjects if lesion else 0):
        label[subject, 1:3, 8 + 4 * subject : 16 + 4 * subject, 10:18] = True
    noise = generator.normal(0, 0.1, restored.shape)
    observed = np.clip(restored + noise + 0.15 * label, 1e-3, 1) * brain()
    return observed.astype(np.float32), restored.astype(np.float32), label


def write(
    folder, name, observed, restored, label, *, rows=None, settings=SETTINGS, extra=(), step=1
):
    """A cache and its restored slices; returns their paths."""
    cache, result = folder / f"{name}.h5", folder / f"{name}_restored.h5"
    with CacheWriter(cache, slice_shape=SHAPE, crop=(0, SHAPE[0], 0, SHAPE[1])) as writer:
        for number, images in enumerate(observed):
            writer.append(
                "Test",
                images,
                subject_id=f"s{number}",
                slice_index=range(0, step * len(images), step),
                mask=np.broadcast_to(brain(), images.shape),
                label=None if label is None else label[number],
            )
    flat = restored.reshape(-1, *SHAPE)
    rows = np.arange(len(flat)) if rows is None else np.asarray(rows)
    with h5py.File(result, "w") as file:
        file["Restore"], file["rows"] = flat[rows], rows
        file.attrs["settings"] = json.dumps(settings)
        for step, images in extra:
            file[f"Trajectory/{step}"] = images.reshape(-1, *SHAPE)[rows]
    return cache, result


def save_calibration(path, **changed):
    points = (Threshold(0.01, 0.3, 0.009), Threshold(0.05, 0.2, 0.05), Threshold(0.1, 0.15, 0.1))
    fields = {"model_identity": "m1", "restoration": SETTINGS, "points": {"residual": points}}
    Calibration(**{**fields, **changed}).save(path)


def measured(*cohorts, score="residual", **options):
    """The row of a score over all scans."""
    return measure(from_cache(cohorts), **options).as_json()["scores"][score]


@pytest.fixture
def patients(tmp_path):
    """(folder, cache, restored file, residual in the brain [V], truth [V], images)."""
    images = made_up(0)
    cache, restored = write(tmp_path, "patients", *images)
    inside = np.broadcast_to(brain(), images[0].shape)
    residual = np.abs(images[0] - images[1])[inside]
    return tmp_path, cache, restored, residual, images[2][inside], images


def run(patients, *extra, out="results"):
    folder, cache, restored = patients[:3]
    flags = ["--restored", restored, "--cache", cache, "--out", folder / out, *extra]
    status = main([str(flag) for flag in flags])
    path = folder / out / "metrics.json"
    return status, json.loads(path.read_text()) if path.exists() else None


def scans_of(patients, score="residual", out="results"):
    rows = pd.read_csv(patients[0] / out / "scans.csv")
    return rows[rows["score"] == score].reset_index()


def test_pooled_numbers_are_those_of_all_brain_voxels_together(patients):
    status, results = run(patients)
    residual, truth = patients[3:5]
    row = results["scores"]["residual"]
    assert status == 0
    assert row["auc_method"] == "exact"
    assert row["pooled_auc"] == pytest.approx(roc_auc_score(truth, residual), abs=EXACT)
    expected = average_precision_score(truth, residual)
    assert row["pooled_auprc"] == pytest.approx(expected, abs=EXACT)
    assert row["pooled_auc_low"] < row["pooled_auc"] < row["pooled_auc_high"]
    detected = residual > row["threshold_dsc_auc"]
    assert row["pooled_fpr_dsc_auc"] == pytest.approx(detected[~truth].mean())
    assert row["pooled_fnr_dsc_auc"] == pytest.approx(1 - detected[truth].mean())


def test_subject_numbers_are_means_over_subjects(patients):
    _, results = run(patients)
    observed, restored, label = patients[5]
    row = results["scores"]["residual"]
    threshold = row["threshold_dsc_auc"]
    aucs, dices = [], []
    for images in zip(observed, restored, label, strict=True):
        one, other, truth = (image[:, brain()].ravel() for image in images)
        residual = np.abs(one - other)
        aucs.append(roc_auc_score(truth, residual))
        detected = residual > threshold
        dices.append(2 * (detected & truth).sum() / (detected.sum() + truth.sum()))
    scans = scans_of(patients)
    assert list(scans["auc"]) == pytest.approx(aucs, abs=EXACT)
    assert row["mean_auc"] == pytest.approx(np.mean(aucs), abs=EXACT)
    assert list(scans["dice_dsc_auc"]) == pytest.approx(dices, abs=EXACT)
    assert row["mean_dice_dsc_auc"] == pytest.approx(np.mean(dices), abs=EXACT)
    assert row["std_dice_dsc_auc"] == pytest.approx(np.std(dices), abs=EXACT)
    assert row["mean_largest_dice"] >= row["mean_dice_dsc_auc"]
    assert list(scans["scan"]) == ["s0", "s1", "s2"]


def test_baselines_are_measured_on_the_same_voxels(patients, capsys):
    _, results = run(patients)
    intensity = patients[5][0][np.broadcast_to(brain(), patients[5][0].shape)]
    area = results["scores"]["intensity"]["pooled_auc"]
    assert area == pytest.approx(roc_auc_score(patients[4], intensity), abs=EXACT)
    equalized = results["scores"]["equalized"]
    assert equalized["mean_auc"] == pytest.approx(
        results["scores"]["intensity"]["mean_auc"], abs=1e-3
    )  # equalization keeps the order within a subject, up to the bins of its histogram
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("residual", "intensity", "equalized"))


def test_released_protocol_counts_at_the_401_thresholds_only(patients):
    status, results = run(patients, "--protocol", "released")
    residual, truth = patients[3:5]
    thresholds = metrics.released_thresholds()
    curve = metrics.Curve.from_counts(count_at(residual, truth, thresholds), thresholds)
    row = results["scores"]["residual"]
    assert status == 0
    assert row["auc_method"] == "released"
    assert row["pooled_auc"] == metrics.area(curve)
    assert row["threshold_dsc_auc"] in thresholds
    assert row["pooled_auc_low"] < row["pooled_auc"] < row["pooled_auc_high"]


def test_a_calibration_gives_dsc1_5_10(patients):
    path = patients[0] / "calibration.h5"
    save_calibration(path)
    status, results = run(patients, "--calibration", path, "--pdf")
    assert status == 0
    row = results["scores"]["residual"]
    names = [name.removeprefix("threshold_") for name in row if name.startswith("threshold_")]
    assert names == ["dsc_auc", "dsc1", "dsc5", "dsc10"]
    assert [row[f"threshold_{name}"] for name in names[1:]] == [0.3, 0.2, 0.15]
    detected = patients[3] > 0.2
    assert row["pooled_fpr_dsc5"] == pytest.approx(detected[~patients[4]].mean())
    assert results["scores"]["intensity"]["threshold_dsc5"] is None
    assert results["settings"]["thresholds"]["residual"][1]["threshold"] == 0.2
    assert (patients[0] / "results" / "panel.pdf").read_bytes().startswith(b"%PDF")


def test_a_pdf_that_is_there_is_told_before_anything_is_measured(patients, capsys, monkeypatch):
    out = patients[0] / "other"
    out.mkdir()
    (out / "panel.pdf").write_bytes(b"mine")
    monkeypatch.delattr("tf_lesion.evaluation.measure.measure")
    assert run(patients, "--pdf", out="other")[0] == 2
    assert "panel.pdf" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["panel.pdf"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_identity": "m2"}, "belongs to model m2, not to m1"),
        ({"restoration": {"tv_weight": 2.0}}, "made with tv_weight 2.0, not 1.8"),
    ],
)
def test_a_calibration_of_another_model_or_lambda_is_an_error(patients, capsys, changed, message):
    path = patients[0] / "calibration.h5"
    save_calibration(path, **changed)
    status, results = run(patients, "--calibration", path)
    assert (status, results) == (2, None)
    assert message in capsys.readouterr().err


def test_lesions_and_false_ones_are_counted_per_scan(tmp_path):
    observed, restored, label = made_up(3)
    observed = restored.copy()
    label[:] = False
    label[0, 1:3, 10:14, 10:14] = True  # found
    label[1, 0, 8:10, 8:10] = True  # missed
    observed[0, 1, 10, 10] += 0.3
    observed[1, 3, 30, 30] += 0.3  # two false ones in one scan, none in the third
    observed[1, 1, 30, 30] += 0.3
    patients = (tmp_path, *write(tmp_path, "patients", observed, restored, label))
    save_calibration(tmp_path / "calibration.h5")
    _, results = run(patients, "--calibration", tmp_path / "calibration.h5")
    row = results["scores"]["residual"]
    assert scans_of(patients)["lesions"].sum() == 2
    assert row["pooled_lesions_found_dsc5"] == 1
    assert row["pooled_lesion_detection_rate_dsc5"] == 0.5
    assert row["mean_false_positives_dsc5"] == pytest.approx(2 / 3)


def test_a_subject_without_lesion_is_counted_but_has_no_auc(tmp_path):
    observed, restored, label = made_up(1)
    label[1] = False
    patients = (tmp_path, *write(tmp_path, "patients", observed, restored, label))
    status, results = run(patients)
    row = results["scores"]["residual"]
    assert status == 0
    assert results["cohort"]["subjects_without_lesion"] == 1
    assert row["scans_with_auc"] == 2
    scans = scans_of(patients)
    assert np.isnan(scans["auc"][1])
    assert scans["dice_dsc_auc"][1] == 0


def test_a_cohort_without_any_lesion_is_measured_without_auc(tmp_path):
    patients = (tmp_path, *write(tmp_path, "patients", *made_up(1, lesion=False)))
    status, results = run(patients)
    assert status == 0
    assert results["scores"]["residual"]["pooled_auc"] is None
    assert "threshold_dsc_auc" not in results["scores"]["residual"]


def test_two_cohorts_are_pooled(tmp_path):
    images = [made_up(seed) for seed in (0, 1)]
    files = [write(tmp_path, f"g{number}", *image) for number, image in enumerate(images)]
    caches, restored = ([str(path) for path in paths] for paths in zip(*files, strict=True))
    flags = ["--restored", *restored, "--cache", *caches, "--out", str(tmp_path / "both")]
    assert main(flags) == 0
    results = json.loads((tmp_path / "both" / "metrics.json").read_text())
    residual = np.concatenate([np.abs(o - r)[..., brain()].ravel() for o, r, _ in images])
    truth = np.concatenate([label[..., brain()].ravel() for *_, label in images])
    area = results["scores"]["residual"]["pooled_auc"]
    assert area == pytest.approx(roc_auc_score(truth, residual), abs=EXACT)
    assert results["cohort"]["subjects"] == 6


def test_a_shuffled_subset_of_slices_is_matched_to_its_rows(tmp_path):
    observed, restored, label = made_up(2)
    rows = np.random.default_rng(0).permutation(12)[:9]
    patients = (tmp_path, *write(tmp_path, "patients", observed, restored, label, rows=rows))
    _, results = run(patients)
    pick = [images.reshape(-1, *SHAPE)[rows][:, brain()] for images in (observed, restored, label)]
    expected = roc_auc_score(pick[2].ravel(), np.abs(pick[0] - pick[1]).ravel())
    assert results["scores"]["residual"]["pooled_auc"] == pytest.approx(expected, abs=EXACT)
    assert results["cohort"]["slices"] == 9
    assert list(scans_of(patients)["scan"]) == ["s0", "s1", "s2"]
    assert list(scans_of(patients)["slices"]) == np.bincount(rows // SLICES).tolist()


def test_slices_come_in_axial_order_whatever_the_order_in_the_file(tmp_path):
    rows = np.random.default_rng(1).permutation(12)
    cache, restored = write(tmp_path, "patients", *made_up(2), rows=rows)
    for number, subject in enumerate(Cohort(restored, cache).subjects()):
        np.testing.assert_array_equal(subject.slice_index, range(SLICES))
        np.testing.assert_array_equal(subject.rows, number * SLICES + np.arange(SLICES))


@pytest.mark.parametrize("step", [1, 6])
def test_a_lesion_of_neighboring_kept_slices_is_one_lesion(tmp_path, step):
    cache, restored = write(tmp_path, "patients", *made_up(2), step=step)
    found = measure(from_cache([Cohort(restored, cache)]))
    assert set(found.scans["lesions"]) == {1}


def test_lesions_are_not_counted_where_slices_lack_at_random(tmp_path):
    rows = [0, 1, 3, *range(4, 12)]  # of the first subject one is missing
    cache, restored = write(tmp_path, "patients", *made_up(2), rows=rows)
    found = measure(from_cache([Cohort(restored, cache)])).scans
    counted = found[found["score"] == "residual"].set_index("scan")["lesions"]
    assert counted.isna().to_dict() == {"s0": True, "s1": False, "s2": False}


def test_a_voxel_of_every_sixth_slice_is_six_slices_high(tmp_path):
    cache, restored = write(tmp_path, "patients", *made_up(2), step=6)
    (scan, *_) = from_cache([Cohort(restored, cache)])
    np.testing.assert_array_equal(np.diag(scan.affine), [1, 1, 6, 1])


def test_lesions_found_are_told_by_their_size(tmp_path, capsys):
    observed, restored, label = made_up(2)
    label[0, 3, 30, 30] = True  # of 1 mm3, beside those of 128
    observed = np.where(label, restored + 0.3, restored)
    observed[0, 3, 30, 30] = restored[0, 3, 30, 30]  # and not to be seen
    cache, result = write(tmp_path, "patients", observed, restored, label)
    sizes = measure(from_cache([Cohort(result, cache)])).sizes
    residual = sizes[sizes["score"] == "residual"].set_index("size")
    assert residual["lesions"].to_dict() == {
        "below 0.1 ml": 1,
        "0.1 to 1 ml": 3,
        "1 to 10 ml": 0,
        "10 ml or more": 0,
    }
    assert residual["found"].tolist() == [0, 3, 0, 0]
    argv = ["--restored", result, "--cache", cache, "--out", tmp_path / "out"]
    assert main([*map(str, argv), "--smallest-lesion", "0.1"]) == 0
    assert "3 of 3" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "sizes.csv")
    assert table[table["score"] == "residual"]["lesions"].tolist() == [0, 3, 0, 0]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["lesions"] == {
        "connectivity": 26,
        "smallest_ml": 0.1,
        "overlap": 0.0,
    }


def test_intervals_draw_what_is_alike_together(tmp_path):
    cache, restored = write(tmp_path, "patients", *made_up(0))
    alone = measured(Cohort(restored, cache))
    same = measured(Cohort(restored, cache), groups=dict.fromkeys(("s0", "s1", "s2"), "anatomy"))
    assert alone["pooled_auc_low"] < alone["pooled_auc_high"]
    assert same["pooled_auc_low"] == same["pooled_auc_high"]
    assert same["pooled_auc"] == alone["pooled_auc"]


def test_a_file_of_groups_is_read_and_must_know_every_scan(patients, capsys):
    groups = patients[0] / "groups.csv"
    groups.write_text("scan,group\ns0,a\ns1,a\ns2,a\n")
    status, results = run(patients, "--groups", groups)
    row = results["scores"]["residual"]
    assert (status, row["pooled_auc_low"]) == (0, row["pooled_auc_high"])
    groups.write_text("scan,group\ns0,a\n")
    assert run(patients, "--groups", groups, out="other")[0] == 2
    assert "there is none for s1" in capsys.readouterr().err
    groups.write_text("name\ns0\n")
    assert run(patients, "--groups", groups, out="other")[0] == 2
    assert "expected the columns scan and group" in capsys.readouterr().err


def test_lesion_outside_the_brain_mask_is_not_counted(tmp_path):
    observed, restored, label = made_up(2)
    inside = int(label.sum())
    label[:, :, :2] = True
    cache, result = write(tmp_path, "patients", observed, restored, label)
    found = measure(from_cache([Cohort(result, cache)]))
    assert found.cohort["lesion_voxels"] == inside
    assert (found.scans["outside_brain_ml"] > 0).all()


def test_interval_of_one_subject_is_its_auc_even_with_many_zeros(tmp_path):
    observed, restored, label = made_up(2, subjects=1)
    restored[:, ::2] = observed[:, ::2]
    cache, result = write(tmp_path, "patients", observed, restored, label)
    row = measured(Cohort(result, cache))
    assert row["pooled_auc_low"] == row["pooled_auc_high"]
    assert row["pooled_auc_low"] == pytest.approx(row["pooled_auc"], abs=1e-4)


def test_a_released_cache_is_evaluated_with_its_label_file_and_counts(tmp_path, patients):
    observed, restored, label = patients[5]
    cache, labels, result, counts = (tmp_path / n for n in ("c.h5", "l.h5", "r.h5", "n.npy"))
    with h5py.File(cache, "w") as file:
        file["Test"] = observed.reshape(-1, *SHAPE).astype(np.float64)
    with h5py.File(labels, "w") as file:
        file["Label"] = 4.0 * label.reshape(-1, *SHAPE)
    with h5py.File(result, "w") as file:
        file["Restore"] = restored.reshape(-1, *SHAPE)
    np.save(counts, [SLICES] * 3)
    flags = ("--labels", labels, "--subjects", counts)
    status, results = run((tmp_path, cache, result), *flags, out="released")
    _, ours = run(patients)
    assert status == 0
    ours, theirs = (r["scores"]["residual"] for r in (ours, results))
    assert theirs["pooled_auc"] == ours["pooled_auc"]
    assert theirs["mean_auc"] == ours["mean_auc"]


def test_slices_of_unknown_position_have_no_lesion_wise_numbers(tmp_path, patients):
    with h5py.File(patients[1], "a") as file:
        del file["Test_info"]
    status, results = run(patients)
    row = results["scores"]["residual"]
    assert status == 0
    assert results["cohort"]["subjects"] == 1
    assert row["pooled_lesion_detection_rate_dsc_auc"] is None
    assert row["pooled_dice_dsc_auc"] > 0


def test_images_of_an_earlier_step_can_be_evaluated(tmp_path):
    observed, restored, label = made_up(4)
    extra = [(0, observed), (500, restored)]
    cache, result = write(tmp_path, "patients", observed, restored, label, extra=extra)
    aucs = []
    for step in (0, 500, None):
        aucs.append(measured(Cohort(result, cache, step=step))["pooled_auc"])
    assert aucs[0] == 0.5  # nothing has moved
    assert aucs[1] == aucs[2] > 0.6
    with pytest.raises(InputError, match="after step 7; it holds 0, 500"):
        measured(Cohort(result, cache, step=7))


def test_binned_pooling_gives_the_same_numbers(patients, monkeypatch):
    cohort = Cohort(patients[2], patients[1])
    exact = measured(cohort)
    kept = metrics.PooledScores
    monkeypatch.setattr(
        metrics, "PooledScores", lambda **given: kept(**{"max_bins": 4_000, **given})
    )
    binned = measured(cohort)
    assert (exact["auc_method"], binned["auc_method"]) == ("exact", "binned")
    assert binned["pooled_auc"] == pytest.approx(exact["pooled_auc"], abs=1e-4)
    assert binned["mean_auc"] == exact["mean_auc"]


def test_results_name_version_settings_and_a_csv_row_for_every_score(patients):
    _, results = run(patients)
    assert results["tf_lesion_version"]
    assert results["settings"]["restoration"] == [SETTINGS]
    scores = ["residual", "intensity", "equalized"]
    assert list(results["scores"]) == scores
    scans = pd.read_csv(patients[0] / "results" / "scans.csv")
    assert list(scans["score"]) == scores * 3
    means = pd.read_csv(patients[0] / "results" / "scores.csv")
    expected = scans.groupby("score")["auprc"].mean()[scores]
    assert list(means["mean_auprc"]) == pytest.approx(list(expected), abs=EXACT)


def test_existing_results_are_kept_without_force(patients, capsys):
    run(patients)
    path = patients[0] / "results" / "metrics.json"
    before = path.stat().st_mtime_ns
    assert run(patients)[0] == 2
    assert "--force" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before
    assert run(patients, "--force")[0] == 0
    assert path.stat().st_mtime_ns != before


def break_shape(file):
    del file["Restore"]
    file["Restore"] = np.zeros((12, 34, 42), np.float32)


def break_rows(file):
    file["rows"][3] = 99


def break_twice(file):
    file["rows"][3] = 2


def break_nan(file):
    file["Restore"][5, 10, 10] = np.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_shape, "holds slices of 34 x 42 pixels"),
        (break_rows, "outside the 12 slices"),
        (break_twice, "some slices twice"),
        (break_nan, "row 5 is NaN or infinite"),
    ],
)
def test_restored_slices_that_do_not_fit_the_cache_are_refused(patients, capsys, damage, message):
    with h5py.File(patients[2], "a") as file:
        damage(file)
    assert run(patients) == (2, None)
    assert message in capsys.readouterr().err
    assert not list((patients[0]).glob("results/*"))


def test_missing_labels_are_asked_for(tmp_path, capsys):
    observed, restored, _ = made_up(0)
    patients = (tmp_path, *write(tmp_path, "patients", observed, restored, None))
    assert run(patients) == (2, None)
    assert "(labels)" in capsys.readouterr().err


def test_many_slices_of_unknown_subject_are_refused(tmp_path, capsys):
    images = made_up(0, subjects=1, slices=257)
    patients = (tmp_path, *write(tmp_path, "patients", *images))
    with h5py.File(patients[1], "a") as file:
        del file["Test_info"]
    assert run(patients) == (2, None)
    assert "slices per subject" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not npy", None])
def test_counts_that_are_none_are_refused(patients, capsys, content):
    path = patients[0] / "counts.npy"
    if content is None:
        np.save(path, [3.5, 2])
    else:
        path.write_bytes(content)
    assert run(patients, "--subjects", path) == (2, None)
    assert "slices" in capsys.readouterr().err


def test_numbers_of_files_must_agree(patients, capsys):
    assert run(patients, "--cache", patients[1], patients[1])[0] == 2
    assert "Expected 1 files with --cache" in capsys.readouterr().err


def test_empty_brain_is_an_error(tmp_path, capsys):
    observed, restored, label = made_up(0)
    patients = (tmp_path, *write(tmp_path, "patients", observed, restored, label))
    with h5py.File(patients[1], "a") as file:
        file["Mask"][:] = 0
    assert run(patients) == (2, None)
    assert "brain mask is empty" in capsys.readouterr().err


# The picture


def test_slices_are_shown_anterior_up_with_the_right_side_on_the_left():
    image = np.zeros(SHAPE)
    image[-1, -1] = 1  # most right, most anterior
    seen = plots.as_seen(image)
    assert seen.shape == SHAPE[::-1]
    assert seen[0, 0] == 1


def test_panel_shows_the_largest_lesions_of_different_subjects(patients):
    arrays = largest_lesions([Cohort(patients[2], patients[1])], 2)
    assert list(arrays["truth"].sum(axis=(1, 2))) == [64, 64]
    assert [title.splitlines()[0] for title in arrays["titles"]] == ["s0", "s1"]


def test_panel_is_a_picture_of_five_rows_with_one_gray_window(patients, drawn):
    assert run(patients)[0] == 0
    plt.imread(patients[0] / "results" / "panel.png")
    images = [axis.images[0] for axis in drawn[0].axes if axis.images]
    assert len(images) == 5 * 3
    windows = [image.get_clim() for image in images]
    assert len(set(windows[:6])) == 1  # observed and restored
    assert len(set(windows[6:9])) == 1  # residual
    assert all(image.get_cmap().name == "gray" for image in images)


def test_lines_are_told_apart_without_color(tmp_path, drawn):
    x = np.linspace(0, 4, 5)
    series = dict.fromkeys(("GMVAE", "VAE", "baseline"), (x, x / 8, x / 8 - 0.1, x / 8 + 0.1))
    path = tmp_path / "fig2a.png"
    plots.lines(path, series, marked={"GMVAE": 1.9}, pdf=True, xlabel="λ", ylabel="AUC")
    (axis,) = drawn[0].axes
    whole = [line for line in axis.lines if len(line.get_xdata()) > 1]
    styles = [(line.get_color(), line.get_linestyle()) for line in whole]
    assert len(set(styles)) == 3
    assert all(color[0] == color[1] == color[2] for color in map(to_rgb, dict(styles)))
    assert [line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 1] == [2]
    assert "λ" in axis.get_xlabel()
    assert path.exists()
    assert path.with_suffix(".pdf").exists()
