"""Rigid alignment of a scan to MNI space, and resampling between the scan and the MNI grid."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813, the usual name
from nibabel.affines import from_matvec
from nibabel.spaces import vox2out_vox
from nilearn import datasets
from scipy import ndimage

from tf_lesion.files import InputError
from tf_lesion.scans import itk
from tf_lesion.scans.volumes import MniGrid

WORKING_MM = 2.0  # registration runs on volumes of this voxel size; sub-voxel accurate
SEARCH_MM = 8.0  # the multi-start search runs on these
SHRINK = (2, 1)  # levels after the search: 4 mm, 2 mm
SMOOTHING_MM = (2.0, 1.0)
SAMPLED_SHARE = (1.0, 0.25)  # of the voxels in the fixed mask, at each level
HISTOGRAM_BINS = 40
SEED = 1  # for the sampling of the metric
PITCH_STARTS = np.deg2rad([0.0, -20.0, 20.0])  # heads nod more than they roll
SEARCH_ROUNDS, SEARCH_LINE_STEPS = 10, 20  # Powell: no gradient, reaches 20 degrees and more
SEARCH_TOLERANCE = (1e-3, 1e-4)  # in steps; relative in the metric
RADIANS_STEP, VERSOR_STEP, SCALE_STEP = 60.0, 120.0, 60.0  # 1 mm at 60 mm from the center
REFINE_STEPS = 200
LARGEST_STEP, SMALLEST_STEP, STEP_RELAXATION = 1.0, 0.01, 0.85  # 0.6 stops several degrees short
SMALLEST_GRADIENT = 1e-8  # nats; so does the default of 1e-4
MARGIN_MM = 8.0  # rim around the template's brain: its edge is part of what is matched
SKULL_MARGIN_MM = 2.0  # with a skull the rim holds tissue that the template lacks
HEAD_HEIGHT_MM = 125.0  # crown to the base of the cerebellum: the part of a head with brain in it
AIR_SHARE = 0.15  # of the bright tissue: darker than this is air
BRIGHT_PERCENTILE = 98
_LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world axes are LPS


class Alignment(NamedTuple):
    """Where a scan lies.

    `atlas_from_grid` leads from MNI space after the rigid alignment to the atlas as fitted to this
    head by an affine map, for the atlas's mask, which ought to have the size of this brain.
    """

    scan_from_grid: np.ndarray  # [4, 4], mm in MNI space -> mm in the scan's own space; rigid
    atlas_from_grid: np.ndarray = np.eye(4)  # mm -> mm; the identity without a fit
    mutual_information: float = np.nan  # nats, Mattes, inside the brain; NaN without registration


@functools.lru_cache(maxsize=1)
def _atlas() -> tuple[np.ndarray, np.ndarray]:
    """(brain [X, Y, Z] float32 in 0..1, mask [X, Y, Z] bool), ICBM152 2009a T1 at 1 mm."""
    template = datasets.load_mni152_template(resolution=1)
    mask = datasets.load_mni152_brain_mask(resolution=1)
    return template.get_fdata(dtype=np.float32), mask.get_fdata(dtype=np.float32) > 0


def atlas_mask_on(grid: MniGrid, atlas_from_grid: np.ndarray | None = None) -> np.ndarray:
    """The ICBM152 brain mask [X, Y, Z] bool on a `MniGrid`."""
    transform = np.eye(4) if atlas_from_grid is None else atlas_from_grid
    mask = to_grid(_atlas()[1].astype(np.float32), MniGrid().affine, transform, grid)
    return mask >= 0.5  # half of the voxel is brain


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


def align(
    volume: np.ndarray,
    affine: np.ndarray,
    *,
    mode: str = "rigid",
    brain: np.ndarray | None = None,
    voxel_size: float = 1.0,
) -> Alignment:
    """Find the rigid map from MNI space to a scan.

    `rigid`: Mattes mutual information with the ICBM152 brain (contrasts may differ, so a T1
    template serves T2 scans), from several tilts around the center of the brain at 8 mm, then
    from the best one at 4 and 2 mm. A skull-stripped brain is matched with one scale as well,
    which is then dropped: otherwise a brain smaller than the template slides and tilts inside it
    (open_ms patient 19: by 9 degrees). One thread, fixed seed: the same scan, the same answer.
    `center`: only the center of the brain. `none`: the scan is in MNI space.

    Args:
        volume: [X, Y, Z] in RAS.
        affine: [4, 4], voxel -> mm.
        mode: "rigid", "center" or "none".
        brain: [X, Y, Z] bool mask of the brain, or None if the scan has its skull. Then the
            start is the center of the upper head, and an affine fit of the atlas is added.
        voxel_size: mm of the cache's grid; a coarser one makes the registration coarser.

    Raises:
        InputError: if there is no head in the scan.
    """
    if mode == "none":
        return Alignment(np.eye(4))
    skull, atlas_center = brain is None, _center_of(_atlas()[1], MniGrid().affine)
    center = _head_center(volume, affine) if skull else _center_of(brain, affine)
    starts = [center - atlas_center]
    if mode == "center":
        return Alignment(from_matvec(np.eye(3), starts[0]))
    if skull:
        starts.append(np.zeros(3))  # scans with a skull may well lie in MNI space already
    else:
        volume = np.where(brain, volume, 0)
    registration = _Registration(volume, affine, max(WORKING_MM, voxel_size), skull=skull)
    with itk.one_thread():
        best, information = registration.refine(registration.search(starts))
        scan_from_grid = _rigid_part(_ras_matrix(best), atlas_center)
        if not skull:
            return Alignment(scan_from_grid, np.eye(4), information)
        affine_fit, _ = registration.refine(_as(sitk.AffineTransform(3), best))
    fit = np.linalg.inv(_ras_matrix(affine_fit)) @ scan_from_grid
    return Alignment(scan_from_grid, fit, information)


def _head_center(volume, affine):
    """[3] mm: center of the head above the skull base."""
    head = volume > AIR_SHARE * np.percentile(volume, BRIGHT_PERCENTILE)
    head = ndimage.binary_opening(head, iterations=2)
    points = affine[:3, :3] @ np.argwhere(head).T + affine[:3, 3:]
    if points.shape[1] == 0:
        raise InputError("no head found in the scan; give a brain mask.")
    crown = np.percentile(points[2], 99.9)
    upper = points[:, points[2] > crown - HEAD_HEIGHT_MM]
    return (upper.min(axis=1) + upper.max(axis=1)) / 2


def _rigid_part(matrix, center):
    """The map without its scale, that takes `center` [3] to where `matrix` takes it."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    rigid = from_matvec(left @ right, matrix[:3, :3] @ center + matrix[:3, 3])
    return rigid @ from_matvec(np.eye(3), -center)


