"""Scans: maps the same in every orientation, on the scan's grid, with facts and files that fit."""

import dataclasses
import json
import os
import re
import shutil

import keras
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk  # noqa: N813, the usual name
import tiny_scans
from scipy import ndimage

import restore_brats
import tf_lesion
from tf_lesion import restoration
from tf_lesion.calibration import Calibration, Threshold
from tf_lesion.calibration.file import FILE_NAME
from tf_lesion.cli import detect, report
from tf_lesion.detection.layout import is_map, layout_of, name_of, one_scan
from tf_lesion.detection.lesions import find_lesions
from tf_lesion.detection.maps import Detector
from tf_lesion.evaluation.results import find_results
from tf_lesion.files import InputError
from tf_lesion.scans.intensity import histogram_distance
from tf_lesion.scans.prepare import ScanSettings, prepare_scan
from tf_lesion.scans.volumes import load_scan

RATES = (0.05, 0.2)
TURNS = {
    "RAS": np.int16,
    "LPS": np.float32,
    "PIR": np.uint16,
    "ASL": np.int32,
    "SRA": np.float32,
    "IPL": np.int16,
}
# Not along the axes, and nothing that float32 holds exactly: as scanners write it.
OBLIQUE = tiny_scans.rigid(degrees=(4, -3, 5), shift=(1.234567, -2.345678, 3.4567))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run, a calibration for it, and a patient: a brain with two bright balls."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("model")
    run = tiny_scans.run(folder)
    prior = tf_lesion.load(run)
    values, affine = tiny_scans.brain()
    for center, radius in (((-20, -10, 30), 12), ((30, -40, 10), 8)):
        ball = tiny_scans.blob(affine, values.shape, center, radius)
        values = np.where(ball & (values > 0), 1500, values)
    scan = tiny_scans.write(folder / "patient_t2.nii.gz", np.rint(values), OBLIQUE @ affine)
    residual = prior.detect(scan).volumes["residual"]
    limits = np.quantile(residual[residual > 0], [1 - rate for rate in RATES]).tolist()
    limits = dict(zip(RATES, limits, strict=True))
    path = tiny_scans.thresholds(folder / FILE_NAME, prior, prior.config.restoration, limits)
    prior = dataclasses.replace(prior, calibration=Calibration.load(path))
    return {"run": run, "prior": prior, "scan": scan, "limits": limits, "calibration": path}


def _restore(model, scan, out, *options):
    argv = ["--model", model["run"], "--input", scan, "--out", out]
    argv += ["--thresholds", model["calibration"], *options]  # as --calibration was called
    return restore_brats.main(list(map(str, argv)))


def _detect(*argv):
    return detect.main(list(map(str, argv)))


def _facts(folder):
    (path,) = folder.glob("*_restoration.json")
    return json.loads(path.read_text())


def _in_ras(path):
    return np.asanyarray(nib.as_closest_canonical(nib.load(path)).dataobj)


@pytest.fixture(scope="module")
def turned(model, tmp_path_factory):
    """{axes: folder with a scan and its maps}: one scan in six orientations and number types."""
    folder = tmp_path_factory.mktemp("turned")
    values, affine = load_scan(model["scan"]).data, nib.load(model["scan"]).affine
    for axes, dtype in TURNS.items():
        scan = folder / "scans" / axes / "p_t2.nii.gz"
        tiny_scans.write(scan, values.astype(dtype), affine, axes=axes, sform=2, qform=1)
    assert _restore(model, folder / "scans", folder / "maps") == 0
    for axes in TURNS:  # the scan beside its maps
        (folder / "scans" / axes / "p_t2.nii.gz").rename(folder / "maps" / axes / "p_t2.nii.gz")
    return {axes: folder / "maps" / axes for axes in TURNS}


def test_a_turned_scan_is_aligned_by_exactly_the_same_matrix(turned):
    settings = ScanSettings(voxel_size=tiny_scans.VOXEL_MM)
    first, other = (
        prepare_scan(turned[axes] / "p_t2.nii.gz", settings=settings) for axes in ("RAS", "PIR")
    )
    np.testing.assert_array_equal(first.scan_from_grid, other.scan_from_grid)
    assert np.abs(first.scan_from_grid - OBLIQUE).max() > 0
    np.testing.assert_allclose(first.scan_from_grid[:3, :3], OBLIQUE[:3, :3], atol=0.05)


