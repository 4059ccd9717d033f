"""Painted heads: whole scans with skull, and the truth about them."""

import nibabel as nib
import numpy as np
import pytest
from tiny_heads import PAINTED_MM, write_label_map

from preprocessing.phantom import __main__ as phantom
from preprocessing.phantom.heads import write
from preprocessing.phantom.heads.anatomy import load_head
from preprocessing.phantom.heads.paint import paint_head
from tf_lesion.files import InputError
from tf_lesion.scans.finder import pose
from tf_lesion.scans.finder.canonical import landmarks


@pytest.fixture(scope="module")
def label_maps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    write_label_map(folder / "head.nii.gz")
    return folder


@pytest.fixture(scope="module")
def anatomy(label_maps):
    return load_head(label_maps / "head.nii.gz")


def test_a_head_is_a_function_of_seed_and_number(anatomy):
    first, again = (paint_head([anatomy], 3, 5, fine_mm=PAINTED_MM) for _ in range(2))
    np.testing.assert_array_equal(first.image, again.image)
    other = paint_head([anatomy], 3, 6, fine_mm=PAINTED_MM)
    assert other.image.shape != first.image.shape or not np.array_equal(other.image, first.image)


def test_landmarks_lie_where_the_geometry_says(anatomy):
    for number in range(8):
        head = paint_head([anatomy], 1, number, fine_mm=PAINTED_MM)
        found = head.geometry.mni(head.landmarks)
        expected = pose.apply(anatomy.mni_from_head, anatomy.landmarks)
        assert np.linalg.norm(found - expected, axis=1).max() < 0.5
        true = write.true_pose(head)
        assert write.landmark_errors(head.landmarks, true, np.linalg.inv(true)).max() < 1e-9


def test_stripped_heads_are_dark_outside_of_the_mask(anatomy):
    heads = [paint_head([anatomy], 2, number, fine_mm=PAINTED_MM) for number in range(24)]
    stripped = [head for head in heads if head.facts["cover"] == "stripped"]
    assert 2 <= len(stripped) < len(heads)
    for head in stripped:
        far = write.on_acquired(head.outside, head) > 3 * PAINTED_MM
        assert np.count_nonzero(head.image[far]) <= 0.02 * far.sum()


def test_files_of_a_head_share_a_grid(anatomy, tmp_path):
    truth = write.write_head(tmp_path, [anatomy], 1, 0, fine_mm=PAINTED_MM)
    scan, mask, seg = (nib.load(tmp_path / f"head-0000_{n}.nii.gz") for n in ("T2w", "mask", "seg"))
    assert scan.shape == mask.shape == seg.shape
    np.testing.assert_array_equal(scan.affine, mask.affine)
    assert len(truth["landmarks_mm"]) == len(landmarks())


def test_the_command_writes_heads(label_maps, tmp_path, capsys):
    none = ("--healthy", "0", "--patients", "0", "--seed", "1", "--voxel-size", "4")
    arguments = ["--out", str(tmp_path / "cohort"), *none, "--heads", "2"]
    assert phantom.main([*arguments, "--label-maps", str(label_maps)]) == 0
    assert len(list((tmp_path / "cohort" / "heads").glob("head-000[01]*"))) == 8
    assert phantom.main([*arguments, "--force"]) == 2
    assert "--label-maps" in capsys.readouterr().err


def test_a_map_without_the_landmarks_is_refused(tmp_path):
    labels = np.zeros((40, 40, 40), np.int16)
    labels[10:30, 10:30, 10:30] = 2
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "part.nii.gz")
    with pytest.raises(InputError, match=r"part\.nii\.gz: expected a whole head.* 3, 7, 8"):
        load_head(tmp_path / "part.nii.gz")