class _Registration:
    """Template (fixed) against one scan (moving), both as ITK images of `working_mm` voxels."""

    def __init__(self, volume, affine, working_mm, *, skull):
        grid = MniGrid(working_mm)
        margin = SKULL_MARGIN_MM if skull else MARGIN_MM
        distance = ndimage.distance_transform_edt(~atlas_mask_on(grid)) * working_mm
        template = to_grid(_atlas()[0], MniGrid().affine, np.eye(4), grid)
        self.fixed = _itk_image(template, grid.affine)
        self.mask = _itk_image((distance <= margin).astype(np.uint8), grid.affine)
        self.moving = _itk_image(*world_aligned(volume, affine, working_mm))
        self.center = _LPS_FROM_RAS[:3, :3] @ _center_of(_atlas()[1], MniGrid().affine)
        self.shrink = max(1, round(SEARCH_MM / working_mm))
        self.skull = skull

    def _start(self, shift, pitch):
        """(transform, step sizes of its parameters): rigid with a skull, with a scale without."""
        euler = sitk.Euler3DTransform(self.center, pitch, 0.0, 0.0, _LPS_FROM_RAS[:3, :3] @ shift)
        if self.skull:
            return euler, [RADIANS_STEP] * 3 + [1.0] * 3
        similarity = _as(sitk.Similarity3DTransform(), euler)
        return similarity, [VERSOR_STEP] * 3 + [1.0] * 3 + [SCALE_STEP]

    def search(self, shifts):
        """The best transform at 8 mm from every shift [3] mm (RAS) and pitch."""
        results = []
        for shift, pitch in itertools.product(shifts, PITCH_STARTS):
            start, scales = self._start(shift, pitch)
            method = self._method([self.shrink], [SEARCH_MM / 2], [1.0])
            method.SetOptimizerAsPowell(SEARCH_ROUNDS, SEARCH_LINE_STEPS, 1.0, *SEARCH_TOLERANCE)
            method.SetOptimizerScales(scales)
            results.append(self._run(method, start))
        return max(results, key=lambda result: result[1])[0]

    def refine(self, start):
        """(transform of the kind of `start`, its mutual information), at the finest level."""
        method = self._method(SHRINK, SMOOTHING_MM, SAMPLED_SHARE)
        method.SetOptimizerAsRegularStepGradientDescent(
            LARGEST_STEP, SMALLEST_STEP, REFINE_STEPS, STEP_RELAXATION, SMALLEST_GRADIENT
        )
        method.SetOptimizerScalesFromPhysicalShift()
        return self._run(method, start)

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

    def _run(self, method, start):
        """(transform, mutual information in nats) that `method` reaches from `start`."""
        transform = type(start)(start)
        method.SetInitialTransform(transform, inPlace=True)
        try:
            method.Execute(self.fixed, self.moving)
        except RuntimeError:  # the scan left the template's brain: no overlap from this start
            return start, -np.inf
        return transform, -method.GetMetricValue()


def _as(transform, other):
    """`transform` with the center, matrix and translation of `other`."""
    transform.SetCenter(other.GetCenter())
    transform.SetMatrix(other.GetMatrix())
    transform.SetTranslation(other.GetTranslation())
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
