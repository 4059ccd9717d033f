"""The brain finder against the truth of painted heads."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny_scans

from eval import heads
from tf_lesion.files import InputError
from tf_lesion.scans import prepare
from tf_lesion.scans.confidence import Confidence
from tf_lesion.scans.finder.canonical import landmarks

SHAPE, EDGE_MM = (20, 20, 20), 2.0
TURN = tiny_scans.rigid(degrees=(18, -10, 12), shift=(30, -20, 15))  # MNI space -> scan


@pytest.fixture
def folder(tmp_path):
    """Two heads: 500 voxels of brain of 8 mm^3; 100 voxels of lesion in the first."""
    brain, lesion = np.zeros((2, *SHAPE), np.uint8)
    brain[:5, :10, :10] = 1
    lesion[:1, :10, :10] = 1
    affine = np.diag([EDGE_MM] * 3 + [1])
    turned = (TURN @ np.c_[landmarks(), np.ones(len(landmarks()))].T).T[:, :3]
    truth = {"mni_from_scan": np.linalg.inv(TURN).tolist(), "landmarks_mm": turned.tolist()}
    for name, part in (("head-0000", lesion), ("head-0001", lesion * 0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(truth))
        for suffix, values in (("T2w", brain * 100), ("mask", brain), ("seg", part)):
            tiny_scans.write(tmp_path / f"{name}_{suffix}.nii.gz", values, affine)
    return tmp_path


def found(mask, shift_mm=0.0, **confidence):
    pose = TURN.copy()
    pose[0, 3] += shift_mm
    return SimpleNamespace(
        scan_mask=mask,
        scan_from_grid=pose,
        brain_kind="with skull",
        confidence=Confidence(**confidence),
        scan=SimpleNamespace(name="head"),
    )


def test_pose_mask_and_lesion_are_measured_against_the_truth(folder, monkeypatch):
    mask = np.zeros(SHAPE, bool)
    mask[:5, :10, 2:10] = True  # a fifth of brain and lesion is missed
    result = found(mask, shift_mm=4, covered=0.75)
    monkeypatch.setattr(prepare, "prepare_scan", lambda scan, settings: result)
    row = heads.measure_head(folder / "head-0000.json")
    assert row["mm"] == pytest.approx(4)
    assert row["dice"] == pytest.approx(2 * 400 / 900)
    assert row["kept"] == pytest.approx(0.8)
    assert row["lesion_ml"] == pytest.approx(0.8)
    assert (row["accepted"], row["stripped"], row["covered"]) == (True, False, 0.75)
    assert np.isnan(heads.measure_head(folder / "head-0001.json")["kept"])


def test_a_refused_head_is_measured_too_and_counted(folder, monkeypatch, capsys):
    right, shifted = np.zeros((2, *SHAPE), bool)
    right[:5, :10, :10] = True

    def prepared(scan, settings):
        if "0000" in str(scan):
            return found(right)
        raise prepare.PoorAlignmentError(found(shifted, shift_mm=30), ["too little", "of a brain"])

    monkeypatch.setattr(prepare, "prepare_scan", prepared)
    out = folder / "heads.csv"
    assert heads.main(["--input", str(folder), "--out", str(out)]) == 0
    table = pd.read_csv(out)
    assert table["accepted"].tolist() == [True, False]
    assert table["doubts"][1] == "too little; of a brain"
    assert table["mm"].tolist() == pytest.approx([0, 30], abs=1e-6)
    printed = capsys.readouterr().out
    assert "2 heads, 1 accepted" in printed
    assert "0 accepted, 1 refused" in printed
    assert "1 of 1, 0 of the 0" in printed  # of .8 ml


def test_a_scan_in_which_nothing_is_found_is_refused(folder, monkeypatch):
    def prepared(scan, settings):
        raise InputError("no brain was found")

    monkeypatch.setattr(prepare, "prepare_scan", prepared)
    assert heads.main(["--input", str(folder), "--out", str(folder / "heads.csv")]) == 0
    table = pd.read_csv(folder / "heads.csv")
    assert table["accepted"].tolist() == [False, False]
    assert table["doubts"].tolist() == ["no brain was found"] * 2
    assert table["mm"].isna().all()
    assert table["lesion_ml"].tolist() == pytest.approx([0.8, 0])


def test_a_head_whose_truth_cannot_be_read_is_named_and_the_rest_measured(
    folder, monkeypatch, capsys
):
    mask = np.zeros(SHAPE, bool)
    mask[:5, :10, :10] = True
    monkeypatch.setattr(prepare, "prepare_scan", lambda scan, settings: found(mask))
    (folder / "head-0001.json").write_text('{"scan": "head"}')
    assert heads.main(["--input", str(folder)]) == 1
    output = capsys.readouterr()
    assert "head-0001 is not measured: Expected what preprocessing.phantom writes" in output.err
    assert "1 heads, 1 accepted" in output.out


def test_a_folder_without_heads_is_an_error(tmp_path, capsys):
    assert heads.main(["--input", str(tmp_path)]) == 2
    assert "Expected heads of preprocessing.phantom" in capsys.readouterr().err
