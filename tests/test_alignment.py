"""Rigid alignment recovers known positions; resampling goes there and back; the brain is found."""

import numpy as np
import pytest
import tiny_scans
from scipy import ndimage

from tf_lesion.files import InputError
from tf_lesion.scans import alignment, brain_mask, intensity, itk
from tf_lesion.scans.finder.find import FoundBrain
from tf_lesion.scans.volumes import MniGrid, load_scan

GRID = MniGrid(tiny_scans.VOXEL_MM)
# Points at the brain's surface and center, mm.
POINTS = np.array(
    [[0, -18, 10], [60, -18, 10], [-60, -18, 10], [0, 60, 10], [0, -95, 0], [0, 0, 70]]
)
POINTS = np.c_[POINTS, np.ones(len(POINTS))].T


def largest_error(found, expected):
    return np.linalg.norm(((found - expected) @ POINTS)[:3], axis=0).max()


def aligned(values, affine, start, **settings):
    return alignment.align(values, affine, brain=values > 0, start=start, voxel_size=4, **settings)


# 1 mm is a quarter of the voxels that these scans have; starts are as far off as the finder's.
STARTS = {
    "in place": {},
    "nodding by 10 degrees": {"degrees": (10, 0, 0)},
    "turned about all axes, 8 mm away": {"degrees": (-5, 6, 5), "shift": (5, -4, 6)},
    "rolled by 10 degrees": {"degrees": (0, 10, 0), "shift": (-4, 5, 3)},
}


@pytest.mark.parametrize("start", STARTS)
def test_a_brain_is_aligned_within_1_mm_from_a_start_nearby(start):
    values, affine = tiny_scans.brain()
    moved = tiny_scans.rigid(degrees=(30, 20, -25), shift=(50, -40, 60))
    found = aligned(values, moved @ affine, moved @ tiny_scans.rigid(**STARTS[start]))
    assert largest_error(found.scan_from_grid, moved) < 1.0
    assert found.mutual_information > 0.4
    assert (found.moved_mm > 5) == (start != "in place")


