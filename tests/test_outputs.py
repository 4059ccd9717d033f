"""What is written beside the maps: brain, normalized scan, uncertainty, lesions, tables."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import tiny_scans

import tf_lesion
from tf_lesion.calibration import Threshold
from tf_lesion.cli import detect
from tf_lesion.detection import regions, table
from tf_lesion.detection.files import detect_many
from tf_lesion.detection.layout import is_map, layout_of, one_scan
from tf_lesion.detection.lesions import label_lesions, voxel_ml
from tf_lesion.detection.maps import Detector
from tf_lesion.detection.progress import LOG, VERBOSE, Progress
from tf_lesion.scans import intensity, picture
from tf_lesion.scans.prepare import ScanSettings, prepare_scan

LEFT_BALL_MM, RADIUS_MM = (-30.0, -10.0, 40.0), 12
POINTS = [Threshold(0.05, 0.1, 0.05), Threshold(0.2, 0.03, 0.2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(maps, folder they were saved to): a brain in MNI space with a bright ball on the left."""
    folder = tmp_path_factory.mktemp("outputs")
    prior = tf_lesion.load(tiny_scans.run(folder))
    values, affine = tiny_scans.brain()
    ball = tiny_scans.blob(affine, values.shape, LEFT_BALL_MM, RADIUS_MM)
    values = np.where(ball & (values > 0), 1500, values)
    # Axes turned: left and right must come from the affine.
    scan = tiny_scans.write(folder / "p_t2.nii.gz", values.astype(np.int16), affine, axes="LPS")
    maps = prior.detect(scan, postprocess="flip", points=POINTS, align="none")
    maps.save(folder / "maps")
    return maps, folder / "maps"


class Ready:
    """A `Detector` that has its maps already."""

    def __init__(self, maps):
        self.volume_names, self.described = tuple(maps.volumes), {}
        self.detect = lambda *_, **__: maps


def _detect_again(maps, out, **options):
    """(status, reason) of the scan of maps among many."""
    (row,) = detect_many(Ready(maps), [one_scan(maps.prepared.scan.path)], out, **options)
    return row["status"], row["reason"]


def test_the_brain_the_normalized_scan_and_the_restored_one_share_their_outside(found):
    maps, _ = found
    brain = maps.volumes["brain"] > 0
    for name in ("normalized", "restored"):
        assert not maps.volumes[name][~brain].any()
        assert maps.volumes[name][brain].min() > 0
    assert maps.volumes["normalized"].max() <= 1


def test_where_nothing_is_restored_the_restored_scan_is_the_scan_in_every_detail(found):
    maps, _ = found
    prior = tf_lesion.load(maps.facts["model_path"])
    still = prior.detect(
        maps.prepared.scan.path, restoration=prior.restoration(steps=0), points=[], align="none"
    )
    difference = still.volumes["restored"] - still.volumes["normalized"]
    assert np.abs(difference).max() < 1e-6
    assert not still.volumes["residual"].any()


def test_the_transfer_takes_any_sampling_of_a_scan_to_the_matched_intensities():
    rng = np.random.default_rng(0)
    before = rng.gamma(2.0, 300.0, (20, 21, 22))
    mask = before > 50
    after = intensity.match_to_reference(intensity.normalize(before, mask), mask, rng.random(5000))
    points = intensity.transfer(before, after, mask)
    again = intensity.transferred(before, mask, points)
    np.testing.assert_allclose(again, after, atol=2e-3)
    assert not again[~mask].any()
    assert (np.diff(points) >= 0).all()
    fewer = intensity.transferred(before[::2], mask[::2], points)
    np.testing.assert_array_equal(fewer, again[::2])


@pytest.mark.slow
def test_uncertainty_is_the_standard_deviation_over_the_restorations(found):
    maps, _ = found
    assert maps.facts["flip"] is True
    prepared = maps.prepared
    prior = tf_lesion.load(maps.facts["model_path"])
    window = tuple(slice(*edge) for edge in np.reshape(prior.data["crop"], (2, 2)))
    z = prepared.grid.shape[2] // 2
    observed, mask = (volume[window][..., z][None] for volume in (prepared.image, prepared.mask))
    straight = prior.restore(observed, mask, slices=[z])
    turned = prior.restore(observed[:, ::-1], mask[:, ::-1], slices=[z])[:, ::-1]
    expected = np.abs(straight - turned)[0] / 2
    detector = Detector(prior, postprocess="flip", points=[], align="none")
    on_grid = detector.restore_volume(prepared)
    np.testing.assert_allclose(on_grid.spread[window][..., z], expected, atol=1e-5)
    assert expected.max() > 0
    assert maps.volumes["uncertainty"].max() == pytest.approx(on_grid.spread.max(), rel=0.5)


def test_without_repeated_restorations_there_is_no_uncertainty(found):
    maps, _ = found
    detector = Detector(tf_lesion.load(maps.facts["model_path"]), points=POINTS)
    assert "uncertainty" in maps.volumes
    assert "uncertainty" not in detector.volume_names


