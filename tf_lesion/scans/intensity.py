"""Intensities: background, bias correction, normalization, histogram matching in the brain.

Everywhere `volume` is [X, Y, Z] intensity, `mask` [X, Y, Z] bool, the brain, and `reference` [Q]
quantiles of the brain of the subject that others are matched to.
"""

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk  # noqa: N813, the usual name
from scipy import ndimage
from skimage.exposure import match_histograms

from tf_lesion.caches.slices import BRAIN_FLOOR, HIGHEST_PERCENTILE, LOWEST_PERCENTILE
from tf_lesion.files import InputError
from tf_lesion.scans import itk

BACKGROUND_SHARE = 0.3  # of the faces of a scan, if there is a constant background at all
DARK_PERCENTILE, BRIGHT_PERCENTILE = 0.1, 99.9  # the rest are outliers
NEAR_BACKGROUND = 1e-3  # of the brightest's distance to the background, and still background
GAP = np.float32(0.03)  # of the median's distance to the darkest; -.01 to .05 in eight real scans
LARGEST_GAP = 0.1  # where the background is further from the darkest, it stays where it is
FAINT_SHARE = 0.05  # of the rest nearly the background: noise of it, or what rings around a brain
AMID_SHARE = 0.05  # of the rest darker than the background, which then lies amid its intensities
QUANTILES = 1001  # of the reference: 0, 0.1, ... 100 %
TRANSFER_POINTS = 4097  # of a map of intensities
N4_SPACING_MM = 4.0  # the bias field is smooth, so it is estimated on voxels of about this size
N4_STEPS = (50, 50, 30)  # at each of three resolutions of the spline


def background_of(volume: np.ndarray) -> tuple[float, float]:
    """(the most frequent value on the faces of a scan, share of the faces that have it)."""
    found, counts = np.unique(_faces(volume), return_counts=True)
    return float(found[counts.argmax()]), float(counts.max() / counts.sum())


def distance_from(background: float, volume: np.ndarray) -> np.ndarray:
    """[X, Y, Z], distance of intensities from the background; 0 where there is hardly any."""
    distance = np.abs(volume - np.float32(background))
    distance[distance <= NEAR_BACKGROUND * np.percentile(distance, BRIGHT_PERCENTILE)] = 0
    return distance


def from_background(volume: np.ndarray) -> np.ndarray:
    """A scan [X, Y, Z] float32 whose intensities begin at 0, its background if that is constant.

    So what follows gives the same for a * x + b, b as large as it may be beside the contrast, and
    for a brain that was standardized (mean 0) with a background of 0, which then lies amid its
    intensities. How far it was below the darkest of them is lost; it becomes `GAP` darker, as do
    those of scans that have about that anyway.
    """
    value, share = background_of(volume)
    if share < BACKGROUND_SHARE:
        return volume - np.percentile(volume, DARK_PERCENTILE, method="lower")
    value = np.float32(value)
    air = volume == value
    rest = volume[~air]
    amid = np.count_nonzero(rest < value) > AMID_SHARE * rest.size
    if amid and np.array_equal(rest, np.rint(rest)):  # voxels of the brain may have that value, too
        air = _reaching_faces(air)
        rest = volume[~air]
    if not rest.size:
        return volume - value
    dark, middle = np.percentile(rest, (DARK_PERCENTILE, 50), method="lower")
    faint = np.count_nonzero(distance_from(value, volume)) < (1 - FAINT_SHARE) * rest.size
    usual = abs(dark - value) <= LARGEST_GAP * (middle - dark)
    if not amid and (faint or not usual):
        return volume - value
    return np.where(air, np.float32(0), np.maximum(volume - dark, 0) + GAP * (middle - dark))


def _reaching_faces(mask):
    """The connected pieces of a mask [X, Y, Z] that reach a face of the volume."""
    labels, _ = ndimage.label(mask)
    return mask & np.isin(labels, np.unique(_faces(labels)))


def _faces(volume):
    """[N], the values on the six faces of a volume [X, Y, Z]."""
    faces = [volume.take(end, axis=axis).ravel() for axis in range(3) for end in (0, -1)]
    return np.concatenate(faces)


