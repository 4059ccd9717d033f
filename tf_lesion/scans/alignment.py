"""Rigid alignment of a scan to MNI space, and resampling between the scan and the MNI grid."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813, the usual name
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from nibabel.spaces import vox2out_vox
from nilearn import datasets
from scipy import ndimage

from tf_lesion.scans import itk
from tf_lesion.scans.finder.pose import between, without_scale
from tf_lesion.scans.volumes import MniGrid

WORKING_MM = 2.0  # registration runs on volumes of this voxel size; sub-voxel accurate
SHRINK = (2, 1)  # levels: 4 mm, 2 mm
SMOOTHING_MM = (2.0, 1.0)
SAMPLED_SHARE = (1.0, 0.25)  # of the voxels in the fixed mask, at each level
HISTOGRAM_BINS = 40
SEED = 1  # for the sampling of the metric
REFINE_STEPS = 400
LARGEST_STEP, STEP_RELAXATION = 1.0, 0.85  # 0.6 stops several degrees short
SMALLEST_STEP = 0.001  # 0.01 leaves .007 mm, and .005 of Dice between masks, to rounding
SMALLEST_GRADIENT = 1e-8  # nats; so does the default of 1e-4
MARGIN_MM = 8.0  # rim around the template's brain: its edge is part of what is matched
FINDER_SHARE = 0.65  # of the finder in the pose, the rest is the registration's
COMPARED_MM = 2.0  # voxels of masks that are compared
DARK_PERCENTILE = 1.0  # of the brain: what lies outside of it is made as dark
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world axes are LPS


class Alignment(NamedTuple):
    """Where a scan lies."""

    scan_from_grid: np.ndarray  # [4, 4], mm in MNI space -> mm in the scan's own space; rigid
    scan_from_mni: np.ndarray  # the same with the scale of this brain
    mutual_information: float = np.nan  # nats, Mattes, inside the brain; NaN without registration
    moved_mm: float = 0.0  # mean over the atlas's brain, from the start to the result


@functools.lru_cache(maxsize=1)
def _atlas() -> tuple[np.ndarray, np.ndarray]:
    """(brain [X, Y, Z] float32 in 0..1, mask [X, Y, Z] bool), ICBM152 2009a T1 at 1 mm."""
    template = datasets.load_mni152_template(resolution=1)
    mask = datasets.load_mni152_brain_mask(resolution=1)
    return template.get_fdata(dtype=np.float32), mask.get_fdata(dtype=np.float32) > 0


def atlas_mask_on(grid: MniGrid) -> np.ndarray:
    """The ICBM152 brain mask [X, Y, Z] bool on a `MniGrid`."""
    mask = to_grid(_atlas()[1].astype(np.float32), MniGrid().affine, np.eye(4), grid)
    return mask >= 0.5  # half of the voxel is brain


def atlas_mask_in(
    scan_from_mni: np.ndarray, shape: Sequence[int], affine: np.ndarray
) -> np.ndarray:
    """The ICBM152 brain mask [X, Y, Z] bool on the voxels of a scan."""
    mask = _atlas()[1].astype(np.float32)
    return to_scan(mask, MniGrid(), scan_from_mni, shape, affine) >= 0.5


def atlas_distance_in(
    scan_from_mni: np.ndarray, shape: Sequence[int], affine: np.ndarray
) -> np.ndarray:
    """[X, Y, Z] float32, signed distance from the ICBM152 brain on the voxels of a scan, mm."""
    grid, distance = _atlas_distance()
    scale = np.float32(np.cbrt(abs(np.linalg.det(scan_from_mni[:3, :3]))))
    return scale * to_scan(distance, grid, scan_from_mni, shape, affine)


@functools.lru_cache(maxsize=1)
def _atlas_distance():
    """(`MniGrid`, signed distance [X, Y, Z] float32 from the atlas's brain, mm)."""
    grid = MniGrid(COMPARED_MM)
    mask = atlas_mask_on(grid)
    inside, outside = (ndimage.distance_transform_edt(part) for part in (mask, ~mask))
    return grid, np.float32(COMPARED_MM) * (outside - inside).astype(np.float32)


def to_grid(
    volume: np.ndarray,
    affine: np.ndarray,
    scan_from_grid: np.ndarray,
    grid: MniGrid,
    *,
    order: int = 1,
) -> np.ndarray:
    """Resample a scan onto the MNI grid, in one interpolation.

    Args:
        volume: [X, Y, Z], values on the scan's voxels.
        affine: [4, 4], voxel of `volume` -> mm.
        scan_from_grid: [4, 4], mm in MNI space -> mm of the scan.
        order: 1 for images (smoothed first where the grid is the coarser), 0 for labels.

    Returns:
        [X, Y, Z] of the grid's shape, 0 outside the scan; float32 for order 1, the type of
        `volume` for order 0.
    """
    matrix = np.linalg.inv(affine) @ scan_from_grid @ grid.affine
    return _resample(volume, matrix, grid.shape, order)


def to_scan(
    grid_volume: np.ndarray,
    grid: MniGrid,
    scan_from_grid: np.ndarray,
    scan_shape: Sequence[int],
    scan_affine: np.ndarray,
    *,
    order: int = 1,
) -> np.ndarray:
    """Resample a volume on the MNI grid onto the voxels of a scan: the inverse of `to_grid`."""
    matrix = np.linalg.inv(scan_from_grid @ grid.affine) @ scan_affine
    return _resample(grid_volume, matrix, scan_shape, order)


def _resample(volume, source_from_target, shape, order):
    if order == 1 or volume.dtype.kind not in "iu":
        volume = np.asarray(volume, dtype=np.float32)
    if order == 1:  # smooth along the axes on which the target's voxels are larger
        step = np.sqrt((source_from_target[:3, :3] ** 2).sum(axis=1))
        sigma = np.maximum(0.0, (step - 1) / 2)  # the rule of skimage.transform.resize
        blur = sigma > 0.05  # less has no effect
        if blur.any():
            volume = ndimage.gaussian_filter(volume, np.where(blur, sigma, 0))
    return ndimage.affine_transform(
        volume, source_from_target, output_shape=tuple(shape), order=order, mode="grid-constant"
    )


def _center_of(mask, affine):
    """[3] mm, center of mass of a mask."""
    return (affine @ [*ndimage.center_of_mass(mask), 1.0])[:3]


def center_start(brain: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """[4, 4] mm in MNI space -> mm of the scan: the center of a brain mask on the atlas's."""
    shift = _center_of(brain, affine) - _center_of(_atlas()[1], MniGrid().affine)
    return from_matvec(np.eye(3), shift)


def align(
    volume: np.ndarray,
    affine: np.ndarray,
    *,
    brain: np.ndarray,
    start: np.ndarray,
    voxel_size: float = 1.0,
) -> Alignment:
    """Refine the rigid map from MNI space to a scan.

    Mattes mutual information with the ICBM152 brain (contrasts may differ, so a T1 template serves
    T2 scans), at 4 and 2 mm, from where the finder saw the brain. It is matched with one scale,
    which is then dropped: otherwise a brain smaller than the template slides and tilts inside it
    (open_ms patient 19: by 9 degrees). One thread, fixed seed: the same scan, the same answer.

    Args:
        volume: [X, Y, Z] in RAS.
        affine: [4, 4], voxel -> mm.
        brain: [X, Y, Z] bool mask of the brain.
        start: [4, 4], mm in MNI space -> mm of the scan; rigid, or with a scale.
        voxel_size: mm of the cache's grid; a coarser one makes the registration coarser.
    """
    center = _center_of(_atlas()[1], MniGrid().affine)
    dark = np.percentile(volume[brain], DARK_PERCENTILE) if brain.any() else 0
    volume = np.where(brain, volume - np.float32(dark), 0)
    registration = _Registration(volume, affine, max(WORKING_MM, voxel_size))
    with itk.one_thread():
        best, information = registration.refine(start)
    points = apply_affine(MniGrid().affine, np.argwhere(_atlas()[1])[::1009])
    moved = np.linalg.norm(apply_affine(best, points) - apply_affine(start, points), axis=1)
    return Alignment(without_scale(best, center), best, information, float(moved.mean()))


def towards(placed: Alignment, found: np.ndarray) -> Alignment:
    """The alignment between a registration and what the finder saw, [4, 4] rigid.

    One matches gray values with an average brain, the other knows places in many brains. They err
    in part independently, and a mean was nearer than either (`scans/finder/README.md`). The
    scale, on which they agree less, stays that of the registration.
    """
    center = _center_of(_atlas()[1], MniGrid().affine)
    rigid = between(placed.scan_from_grid, found, center, FINDER_SHARE)
    scaling = np.linalg.inv(placed.scan_from_grid) @ placed.scan_from_mni
    return placed._replace(scan_from_grid=rigid, scan_from_mni=rigid @ scaling)


def agreement(
    brain: np.ndarray, affine: np.ndarray, scan_from_mni: np.ndarray
) -> tuple[float, float]:
    """How well a brain mask [X, Y, Z] bool and that of the atlas agree.

    Returns:
        (Dice of the two within the field of view, share of the atlas's brain that lies in it).
    """
    steps = np.maximum(1, np.rint(COMPARED_MM / voxel_sizes(affine))).astype(int)
    brain = brain[tuple(slice(None, None, step) for step in steps)]
    affine = affine @ np.diag([*steps, 1.0])
    whole = _atlas()[1].astype(np.uint8)
    atlas = to_scan(whole, MniGrid(), scan_from_mni, brain.shape, affine, order=0) > 0
    volume = np.count_nonzero(whole) * abs(np.linalg.det(scan_from_mni[:3, :3]))
    covered = np.count_nonzero(atlas) * abs(np.linalg.det(affine[:3, :3])) / volume
    both = np.count_nonzero(brain & atlas)
    total = np.count_nonzero(brain) + np.count_nonzero(atlas)
    return 2 * both / max(total, 1), min(float(covered), 1.0)


class _Registration:
    """Template (fixed) against one scan (moving), both as ITK images of `working_mm` voxels."""

    def __init__(self, volume, affine, working_mm):
        grid = MniGrid(working_mm)
        distance = ndimage.distance_transform_edt(~atlas_mask_on(grid)) * working_mm
        template = to_grid(_atlas()[0], MniGrid().affine, np.eye(4), grid)
        self.fixed = _itk_image(template, grid.affine)
        self.mask = _itk_image((distance <= MARGIN_MM).astype(np.uint8), grid.affine)
        self.moving = _itk_image(*world_aligned(volume, affine, working_mm))
        self.center = _LPS_FROM_RAS[:3, :3] @ _center_of(_atlas()[1], MniGrid().affine)

    def refine(self, start):
        """([4, 4] with a scale, its mutual information) from a start [4, 4]."""
        method = self._method(SHRINK, SMOOTHING_MM, SAMPLED_SHARE)
        method.SetOptimizerAsRegularStepGradientDescent(
            LARGEST_STEP, SMALLEST_STEP, REFINE_STEPS, STEP_RELAXATION, SMALLEST_GRADIENT
        )
        method.SetOptimizerScalesFromPhysicalShift()
        transform = _similarity(start, self.center)
        method.SetInitialTransform(transform, inPlace=True)
        try:
            method.Execute(self.fixed, self.moving)
        except RuntimeError:  # the scan left the template's brain: no overlap from this start
            return start, -np.inf
        return _ras_matrix(transform), -method.GetMetricValue()

    def _method(self, shrink, smoothing_mm, shares):
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(HISTOGRAM_BINS)
        method.SetMetricFixedMask(self.mask)
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentagePerLevel(list(shares), SEED)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetShrinkFactorsPerLevel(list(shrink))
        method.SetSmoothingSigmasPerLevel(list(smoothing_mm))
        method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
        return method


def _similarity(matrix, center):
    """ITK similarity about `center` [3] (LPS) that does what a map [4, 4] (RAS) does."""
    lps = _LPS_FROM_RAS @ matrix @ _LPS_FROM_RAS
    scale = np.cbrt(np.linalg.det(lps[:3, :3]))
    transform = sitk.Similarity3DTransform()
    transform.SetCenter(center.tolist())
    transform.SetScale(scale)
    left, _, right = np.linalg.svd(lps[:3, :3])
    transform.SetMatrix((scale * left @ right).ravel().tolist())
    shift = lps[:3, 3] + lps[:3, :3] @ center - center
    transform.SetTranslation(shift.tolist())
    return transform


def world_aligned(
    volume: np.ndarray, affine: np.ndarray, voxel_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """The scan on a grid of cubic voxels along the world's axes, (values, affine).

    ITK cannot hold a sheared affine; along the world's axes any affine will do.
    """
    shape, target = vox2out_vox((volume.shape, affine), [voxel_mm] * 3)
    return _resample(volume, np.linalg.inv(affine) @ target, shape, 1), target


def _itk_image(values, affine):
    """ITK image of values [X, Y, Z] whose RAS axes run along the world's."""
    image = itk.to_image(values, spacing=np.diag(affine)[:3])
    image.SetOrigin((_LPS_FROM_RAS @ affine)[:3, 3].tolist())
    image.SetDirection(_LPS_FROM_RAS[:3, :3].ravel().tolist())
    return image


def _ras_matrix(transform):
    """[4, 4] mm -> mm in RAS of an ITK transform with a center."""
    rotation = np.array(transform.GetMatrix()).reshape(3, 3)
    center = np.array(transform.GetCenter())
    shift = center + np.array(transform.GetTranslation()) - rotation @ center
    return _LPS_FROM_RAS @ from_matvec(rotation, shift) @ _LPS_FROM_RAS