@pytest.mark.parametrize("axes", list(TURNS)[1:])
def test_a_flipped_or_permuted_scan_gets_exactly_the_same_maps(turned, axes):
    for name in ("restored", "residual", "lesions_fpr_0.05", "lesions_fpr_0.2"):
        first = _in_ras(turned["RAS"] / f"p_t2_{name}.nii.gz")
        other = _in_ras(turned[axes] / f"p_t2_{name}.nii.gz")
        np.testing.assert_array_equal(first, other)
        assert first.any()
    facts = [_facts(turned[name])["lesions"]["fpr_0.05"] for name in ("RAS", axes)]
    assert facts[0]["count"] == facts[1]["count"]
    np.testing.assert_allclose(
        facts[0]["largest_center_mm"], facts[1]["largest_center_mm"], atol=2e-3
    )


@pytest.mark.parametrize("axes", list(TURNS))
def test_maps_have_the_grid_units_and_codes_of_the_scan_for_nibabel_and_itk(turned, axes):
    given = nib.load(turned[axes] / "p_t2.nii.gz")
    itk_given = sitk.ReadImage(str(turned[axes] / "p_t2.nii.gz"))
    for name in ("restored", "residual", "lesions_fpr_0.05"):
        path = turned[axes] / f"p_t2_{name}.nii.gz"
        written = nib.load(path)
        assert written.shape == given.shape
        np.testing.assert_array_equal(written.affine, given.affine)
        assert nib.aff2axcodes(written.affine) == tuple(axes)
        assert written.header.get_xyzt_units() == ("mm", "sec")
        assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 2)
        image = sitk.ReadImage(str(path))
        assert image.GetSize() == itk_given.GetSize()
        np.testing.assert_allclose(image.GetDirection(), itk_given.GetDirection(), atol=1e-6)
        np.testing.assert_allclose(image.GetOrigin(), itk_given.GetOrigin(), atol=1e-4)
        np.testing.assert_array_equal(
            sitk.GetArrayFromImage(image).T, np.asanyarray(written.dataobj)
        )
    assert nib.load(turned[axes] / "p_t2_lesions_fpr_0.05.nii.gz").get_data_dtype() == np.uint8


@pytest.mark.parametrize("sizes", [(2.5, 2.5, 2.5), (3, 3, 5), (5, 5, 5)])
def test_a_lesion_is_found_in_its_place_at_every_voxel_size(model, tmp_path, monkeypatch, sizes):
    def without_bright(restorer, observed, mask, slices, on_progress):
        return restoration.Restored(np.minimum(observed, 0.65), np.zeros_like(observed), {})

    monkeypatch.setattr(restoration, "restore", without_bright)
    brain, grid = tiny_scans.brain()
    zoom = np.diag([*(np.array(sizes) / tiny_scans.VOXEL_MM), 1])
    affine = grid @ zoom
    shape = np.ceil(np.array(brain.shape) / zoom.diagonal()[:3]).astype(int)
    values = 0.6 * ndimage.affine_transform(brain, zoom, output_shape=tuple(shape), order=1)
    ball = tiny_scans.blob(affine, values.shape, (-20, -20, 30), 20)
    values[ball] = brain.max()
    path = tiny_scans.write(tmp_path / "p.nii.gz", values.astype(np.int16), OBLIQUE @ affine)
    prior = dataclasses.replace(model["prior"], reference=None)  # intensities as they are
    maps = prior.detect(path, points=[Threshold(0.05, 0.1, 0.05)])
    found = maps.volumes["fpr_0.05"] > 0
    assert found.shape == tuple(shape)
    assert 2 * (found & ball).sum() / (found.sum() + ball.sum()) > 0.9
    facts = maps.facts["lesions"]["fpr_0.05"]
    blur = 0.2 if sizes[0] == 5 else 0.15  # a voxel of 5 mm is a quarter of the radius
    assert facts["largest_ml"] == pytest.approx(4 / 3 * np.pi * 2**3, rel=blur)
    center = OBLIQUE @ [-20, -20, 30, 1]
    np.testing.assert_allclose(facts["largest_center_mm"], center[:3], atol=1)