def correct_bias(volume: np.ndarray, mask: np.ndarray, voxel_sizes: Sequence[float]) -> np.ndarray:
    """N4 bias correction (Tustison et al., IEEE TMI 2010) of the brain; `voxel_sizes` [3] in mm.

    Returns `volume` [X, Y, Z] float32 divided by the field, which is 1 where nothing is known.
    """
    shrink = [max(1, round(N4_SPACING_MM / size)) for size in voxel_sizes]
    image = itk.to_image(volume.astype(np.float32), spacing=voxel_sizes)
    # N4 takes logarithms: voxels of the brain that are 0 or below say nothing about the field.
    inside = itk.to_image((mask & (volume > 0)).astype(np.uint8), spacing=voxel_sizes)
    method = sitk.N4BiasFieldCorrectionImageFilter()
    method.SetMaximumNumberOfIterations(list(N4_STEPS))
    with itk.one_thread():
        method.Execute(sitk.Shrink(image, shrink), sitk.Shrink(inside, shrink))
        log_field = sitk.GetArrayFromImage(method.GetLogBiasFieldAsImage(image))
    field = np.exp(log_field.transpose(2, 1, 0))
    return (volume / np.maximum(field, np.finfo(np.float32).tiny)).astype(np.float32)


def normalize(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Min-max between the 0.1th and the 99.9th percentile of the brain.

    The result [X, Y, Z] float32 is 1e-3 to 1 in the brain, exactly 0 outside.

    Raises:
        InputError: if the brain is empty or constant.
    """
    values = volume[mask]
    if values.size == 0:
        raise InputError("the brain mask holds no voxel of the scan.")
    low, high = np.percentile(values, [LOWEST_PERCENTILE, HIGHEST_PERCENTILE])
    if not high > low:
        raise InputError(f"the brain is constant ({low:g}); expected a scan with contrast.")
    return _inside(np.clip((values - low) / (high - low), BRAIN_FLOOR, 1.0), mask)


def brain_quantiles(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[1001] float32 quantiles of the brain's intensities, from least to largest."""
    return np.quantile(volume[mask], np.linspace(0, 1, QUANTILES)).astype(np.float32)


def histogram_distance(volume: np.ndarray, mask: np.ndarray, reference: np.ndarray) -> float:
    """How far the brain's histogram is from the reference's: the 1-Wasserstein distance.

    The mean over the quantiles of their absolute difference, in normalized intensity: 0 for equal
    histograms; what `match_to_reference` has to move a voxel by on average. `scipy.stats` sorts
    every voxel for it, which takes six times as long and changes the fourth decimal. The volume is
    normalized and not matched yet; `reference` may be any intensities of that brain.
    """
    steps = np.linspace(0, 1, QUANTILES)
    return float(np.abs(np.quantile(volume[mask], steps) - np.quantile(reference, steps)).mean())


def match_to_reference(volume: np.ndarray, mask: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Match the histogram of the brain to that of the reference subject.

    Only brain voxels take part: background in either histogram moves all ranks, which is what makes
    black patches. The map is monotone and stays in the reference's range; the result [X, Y, Z]
    float32 is above 0 in the brain, exactly 0 outside.

    Raises:
        InputError: if the reference has no quantiles, or values that are not finite or vary not.
    """
    reference = np.asarray(reference, dtype=np.float64).ravel()
    if reference.size < 2 or not np.isfinite(reference).all() or np.ptp(reference) == 0:
        raise InputError("expected a Reference of finite, varied brain intensities.")
    matched = match_histograms(volume[mask].astype(np.float64), reference)
    low = max(reference.min(), BRAIN_FLOOR)
    return _inside(np.clip(matched, low, max(reference.max(), low)), mask)


def matching_of(restored: np.ndarray, mask: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Points of the map, as of `transfer`, that matches a restored brain to the reference.

    A lesion takes part in the histogram of its scan, so that matching dims it and moves what is
    healthy; in the restored brain it is gone, or less.
    """
    return transfer(restored, match_to_reference(restored, mask, reference), mask)


def transfer(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Points of the monotone map that took the brain of `before` [X, Y, Z] to that of `after`.

    Returns [2, n] float64: intensities before, ascending, and what became of them; at most
    `TRANSFER_POINTS`, the same share of voxels between two of them.
    """
    values = before[mask]
    order = np.argsort(values, kind="stable")
    steps = np.linspace(0, len(order) - 1, min(len(order), TRANSFER_POINTS)).round().astype(int)
    rows = order[steps]
    return np.stack([values[rows], np.maximum.accumulate(after[mask][rows])]).astype(np.float64)


def transferred(volume: np.ndarray, mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The brain of another sampling of the same scan through the map of `transfer`; 0 outside."""
    return _inside(np.interp(volume[mask], *points), mask)


def _inside(values, mask):
    whole = np.zeros(mask.shape, dtype=np.float32)
    whole[mask] = values
    return whole
