"""Rigid alignment recovers known positions; resampling goes there and back; the brain is found."""

import numpy as np
import pytest
import tiny_scans
from scipy import ndimage

from tf_lesion.files import InputError
from tf_lesion.scans import alignment, brain_mask, itk
from tf_lesion.scans.volumes import MniGrid, load_scan

GRID = MniGrid(tiny_scans.VOXEL_MM)
# Points at the brain's surface and center, mm.
POINTS = np.array(
    [[0, -18, 10], [60, -18, 10], [-60, -18, 10], [0, 60, 10], [0, -95, 0], [0, 0, 70]]
)
POINTS = np.c_[POINTS, np.ones(len(POINTS))].T


def largest_error(found, expected):
    return np.linalg.norm(((found - expected) @ POINTS)[:3], axis=0).max()


def crop_faces(values, affine, low, high):
    """Cut voxels off both ends of each axis: another field of view of the same scan."""
    cut = values[tuple(slice(a, n - b) for a, b, n in zip(low, high, values.shape, strict=True))]
    return cut, affine @ np.vstack([np.c_[np.eye(3), low], [0, 0, 0, 1]])


# 1 mm is a quarter of the voxels that these scans have.
POSES = {
    "in place": {},
    "nodding by 20 degrees": {"degrees": (20, 0, 0)},
    "turned about all axes, 90 mm away": {"degrees": (-15, 12, 15), "shift": (50, -40, 60)},
    "rolled by 20 degrees": {"degrees": (0, 20, 0), "shift": (-120, 130, 70)},
}


@pytest.mark.parametrize("pose", POSES)
def test_a_stripped_brain_in_a_known_position_is_found_within_1_mm(pose):
    values, affine = tiny_scans.brain()
    moved = tiny_scans.rigid(**POSES[pose])
    found = alignment.align(values, moved @ affine, brain=values > 0, voxel_size=4)
    assert largest_error(found.scan_from_grid, moved) < 1.0
    assert found.mutual_information > 0.4


@pytest.mark.parametrize("pose", ["nodding by 20 degrees", "turned about all axes, 90 mm away"])
def test_a_head_with_its_skull_in_a_known_position_is_found_within_2_mm(pose):
    values, affine = crop_faces(*tiny_scans.head(), (0, 2, 5), (3, 0, 2))
    moved = tiny_scans.rigid(**POSES[pose])
    found = alignment.align(values, moved @ affine, voxel_size=4)
    assert largest_error(found.scan_from_grid, moved) < 2.0
    mask = alignment.atlas_mask_on(GRID, found.atlas_from_grid)
    truth = alignment.atlas_mask_on(GRID)
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.95