def test_the_facts_are_those_of_the_masks_written(turned, model):
    folder = turned["LPS"]
    facts = _facts(folder)
    voxel_ml = (tiny_scans.VOXEL_MM / 10) ** 3
    for rate, limit in model["limits"].items():
        name = f"fpr_{rate:g}"
        image = nib.load(folder / f"p_t2_lesions_{name}.nii.gz")
        mask = np.asanyarray(image.dataobj)
        parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        center = image.affine @ [*ndimage.center_of_mass(parts == sizes.argmax() + 1), 1]
        stated = facts["lesions"][name]
        assert stated["count"] == count > 1
        assert stated["volume_ml"] == pytest.approx(mask.sum() * voxel_ml, abs=2e-3)
        assert stated["largest_ml"] == pytest.approx(sizes.max() * voxel_ml, abs=2e-3)
        if (sizes == sizes.max()).sum() == 1:
            np.testing.assert_allclose(stated["largest_center_mm"], center[:3], atol=2e-3)
        assert (stated["target_fpr"], stated["threshold"]) == (rate, limit)
        assert stated["healthy_fpr"] == pytest.approx(rate * 0.99)
        assert facts["files"][name] == f"p_t2_lesions_{name}.nii.gz"
    assert facts["scan"]["orientation"] == "LPS"
    assert facts["versions"]["tensorflow"]
    assert facts["command"].startswith("restore_brats.py --model")
    assert facts["input"].endswith("scans/LPS/p_t2.nii.gz")


def test_brain_outside_the_models_window_is_said_not_to_be_examined(model, tmp_path):
    values, affine = tiny_scans.brain()
    whole = tiny_scans.write(tmp_path / "whole.nii", values, affine)
    moved = tiny_scans.write(
        tmp_path / "moved.nii", values, tiny_scans.rigid(shift=(50, 0, 0)) @ affine
    )
    detector = Detector(model["prior"], align="none")
    facts = detector.detect(whole).facts
    assert facts["examined_fraction"] > 0.97
    assert facts["warnings"] == []
    maps = detector.detect(moved)
    x0, x1, _, _ = model["prior"].data["crop"]
    inside = np.zeros(values.shape, bool)
    shift = 50 / tiny_scans.VOXEL_MM
    first, last = max(0, int(np.ceil(x0 - shift - 0.5))), int(np.floor(x1 - shift - 0.5))
    inside[first : last + 1] = True
    expected = (inside & (values > 0)).sum() / (values > 0).sum()
    assert maps.facts["examined_fraction"] == pytest.approx(expected, abs=0.04)
    assert not maps.volumes["residual"][last + 2 :].any()
    said = " ".join(maps.facts["warnings"])
    assert "of the brain were examined" in said
    assert "outside the crop" in said


def test_odd_scans_are_restored_with_a_warning_each(model, tmp_path):
    values, affine = tiny_scans.brain()
    dark_on_bright = np.where(values > 0, 1001 - 1000 * (values / values.max()) ** 4, 0)
    scans = {
        "unusual histogram": (dark_on_bright, affine),
        "few slices: 26, 8.0 mm apart": (values[:, :, :-1:2][:, :, :26], None),
        "overlap little": (values, tiny_scans.rigid(shift=(0, 0, 45)) @ affine),
    }
    thick = affine @ np.diag([1, 1, 2, 1])
    detector = Detector(model["prior"], align="none", slice_step=3)
    for warning, (scan, where) in scans.items():
        path = tiny_scans.write(tmp_path / "odd.nii", scan, thick if where is None else where)
        said = detector.detect(path).facts["warnings"]
        expected = "few slices" if where is None else warning
        assert any(expected in line for line in said), (warning, said)


def test_a_scan_that_knows_no_side_says_so_on_the_screen_and_in_the_facts(model, tmp_path, capsys):
    values, affine = tiny_scans.brain()
    path = tiny_scans.write(tmp_path / "p.nii", values, affine, sform=0, qform=0)
    options = ("--align", "center", "--slice-step", 12)
    assert _restore(model, path, tmp_path / "maps", *options) == 0
    assert "warning: p: the header knows no orientation" in capsys.readouterr().err
    facts = _facts(tmp_path / "maps")
    assert facts["scan"]["orientation_from"] == "nothing"
    assert "which side is left" in facts["warnings"][0]


