"""The grid in MNI space on which the surface of the brain is found."""

import numpy as np

from tf_lesion.scans.finder.grid import FINE_MM, halved, to_channels

CANONICAL_SHAPE = (56, 72, 64)  # voxels of FINE_MM
CANONICAL_CENTER = (0.0, -18.0, 6.0)  # mm
HALF_EXTENT = (62.0, 80.0, 60.0)  # mm, of a brain along the axes
# Where `scans.alignment` puts the right centroids of tissues in MNI space, mm; the left are their
# mirror images. Medians of 20 label maps (those SynthSeg was trained with). The pose from these
# differs from the alignment of one anatomy by 1.1 degrees and 0.7 mm per axis (RMS).
LANDMARKS = {
    "white": (26.6, -18.5, 17.1),
    "cortex": (30.2, -17.8, 14.9),
    "thalamus": (12.3, -17.6, 6.4),
    "caudate": (15.5, 7.8, 9.0),
    "putamen": (25.6, -0.3, 0.1),
    "pallidum": (20.4, -4.0, -1.2),
    "hippocampus": (24.6, -21.5, -12.0),
    "amygdala": (22.7, -4.7, -16.4),
    "cerebellar_white": (16.3, -51.3, -27.3),
    "cerebellar_cortex": (22.6, -60.5, -31.1),
}


def canonical_affine() -> np.ndarray:
    """[4, 4], voxel -> mm in MNI space."""
    affine = np.diag([FINE_MM] * 3 + [1.0])
    affine[:3, 3] = np.array(CANONICAL_CENTER) - FINE_MM * (np.array(CANONICAL_SHAPE) - 1) / 2
    return affine


def landmarks() -> np.ndarray:
    """[20, 3] mm in MNI space: left and right of each of LANDMARKS."""
    return np.array([(side * x, y, z) for x, y, z in LANDMARKS.values() for side in (-1, 1)])


def brain_points() -> np.ndarray:
    """[26, 3] mm in MNI space: `landmarks`, and the ends of a brain."""
    ends = np.concatenate([np.diag(HALF_EXTENT), -np.diag(HALF_EXTENT)]) + CANONICAL_CENTER
    return np.concatenate([landmarks(), ends])


def places(step: int) -> np.ndarray:
    """[x, y, z, 3] mm in MNI space of the middles of cubes of `step` voxels."""
    affine = canonical_affine()
    axes = [
        affine[k, 3] + FINE_MM * (np.arange(n // step) * step + (step - 1) / 2)
        for k, n in enumerate(CANONICAL_SHAPE)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def surface_input(volume: np.ndarray, inside: np.ndarray, template: np.ndarray) -> np.ndarray:
    """What the surface network reads, [x, y, z, 13] at 6 mm, of volumes on the canonical grid."""
    parts = (
        to_channels(volume),
        halved(inside)[..., None],
        halved(template)[..., None],
        places(2) / 100,
    )
    return np.concatenate(parts, axis=-1).astype(np.float32)
