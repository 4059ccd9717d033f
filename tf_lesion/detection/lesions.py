"""Counting lesions instead of voxels: where they are, how many are found, how many are false.

A lesion is a 26-connected component of the truth in a whole scan, not in a slice.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage import measure

MM3_PER_ML = 1e3


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


def find_lesions(detected: np.ndarray, residual: np.ndarray, affine: np.ndarray) -> list[Lesion]:
    """The `Lesion`s of a scan, 26-connected, the largest first.

    Args:
        detected: [X, Y, Z] bool.
        residual: [X, Y, Z], normalized intensity.
        affine: [4, 4], voxel -> mm.
    """
    detected = np.reshape(detected, np.shape(detected)[:3]) > 0  # files may be [X, Y, Z, 1]
    parts = measure.label(detected, connectivity=detected.ndim)
    voxels = np.nonzero(parts)
    lesion = parts[voxels] - 1
    count = np.bincount(lesion)
    center = [np.bincount(lesion, weights=axis) / count for axis in voxels]
    center = affine[:3, :3] @ center + affine[:3, 3:]
    values = np.reshape(residual, detected.shape)[voxels].astype(np.float64)
    volume = count * abs(np.linalg.det(affine[:3, :3])) / MM3_PER_ML
    mean = np.bincount(lesion, weights=values) / count
    found = [
        Lesion(volume_ml=ml, center_mm=tuple(mm), mean_residual=value)
        for ml, mm, value in zip(volume.tolist(), center.T.tolist(), mean.tolist(), strict=True)
    ]
    return sorted(found, key=lambda lesion: (-lesion.volume_ml, lesion.center_mm))


def stack_volume(slices: np.ndarray, slice_index: np.ndarray) -> np.ndarray:
    """Volume [H, W, Z] of slices [n, H, W] at their axial positions; missing slices are empty."""
    index = np.asarray(slice_index) - np.min(slice_index)
    volume = np.zeros((*slices.shape[1:], index.max() + 1), dtype=slices.dtype)
    volume[..., index] = np.moveaxis(slices, 0, -1)
    return volume
