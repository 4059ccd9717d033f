"""How a painted head is acquired: slices, gaps, noise, wrap, missing slices."""

from dataclasses import dataclass

import numpy as np

THICK = 0.6  # share of scans with thick slices
ISOTROPIC_MM, THICK_MM = (1.0, 3.0), (2.0, 6.5)
IN_PLANE_MM = (0.9, 1.6)
SLICE_AXIS = (0.2, 0.2, 0.6)  # shares of sagittal, coronal and axial slices
PROFILE = (0.65, 1.0)  # thickness of a slice, of the distance to the next: the rest is gap
NOISE, LOUD_NOISE, LOUD = (0.0, 0.04), (0.04, 0.12), 0.15  # of the 99th percentile; share of scans
WRAPPED, WRAP_SHARE, WRAP_STRENGTH = 0.07, (0.55, 0.9), (0.2, 0.9)
MISSING, UNEVEN = 0.05, 0.08  # shares of scans with missing slices, and with slices of uneven gain
FEWEST = 4  # slices


@dataclass(frozen=True)
class Acquisition:
    """Voxel sizes of a scan and what goes wrong with it.

    Attributes:
        fine_affine: [4, 4], voxel painted -> mm.
        fine_mm: size of those.
        sizes: [3] mm, distance of voxels.
        profile: [3] mm, width that a voxel averages over.
        counts: [3] voxels.
        axis: of the slices.
        facts: for the records.
    """

    fine_affine: np.ndarray
    fine_mm: float
    sizes: np.ndarray
    profile: np.ndarray
    counts: tuple
    axis: int
    facts: dict


def draw_acquisition(rng, fine_mm, fine_affine, shape):
    """An `Acquisition` of voxels painted [X, Y, Z] of size `fine_mm`."""
    axis = int(rng.choice(3, p=SLICE_AXIS))
    if rng.random() < THICK:
        sizes = np.full(3, rng.uniform(*IN_PLANE_MM))
        sizes[axis] = rng.uniform(*THICK_MM)
    else:
        sizes = np.full(3, rng.uniform(*ISOTROPIC_MM))
    sizes = np.maximum(sizes, fine_mm)
    lengths = np.array(shape) * fine_mm
    sizes = np.minimum(sizes, lengths / FEWEST)
    profile = sizes.copy()
    profile[axis] *= rng.uniform(*PROFILE)
    counts = tuple(int(n) for n in np.maximum(np.floor(lengths / sizes + 1e-6), 1))
    facts = {"voxel_mm": np.round(sizes, 2).tolist(), "slice_axis": axis}
    return Acquisition(fine_affine, fine_mm, sizes, profile, counts, axis, facts)


def acquire(rng, image, acquisition, *, clean_air):
    """(scan [X, Y, Z] float32, affine [4, 4]) of painted voxels.

    `clean_air`: no noise where the painted image is exactly 0, as after skull stripping.
    """
    if rng.random() < WRAPPED:
        image = _wrapped(rng, image)
    scan = image
    affine = np.diag([*acquisition.sizes, 1.0])
    origin = acquisition.fine_affine[:3, 3] - acquisition.fine_mm / 2
    affine[:3, 3] = origin + acquisition.sizes / 2
    for axis in range(3):
        size, count = acquisition.sizes[axis], acquisition.counts[axis]
        if abs(size - acquisition.fine_mm) < 1e-6:
            continue
        weights = _profiles(
            image.shape[axis], acquisition.fine_mm, size, acquisition.profile[axis], count
        )
        scan = np.moveaxis(np.tensordot(weights, scan, axes=(1, axis)), 0, axis)
    air = scan <= 0
    scan = _slices(rng, scan, acquisition.axis)
    scan = _noisy(rng, scan)
    if clean_air:
        scan[air] = 0
    return np.ascontiguousarray(scan), affine


def resample_bands(values, affine, to_affine, shape):
    """Linear interpolation of painted voxels [x, y, z] at the centers of a scan's."""
    for axis in range(3):
        step = to_affine[axis, axis] / affine[axis, axis]
        start = (to_affine[axis, 3] - affine[axis, 3]) / affine[axis, axis]
        place = np.clip(start + step * np.arange(shape[axis])[:, None], 0, values.shape[axis] - 1)
        weights = np.maximum(0, 1 - np.abs(place - np.arange(values.shape[axis]))).astype(
            np.float32
        )
        values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    return values


def _profiles(length, fine_mm, size, thickness, count):
    """[count, length] float32: overlap of each slice, a box, with the painted voxels."""
    middle = (np.arange(count)[:, None] + 0.5) * size
    low = np.arange(length) * fine_mm
    overlap = np.minimum(middle + thickness / 2, low + fine_mm) - np.maximum(
        middle - thickness / 2, low
    )
    overlap = np.maximum(overlap, 0)
    return (overlap / np.maximum(overlap.sum(axis=1, keepdims=True), 1e-9)).astype(np.float32)


def _wrapped(rng, image):
    """The image with what lies at one end of an axis added at the other."""
    axis = rng.integers(3)
    ends = np.moveaxis(image.copy(), axis, 0)
    source = ends.copy()
    if rng.random() < 0.5:
        ends, source = ends[::-1], source[::-1]
    width = max(1, int((1 - rng.uniform(*WRAP_SHARE)) * len(ends)))
    ends[:width] += np.float32(rng.uniform(*WRAP_STRENGTH)) * source[-width:]
    return np.moveaxis(ends if ends.strides[0] > 0 else ends[::-1], 0, axis)


def _slices(rng, scan, axis):
    count = scan.shape[axis]
    gain = np.ones(count, np.float32)
    if rng.random() < UNEVEN:
        gain *= np.exp(rng.uniform(0.02, 0.15) * rng.standard_normal(count))
    if rng.random() < MISSING:
        first = rng.integers(count)
        gain[first : first + rng.integers(1, 4)] = 0
    return scan * gain.reshape([-1 if k == axis else 1 for k in range(3)])


def _noisy(rng, scan):
    """Rician noise."""
    size = rng.uniform(*(LOUD_NOISE if rng.random() < LOUD else NOISE))
    size = np.float32(size * np.percentile(scan[::2, ::2, ::2], 99))
    noise = rng.standard_normal((2, *scan.shape), dtype=np.float32)
    return np.sqrt((scan + size * noise[0]) ** 2 + (size * noise[1]) ** 2)
