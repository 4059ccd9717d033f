"""Batches for the two networks of the brain finder, from the shards of painted heads."""

import queue
import threading

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from preprocessing.finder.shards import COARSE, INTENSITY_STEPS, OUTSIDE_STEPS, SIDE
from tf_lesion.scans.finder.canonical import (
    CANONICAL_CENTER,
    CANONICAL_SHAPE,
    brain_points,
    canonical_affine,
    places,
    surface_input,
)
from tf_lesion.scans.finder.grid import FINE_MM, halved, pose_input, to_channels
from tf_lesion.scans.finder.pose import apply

GAMMA_SPREAD = 0.2  # of the logarithm
OUTSIDE_RANGE_MM = 25.0  # distances are cut there
NEAR_MM, FAR_WEIGHT = 20.0, 0.1  # coordinates count this far from the brain; less beyond
SURFACE_MM = 12.0  # and distances more if this near
TURN = (10.0, 10.0, 0.06)  # standard deviations of further turns (degrees), shifts (mm), scales
TURNED = 0.75  # share of examples of the pose network that are moved once more
LEFT = (6.0, 6.0, 0.05)  # of what is left to find by the surface network
WIDE, WIDER = 0.35, 2.2  # share of its examples with more of it; factor


# The other side of each of `brain_points`: pairs, then the right, front, top, left, back, bottom.
MIRRORED = [*(k ^ 1 for k in range(20)), 23, 21, 22, 20, 24, 25]


def pose_source(shards):
    """The function that makes example `number` of the pose network; small copies stay in memory."""
    kept = {}

    def make(number, rng):
        if number not in kept:
            kept[number] = _small(shards[number])
        return pose_example(kept[number], rng)

    return make


def _small(example):
    """What the pose network needs, at 6 mm: volume, inside, and places of the brain [26, 3] mm."""
    volume, _, _, inside = _unpacked(example)
    points = apply(np.linalg.inv(example["mni_from_grid"].astype(float)), brain_points())
    points[: len(example["landmarks"])] = example["landmarks"]
    return halved(volume).astype(np.float16), halved(inside).astype(np.float16), points


def pose_example(small, rng):
    """Input and target of the pose network, without a batch axis."""
    volume, inside, points = small
    volume, inside = volume.astype(np.float32), inside.astype(np.float32)
    if rng.random() < 0.5:  # the mirror image is a head as well
        volume, inside = volume[::-1], inside[::-1]
        points = points[MIRRORED] * [-1.0, 1, 1]
    if rng.random() < TURNED:
        matrix = _disturbance(rng, TURN, center=(0, 0, 0))
        to_voxel = np.diag([1 / (2 * FINE_MM)] * 3 + [1.0])
        to_voxel[:3, 3] = (SIDE / 2 - 1) / 2
        voxels = to_voxel @ matrix @ np.linalg.inv(to_voxel)
        volume, inside = (
            ndimage.affine_transform(np.ascontiguousarray(a), voxels, order=1)
            for a in (volume, inside)
        )
        points = apply(np.linalg.inv(matrix), points)
    expected = brain_points() - CANONICAL_CENTER
    return {
        "volume": pose_input(_intensities(volume, rng), inside),
        "points": ((points - expected) / 100).astype(np.float32),
    }


def surface_source(shards, template):
    """The function that makes example `number` of the surface network."""
    return lambda number, rng: surface_example(shards[number], rng, template)


def surface_example(example, rng, template):
    """Inputs and targets of the surface network: the head about in MNI space."""
    volume, outside, coordinates, inside = _unpacked(example)
    size = WIDER if rng.random() < WIDE else 1.0
    grid_from_mni = np.linalg.inv(example["mni_from_grid"].astype(float)) @ _disturbance(
        rng, size * np.array(LEFT), center=CANONICAL_CENTER
    )
    if rng.random() < 0.5:
        mirror = np.diag([-1.0, 1, 1, 1])
        volume, outside, coordinates, inside = (
            a[::-1] for a in (volume, outside, coordinates, inside)
        )
        coordinates = coordinates * np.float32([-1, 1, 1])
        grid_from_mni = mirror @ grid_from_mni @ mirror
    to_voxel = np.eye(4)
    to_voxel[:3, :3] /= FINE_MM
    to_voxel[:3, 3] = (SIDE - 1) / 2
    matrix = to_voxel @ grid_from_mni @ canonical_affine()
    volume, inside = (_sample(a, matrix) for a in (volume, inside))
    volume = _intensities(volume, rng)
    outside = _sample(outside, matrix, mode="nearest")
    place = places(COARSE)
    points = apply(grid_from_mni, place.reshape(-1, 3)) / FINE_MM / COARSE
    points = points + (SIDE // COARSE - 1) / 2
    true = np.stack(
        [
            ndimage.map_coordinates(coordinates[..., k], points.T, order=1, mode="nearest")
            for k in range(3)
        ],
        axis=-1,
    )
    near = np.where(np.abs(outside) < SURFACE_MM, 1, FAR_WEIGHT).astype(np.float32)
    return {
        "volume": surface_input(volume, inside, template),
        "coordinates": ((true.reshape(place.shape) - place) / 10).astype(np.float32),
        "outside": to_channels(np.clip(outside, -OUTSIDE_RANGE_MM, OUTSIDE_RANGE_MM) / 10),
        "coordinates_weight": _weight(halved(halved(outside))) * halved(halved(inside)),
        "outside_weight": to_channels(inside * near),
    }


def _unpacked(example):
    """(volume, outside in mm, coordinates in mm, inside 0 or 1), float32."""
    inside = np.zeros((SIDE,) * 3, np.float32)
    inside[tuple(slice(*ends) for ends in example["inside"])] = 1
    return (
        example["volume"].astype(np.float32) / INTENSITY_STEPS,
        example["outside"].astype(np.float32) / OUTSIDE_STEPS,
        example["coordinates"].astype(np.float32),
        inside,
    )


def _intensities(volume, rng):
    volume = volume ** np.float32(np.exp(GAMMA_SPREAD * rng.standard_normal()))
    return volume * np.float32(np.exp(0.1 * rng.standard_normal()))


def _weight(outside):
    return (
        FAR_WEIGHT + (1 - FAR_WEIGHT) * np.clip(2 - np.abs(outside.clip(0)) / (NEAR_MM / 2), 0, 1)
    ).astype(np.float32)


def _disturbance(rng, sizes, *, center):
    """Random similarity [4, 4] about `center` [3]; `sizes` are degrees, mm, and of a logarithm."""
    degrees, shift, scale = sizes
    matrix = np.eye(4)
    turn = Rotation.from_rotvec(np.deg2rad(degrees) / np.sqrt(3) * rng.standard_normal(3))
    matrix[:3, :3] = turn.as_matrix() * np.exp(scale * rng.standard_normal())
    matrix[:3, 3] = shift / np.sqrt(3) * rng.standard_normal(3)
    matrix[:3, 3] += center - matrix[:3, :3] @ center
    return matrix


def _sample(volume, matrix, mode="constant"):
    return ndimage.affine_transform(
        np.ascontiguousarray(volume), matrix, output_shape=CANONICAL_SHAPE, order=1, mode=mode
    )


def batches(shards, make, *, batch, seed, ahead=4):
    """Endless batches {name: [B, ...]}, made by one thread ahead of their use."""
    made = queue.Queue(ahead)

    def work():
        rng = np.random.default_rng(seed)
        while True:
            shards.refresh()
            examples = [make(rng.integers(len(shards)), rng) for _ in range(batch)]
            made.put({name: np.stack([e[name] for e in examples]) for name in examples[0]})

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield made.get()