def test_a_model_without_a_reference_says_so(tmp_path):
    prior = tf_lesion.load(tiny_scans.run(tmp_path, reference=False))
    path = tiny_scans.write(tmp_path / "p.nii", *tiny_scans.brain())
    facts = prior.detect(path, align="none", slice_step=9).facts
    assert facts["histogram_distance"] is None
    assert facts["lesions"] == {}
    assert any("no reference histogram" in warning for warning in facts["warnings"])


def test_the_histogram_distance_is_the_shift_between_two_histograms():
    mask = np.ones((4, 5, 6), bool)
    volume = np.linspace(0.1, 0.6, mask.size).reshape(mask.shape)
    assert histogram_distance(volume, mask, volume.ravel()) == pytest.approx(0, abs=1e-12)
    assert histogram_distance(volume, mask, volume.ravel() + 0.25) == pytest.approx(0.25)
    assert histogram_distance(volume, mask, np.full(9, 0.35)) == pytest.approx(0.125, rel=0.01)


def test_lesions_are_measured_in_milliliters_and_millimeters_of_the_scan():
    mask, residual = np.zeros((2, 9, 10, 11))
    mask[1:3, 1:3, 1:3] = 1
    mask[3, 3, 3] = 1  # touches by a corner
    mask[7, 7, 7:9] = 1
    residual[mask > 0] = 0.2
    residual[7, 7, 7] = 0.6
    affine = np.array([[-2.0, 0, 0, 10], [0, 0, 3, 20], [0, 1, 0, 30], [0, 0, 0, 1]])
    large, small = find_lesions(mask, residual, affine)
    assert large.volume_ml == pytest.approx(9 * 6e-3)
    assert small.volume_ml == pytest.approx(2 * 6e-3)
    assert small.center_mm == pytest.approx((-4, 42.5, 37))
    assert small.mean_residual == pytest.approx(0.4)
    assert find_lesions(0 * mask, residual, affine) == []


# Files, many scans ------------------------------------------------------------------------------


