"""Restored scans against their segmentations: over which voxels, masks and scans."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import tiny_scans

from tf_lesion.cli import evaluate
from tf_lesion.cli.command import EXIT_INTERRUPTED
from tf_lesion.evaluation.results import Result
from tf_lesion.report import pictures as report_pictures

SHAPE = (14, 16, 12)
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
VOXEL_ML = 0.024
SMALL, LARGE, MISSED = np.s_[3:5, 3:5, 3:5], np.s_[8:11, 8:12, 2:9], np.s_[4, 11, 9]
FALSE = np.s_[10, 4, 8]
OUTSIDE = np.s_[0, 0, 0:2]


def _brain():
    brain = np.zeros(SHAPE, bool)
    brain[2:12, 2:14, 1:11] = True
    return brain


def _truth():
    truth = np.zeros(SHAPE, np.uint8)
    truth[SMALL], truth[LARGE], truth[MISSED] = 1, 4, 2
    return truth


def _maps(seed):
    """Scan, restored and residual: lesions are brighter; outside the brain nothing may count."""
    random, brain, truth = np.random.default_rng(seed), _brain(), _truth() > 0
    scan = np.where(brain, random.integers(100, 400, SHAPE) + 150 * truth, 900).astype(np.float32)
    restored = np.where(brain, random.normal(0.3, 0.2, SHAPE), 0)  # below 0 here and there
    residual = np.where(brain, random.random(SHAPE) + 0.5 * truth, 0)
    return scan, restored, residual


def _write(folder, name="P_1", *, seed=0, axes="RAS", score=False, truth=None, bids=0):
    """Maps and JSON of a scan as restore_brats.py writes them; returns the arrays."""
    scan, restored, residual = _maps(seed)
    mask = np.zeros(SHAPE, np.uint8)
    mask[SMALL], mask[LARGE], mask[FALSE] = 1, 0, 1
    mask[8, 8, 2] = 1  # a corner of the large lesion
    volumes = {"restored": restored, "residual": residual}
    volumes |= {"score": residual**2} if score else {}
    volumes = {key: volume.astype(np.float32) for key, volume in volumes.items()}
    volumes["fpr_0.05"] = mask
    for key, volume in volumes.items():
        tiny_scans.write(folder / f"{name}_{key}.nii.gz", volume, AFFINE, axes=axes)
    source = tiny_scans.write(folder / "scans" / f"{name}_t2.nii.gz", scan, AFFINE, axes=axes)
    seg = source.with_name(f"{name}_seg.nii.gz")
    tiny_scans.write(seg, _truth() if truth is None else truth, AFFINE, axes=axes)
    facts = {
        "name": name,
        "input": str(source),
        "truth": str(seg),
        "lesions": {"fpr_0.05": {"target_fpr": 0.05, "threshold": 0.9}},
        "files": {key: f"{name}_{key}.nii.gz" for key in volumes},
    }
    end = "_desc-restored_T2w.json" if bids else "_restoration.json"
    (folder / f"{name}{end}").write_text(json.dumps(facts))
    return {"observed": scan, **volumes}


def _run(folder, *more, status=0):
    argv = ["--results", folder, "--out", folder / "out", "--force", *more]
    assert evaluate.main(list(map(str, argv))) == status
    if status:
        return None
    with (folder / "out" / "scans.csv").open(newline="") as file:
        rows = {(row["scan"], row["score"]): row for row in csv.DictReader(file)}
    return {key: {n: _number(v) for n, v in row.items()} for key, row in rows.items()}


def _number(text):
    try:
        return float(text) if text else None
    except ValueError:
        return text


def _by_hand(scores, lesion):
    """AUC, average precision and largest Dice by their definitions, threshold by threshold."""
    above = scores[lesion][:, None] - scores[~lesion]
    auc = np.mean((above > 0) + 0.5 * (above == 0))
    steps, dice, recall = [], [], 0.0
    for threshold in np.unique(scores)[::-1]:
        detected = scores >= threshold
        tp = np.count_nonzero(detected & lesion)
        steps.append((tp / lesion.sum() - recall) * tp / detected.sum())
        recall = tp / lesion.sum()
        dice.append(2 * tp / (detected.sum() + lesion.sum()))
    return auc, sum(steps), max(dice)


def _three(row, over=""):
    return [row[f"{over}{name}"] for name in ("auc", "auprc", "largest_dice")]


def test_every_score_is_measured_over_the_voxels_that_were_restored(tmp_path):
    maps = _write(tmp_path, score=True)
    brain, lesion = _brain(), _truth() > 0
    assert (maps["restored"][brain] < 0).any()
    rows = _run(tmp_path)
    for name, volume in (("residual", maps["residual"]), ("score", maps["score"])):
        expected = _by_hand(volume[brain], lesion[brain])
        assert _three(rows["P_1", name]) == pytest.approx(expected, abs=1e-6)
    equalized = _three(rows["P_1", "equalized"])
    assert equalized[0] == pytest.approx(
        _by_hand(maps["observed"][brain], lesion[brain])[0], abs=2e-3
    )
    assert rows["P_1", "residual"]["lesions"] == 3
    assert rows["P_1", "residual"]["lesion_ml"] == pytest.approx(lesion.sum() * VOXEL_ML)


@pytest.mark.parametrize("score", [False, True])
def test_masks_are_counted_for_the_score_they_were_made_from(tmp_path, score):
    _write(tmp_path, score=score)
    rows = _run(tmp_path)
    row = rows["P_1", "score" if score else "residual"]
    tp, detected, lesion = 8 + 1, 8 + 1 + 1, 8 + 84 + 1
    assert row["dice_fpr_0.05"] == pytest.approx(2 * tp / (detected + lesion))
    assert row["lesion_detection_rate_fpr_0.05"] == pytest.approx(2 / 3)
    assert row["false_positives_fpr_0.05"] == 1
    others = [other for key, other in rows.items() if other is not row]
    assert {other["dice_fpr_0.05"] for other in others} == {None}


@pytest.mark.slow
def test_a_turned_scan_has_the_same_numbers(tmp_path):
    for axes in ("RAS", "LPS", "AIR"):
        _write(tmp_path / axes, axes=axes)
    straight, *turned = (_run(tmp_path / axes) for axes in ("RAS", "LPS", "AIR"))
    assert all(rows == straight for rows in turned)


def test_lesion_outside_the_restored_brain_is_told_and_not_counted(tmp_path, capsys):
    truth = _truth()
    truth[OUTSIDE] = 1
    _write(tmp_path / "more", truth=truth)
    _write(tmp_path / "plain")
    more, plain = (_run(tmp_path / name)["P_1", "residual"] for name in ("more", "plain"))
    assert more.pop("outside_brain_ml") == pytest.approx(2 * VOXEL_ML)
    assert plain.pop("outside_brain_ml") == 0
    assert more == plain
    lost = "0.05 ml of its lesions are outside the restored brain"
    assert capsys.readouterr().err.count(lost) == 1


def test_scores_are_pooled_over_voxels_and_averaged_over_scans(tmp_path, capsys):
    maps = [_write(tmp_path, "P_1", seed=1), _write(tmp_path, "P_2", seed=2, bids=True)]
    rows = _run(tmp_path)
    brain, lesion = _brain(), _truth() > 0
    voxels = np.concatenate([each["residual"][brain] for each in maps])
    expected = _by_hand(voxels, np.tile(lesion[brain], 2))
    over_all = json.loads((tmp_path / "out" / "metrics.json").read_text())["scores"]["residual"]
    assert _three(over_all, "pooled_") == pytest.approx(expected, abs=1e-6)
    assert over_all["pooled_false_positives_fpr_0.05"] == 2
    assert over_all["threshold_fpr_0.05"] == 0.9
    for name in ("auc", "auprc", "largest_dice", "dice_fpr_0.05", "false_positives_fpr_0.05"):
        of_scans = [rows[scan, "residual"][name] for scan in ("P_1", "P_2")]
        assert over_all[f"mean_{name}"] == pytest.approx(np.mean(of_scans))
    text = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out == text
    assert f"{expected[0]:.3f}" in text


def test_a_scan_without_a_segmentation_is_left_out_with_a_warning(tmp_path, capsys):
    _write(tmp_path, "P_1")
    _write(tmp_path, "P_2")
    (tmp_path / "scans" / "P_2_seg.nii.gz").unlink()
    assert set(_run(tmp_path)) == {("P_1", "residual"), ("P_1", "equalized")}
    assert "warning: P_2 is left out: No such file: " in capsys.readouterr().err
    (tmp_path / "scans" / "P_1_seg.nii.gz").unlink()
    _run(tmp_path, status=2)
    assert "Expected a segmentation of one scan at least" in capsys.readouterr().err


def test_scans_that_are_missing_in_the_figures_are_named_with_them(tmp_path, capsys):
    _write(tmp_path, "P_1")
    _write(tmp_path / "elsewhere", "P_2")
    folder = tmp_path / "cohort"
    (folder / "P_1").mkdir(parents=True)
    (folder / "P_2").symlink_to(tmp_path / "elsewhere")
    for path in tmp_path.glob("P_1_*"):
        path.rename(folder / "P_1" / path.name)
    row = {"name": "lost", "status": "failed", "reason": "is truncated", "facts": "lost"}
    (folder / "summary.json").write_text(json.dumps({"scans": [row]}))
    assert {name for name, _ in _run(folder)} == {"P_1", "P_2"}
    said = capsys.readouterr()
    assert "warning: lost is left out: is truncated" in said.err
    assert "1 of 3 scans are missing in all figures:\n\n* lost: is truncated\n" in said.out
    assert said.out == (folder / "out" / "table.md").read_text()
    missing = json.loads((folder / "out" / "metrics.json").read_text())["missing"]
    assert missing == [{"scan": "lost", "reason": "is truncated"}]


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _changed(path, change, affine=AFFINE):
    volume = nib.load(path).get_fdata(dtype=np.float32)
    volume[5, 5, 5] += change
    nib.save(nib.Nifti1Image(volume, affine), path)


def _told(path, **changed):
    facts = json.loads(path.with_name("P_1_restoration.json").read_text())
    path.with_name("P_1_restoration.json").write_text(json.dumps(facts | changed))


DAMAGE = {
    "cannot be read": _cut,
    "it is truncated or of another kind": lambda path: path.write_bytes(b"no map"),
    "expected finite values": lambda path: _changed(path, np.nan),
    "expected values of 0 or more": lambda path: _changed(path, -9),
    "25.0 mm apart": lambda path: _changed(path, 0, AFFINE + 25 * np.eye(4, k=3)),
    "names no map 'residual'": lambda path: _told(path, files={}),
    "it['files'] is []": lambda path: _told(path, files=[]),
    "['threshold'] is nan": lambda path: _told(
        path, lesions={"fpr_0.05": {"target_fpr": 0.05, "threshold": np.nan}}
    ),
    "has no 'target_fpr'": lambda path: _told(path, lesions={"fpr_0.05": {}}),
    "P_1_residual.nii.gz, which": lambda path: path.unlink(),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_map_or_json_is_named_and_the_other_scans_are_measured(tmp_path, capsys, reason):
    for name in ("P_1", "P_2"):
        _write(tmp_path / "cohort" / name, name)
    DAMAGE[reason](tmp_path / "cohort" / "P_1" / "P_1_residual.nii.gz")
    argv = ["--results", tmp_path / "cohort", "--out", tmp_path / "out"]
    assert evaluate.main(list(map(str, argv))) == 1
    said = capsys.readouterr()
    assert reason in said.err
    assert reason in said.out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"P_2_panel.png"}
    argv[1] = tmp_path / "cohort" / "P_1"
    assert evaluate.main([*map(str, argv), "--force"]) == 2
    assert reason in capsys.readouterr().err


def test_segmentations_can_be_given_by_a_file_or_a_pattern(tmp_path, capsys):
    _write(tmp_path, "P_1", truth=0 * _truth())
    by_hand = tiny_scans.write(tmp_path / "drawn" / "P_1_by_hand.nii.gz", _truth(), AFFINE)
    assert _run(tmp_path)["P_1", "residual"]["lesions"] == 0
    assert _run(tmp_path, "--seg", by_hand)["P_1", "residual"]["lesions"] == 3
    pattern = "../drawn/{subject}_by_hand.nii*"
    assert _run(tmp_path, "--seg-pattern", pattern)["P_1", "residual"]["lesions"] == 3
    _run(tmp_path, "--seg-pattern", "{subject}_nothing.nii", status=2)
    assert "expected one file for seg_pattern" in capsys.readouterr().err


def test_scans_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in ("patient07", "patient19"):
        _write(tmp_path / name, "T2")
    names = {scan for scan, _ in _run(tmp_path)}
    assert names == {"patient07_T2", "patient19_T2"}
    assert (tmp_path / "out" / "patient07_T2_panel.png").exists()


def test_a_segmentation_on_another_grid_names_both_files(tmp_path, capsys):
    _write(tmp_path)
    seg = tmp_path / "scans" / "P_1_seg.nii.gz"
    for truth, affine in ((_truth()[:-1], AFFINE), (_truth(), AFFINE + np.eye(4, k=3))):
        nib.save(nib.Nifti1Image(truth, affine), seg)
        _run(tmp_path, status=2)
        error = capsys.readouterr().err
        assert "P_1_seg.nii.gz: expected the" in error
        assert "P_1_t2.nii.gz" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--results {0} --seg x.nii", "Expected one scan for seg, found 2"),
        ("--results {0} {0}", "Expected each scan once, got 2 maps of"),
        ("--results {0}", "pass --force"),
        ("--results {0}/scans", "Expected maps of restore_brats.py"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, capsys, options, message):
    _write(tmp_path, "P_1")
    _write(tmp_path, "P_2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "P_2_panel.png").touch()
    argv = [*options.format(tmp_path).split(), "--out", str(tmp_path / "out")]
    assert evaluate.main(argv) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["P_2_panel.png"]


def test_numbers_do_not_outlive_the_tables_and_pictures_they_come_with(tmp_path, monkeypatch):
    _write(tmp_path)
    _run(tmp_path)
    metrics = tmp_path / "out" / "metrics.json"
    assert metrics.exists()

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_pictures, "scan_picture", killed)
    _run(tmp_path, status=EXIT_INTERRUPTED)
    assert not metrics.exists()


def test_the_picture_shows_the_slices_with_most_lesion(tmp_path, monkeypatch):
    truth = np.zeros(SHAPE, np.uint8)
    for z, width in ((2, 3), (4, 1), (5, 6), (6, 5), (8, 4), (9, 2), (10, 7)):
        truth[3 : 3 + width, 5, z] = 1
    draw, shown = report_pictures.montage_figure, []

    def seen(result, chosen):
        shown.append(list(chosen))
        return draw(result, chosen)

    monkeypatch.setattr(report_pictures, "montage_figure", seen)
    for name, segmentation in (("some", truth), ("none", 0 * truth)):
        _write(tmp_path / name, truth=segmentation)
        _run(tmp_path / name)
    assert shown[0] == [2, 5, 6, 8, 10]
    assert len(shown[1]) == evaluate.SCAN_SLICES  # spread over the brain


@pytest.mark.parametrize(("score", "maps"), [(False, 1), (True, 2)])
def test_the_picture_has_a_row_for_every_map(tmp_path, score, maps):
    _write(tmp_path, score=score)
    result = Result.read(tmp_path / "P_1_restoration.json")
    figure = report_pictures.montage_figure(result, [3, 5])
    rows = 2 + maps
    assert len(figure.axes) == rows * 2 + maps  # a color bar for each map