def test_a_smaller_brain_is_aligned_without_being_scaled_and_the_atlas_shrinks_for_a_head():
    scale = np.diag([0.88, 0.9, 0.88, 1])
    values, affine = tiny_scans.brain()
    moved = tiny_scans.rigid(degrees=(14, 0, 0), shift=(9, 5, -20))
    found = alignment.align(values, moved @ scale @ affine, brain=values > 0, voxel_size=4)
    rotation = found.scan_from_grid[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    turned = np.rad2deg(np.arccos((np.trace(rotation.T @ moved[:3, :3]) - 1) / 2))
    assert turned < 1.5
    head, affine = tiny_scans.head()
    fit = alignment.align(head, moved @ scale @ affine, voxel_size=4).atlas_from_grid
    assert 1.05 < np.cbrt(np.linalg.det(fit[:3, :3])) < 1.2  # the mask is as much smaller


def test_alignment_of_the_same_scan_twice_is_identical_and_leaves_the_threads_alone():
    import SimpleITK as sitk  # noqa: N813

    values, affine = tiny_scans.head()
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    first, second = (alignment.align(values, affine, voxel_size=4) for _ in range(2))
    np.testing.assert_array_equal(first.scan_from_grid, second.scan_from_grid)
    np.testing.assert_array_equal(first.atlas_from_grid, second.atlas_from_grid)
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == before
    with itk.one_thread():
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 1


def test_center_only_moves_and_none_does_nothing():
    values, affine = tiny_scans.brain()
    moved = tiny_scans.rigid(shift=(30, -20, 10))
    found = alignment.align(values, moved @ affine, mode="center", brain=values > 0)
    assert largest_error(found.scan_from_grid, moved) < 0.5
    np.testing.assert_array_equal(found.scan_from_grid[:3, :3], np.eye(3))
    untouched = alignment.align(values, moved @ affine, mode="none", brain=values > 0)
    np.testing.assert_array_equal(untouched.scan_from_grid, np.eye(4))


def test_resampling_in_place_is_the_identity_to_the_last_voxel():
    values = np.random.default_rng(0).normal(size=GRID.shape).astype(np.float32)
    there = alignment.to_grid(values, GRID.affine, np.eye(4), GRID)
    np.testing.assert_array_equal(there, values)
    back = alignment.to_scan(there, GRID, np.eye(4), GRID.shape, GRID.affine, order=0)
    np.testing.assert_array_equal(back, values)


@pytest.mark.parametrize("order", [0, 1])
def test_a_linear_ramp_is_resampled_exactly_up_to_rounding(order):
    shape, affine = (60, 70, 50), np.diag([3.0, 2.5, 4.0, 1.0])
    affine[:3, 3] = -80, -100, -70
    transform = tiny_scans.rigid(degrees=(5, -8, 10), shift=(4, 5, 6))
    index = np.indices(shape).reshape(3, -1)
    ramp = (affine[:3, :3] @ index + affine[:3, 3:])[1].reshape(shape)
    found = alignment.to_grid(ramp, affine, transform, GRID, order=order)
    inside = alignment.to_grid(np.ones(shape), affine, transform, GRID, order=1) > 0.999
    inside = ndimage.binary_erosion(inside, iterations=2)
    index = np.indices(GRID.shape).reshape(3, -1)
    points = transform @ GRID.affine @ np.vstack([index, np.ones(index.shape[1])])
    error = np.abs(found - points[1].reshape(GRID.shape))[inside]
    assert inside.sum() > 1000
    assert error.max() < (1e-3 if order == 1 else 0.5 * np.linalg.norm([3, 2.5, 4]))


def test_labels_keep_their_values_and_type():
    labels = np.random.default_rng(0).choice([0, 1, 2, 4], size=GRID.shape).astype(np.uint8)
    transform = tiny_scans.rigid(degrees=(7, 3, 4))
    found = alignment.to_grid(labels, GRID.affine, transform, GRID, order=0)
    assert found.dtype == np.uint8
    assert set(np.unique(found)) == {0, 1, 2, 4}


def test_fine_noise_is_averaged_when_the_grid_is_coarser():
    noise = np.random.default_rng(0).normal(size=(180, 200, 160)).astype(np.float32)
    fine = np.diag([1.0, 1.0, 1.0, 1.0])
    fine[:3, 3] = -90, -110, -70
    found = alignment.to_grid(noise, fine, np.eye(4), GRID)
    assert found[10:40, 12:45, 5:35].std() < 0.2


def scan_of(values, affine, tmp_path):
    return load_scan(tiny_scans.write(tmp_path / "t2.nii", values, affine))


def test_a_stripped_brain_is_told_from_a_head(tmp_path):
    values, affine = tiny_scans.brain()
    brain = brain_mask.find_brain(scan_of(values, affine, tmp_path))
    np.testing.assert_array_equal(brain, ndimage.binary_fill_holes(values > 0))
    assert brain_mask.find_brain(scan_of(*tiny_scans.head(), tmp_path)) is None
    head, affine = tiny_scans.head()
    silent = np.where(head > 5 * tiny_scans.AIR_NOISE, head, 0)  # its air set to zero
    assert brain_mask.find_brain(scan_of(silent, affine, tmp_path)) is None


def test_specks_negative_values_and_holes_do_not_change_the_brain(tmp_path):
    values, affine = tiny_scans.brain()
    expected = ndimage.binary_fill_holes(values > 0)
    center = tuple(np.array(values.shape) // 2)
    dirty = values.copy()
    dirty[center] = 0  # a hole
    dirty[2:4, 2:4, 2:4] = 300  # a speck
    dirty[5, 5, 5] = -60
    brain = brain_mask.find_brain(scan_of(dirty, affine, tmp_path))
    np.testing.assert_array_equal(brain, expected)


def test_background_need_not_be_zero(tmp_path):
    values, affine = tiny_scans.brain()
    brain = brain_mask.find_brain(scan_of(values - 500, affine, tmp_path))
    np.testing.assert_array_equal(brain, ndimage.binary_fill_holes(values > 0))


@pytest.mark.parametrize("order", [1, 3])
def test_resampling_a_stripped_brain_does_not_move_its_rim(tmp_path, order):
    values, affine = tiny_scans.brain(2.0)
    expected = brain_mask.find_brain(scan_of(values, affine, tmp_path))
    finer = ndimage.affine_transform(
        values, np.full(3, 0.75), output_shape=(np.array(values.shape) - 1) * 4 // 3, order=order
    )
    finer_affine = affine @ np.diag([0.75, 0.75, 0.75, 1])
    found = brain_mask.find_brain(scan_of(finer, finer_affine, tmp_path))
    untrimmed, trimmed = (brain_mask.liters(m, finer_affine) for m in (finer, found))
    true = brain_mask.liters(expected, affine)
    assert untrimmed > 1.05 * true
    assert abs(trimmed - true) < 0.5 * (untrimmed - true)


def test_mask_modes_and_files_go_before_the_rule(tmp_path):
    values, affine = tiny_scans.brain()
    scan = scan_of(values, affine, tmp_path)
    assert brain_mask.find_brain(scan, mode="atlas") is None
    half = values > 0
    half[: half.shape[0] // 2] = False
    path = tiny_scans.write(tmp_path / "mask.nii", half.astype(np.uint8), affine)
    np.testing.assert_array_equal(brain_mask.find_brain(scan, mask_path=path), half)


def test_an_empty_mask_is_refused(tmp_path):
    values, affine = tiny_scans.brain()
    path = tiny_scans.write(tmp_path / "mask.nii", np.zeros(values.shape, np.uint8), affine)
    with pytest.raises(InputError, match=r"mask\.nii: expected a brain mask of at least"):
        brain_mask.find_brain(scan_of(values, affine, tmp_path), mask_path=path)