@pytest.fixture
def brats(model, tmp_path):
    """Two patients in the layout of BRATS, one with a segmentation, and a broken scan."""
    folder = tmp_path / "brats"
    for name in ("A_1", "B_2"):
        (folder / name).mkdir(parents=True)
        shutil.copy(model["scan"], folder / name / f"{name}_t2.nii.gz")
    shutil.copy(model["scan"], folder / "A_1" / "A_1_seg.nii.gz")
    (folder / "broken").mkdir()
    content = model["scan"].read_bytes()
    (folder / "broken" / "broken_t2.nii.gz").write_bytes(content[: len(content) // 2])
    return folder


@pytest.mark.slow
def test_one_bad_scan_does_not_stop_the_rest_and_a_second_run_skips_what_is_done(
    model, brats, tmp_path, capsys
):
    out = brats / "maps"
    assert _restore(model, brats, out) == 1
    assert "broken_t2.nii.gz" in capsys.readouterr().err
    rows = json.loads((out / "summary.json").read_text())["scans"]
    assert {row["name"]: row["status"] for row in rows} == {
        "A_1": "done",
        "B_2": "done",
        "broken": "failed",
    }
    assert "truncated" in rows[2]["reason"]
    assert _facts(out / "A_1")["truth"] == str(brats / "A_1" / "A_1_seg.nii.gz")
    assert _facts(out / "B_2")["truth"] is None
    assert all((out / row["facts"]).exists() for row in rows[:2])
    first = out / "A_1" / "A_1_t2_residual.nii.gz"
    before = first.stat().st_mtime_ns
    facts = out / "B_2" / "B_2_t2_restoration.json"
    facts.rename(f"{facts}.partial")  # as if it had been killed there
    shutil.copy(model["scan"], brats / "broken" / "broken_t2.nii.gz")
    assert _restore(model, brats, out) == 0
    rows = json.loads((out / "summary.json").read_text())["scans"]
    assert [row["status"] for row in rows] == ["skipped", "done", "done"]
    assert first.stat().st_mtime_ns == before
    assert _restore(model, brats, out, "--align", "none") == 1
    assert "made with another scan_settings; pass force" in capsys.readouterr().err
    assert _restore(model, brats, out, "--align", "none", "--force") == 0
    assert first.stat().st_mtime_ns > before
    assert _facts(out / "A_1")["scan_settings"]["align"] == "none"


@pytest.mark.slow
def test_a_scan_or_mask_replaced_under_its_name_is_not_done(model, tmp_path, capsys):
    folder, out = tmp_path / "scans", tmp_path / "maps"
    scan, mask = folder / "p_t2.nii.gz", folder / "p_mask.nii.gz"
    image = nib.load(model["scan"])
    brain = (image.get_fdata() > 0).astype(np.uint8)
    tiny_scans.write(mask, brain, image.affine)
    shutil.copy(model["scan"], scan)
    options = ("--align", "none", "--slice-step", 12, "--mask-pattern", "{subject}_mask.nii.gz")
    assert _restore(model, folder, out, *options) == 0
    facts = _facts(out / "p")
    assert len(facts["input_identity"]) == len(facts["brain_mask_identity"]) == 12
    kept, times = scan.read_bytes(), scan.stat()
    shutil.copy(model["scan"], scan)  # another time, the same content
    assert _restore(model, folder, out, *options) == 0
    assert "1 skipped" in capsys.readouterr().out
    tiny_scans.write(scan, image.get_fdata()[::-1], image.affine)
    os.utime(scan, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert _restore(model, folder, out, *options) == 1
    assert "made with another input_identity; pass force" in capsys.readouterr().err
    assert report.main(["--results", str(out), "--force"]) == 2
    assert "another file has taken its name" in capsys.readouterr().err
    scan.write_bytes(kept)
    brain[30:] = 0
    tiny_scans.write(mask, brain, image.affine)
    assert _restore(model, folder, out, *options) == 1
    assert "made with another brain_mask_identity" in capsys.readouterr().err


def test_a_scan_that_is_no_head_fails_with_a_picture_unless_that_is_allowed(
    model, tmp_path, capsys
):
    folder, out = tmp_path / "scans", tmp_path / "out"
    shutil.copytree(model["scan"].parent, folder / "good", ignore=shutil.ignore_patterns("run"))
    rng = np.random.default_rng(0)
    values = ndimage.gaussian_filter(rng.random((50, 60, 45)), 3)
    tiny_scans.write(folder / "noise" / "noise_t2.nii.gz", values.astype(np.float32), OBLIQUE)
    options = ("--align", "rigid", "--pattern", "**/*_t2.nii.gz")
    assert _restore(model, folder, out, *options) == 1
    rows = json.loads((out / "summary.json").read_text())["scans"]
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert "--allow-poor-alignment" in rows[1]["reason"]
    written = sorted(path.name for path in (out / "noise").iterdir())
    assert written == ["noise_t2_qc.png", "noise_t2_restoration.json.partial"]
    facts = json.loads((out / rows[0]["facts"]).read_text())
    table = pd.read_csv(out / "scans.csv")
    assert table["qc"].tolist() == ["failed", facts["qc"]["verdict"]]
    assert "--allow-poor-alignment" in table["qc_reasons"][0]
    assert facts["brain"]["kind"] == "stripped"
    assert facts["brain"]["overlap"] > 0.9
    capsys.readouterr()
    assert _restore(model, folder, out, *options, "--allow-poor-alignment") == 0
    assert "look at the result" in capsys.readouterr().err


def test_bids_derivatives_have_valid_names_sidecars_and_a_description(model, tmp_path):
    source = tmp_path / "bids"
    names = ("sub-01/ses-a/anat/sub-01_ses-a_T2w", "sub-02/anat/sub-02_acq-hi_T2w")
    for name in names:
        (source / name).parent.mkdir(parents=True)
        shutil.copy(model["scan"], source / f"{name}.nii.gz")
    old = source / "derivatives" / "x" / "sub-01" / "anat" / "sub-01_desc-old_T2w.nii.gz"
    old.parent.mkdir(parents=True)
    shutil.copy(model["scan"], old)
    out = source / "derivatives" / "lesions"
    assert _restore(model, source, out, "--bids-out") == 0
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    expected = {"dataset_description.json", "summary.json", "scans.csv", ".bidsignore"}
    expected.add("tf-lesion.log")
    for name in names:
        stem = name.removesuffix("_T2w")
        labels = [
            "desc-restored_T2w",
            "desc-residual_T2w",
            "desc-normalized_T2w",
            "desc-brain_mask",
        ]
        for rate in ("05", "20"):
            labels += [f"label-lesion_desc-fpr{rate}_mask", f"desc-fpr{rate}_dseg"]
        for label in labels:
            expected |= {f"{stem}_{label}.nii.gz", f"{stem}_{label}.json"}
        expected |= {f"{stem}_lesions.csv", f"{stem}_qc.png"}
    assert found == expected
    about = json.loads((out / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative"
    assert about["GeneratedBy"][0]["Name"] == "tf_lesion"
    assert about["SourceDatasets"] == [{"URL": source.as_uri()}]
    sidecar = json.loads((out / f"{names[1][:-4]}_label-lesion_desc-fpr05_mask.json").read_text())
    assert sidecar["Type"] == "Lesion"
    assert sidecar["Sources"] == [(source / f"{names[1]}.nii.gz").as_uri()]
    assert sidecar["target_fpr"] == 0.05
    assert _restore(model, source, out, "--bids-out") == 0
    rows = json.loads((out / "summary.json").read_text())["scans"]
    assert {row["status"] for row in rows} == {"skipped"}


def test_a_scan_that_is_not_here_and_a_data_set_of_others_are_refused(model, tmp_path, capsys):
    link = tmp_path / "p_t2.nii.gz"
    link.symlink_to("nowhere")
    assert _restore(model, link, tmp_path / "out") == 2
    assert "its content is not here" in capsys.readouterr().err
    theirs = tmp_path / "dataset_description.json"
    theirs.write_text('{"Name": "theirs"}')
    assert _restore(model, model["scan"], tmp_path, "--bids-out") == 2
    assert "describes another data set" in capsys.readouterr().err
    assert theirs.read_text() == '{"Name": "theirs"}'


def test_a_scan_with_any_name_becomes_a_bids_subject(tmp_path):
    subject = one_scan(tmp_path / "Brats17_X-1_t2.nii.gz")
    layout = layout_of(subject, tmp_path, bids=True)
    assert layout.volume("fpr_0.1").relative_to(tmp_path).as_posix() == (
        "sub-Brats17X1t2/anat/sub-Brats17X1t2_label-lesion_desc-fpr10_mask.nii.gz"
    )
    assert layout.volume("fpr_0.005").name.endswith("desc-fpr005_mask.nii.gz")
    names = ("病人", "病", "élève", "eleve", "🧠", "--")
    labels = [layout_of(one_scan(tmp_path / name), tmp_path, bids=True).prefix for name in names]
    assert labels[2:4] == ["sub-e9le8ve", "sub-eleve"]
    assert all(re.fullmatch("sub-[a-z0-9]+", label) for label in labels)
    assert len(set(labels)) == len(names)


def test_entities_of_bids_names_are_kept_and_there_is_one_description(tmp_path):
    path = tmp_path / "sub-01_ses-2_acq-a+b_desc-preproc_T2w.nii.gz"
    layout = layout_of(one_scan(path), tmp_path, bids=True)
    start = "sub-01/ses-2/anat/sub-01_ses-2_acq-a+b"
    files = (layout.facts, layout.volume("residual"), layout.volume("fpr_0.05"))
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        f"{start}_desc-preprocrestored_T2w.json",
        f"{start}_desc-preprocresidual_T2w.nii.gz",
        f"{start}_label-lesion_desc-preprocfpr05_mask.nii.gz",
    ]
    assert name_of(tmp_path / "sub-01_ses-2_FLAIR.nii.gz") == "sub-01_ses-2"
    for name in (layout.facts, layout.volume("residual")):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    assert find_results(tmp_path) == [layout.facts]
    assert is_map(layout.volume("residual"))
    assert not is_map(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "*.img"], "nothing matches"),
        (["--pattern", "**/*_t2*"], "Two scans of"),
        (["--mask", "mask.nii"], "give --mask-pattern"),
    ],
)
def test_a_folder_without_scans_or_with_two_of_one_name_is_refused(
    model, brats, tmp_path, capsys, options, message
):
    shutil.copytree(brats / "A_1", brats / "again")
    assert _restore(model, brats, tmp_path / "maps", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "maps").exists()


# As a library, and tf-lesion detect --------------------------------------------------------------


@pytest.mark.slow
def test_an_image_in_memory_gets_the_maps_of_its_file_and_saves_the_files_of_the_command(
    model, tmp_path
):
    prior = model["prior"]
    maps = prior.detect(nib.load(model["scan"]), slice_step=4)
    assert set(maps.masks) == {"fpr_0.05", "fpr_0.2"}
    assert maps.score is None
    assert maps.facts["input"] is None
    np.testing.assert_array_equal(maps.residual.affine, nib.load(model["scan"]).affine)
    assert maps.save(tmp_path / "memory")["files"]["residual"] == "scan_residual.nii.gz"
    prior.detect(model["scan"], slice_step=4).save(tmp_path / "library")
    given = (model["scan"], tmp_path / "command", "--model", model["run"], "--slice-step", 4)
    assert _detect(*given, "--calibration", model["calibration"]) == 0
    names = {path.name for path in (tmp_path / "library").iterdir()}
    written = {path.name for path in (tmp_path / "command").iterdir()}
    assert written == names | {"tf-lesion.log"}
    images = {"restored": maps.restored, "residual": maps.residual}
    images |= {f"lesions_{name}": mask for name, mask in maps.masks.items()}
    for name, image in images.items():
        written = nib.load(tmp_path / "command" / f"patient_t2_{name}.nii.gz")
        for other in (image, nib.load(tmp_path / "library" / f"patient_t2_{name}.nii.gz")):
            np.testing.assert_array_equal(other.get_fdata(), written.get_fdata())
            assert other.get_data_dtype() == written.get_data_dtype()
            for key in ("qform_code", "sform_code", "xyzt_units", "descrip", "cal_max"):
                assert other.header[key] == written.header[key]
    facts = [_facts(tmp_path / folder) for folder in ("library", "command")]
    for each in facts:
        assert each.pop("command") == "" or each is facts[1]
        each.pop("model_path")
    assert facts[0] == facts[1]
    with pytest.raises(FileExistsError, match="pass --force"):
        maps.save(tmp_path / "memory")


@pytest.mark.slow
def test_detect_takes_what_the_run_was_calibrated_with_and_says_why_not(model, tmp_path, capsys):
    run = shutil.copytree(model["run"], tmp_path / "run")
    quick = (model["scan"], "--model", run, "--slice-step", 12, "--align", "none")
    assert _detect(*quick[:1], tmp_path / "plain", *quick[1:]) == 0
    assert "No lesion maps: " in (said := capsys.readouterr().err)
    assert "has no calibration; make one" in said
    assert _facts(tmp_path / "plain")["lesions"] == {}
    chosen = model["prior"].config.restoration.changed(tv_weight=0.3, steps=2)
    steps = "signed,median=3"
    points = {name: (Threshold(0.05, 0.01, 0.05),) for name in ("residual", "score")}
    Calibration(
        model["prior"].identity,
        model["prior"].describe(chosen),
        points,
        tv_weight=0.3,
        postprocessing=steps,
        cache_identity="0123456789ab",
    ).save(run / FILE_NAME)
    assert _detect(*quick[:1], tmp_path / "own", *quick[1:]) == 0
    facts = _facts(tmp_path / "own")
    assert (facts["tv_weight"], facts["steps"], facts["postprocessing"]) == (0.3, 2, steps)
    always = {"restored", "residual", "normalized", "brain"}
    assert set(facts["files"]) == always | {"score", "fpr_0.05", "labels_fpr_0.05"}
    assert facts["calibration_cache_identity"] == "0123456789ab"
    capsys.readouterr()
    other = ("--tv-weight", 0.5, "--steps", 1, "--postprocess", "none")
    assert _detect(*quick[:1], tmp_path / "other", *quick[1:], *other) == 0
    assert set(_facts(tmp_path / "other")["files"]) == always
    assert "No lesion maps: The calibration was made with tv_weight 0.3, not 0.5" in (
        capsys.readouterr().err
    )
    other = ("--tv-weight", 0.5, "--calibration", run / FILE_NAME)
    assert _detect(*quick[:1], tmp_path / "refused", *quick[1:], *other) == 2
    assert "false positive rates hold only there" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_the_form_of_bids_apps_takes_participants_and_writes_derivatives(model, tmp_path, capsys):
    source, out = tmp_path / "bids", tmp_path / "out"
    for name in ("sub-01/anat/sub-01_T2w", "sub-02/anat/sub-02_T2w"):
        (source / name).parent.mkdir(parents=True)
        shutil.copy(model["scan"], source / f"{name}.nii.gz")
    given = ("--model", model["run"], "--slice-step", 12, "--align", "none")
    assert _detect(source, out, "participant", "--participant-label", "02", *given) == 0
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.nii.gz")}
    stem = "sub-02/anat/sub-02_desc"
    names = ("restored_T2w", "residual_T2w", "normalized_T2w", "brain_mask")
    assert found == {f"{stem}-{name}.nii.gz" for name in names}
    assert (out / "dataset_description.json").exists()
    wrong = ("participant", "--participant-label", "sub-01", "07")
    assert _detect(source, tmp_path / "no", *wrong, *given) == 2
    assert "No scans of sub-07" in capsys.readouterr().err
    alone = (model["scan"], tmp_path / "no", *wrong, *given)
    assert _detect(*alone) == 2
    assert "--participant-label needs a BIDS dataset" in capsys.readouterr().err


# One scan ----------------------------------------------------------------------------------------


def test_without_steps_the_restored_scan_is_the_scan_there_and_back_again(model, tmp_path):
    assert _restore_plain(model, model["scan"], tmp_path, "--steps", 0) == 0
    observed = nib.load(model["scan"]).get_fdata()
    restored = nib.load(tmp_path / "patient_t2_restored.nii.gz").get_fdata()
    inside = restored > 0
    assert 0.6 < inside.sum() / (observed > 0).sum() <= 1
    assert not inside[observed == 0].any()
    assert np.corrcoef(restored[inside], observed[inside])[0, 1] > 0.8
    assert not nib.load(tmp_path / "patient_t2_residual.nii.gz").get_fdata().any()


def _restore_plain(model, scan, out, *options):
    argv = ["--model", model["run"], "--input", scan, "--out", out, *options]
    return restore_brats.main(list(map(str, argv)))


def test_slices_left_out_are_interpolated_between_their_neighbors(model):
    every, second = (
        model["prior"].detect(model["scan"], slice_step=step, align="none").volumes["residual"]
        for step in (1, 2)
    )
    assert 0.9 < (second > 0).sum() / (every > 0).sum() < 1.1
    brain = every > 0
    assert brain.any()
    assert np.corrcoef(every[brain], second[brain])[0, 1] > 0.5
    with pytest.raises(InputError, match="slice_step of 1 or more, got 0"):
        model["prior"].detect(model["scan"], slice_step=0)


def test_steps_leave_a_residual_inside_the_brain_only(turned):
    residual = nib.load(turned["RAS"] / "p_t2_residual.nii.gz").get_fdata()
    brain = nib.load(turned["RAS"] / "p_t2.nii.gz").get_fdata() > 0
    assert (residual[brain] > 0).mean() > 0.6
    assert not residual[~brain].any()
    facts = _facts(turned["RAS"])
    assert facts["steps"] == 3
    assert np.shape(facts["scan_from_grid"]) == (4, 4)


def test_existing_maps_are_kept_without_force(model, tmp_path, capsys):
    precious = tmp_path / "patient_t2_residual.nii.gz"
    precious.write_text("precious")
    assert _restore_plain(model, model["scan"], tmp_path) == 2
    assert "pass --force" in capsys.readouterr().err
    assert precious.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [precious.name]


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (np.zeros((8, 8, 8), np.int16), "every voxel is 0"),
        (np.full((8, 8, 8), np.nan, np.float32), "NaN"),
        (np.ones((8, 8, 8, 3), np.int16), "got 4-D data"),
        (None, "truncated"),
    ],
)
def test_scans_that_cannot_be_used_are_one_line_and_leave_nothing(
    model, tmp_path, capsys, volume, message
):
    scan = tmp_path / "bad_t2.nii.gz"
    if volume is None:
        content = model["scan"].read_bytes()
        scan.write_bytes(content[: len(content) // 2])
    else:
        nib.save(nib.Nifti1Image(volume, np.eye(4)), scan)
    assert _restore_plain(model, scan, tmp_path / "maps") == 2
    error = capsys.readouterr().err
    assert "bad_t2.nii.gz" in error
    assert message in error
    assert not (tmp_path / "maps").exists()
