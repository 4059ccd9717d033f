"""One scan through the command line: maps come back in the scan's own grid."""

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import small_config

import restore_brats
from preprocessing import camcan
from preprocessing.phantom import HEALTHY, PATIENT
from preprocessing.phantom.__main__ import subject_files, write_cohort
from tf_lesion.caches.slices import SliceCache
from tf_lesion.training.runs import Run
from tf_lesion.training.trainer import Trainer

VOXEL_SIZE = 4  # mm


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Two healthy scans, one patient, their cache, and a run with untrained weights."""
    folder = tmp_path_factory.mktemp("cohort")
    scans = folder / "scans"
    write_cohort(scans, healthy=2, patients=1, seed=3, voxel_size=VOXEL_SIZE)
    argv = ["--input", str(scans / "healthy"), "--out", str(folder / "healthy.h5")]
    assert camcan.main([*argv, "--voxel-size", str(VOXEL_SIZE), "--test-subjects", "1"]) == 0
    run = Run(folder / "run")
    with SliceCache(folder / "healthy.h5", "Train") as train:
        size = {"height": train.shape[0], "width": train.shape[1]}
        config = small_config(network=size, restoration={"steps": 3, "gradient_clip": 20.0})
        run.write(config, train)
        Trainer(run, config, train=train, test=train).save()
    return {
        "run": run.folder,
        "patient": scans / subject_files(PATIENT, 0)[0],
        "healthy": scans / subject_files(HEALTHY, 0)[0],
    }


def _restore(cohort, scan, out, *options):
    argv = ["--model", str(cohort["run"]), "--input", str(scan), "--out", str(out)]
    return restore_brats.main([*argv, *map(str, options)])


def _as_oriented(image, axes, dtype, path):
    """The scan in another orientation and type."""
    start = nib.orientations.io_orientation(image.affine)
    target = nib.orientations.axcodes2ornt(axes)
    turned = image.as_reoriented(nib.orientations.ornt_transform(start, target))
    data = np.round(turned.get_fdata()).astype(dtype)
    out = nib.Nifti1Image(data, turned.affine)
    out.header.set_xyzt_units("mm", "sec")
    out.set_qform(turned.affine, 1)
    out.set_sform(turned.affine, 2)
    nib.save(out, path)
    return path


@pytest.mark.parametrize(
    ("axes", "dtype"), [("LPS", np.int16), ("PIR", np.float32), ("ASL", np.uint16)]
)
def test_maps_come_back_in_shape_affine_and_units_of_the_scan(cohort, tmp_path, axes, dtype):
    source = nib.load(cohort["patient"])
    scan = _as_oriented(source, axes, dtype, tmp_path / "p_t2.nii.gz")
    assert _restore(cohort, scan, tmp_path / "maps", "--steps", 0) == 0
    given = nib.load(scan)
    for name in ("restored", "residual"):
        written = nib.load(tmp_path / "maps" / f"p_t2_{name}.nii.gz")
        assert written.shape == given.shape
        np.testing.assert_allclose(written.affine, given.affine, atol=1e-5)
        assert written.affine.dtype == np.float64
        assert nib.aff2axcodes(written.affine) == tuple(axes)
        assert written.header.get_xyzt_units() == ("mm", "sec")
        assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 2)
    observed = given.get_fdata()
    # No step taken: the restored image is the scan itself, there and back again.
    restored = nib.load(tmp_path / "maps" / "p_t2_restored.nii.gz").get_fdata()
    inside = restored > 0
    assert 0.6 < inside.sum() / (observed > 0).sum() <= 1
    assert not inside[observed == 0].any()
    assert np.corrcoef(restored[inside], observed[inside])[0, 1] > 0.8
    assert not nib.load(tmp_path / "maps" / "p_t2_residual.nii.gz").get_fdata().any()


def test_steps_leave_a_residual_inside_the_brain_only(cohort, tmp_path):
    assert _restore(cohort, cohort["patient"], tmp_path) == 0
    stem = cohort["patient"].name.removesuffix(".nii.gz")
    residual = nib.load(tmp_path / f"{stem}_residual.nii.gz").get_fdata()
    brain = nib.load(cohort["patient"]).get_fdata() > 0
    assert (residual[brain] > 0).mean() > 0.6
    assert not residual[~brain].any()
    facts = json.loads((tmp_path / f"{stem}_restoration.json").read_text())
    assert facts["steps"] == 3
    assert np.shape(facts["scan_from_grid"]) == (4, 4)


def test_slices_left_out_are_interpolated_between_their_neighbors(cohort, tmp_path):
    residuals = []
    for step in (1, 2):
        assert _restore(cohort, cohort["patient"], tmp_path / str(step), "--slice-step", step) == 0
        name = cohort["patient"].name.removesuffix(".nii.gz") + "_residual.nii.gz"
        residuals.append(nib.load(tmp_path / str(step) / name).get_fdata())
    every, second = residuals
    assert 0.9 < (second > 0).sum() / (every > 0).sum() < 1.1
    brain = every > 0
    assert np.corrcoef(every[brain], second[brain])[0, 1] > 0.5
    assert _restore(cohort, cohort["patient"], tmp_path / "none", "--slice-step", 0) == 2


def test_existing_maps_are_kept_without_force(cohort, tmp_path, capsys):
    stem = cohort["patient"].name.removesuffix(".nii.gz")
    precious = tmp_path / f"{stem}_residual.nii.gz"
    precious.write_text("precious")
    assert _restore(cohort, cohort["patient"], tmp_path) == 2
    assert "pass --force" in capsys.readouterr().err
    assert precious.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [precious.name]


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (np.zeros((8, 8, 8), np.int16), "empty|constant|zero"),
        (np.full((8, 8, 8), np.nan, np.float32), "NaN"),
        (np.ones((8, 8, 8, 3), np.int16), "4"),
    ],
)
def test_scans_that_cannot_be_used_are_named_and_leave_nothing(
    cohort, tmp_path, capsys, volume, message
):
    scan = tmp_path / "bad_t2.nii.gz"
    nib.save(nib.Nifti1Image(volume, np.eye(4)), scan)
    assert _restore(cohort, scan, tmp_path / "maps") == 2
    error = capsys.readouterr().err
    assert "bad_t2.nii.gz" in error
    assert any(part in error for part in message.split("|"))
    assert not (tmp_path / "maps").exists()


def test_a_truncated_scan_is_one_line(cohort, tmp_path, capsys):
    content = cohort["healthy"].read_bytes()
    scan = tmp_path / "cut.nii.gz"
    scan.write_bytes(content[: len(content) // 2])
    assert _restore(cohort, scan, tmp_path / "maps") == 2
    assert "cut.nii.gz" in capsys.readouterr().err