def test_the_numbered_lesions_and_their_table_are_the_mask(found):
    maps, folder = found
    written = pd.read_csv(folder / "p_t2_lesions.csv")
    pd.testing.assert_frame_equal(written, maps.lesions, check_dtype=False)
    assert tuple(written.columns) == table.COLUMNS
    for name, point in maps.points.items():
        numbers = np.asarray(nib.load(folder / f"p_t2_labels_{name}.nii.gz").dataobj)
        mask = np.asarray(nib.load(folder / f"p_t2_lesions_{name}.nii.gz").dataobj)
        np.testing.assert_array_equal(numbers > 0, mask > 0)
        rows = written[written["target_fpr"] == point.target_fpr]
        assert rows["lesion"].tolist() == list(range(1, numbers.max() + 1))
        assert rows["voxels"].tolist() == np.bincount(numbers.ravel())[1:].tolist()
        ml = voxel_ml(maps.prepared.scan.file_affine)
        assert rows["volume_ml"].sum() == pytest.approx(mask.sum() * ml, abs=1e-5)
        assert maps.facts["lesions"][name]["count"] == len(rows)
        assert rows["volume_ml"].is_monotonic_decreasing
    assert maps.facts["lesions"]["fpr_0.2"]["volume_ml"] > 0


def test_a_lesions_row_says_where_it_is_and_how_strong():
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = 90, -126, -72
    numbers = np.zeros((181, 217, 181), np.uint16)
    numbers[118:122, 104:108, 120:124] = 1  # x = -30, y = -20, z = 50
    score, residual = 0.5 * (numbers > 0), 0.25 * (numbers > 0)
    score[119, 105, 121] = 2.0
    seen = np.ones(numbers.shape, np.uint8)
    seen[118] = 0
    scan_from_mni = np.eye(4)
    scan_from_mni[:3, 3] = 5, 0, 0
    where = {"affine": affine, "scan_from_mni": scan_from_mni}
    (row,) = table.lesion_table(
        numbers, score=score, residual=residual, seen=seen, target_fpr=0.05, **where
    ).to_dict("records")
    assert [row[f"center_{axis}_mm"] for axis in "xyz"] == [-29.5, -20.5, 49.5]
    assert row["mni_x_mm"] == -34.5
    assert row["volume_ml"] == 0.064
    assert row["peak_score"] == 2
    assert row["mean_score"] == pytest.approx((63 * 0.5 + 2) / 64, abs=1e-4)
    assert row["mean_residual"] == 0.25
    assert row["outside_window"] == 0.25
    assert row["region"].startswith("Left ")
    assert 20 < row["ventricle_distance_mm"] < 35


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ((-10, 12, 10), "Left Caudate"),
        ((12, -18, 8), "Right Thalamus Proper"),
        ((0, -25, -30), "Brain Stem"),
        ((38, -65, -32), "Right Cerebellum Cortex"),
        ((26, 30, 20), "Right Cerebral White Matter near rostralmiddlefrontal"),
        ((0, 0, 150), regions.OUTSIDE),
    ],
)
def test_places_of_mni_space_are_named_by_the_atlas(place, name):
    assert regions.region_of(np.array([place], float)) == name


def test_the_ventricles_are_as_far_as_they_are():
    inside, outside = np.array([[-15.0, -30, 20]]), np.array([[-15.0, -30, 20], [-60, -30, 20]])
    assert regions.ventricle_distance(inside) == 0
    assert regions.ventricle_distance(outside) == 0
    assert 25 < regions.ventricle_distance(outside[1:]) < 60


def test_lesions_are_numbered_the_same_in_every_orientation_of_the_file():
    rng = np.random.default_rng(1)
    detected = rng.random((20, 21, 22)) > 0.97
    affine = np.diag([2.0, 3.0, 1.0, 1.0])
    numbers = label_lesions(detected, affine)
    turned = np.diag([-1.0, 1, 1, 1])
    turned[0, 3] = 19
    other = label_lesions(detected[::-1], affine @ turned)
    np.testing.assert_array_equal(other[::-1], numbers)
    assert numbers.max() > 20


