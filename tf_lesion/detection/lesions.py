"""Counting lesions instead of voxels: where they are, how many are found, how many are false.

A lesion is a connected component of the truth in a whole scan, not in a slice.
"""

import math
from dataclasses import dataclass

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage
from skimage import measure

MM3_PER_ML = 1e3
CONNECTIVITIES = (6, 18, 26)
CENTER_DIGITS = 6  # of mm, where two lesions of a size are told apart


@dataclass(frozen=True)
class Counting:
    """What is counted as a lesion, and as found.

    Attributes:
        connectivity: 6, 18 or 26 neighbors of a voxel belong to its lesion.
        smallest_ml: smaller components are left out, of the truth and of the detection.
        overlap: share of a lesion beyond which it must be detected; 0: one voxel is enough.
    """

    connectivity: int = 26
    smallest_ml: float = 0.0
    overlap: float = 0.0


@dataclass(frozen=True)
class LesionCounts:
    """Connected components of one scan.

    Attributes:
        volumes_ml: [n] of the lesions, the components of the truth; NaN if unknown.
        hit: [n] bool, the lesions that are found.
        false_positives: components of the detection without a lesion voxel.
    """

    volumes_ml: np.ndarray
    hit: np.ndarray
    false_positives: int

    @property
    def lesions(self) -> int:
        """Number of lesions."""
        return len(self.hit)

    @property
    def found(self) -> int:
        """Number of lesions that are found."""
        return int(self.hit.sum())


def lesion_counts(
    detected: np.ndarray,
    truth: np.ndarray,
    *,
    voxel_ml: float = math.nan,
    counting: Counting | None = None,
) -> LesionCounts:
    """Lesion-wise `LesionCounts` of one scan [X, Y, Z]; `counting` is by default `Counting()`."""
    counting = counting or Counting()
    detected, truth = np.asarray(detected, bool), np.asarray(truth, bool)
    window = ndimage.find_objects((detected | truth).astype(np.uint8))
    if not window:
        return LesionCounts(np.zeros(0), np.zeros(0, bool), 0)
    detected, truth = detected[window[0]], truth[window[0]]
    rank = CONNECTIVITIES.index(counting.connectivity) + 1
    lesions, parts = (measure.label(mask, connectivity=rank) for mask in (truth, detected))
    small, tiny = (
        np.bincount(of.ravel()) * voxel_ml < counting.smallest_ml for of in (lesions, parts)
    )
    detected = detected & ~tiny[parts]
    size = np.bincount(lesions.ravel())
    hit = np.bincount(lesions[detected], minlength=len(size)) > counting.overlap * size
    touched = np.bincount(parts[truth], minlength=len(tiny)) > 0
    return LesionCounts(
        volumes_ml=(size * voxel_ml)[1:][~small[1:]],
        hit=hit[1:][~small[1:]],
        false_positives=int((~touched & ~tiny)[1:].sum()),
    )


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
