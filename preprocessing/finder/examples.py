"""Batches for the network of the brain finder, from the shards of painted heads."""

import queue
import threading

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from preprocessing.finder.shards import INTENSITY_STEPS, OUTSIDE_STEPS, SIDE
from tf_lesion.scans.finder.grid import (
    COARSE,
    FINE_MM,
    coarse_places,
    covering_box,
    finder_input,
    halved,
    to_channels,
)
from tf_lesion.scans.finder.pose import apply

GAMMA_SPREAD = 0.25  # of the logarithm
OUTSIDE_RANGE_MM = 25.0  # distances are cut there
NEAR_MM, FAR_WEIGHT = 20.0, 0.02  # coordinates count this far from the brain; less beyond
SURFACE_MM, DISTANT_WEIGHT = 12.0, 0.2  # and distances more if this near
# Of the examples, this share is moved once more; standard deviations: degrees, mm, logarithm.
MOVED, DEGREES, SHIFT_MM, SCALE = 0.5, 15.0, 6.0, 0.08
CUT, CUT_SHARE = 0.1, (0.05, 0.4)  # share of examples that lose a further part of an axis


def source(shards):
    """The function that makes example `number`."""
    return lambda number, rng: make_example(shards[number], rng)


def make_example(example, rng):
    """Input and targets of the network, without a batch axis."""
    volume, outside, inside = _unpacked(example)
    affine, bend = _affine_and_rest(example["coordinates"].astype(float))
    mirror = np.diag([float(rng.choice([-1, 1])), 1, 1, 1])
    seen = mirror @ (_move(rng) if rng.random() < MOVED else np.eye(4))  # mm -> mm of the example
    to_voxel = _voxel_from_mm(SIDE, FINE_MM)
    matrix = to_voxel @ seen @ np.linalg.inv(to_voxel)
    if not np.array_equal(matrix, np.eye(4)):
        volume, inside = (ndimage.affine_transform(a, matrix, order=1) for a in (volume, inside))
        outside = ndimage.affine_transform(outside, matrix, order=1, mode="nearest")
        outside = outside / np.float32(np.cbrt(abs(np.linalg.det(seen[:3, :3]))))
    if rng.random() < CUT:
        inside = _cut(rng, inside)
    volume = _intensities(volume, rng) * (inside > 0.5)
    box = covering_box(inside > 0.5)
    middle = FINE_MM * (np.array([(b.start + b.stop - 1) / 2 for b in box]) - (SIDE - 1) / 2)
    volume, outside, inside = (np.ascontiguousarray(a[box]) for a in (volume, outside, inside))
    places = coarse_places(volume.shape) + middle
    points = apply(seen, places.reshape(-1, 3))
    true = (apply(affine, points) + _at(bend, points)) @ mirror[:3, :3]
    near = np.where(np.abs(outside) < SURFACE_MM, 1, DISTANT_WEIGHT).astype(np.float32)
    clipped = np.clip(outside, -OUTSIDE_RANGE_MM, OUTSIDE_RANGE_MM) / 10
    return {
        "volume": finder_input(volume, inside),
        "coordinates": (true.reshape(places.shape) / 100).astype(np.float32),
        "outside": to_channels(clipped),
        "coordinates_weight": _weight(halved(halved(outside))) * halved(halved(inside)),
        "outside_weight": to_channels(inside * near),
    }


def _unpacked(example):
    """(volume, outside in mm, inside 0 or 1), float32."""
    inside = np.zeros((SIDE,) * 3, np.float32)
    inside[tuple(slice(*ends) for ends in example["inside"])] = 1
    volume = example["volume"].astype(np.float32) / INTENSITY_STEPS
    return volume, example["outside"].astype(np.float32) / OUTSIDE_STEPS, inside


def _affine_and_rest(coordinates):
    """The affine map [4, 4] that is nearest to coordinates [x, y, z, 3], and what is left."""
    places = coarse_places((SIDE,) * 3).reshape(-1, 3)
    with_one = np.column_stack([places, np.ones(len(places))])
    affine = np.eye(4)
    affine[:3] = np.linalg.lstsq(with_one, coordinates.reshape(-1, 3), rcond=None)[0].T
    return affine, coordinates - apply(affine, places).reshape(coordinates.shape)


def _at(bend, points):
    voxels = apply(_voxel_from_mm(SIDE // COARSE, FINE_MM * COARSE), points).T
    return np.stack(
        [
            ndimage.map_coordinates(bend[..., k], voxels, order=1, mode="nearest", prefilter=False)
            for k in range(3)
        ],
        axis=-1,
    )


def _voxel_from_mm(side, size_mm):
    matrix = np.diag([1 / size_mm] * 3 + [1.0])
    matrix[:3, 3] = (side - 1) / 2
    return matrix


def _move(rng):
    """Random similarity [4, 4]."""
    matrix = np.eye(4)
    turn = Rotation.from_rotvec(np.deg2rad(DEGREES) / np.sqrt(3) * rng.standard_normal(3))
    matrix[:3, :3] = turn.as_matrix() * np.exp(SCALE * rng.standard_normal())
    matrix[:3, 3] = SHIFT_MM * rng.standard_normal(3)
    return matrix


def _cut(rng, inside):
    """`inside` without a part of it at one end of an axis."""
    axis = rng.integers(3)
    used = np.flatnonzero((inside > 0.5).any(axis=tuple({0, 1, 2} - {axis})))
    lost = int(rng.uniform(*CUT_SHARE) * len(used))
    used = used[:lost] if rng.random() < 0.5 else used[len(used) - lost :]
    inside = np.moveaxis(inside.copy(), axis, 0)
    inside[used] = 0
    return np.ascontiguousarray(np.moveaxis(inside, 0, axis))


def _intensities(volume, rng):
    volume = np.maximum(volume, 0) ** np.float32(np.exp(GAMMA_SPREAD * rng.standard_normal()))
    return volume * np.float32(np.exp(0.1 * rng.standard_normal()))


def _weight(outside):
    near = np.clip(2 - np.abs(outside.clip(0)) / (NEAR_MM / 2), 0, 1)
    return (FAR_WEIGHT + (1 - FAR_WEIGHT) * near).astype(np.float32)


def batches(shards, make, *, batch, seed, ahead=4):
    """Endless lists of `batch` examples, made by one thread ahead of their use.

    The examples of a batch may differ in shape.
    """
    made = queue.Queue(ahead)

    def work():
        rng = np.random.default_rng(seed)
        while True:
            shards.refresh()
            made.put([make(rng.integers(len(shards)), rng) for _ in range(batch)])

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield made.get()
