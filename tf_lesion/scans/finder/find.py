"""The brain finder: where a brain is in a scan, and where the scan lies in MNI space.

A network trained on painted heads alone (`preprocessing.finder`) reads the whole scan at 3 mm and
says of every voxel how far it is from the surface of the brain, and where in MNI space it lies; a
robust fit makes a pose of that. It looks twice: at the scan as it lies, and as it lies upright
after the first pose; each time also at the mirror image. Distances are averaged, and the pose is
that of both looks together.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from tf_lesion import devices
from tf_lesion.scans.finder.canonical import landmarks, places_of
from tf_lesion.scans.finder.grid import (
    COARSE,
    FINE_MM,
    coarser,
    covering_box,
    finder_input,
    from_channels,
    halved,
    network_input,
)
from tf_lesion.scans.finder.pose import apply, fit_landmarks, without_scale

RIM_MM, SOFTNESS_MM = 5.0, 3.0  # coordinates count to this far outside of the brain; softly
SMALLEST_WEIGHT = 1e-3
FEWEST_PLACES = 8
LARGEST_VIEW = 96  # voxels of FINE_MM along each axis of the second look


@dataclass(frozen=True)
class FoundBrain:
    """What the finder says about a scan.

    Attributes:
        scan_from_mni: [4, 4], mm in MNI space -> mm of the scan; with a scale.
        scan_from_grid: the same without the scale, rigid, about the middle of the landmarks.
        outside: [A, B, C] float32, signed distance from the brain, mm, negative inside.
        affine: [4, 4], voxel of `outside` (FINE_MM) -> mm of the scan.
        disagreement_mm: median distance between the places that the network gives and the fit.
        expected_mm: median of what the network expects of it.
    """

    scan_from_mni: np.ndarray
    scan_from_grid: np.ndarray
    outside: np.ndarray = field(repr=False)
    affine: np.ndarray
    disagreement_mm: float
    expected_mm: float

    def outside_on(self, shape: tuple, affine: np.ndarray) -> np.ndarray:
        """Signed distance [X, Y, Z] float32 from the brain, on the voxels of a scan, mm."""
        matrix = np.linalg.inv(self.affine) @ affine
        if np.array_equal(matrix[:3, :3], np.diag(np.diag(matrix)[:3])):
            return _along_axes(self.outside, matrix, shape)
        return ndimage.affine_transform(
            self.outside, matrix, output_shape=shape, order=1, mode="nearest"
        )


class _Look(NamedTuple):
    """What the network says of one view of the scan.

    outside [A, B, C] mm on voxels of `affine`; places, wanted [N, 3] mm of the scan and in MNI
    space; weight [N]; scale_mm [N], the error that is expected.
    """

    outside: np.ndarray
    affine: np.ndarray
    places: np.ndarray
    wanted: np.ndarray
    weight: np.ndarray
    scale_mm: np.ndarray


def _shipped():
    """The network of the package; TensorFlow is set up, unless it has been."""
    if "tensorflow" not in sys.modules:
        devices.start()
    from tf_lesion.scans.finder.weights import load

    return load()


def find(data: np.ndarray, affine: np.ndarray, network: Callable | None = None) -> FoundBrain:
    """Find the brain of a scan.

    Args:
        data: [X, Y, Z] float, the axes nearest to RAS.
        affine: [4, 4], voxel -> mm.
        network: [B, x, y, z, 12] -> dictionary of arrays, as `networks.build_network`; that of the
            package by default.

    Returns:
        A `FoundBrain`.
    """
    network = network or _shipped()
    volume, grid_affine, ends = network_input(data, affine)
    inside = np.zeros_like(volume)
    inside[tuple(slice(*pair) for pair in ends)] = 1
    first = _look(network, volume, inside, grid_affine)
    pose, _, _ = _fit([first])
    second = _look(network, *_upright(volume, inside, grid_affine, pose))
    pose, disagreement, expected = _fit([first, second])
    back = np.linalg.inv(second.affine) @ grid_affine
    outside = ndimage.affine_transform(
        second.outside, back, output_shape=volume.shape, order=1, mode="nearest"
    )
    outside = (first.outside + outside) / 2
    return FoundBrain(
        scan_from_mni=pose,
        scan_from_grid=without_scale(pose, landmarks().mean(axis=0)),
        outside=outside,
        affine=grid_affine,
        disagreement_mm=disagreement,
        expected_mm=expected,
    )


def _look(network, volume, inside, affine):
    """A `_Look` at a volume and at its mirror image."""
    views = [(volume, inside), (volume[::-1], inside[::-1])]
    outputs = [network(finder_input(*view)[None]) for view in views]
    outside, mirrored = (10 * from_channels(np.asarray(out["outside"])[0]) for out in outputs)
    outside = (outside + mirrored[::-1]) / 2
    (wanted, scale), (other, scale_there) = (
        places_of(np.asarray(out["coordinates"])[0]) for out in outputs
    )
    wanted = (wanted + other[::-1] * [-1, 1, 1]) / 2
    scale = (scale + scale_there[::-1]) / 2
    weight = _near(halved(halved(outside))) * halved(halved(inside))
    coarse = coarser(affine, COARSE)
    voxels = np.stack(np.meshgrid(*map(np.arange, weight.shape), indexing="ij"), axis=-1)
    used = weight > SMALLEST_WEIGHT
    return _Look(
        outside=outside,
        affine=affine,
        places=apply(coarse, voxels[used]),
        wanted=wanted[used],
        weight=weight[used],
        scale_mm=scale[used],
    )


def _near(outside):
    return 1 / (1 + np.exp(np.clip((outside - RIM_MM) / SOFTNESS_MM, -30, 30)))


def _upright(volume, inside, affine, pose):
    """The scan on a grid along the axes of MNI space: (volume, inside, affine)."""
    axes = without_scale(pose, np.zeros(3))[:3, :3]
    view = np.eye(4)  # voxel of a large cube -> mm of the scan
    view[:3, :3] = FINE_MM * axes
    middle = apply(affine, (np.array(volume.shape) - 1) / 2)
    view[:3, 3] = middle - view[:3, :3] @ np.full(3, (LARGEST_VIEW - 1) / 2)
    matrix = np.linalg.inv(affine) @ view
    volume, inside = (
        ndimage.affine_transform(each, matrix, output_shape=(LARGEST_VIEW,) * 3, order=1)
        for each in (volume, inside)
    )
    box = covering_box(inside > 0.5)
    view[:3, 3] = apply(view, np.array([part.start for part in box]))
    return np.ascontiguousarray(volume[box]), np.ascontiguousarray(inside[box]), view


def _fit(looks):
    """(scan_from_mni, median disagreement, median of what was expected), mm."""
    places, wanted, weight, scale = (
        np.concatenate([getattr(look, name) for look in looks])
        for name in ("places", "wanted", "weight", "scale_mm")
    )
    if len(places) < FEWEST_PLACES:  # no brain: any pose will do, the disagreement tells
        return np.eye(4), np.inf, np.inf
    matrix, left = fit_landmarks(places, wanted, weight, scale, landmarks())
    return np.linalg.inv(matrix), _median(left, weight), _median(scale, weight)


def _median(values, weights):
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _along_axes(volume, matrix, shape):
    """Linear interpolation of a volume at voxels of a grid with the same axes; edges go on."""
    for axis, count in enumerate(shape):
        length = volume.shape[axis]
        place = np.clip(matrix[axis, axis] * np.arange(count) + matrix[axis, 3], 0, length - 1)
        low = np.minimum(place.astype(int), length - 2)
        share = (place - low).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(3)])
        volume = volume.take(low, axis) * (1 - share) + volume.take(low + 1, axis) * share
    return volume
