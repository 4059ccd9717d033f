"""Synthetic infarcts on T2, days to weeks old: a part of a vascular territory, or a lacune."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from preprocessing.phantom.fields import Grid, random_field
from preprocessing.phantom.lesions import Lesion, Maps, Places, box_of, region, share_of
from preprocessing.phantom.tumors import EDEMA, EDGE_BLUR_MM

LABELS = {"edema": EDEMA}
PLURAL = "lesions"  # in phantom.json
LACUNE_RATE = 0.25
# A territory's center: no deeper than this and this share of its radius, so that it has cortex.
OUTER_MM, OUTER_RADII = 7.0, 0.4
LACUNE_DEPTH_MM, LACUNE_VENTRICLE_MM = 24.0, 3.0  # at least that far from either
ALWAYS_DEEP_ENOUGH = 0.8  # quantile of depth that serves lacunes in the smallest brains
LEAST_TISSUE = 0.25  # share of cerebral tissue below which nothing is part of an infarct
FLUID_BARRIER_MM = 4.0
FINE_MM, COARSE_RADII, TEXTURE = 3.0, 0.4, 0.05  # scales and spread of unevenness


@dataclass(frozen=True)
class Infarct:
    """Ranges (low, high) that infarcts of a kind are drawn from; names as in `Lesion`."""

    volume_ml: tuple[float, float]  # log-uniform
    elongation: tuple[float, float]
    taper: tuple[float, float]
    level: tuple[float, float]
    edge: tuple[float, float]
    contrast: tuple[float, float]
    push: tuple[float, float]  # share of the radius


INFARCTS = {
    "territory": Infarct(
        volume_ml=(2.0, 100.0),
        elongation=(0.8, 1.4),
        taper=(0.2, 0.6),
        level=(1.4, 2.6),
        edge=(0.6, 4.0),
        contrast=(0.2, 0.5),
        push=(0.0, 0.06),
    ),
    "lacune": Infarct(
        volume_ml=(0.1, 1.0),
        elongation=(1.0, 1.8),
        taper=(0.0, 0.0),
        level=(1.6, 2.6),
        edge=(0.6, 1.5),
        contrast=(0.2, 0.5),
        push=(0.0, 0.0),
    ),
}


def draw(rng: np.random.Generator, number: int, places: Places) -> list[Lesion]:
    """The one infarct of a patient; `number` does not matter."""
    site = "lacune" if rng.random() < LACUNE_RATE else "territory"
    ranges = INFARCTS[site]
    volume_ml = float(np.exp(rng.uniform(*np.log(ranges.volume_ml))))
    radius = 10 * np.cbrt(3 * volume_ml / (4 * np.pi))  # mm, of a ball
    if site == "lacune":
        deep = min(LACUNE_DEPTH_MM, np.quantile(places.depth, ALWAYS_DEEP_ENOUGH))
        fits = (places.depth >= deep) & (places.to_ventricle >= LACUNE_VENTRICLE_MM)
    else:
        fits = places.depth <= OUTER_MM + OUTER_RADII * radius
    # Where no place fits, any will do.
    where = rng.choice(np.flatnonzero(fits if fits.any() else ~fits))
    infarct = Lesion(
        site=site,
        center=tuple(places.points[where]),
        axis=tuple(places.inward[where]),
        volume_ml=volume_ml,
        elongation=rng.uniform(*ranges.elongation),
        taper=rng.uniform(*ranges.taper),
        level=rng.uniform(*ranges.level),
        edge=rng.uniform(*ranges.edge),
        contrast=rng.uniform(*ranges.contrast),
        push=radius * rng.uniform(*ranges.push),
    )
    return [infarct]


def grow(
    rng: np.random.Generator,
    infarct: Lesion,
    *,
    image: np.ndarray,
    label: np.ndarray,
    brain: np.ndarray,
    grid: Grid,
    maps: Maps,
) -> None:
    """Paint an infarct into an image and its labels, in place; arguments as `tumors.grow`.

    Cortex, white matter and the sulci between come near one intensity. Ventricles and the other
    hemisphere stay as they are.
    """
    box = box_of(infarct, grid)
    seen, cerebrum, side = image[box], maps("cerebrum")[box], maps("side")[box]
    middle = np.rint((np.asarray(infarct.center) - grid.origin) / grid.voxel_size).astype(int)
    room = brain[box] & (cerebrum > LEAST_TISSUE)
    room &= (side > 0) == (maps("side")[tuple(middle)] > 0)
    barrier = FLUID_BARRIER_MM * (1 - cerebrum)
    inside, depth = region(rng, infarct, room=room, barrier=barrier, box=box, grid=grid)
    scales = np.array([FINE_MM, COARSE_RADII * infarct.radius]) / grid.voxel_size
    texture = sum(random_field(rng, seen.shape, scale) for scale in scales)
    target = infarct.level * (1 + TEXTURE * texture) + infarct.contrast * (seen - 1)
    change = share_of(infarct, depth) * room * (target - seen)
    change = np.where(inside, change, np.maximum(change, 0))
    image[box] += ndimage.gaussian_filter(change, EDGE_BLUR_MM / grid.voxel_size)
    label[box][inside] = EDEMA


def summary(infarcts: list[Lesion]) -> dict[str, Any]:
    """What a patient has, for phantom.json."""
    return {"lesion_kind": "stroke"}
