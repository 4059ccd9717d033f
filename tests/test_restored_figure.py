"""The picture of a scan: which slice, how large, and what is missing when it cannot be drawn."""

import json

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

from eval import restored_figure

SHAPE, LESION_Z = (24, 30, 12), 7


@pytest.fixture
def results(tmp_path):
    """Maps of a scan with a lesion that is largest in one slice, and its segmentation."""
    brain = np.zeros(SHAPE, np.float32)
    brain[4:20, 5:26] = 0.4
    lesion = np.zeros(SHAPE, np.float32)
    lesion[8:12, 8:12, LESION_Z] = lesion[8:10, 8:10, LESION_Z + 1] = 1
    volumes = {"restored": brain, "residual": lesion / 2, "fpr_0.01": lesion}
    scans = {"case_t2": brain + lesion / 2, "case_seg": lesion}
    out = tmp_path / "maps"
    out.mkdir()
    for path, volume in {
        **{out / f"case_t2_{name}.nii.gz": volume for name, volume in volumes.items()},
        **{tmp_path / f"{name}.nii.gz": volume for name, volume in scans.items()},
    }.items():
        nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2, 2, 1])), path)
    facts = {
        "name": "case",
        "truth": str(tmp_path / "case_seg.nii.gz"),
        "input": str(tmp_path / "case_t2.nii.gz"),
        "lesions": {},
        "files": {name: f"case_t2_{name}.nii.gz" for name in volumes},
    }
    (out / "case_t2_restoration.json").write_text(json.dumps(facts))
    return out


def test_the_slice_is_the_one_with_most_lesion():
    lesion = np.zeros(SHAPE)
    lesion[2:4, 2:4, 3] = lesion[5, 5, 9] = 1
    assert restored_figure.chosen_slice(lesion) == 3


@pytest.mark.parametrize(("truth", "title"), [(True, "found (red), true (blue)"), (False, "found")])
def test_four_panels_show_the_same_slice(results, truth, title):
    if not truth:
        (results.parent / "case_seg.nii.gz").unlink()
    axes = restored_figure.draw(results).axes
    assert [axis.get_title() for axis in axes] == ["scan", "restored", "residual", title]
    shapes = {axis.images[0].get_array().shape for axis in axes}
    assert shapes == {(25, 20)}  # the brain with 2 voxels around it
    assert axes[2].images[0].get_array().max() == 0.5


def test_the_command_writes_a_small_picture_and_overwrites_none(results, tmp_path, capsys):
    argv = ["--results", str(results), "--out", str(tmp_path / "restored.png")]
    assert restored_figure.main(argv) == 0
    assert imread(tmp_path / "restored.png").ndim == 3
    assert restored_figure.main(argv) == 2
    assert "--force" in capsys.readouterr().err


def test_a_folder_without_maps_is_refused(tmp_path, capsys):
    assert restored_figure.main(["--results", str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    assert "Expected the maps of one scan" in capsys.readouterr().err