def test_a_scan_with_a_warning_is_worth_a_look_and_the_picture_is_there(found):
    maps, folder = found
    facts = json.loads((folder / "p_t2_restoration.json").read_text())
    assert facts["qc"]["verdict"] == ("look" if maps.facts["warnings"] else "pass")
    assert facts["qc"]["reasons"] == facts["warnings"]
    picture = folder / facts["qc"]["picture"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert facts["tables"]["lesions"] == "p_t2_lesions.csv"


def test_the_table_of_scans_puts_first_what_is_worth_a_look():
    rows = [
        {"name": name, "status": status, "qc": qc}
        for name, status, qc in (
            ("a", "done", "pass"),
            ("b", "done", "look"),
            ("c", "failed", "failed"),
            ("d", "skipped", "look"),
        )
    ]
    assert table.scan_table(rows)["name"].tolist() == ["c", "b", "d", "a"]


def test_the_alignment_has_the_scale_of_the_brain(found):
    maps, _ = found
    prepared = prepare_scan(maps.prepared.scan.path, settings=ScanSettings(tiny_scans.VOXEL_MM))
    scale = np.cbrt(np.linalg.det(prepared.scan_from_mni[:3, :3]))
    assert np.linalg.det(prepared.scan_from_grid[:3, :3]) == pytest.approx(1, abs=1e-6)
    assert 0.8 < scale < 1.2
    assert scale != pytest.approx(1, abs=1e-6)


def test_the_bids_validator_accepts_the_derivatives(found, tmp_path):
    validator = Path(sys.executable).with_name("bids-validator-deno")
    maps, _ = found
    source, out = tmp_path / "bids", tmp_path / "derivatives"
    scan = source / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_T2w.nii.gz"
    scan.parent.mkdir(parents=True)
    shutil.copy(maps.prepared.scan.path, scan)
    argv = ["--model", maps.facts["model_path"], "--bids-out", "--align", "none"]
    assert detect.main([str(source), str(out), *argv]) == 0
    done = subprocess.run(
        [validator, out, "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_a_scan_of_an_odd_name_has_all_its_files_under_the_users_settings(found, tmp_path):
    name = os.fsdecode("é".encode("latin-1")) + " $_$ ü"
    scan = tmp_path / f"{name}_t2.nii.gz"
    shutil.copy(found[0].prepared.scan.path, scan)
    read = dataclasses.replace(found[0].prepared.scan, path=scan)
    prepared = dataclasses.replace(found[0].prepared, scan=read)
    maps = dataclasses.replace(found[0], prepared=prepared)
    with mpl.rc_context({"text.usetex": True}):
        assert _detect_again(maps, tmp_path) == ("done", "")
    with (tmp_path / "scans.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["input"] == str(tmp_path / "é $_$ ü_t2.nii.gz")
    (facts,) = tmp_path.rglob("*_restoration.json")
    assert facts.name == f"{name}_t2_restoration.json"
    assert facts.with_name(f"{name}_t2_qc.png").stat().st_size > 1000


def test_what_a_brain_was_taken_for_is_told_to_who_wants_to_know(found, tmp_path, capsys):
    with Progress(1, screen=VERBOSE, log=tmp_path / LOG) as progress:
        _detect_again(found[0], tmp_path, progress=progress)
    for told in (capsys.readouterr().out, (tmp_path / LOG).read_text()):
        assert "p_t2: brain (stripped): 1881 ml" in told


@pytest.mark.parametrize("bids", [False, True])
def test_maps_that_are_half_replaced_do_not_pass_for_done(found, tmp_path, monkeypatch, bids):
    maps, _ = found
    again = {"out": tmp_path, "bids": bids}
    statuses = [_detect_again(maps, **again)[0] for _ in range(2)]
    assert statuses == ["done", "skipped"]
    layout = layout_of(one_scan(maps.prepared.scan.path), tmp_path, bids=bids, many=True)
    told = json.loads(layout.facts.read_text())

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(picture, "write_picture", killed)
        with pytest.raises(KeyboardInterrupt):
            _detect_again(maps, **again, force=True)
    assert not layout.facts.exists()
    assert is_map(layout.volume("restored"))
    assert _detect_again(maps, **again) == ("done", "")
    assert json.loads(layout.facts.read_text()) == told
    assert list(tmp_path.rglob("*.partial")) == []
    layout.picture.unlink()
    assert _detect_again(maps, **again) == ("done", "")
    assert layout.picture.exists()


@pytest.mark.parametrize(
    "name",
    [
        "p_t2/p_t2_brain.nii.gz",
        "p_t2/p_t2_lesions.csv",
        "sub-pt2/anat/sub-pt2_desc-brain_mask.json",
    ],
)
def test_a_file_of_somebody_else_is_kept_until_it_is_to_be_replaced(found, tmp_path, name):
    theirs = tmp_path / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    again = {"maps": found[0], "out": tmp_path, "bids": name.startswith("sub-")}
    for _ in range(2):
        status, reason = _detect_again(**again)
        assert (status, f"{theirs} exists" in reason) == ("failed", True)
        assert "pass --force" in reason
        assert theirs.read_text() == "precious"
    assert [path.name for path in theirs.parent.iterdir()] == [theirs.name]
    assert _detect_again(**again, force=True) == ("done", "")
    assert theirs.read_bytes() != b"precious"


def test_a_table_of_somebody_else_is_refused_before_the_first_scan(found, tmp_path):
    theirs = tmp_path / "scans.csv"
    theirs.write_text("precious")
    with pytest.raises(FileExistsError, match=r"scans\.csv exists; .* pass --force"):
        _detect_again(found[0], tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
    assert _detect_again(found[0], tmp_path, force=True) == ("done", "")
    assert _detect_again(found[0], tmp_path) == ("skipped", "")
