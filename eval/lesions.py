"""Counting lesions instead of voxels: how many are found, how many false ones are shown.

A lesion is a 26-connected component of the truth in a whole scan, not in a slice.
"""

from dataclasses import dataclass

import numpy as np
from skimage import measure


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


def lesion_counts(detected, truth):
    """Lesion-wise `LesionCounts` of one scan [X, Y, Z], 26-connected."""
    detected, truth = np.asarray(detected, bool), np.asarray(truth, bool)
    lesions, num_lesions = measure.label(truth, connectivity=truth.ndim, return_num=True)
    parts, num_parts = measure.label(detected, connectivity=truth.ndim, return_num=True)
    found = np.unique(lesions[detected & truth]).size
    hits = np.unique(parts[detected & truth]).size
    return LesionCounts(lesions=num_lesions, found=found, false_positives=num_parts - hits)


def stack_volume(slices, slice_index):
    """Volume [H, W, Z] of slices [n, H, W] at their axial positions; missing slices are empty."""
    index = np.asarray(slice_index) - np.min(slice_index)
    volume = np.zeros((*slices.shape[1:], index.max() + 1), dtype=slices.dtype)
    volume[..., index] = np.moveaxis(slices, 0, -1)
    return volume
