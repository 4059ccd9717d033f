"""Counting lesions instead of voxels: where they are, how many are found, how many are false.

A lesion is a 26-connected component of the truth in a whole scan, not in a slice.
"""

from dataclasses import dataclass

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage
from skimage import measure

MM3_PER_ML = 1e3
CENTER_DIGITS = 6  # of mm, where two lesions of a size are told apart


@dataclass(frozen=True)
class LesionCounts:
    """Connected components of one scan.

    Attributes:
        lesions: components of the truth.
        found: those with at least one detected voxel.
        false_positives: components of the detection without a lesion voxel.
    """

    lesions: int
    found: int
    false_positives: int


def lesion_counts(detected: np.ndarray, truth: np.ndarray) -> LesionCounts:
    """Lesion-wise `LesionCounts` of one scan [X, Y, Z], 26-connected."""
    detected, truth = np.asarray(detected, bool), np.asarray(truth, bool)
    window = ndimage.find_objects((detected | truth).astype(np.uint8))
    if not window:
        return LesionCounts(0, 0, 0)
    detected, truth = detected[window[0]], truth[window[0]]
    lesions, num_lesions = measure.label(truth, connectivity=truth.ndim, return_num=True)
    parts, num_parts = measure.label(detected, connectivity=truth.ndim, return_num=True)
    found = np.unique(lesions[detected & truth]).size
    hits = np.unique(parts[detected & truth]).size
    return LesionCounts(lesions=num_lesions, found=found, false_positives=num_parts - hits)


@dataclass(frozen=True)
class Lesion:
    """One connected component of a detection.

    Attributes:
        volume_ml: milliliters.
        center_mm: (x, y, z), center of mass in mm of the scan (RAS).
        mean_residual: over its voxels, normalized intensity.
    """

    volume_ml: float
    center_mm: tuple[float, float, float]
    mean_residual: float


def label_lesions(detected: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Number the lesions of a scan, 26-connected, from 1, the largest first.

    Args:
        detected: [X, Y, Z] bool; a file may be [X, Y, Z, 1].
        affine: [4, 4], voxel -> mm; of lesions of one size the one with the lowest x, y, z of its
            center comes first, so that the order does not depend on the file's orientation.

    Returns:
        Of the shape of `detected`, uint16, or uint32 if there are more than it counts.
    """
    parts = measure.label(np.reshape(detected, np.shape(detected)[:3]) > 0, connectivity=3)
    voxels = np.nonzero(parts)
    lesion = parts[voxels] - 1
    count = np.bincount(lesion)
    center = np.round(_centers(voxels, lesion, count, affine), CENTER_DIGITS)
    order = np.lexsort((*center[:, ::-1].T, -count))
    numbers = np.zeros(len(count) + 1, np.uint16 if len(count) < 2**16 else np.uint32)
    numbers[1 + order] = np.arange(1, len(count) + 1)
    return numbers[parts].reshape(np.shape(detected))


def find_lesions(detected: np.ndarray, residual: np.ndarray, affine: np.ndarray) -> list[Lesion]:
    """The `Lesion`s of a scan, as `label_lesions` numbers them.

    Args:
        detected: [X, Y, Z] bool.
        residual: [X, Y, Z], normalized intensity.
        affine: [4, 4], voxel -> mm.
    """
    numbers = label_lesions(detected, affine)
    numbers = numbers.reshape(numbers.shape[:3])
    voxels = np.nonzero(numbers)
    lesion = numbers[voxels].astype(np.intp) - 1
    count = np.bincount(lesion)
    values = np.reshape(residual, numbers.shape)[voxels].astype(np.float64)
    volume = count * voxel_ml(affine)
    center = _centers(voxels, lesion, count, affine)
    mean = np.bincount(lesion, weights=values) / count
    return [
        Lesion(volume_ml=ml, center_mm=tuple(mm), mean_residual=value)
        for ml, mm, value in zip(volume.tolist(), center.tolist(), mean.tolist(), strict=True)
    ]


def voxel_ml(affine: np.ndarray) -> float:
    """Milliliters of a voxel."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / MM3_PER_ML


def _centers(voxels, lesion, count, affine):
    """[n, 3] mm, centers of mass of the lesions."""
    center = [np.bincount(lesion, weights=axis) / count for axis in voxels]
    return apply_affine(affine, np.transpose(center)) if len(count) else np.zeros((0, 3))
