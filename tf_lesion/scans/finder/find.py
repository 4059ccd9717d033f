"""The brain finder: where a brain is in a scan, and where the scan lies in MNI space.

Two small networks, trained on painted heads alone (`preprocessing.finder`). The first
reads the whole scan at 6 mm and says every 24 mm where it lies in MNI space; a least-squares fit
makes a pose of that. The second sees the scan in that pose at 3 mm and says how far each voxel is
from the surface of the brain, and how far the pose is still off; the pose is fitted once more.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from tf_lesion.scans.finder.canonical import (
    CANONICAL_CENTER,
    CANONICAL_SHAPE,
    brain_points,
    canonical_affine,
    landmarks,
    places,
    surface_input,
)
from tf_lesion.scans.finder.grid import (
    FINE_MM,
    POSE_SHAPE,
    coarser,
    from_channels,
    halved,
    network_input,
    pose_grid_affine,
    pose_input,
)
from tf_lesion.scans.finder.pose import apply, fit_robustly, translation, without_scale

COARSE = 4  # voxels of FINE_MM in one of the coordinates
LOOKS, PASSES = 2, 2  # of the two networks
TILT_DEGREES = 20.0  # of the poses that the second network compares
LEFT_MM = 5.0  # that places of the brain may be away from a rigid fit
SURFACE_RIM_MM = 5.0  # outside of the brain that coordinates still count
SOFTNESS_MM = 3.0
LEAST_LOG_SCALE, LARGEST_LOG_SCALE = -3.0, 4.0
SMALLEST_WEIGHT = 1e-6


@dataclass(frozen=True)
class FoundBrain:
    """What the finder says about a scan.

    Attributes:
        scan_from_mni: [4, 4], mm in MNI space -> mm of the scan; with a scale.
        scan_from_grid: the same without the scale, rigid, about the middle of the landmarks.
        outside: [X, Y, Z] float32 on the canonical grid, signed distance from the brain, mm of the
            average brain, negative inside.
        inside: [X, Y, Z] float32 on the canonical grid, 1 within the scan.
        disagreement_mm: median distance between the places that the network gives and the fit.
        expected_mm: median of what the network expects of it.
        spread_mm: root mean square of what the places found by the first network are off its fit.
        moved_mm: how far the second network moved the brain.
        overlap: Dice of the mask and the average brain, within the scan.
    """

    scan_from_mni: np.ndarray
    scan_from_grid: np.ndarray
    outside: np.ndarray = field(repr=False)
    inside: np.ndarray = field(repr=False)
    disagreement_mm: float
    expected_mm: float
    spread_mm: float
    moved_mm: float
    overlap: float

    def outside_of(self, shape: tuple, affine: np.ndarray) -> np.ndarray:
        """Signed distance [X, Y, Z] float32 from the brain, on the voxels of a scan, mm."""
        matrix = np.linalg.inv(self.scan_from_mni @ canonical_affine()) @ affine
        distance = ndimage.affine_transform(
            self.outside, matrix, output_shape=shape, order=1, mode="nearest"
        )
        return distance * np.float32(np.cbrt(np.linalg.det(self.scan_from_mni[:3, :3])))

    def mask_on(self, shape: tuple, affine: np.ndarray) -> np.ndarray:
        """[X, Y, Z] bool, the brain on the voxels of a scan."""
        return self.outside_of(shape, affine) < 0


@dataclass(frozen=True)
class Networks:
    """Functions [B, x, y, z, C] -> dictionary of arrays, and the average brain."""

    pose: Callable
    surface: Callable
    template: np.ndarray


def find(data: np.ndarray, affine: np.ndarray, networks: Networks | None = None) -> FoundBrain:
    """Find the brain of a scan.

    Args:
        data: [X, Y, Z] float, the axes nearest to RAS.
        affine: [4, 4], voxel -> mm.
        networks: `Networks`; those of the package by default.

    Returns:
        A `FoundBrain`.
    """
    networks = networks or load_networks()
    volume, grid_affine, ends = network_input(data, affine)
    inside = np.zeros_like(volume)
    inside[tuple(slice(*pair) for pair in ends)] = 1
    first, spread = _first_pose(networks, volume, inside, grid_affine)
    poses = [first @ tilt for tilt in _tilts()]
    views = _second_look(networks, volume, inside, grid_affine, poses)
    view = min(views, key=lambda each: each.expected_mm + each.disagreement_mm)
    for _ in range(PASSES):
        (view,) = _second_look(networks, volume, inside, grid_affine, [view.scan_from_mni])
    pose, corners = view.scan_from_mni, brain_points()
    moved = np.linalg.norm(apply(first, corners) - apply(pose, corners), axis=1)
    return FoundBrain(
        scan_from_mni=view.seen_from_mni,
        scan_from_grid=without_scale(pose, landmarks().mean(axis=0)),
        outside=view.outside,
        inside=view.inside,
        disagreement_mm=view.disagreement_mm,
        expected_mm=view.expected_mm,
        spread_mm=spread,
        moved_mm=float(moved.mean()),
        overlap=_overlap(view.outside < 0, networks.template < 0, view.inside > 0.5),
    )


def _tilts():
    """[4, 4] each: turns about the middle of the brain that a first pose may be off by."""
    vectors = [np.zeros(3), *np.deg2rad(TILT_DEGREES) * np.concatenate([np.eye(3), -np.eye(3)])]
    for vector in vectors:
        turn = np.eye(4)
        turn[:3, :3] = Rotation.from_rotvec(vector).as_matrix()
        center = np.array(CANONICAL_CENTER)
        yield translation(center) @ turn @ translation(-center)


def _first_pose(networks, volume, inside, grid_affine):
    """(scan_from_mni, mm that the places of the brain are away from the fit).

    The network looks at the scan as it lies, and then as it came to lie.
    """
    affine = coarser(grid_affine, 2)
    middle = apply(affine, (np.array(volume.shape) / 2 - 1) / 2)
    axes = grid_affine[:3, :3] / FINE_MM  # the scan's own
    view = np.eye(4)  # mm from the middle of the network's grid -> mm of the scan
    view[:3, :3], view[:3, 3] = axes, middle
    small = halved(volume), halved(inside)
    expected = brain_points() - CANONICAL_CENTER
    for _ in range(LOOKS):
        voxels = np.linalg.inv(affine) @ view @ pose_grid_affine()
        seen = (
            ndimage.affine_transform(each, voxels, output_shape=POSE_SHAPE, order=1)
            for each in small
        )
        found = expected + 100 * np.asarray(networks.pose(pose_input(*seen)[None]))[0]
        fit, left = fit_robustly(
            brain_points(), apply(view, found), np.ones(len(found)), np.full(len(found), LEFT_MM)
        )
        view = fit @ translation(CANONICAL_CENTER)
    return fit, float(np.sqrt((left**2).mean()))


@dataclass(frozen=True)
class _View:
    """What the second network says of a scan in one pose, and the pose that follows from it."""

    seen_from_mni: np.ndarray
    outside: np.ndarray
    inside: np.ndarray
    scan_from_mni: np.ndarray
    disagreement_mm: float
    expected_mm: float


def _second_look(networks, volume, inside, grid_affine, poses):
    """A `_View` for each of the poses (scan_from_mni)."""
    to_grid = np.linalg.inv(grid_affine)
    seen = [
        [_sample(each, to_grid @ pose @ canonical_affine()) for each in (volume, inside)]
        for pose in poses
    ]
    inputs = np.stack([surface_input(*each, networks.template) for each in seen])
    outputs = {name: np.asarray(value) for name, value in networks.surface(inputs).items()}
    views = []
    for number, (pose, (_, seen_inside)) in enumerate(zip(poses, seen, strict=True)):
        outside = 10 * from_channels(outputs["outside"][number])
        coordinates = outputs["coordinates"][number].astype(float)
        weight = _near(halved(halved(outside)), SURFACE_RIM_MM) * halved(halved(seen_inside))
        place = places(COARSE)
        fitted = _fit(
            apply(pose, place), place + 10 * coordinates[..., :3], coordinates[..., 3], weight
        )
        views.append(_View(pose, outside, seen_inside, *fitted))
    return views


def _fit(points, wanted, log_scale, weight):
    """(scan_from_mni, median disagreement, median of what was expected), mm."""
    used = weight.ravel() > SMALLEST_WEIGHT
    if used.sum() < 4:
        used = np.ones(weight.size, bool)
    weight = weight.ravel()[used] + SMALLEST_WEIGHT
    scale = np.exp(np.clip(log_scale, LEAST_LOG_SCALE, LARGEST_LOG_SCALE)).ravel()[used]
    matrix, left = fit_robustly(
        points.reshape(-1, 3)[used], wanted.reshape(-1, 3)[used], weight, scale
    )
    return np.linalg.inv(matrix), _median(left, weight), _median(scale, weight)


def _near(outside, rim_mm):
    return 1 / (1 + np.exp(np.clip((outside - rim_mm) / SOFTNESS_MM, -30, 30)))


def _median(values, weights):
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _overlap(mask, other, inside):
    both = np.count_nonzero(mask & other & inside)
    return 2 * both / max(np.count_nonzero(mask & inside) + np.count_nonzero(other & inside), 1)


def _sample(volume, matrix):
    return ndimage.affine_transform(volume, matrix, output_shape=CANONICAL_SHAPE, order=1)


@functools.lru_cache(maxsize=1)
def load_networks() -> Networks:
    """The `Networks` of the package."""
    import tensorflow as tf

    from tf_lesion.scans.finder.weights import load

    networks, template = load()
    return Networks(tf.function(networks["pose"]), tf.function(networks["surface"]), template)