def test_a_smaller_brain_is_aligned_without_being_scaled():
    scale = np.diag([0.88, 0.9, 0.88, 1])
    values, affine = tiny_scans.brain()
    moved = tiny_scans.rigid(degrees=(14, 0, 0), shift=(9, 5, -20))
    start = moved @ np.diag([0.9, 0.9, 0.9, 1]) @ tiny_scans.rigid(degrees=(6, 0, 5))
    found = aligned(values, moved @ scale @ affine, start)
    rotation = found.scan_from_grid[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    turned = np.rad2deg(np.arccos((np.trace(rotation.T @ moved[:3, :3]) - 1) / 2))
    assert turned < 1.5


def test_towards_the_finder_keeps_the_scale_of_the_registration():
    values, affine = tiny_scans.brain()
    seen = tiny_scans.rigid(degrees=(8, 0, 0), shift=(0, 6, 0))
    placed = aligned(values, affine, tiny_scans.rigid())
    between = alignment.towards(placed, seen)
    scales = [np.linalg.det(each.scan_from_mni[:3, :3]) for each in (placed, between)]
    assert scales[0] == pytest.approx(scales[1])
    rotation = between.scan_from_grid[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    turned, whole = (
        np.arccos((np.trace(a[:3, :3].T @ b[:3, :3]) - 1) / 2)
        for a, b in (
            (placed.scan_from_grid, between.scan_from_grid),
            (placed.scan_from_grid, seen),
        )
    )
    assert turned == pytest.approx(alignment.FINDER_SHARE * whole)


def test_a_background_within_the_intensities_does_not_matter():
    values, affine = tiny_scans.brain()
    start = tiny_scans.rigid(degrees=(5, 5, 0))
    scored = np.where(values > 0, values - values[values > 0].mean(), 0)
    found, expected = (
        alignment.align(v, affine, brain=values > 0, start=start, voxel_size=4)
        for v in (scored, values)
    )
    assert largest_error(found.scan_from_grid, expected.scan_from_grid) < 0.3


def test_alignment_of_the_same_scan_twice_is_identical_and_leaves_the_threads_alone():
    import SimpleITK as sitk  # noqa: N813

    values, affine = tiny_scans.brain()
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    start = tiny_scans.rigid(degrees=(5, 5, 0))
    first, second = (aligned(values, affine, start) for _ in range(2))
    np.testing.assert_array_equal(first.scan_from_grid, second.scan_from_grid)
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == before
    with itk.one_thread():
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 1


def test_the_center_of_a_brain_only_moves():
    values, affine = tiny_scans.brain()
    moved = tiny_scans.rigid(shift=(30, -20, 10))
    found = alignment.center_start(values > 0, moved @ affine)
    assert largest_error(found, moved) < 0.5
    np.testing.assert_array_equal(found[:3, :3], np.eye(3))


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


def seen(values, affine, distance):
    """What a finder would say that sees signed distances [X, Y, Z] in mm."""
    return FoundBrain(
        scan_from_mni=np.eye(4),
        scan_from_grid=np.eye(4),
        outside=distance.astype(np.float32),
        affine=affine,
        disagreement_mm=1.0,
        expected_mm=1.0,
    )


def distance_from(mask, voxel_mm):
    inside, outside = (ndimage.distance_transform_edt(m) for m in (mask, ~mask))
    return voxel_mm * (outside - inside + np.where(mask, 0.5, -0.5))


@pytest.fixture(scope="module")
def brain():
    values, affine = tiny_scans.brain(2.0)
    return values, affine, distance_from(ndimage.binary_fill_holes(values > 0), 2.0)


def found_in(values, affine, distance, tmp_path, **how):
    found = None if distance is None else seen(values, affine, distance)
    scan = scan_of(intensity.from_background(values.astype(np.float32)), affine, tmp_path)
    return brain_mask.brain_of(scan, found, **how)


def test_a_stripped_brain_keeps_its_voxels_where_the_finder_is_off_by_a_voxel(brain, tmp_path):
    values, affine, distance = brain
    whole = ndimage.binary_fill_holes(values > 0)
    for off in (-1.5, 0, 1.5):
        found = found_in(values, affine, distance + off, tmp_path)
        np.testing.assert_array_equal(found.mask, whole)
        assert found.kind == brain_mask.STRIPPED


def test_a_head_gets_the_mask_of_the_finder_also_where_its_air_is_zero(brain, tmp_path):
    _, affine, distance = brain
    head, _ = tiny_scans.head(2.0)
    for values in (head, np.where(head > 5 * tiny_scans.AIR_NOISE, head, 0)):
        found = found_in(values, affine, distance, tmp_path)
        np.testing.assert_array_equal(found.mask, distance < brain_mask.EDGE_MM)
        assert found.kind == brain_mask.SKULL


def test_a_partly_stripped_head_gets_the_mask_of_the_finder(brain, tmp_path):
    _, affine, distance = brain
    head, _ = tiny_scans.head(2.0)
    found = found_in(np.where(distance < 8, head, 0), affine, distance, tmp_path)
    np.testing.assert_array_equal(found.mask, distance < brain_mask.EDGE_MM)


def test_specks_negative_values_and_holes_do_not_change_the_brain(brain, tmp_path):
    values, affine, distance = brain
    expected = ndimage.binary_fill_holes(values > 0)
    center = tuple(np.array(values.shape) // 2)
    dirty = values.copy()
    dirty[center] = 0  # a hole
    dirty[2:4, 2:4, 2:4] = 300  # a speck
    dirty[5, 5, 5] = -60
    found = found_in(dirty, affine, distance, tmp_path)
    np.testing.assert_array_equal(found.mask, expected)


@pytest.mark.parametrize("offset", [-500, 1000])
def test_background_need_not_be_zero(brain, tmp_path, offset):
    values, affine, distance = brain
    found = found_in(values + np.float32(offset), affine, distance, tmp_path)
    np.testing.assert_array_equal(found.mask, ndimage.binary_fill_holes(values > 0))


def test_a_dark_lesion_at_the_surface_of_a_stripped_brain_stays_in_the_mask(brain, tmp_path):
    values, affine, distance = brain
    mask = ndimage.binary_fill_holes(values > 0)
    lesion = tiny_scans.blob(affine, values.shape, (45, -20, 40), 26) & mask
    assert lesion.sum() * 8 > 30_000  # mm^3
    dark = np.where(lesion, 60, values).astype(np.float32)
    found = found_in(dark, affine, distance, tmp_path)
    assert (found.mask & lesion).sum() > 0.9 * lesion.sum()


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("order", [1, 3])
def test_resampling_a_stripped_brain_does_not_move_its_rim(brain, tmp_path, order, standardized):
    values, affine, _ = brain
    expected = ndimage.binary_fill_holes(values > 0)
    finer = ndimage.affine_transform(
        values, np.full(3, 0.75), output_shape=(np.array(values.shape) - 1) * 4 // 3, order=order
    )
    finer_affine = affine @ np.diag([0.75, 0.75, 0.75, 1])
    if standardized:  # in the brain, with a background of 0
        inside = finer != 0
        finer = np.where(inside, (finer - finer[inside].mean()) / finer[inside].std(), 0)
    found = found_in(finer, finer_affine, None, tmp_path, mode="nonzero").mask
    untrimmed, trimmed = (brain_mask.liters(m, finer_affine) for m in (finer, found))
    true = brain_mask.liters(expected, affine)
    assert untrimmed > 1.05 * true
    assert abs(trimmed - true) < 0.5 * (untrimmed - true)


def test_mask_modes_and_files_go_before_the_finder(brain, tmp_path):
    values, affine, distance = brain
    half = values > 0
    half[: half.shape[0] // 2] = False
    path = tiny_scans.write(tmp_path / "mask.nii", half.astype(np.uint8), affine)
    found = found_in(values, affine, distance, tmp_path, mask_path=path)
    np.testing.assert_array_equal(found.mask, half)
    assert found.kind == brain_mask.GIVEN
    atlas = found_in(values, affine, distance, tmp_path, mode="atlas").mask
    assert 2 * (atlas & (values > 0)).sum() / (atlas.sum() + (values > 0).sum()) > 0.98


def test_an_empty_mask_is_refused(brain, tmp_path):
    values, affine, distance = brain
    path = tiny_scans.write(tmp_path / "mask.nii", np.zeros(values.shape, np.uint8), affine)
    with pytest.raises(InputError, match=r"mask\.nii: expected a brain mask of at least"):
        found_in(values, affine, distance, tmp_path, mask_path=path)
