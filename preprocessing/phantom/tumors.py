"""Synthetic gliomas on T2: where they grow, push, what they look like, and their BRATS labels."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from preprocessing.phantom.fields import Grid, random_field
from preprocessing.phantom.lesions import Drawn, Maps, Places, rough

NECROSIS, EDEMA, ENHANCING = 1, 2, 4  # BRATS 2017 labels; 1 is the non-enhancing core as well
LABELS = {"necrosis": NECROSIS, "edema": EDEMA, "enhancing": ENHANCING}
PLURAL = "tumors"  # in phantom.json
CSF_LIKE = 2.0  # intensity, in units of white matter, above which a voxel is mostly fluid
SKULL_MARGIN_MM = 10.0  # tissue closer to the skull than this is pushed less
SECOND_TUMOR_RATE = 0.2
SECOND_TUMOR_SIZE = 0.6  # of the size of a first
DEPTH_SHARE = 0.45  # of its radius that a tumor's center lies at least below the surface
ALWAYS_DEEP_ENOUGH = 0.8  # quantile of depth that serves the largest tumors of the smallest brains
STRETCH_SPREAD = 0.18  # of the logarithms of a tumor's half axes
GRAY_BARRIER = 0.15  # radii by which edema, which follows white matter, falls short in the cortex
# Cores stop at ventricles: places where the image is bright even after a blur over WIDE_MM.
VENTRICLE_BARRIER, WIDE_MM, WIDE_CSF = 0.5, 2.0, 2.4
GRAY_FROM, GRAY_RAMP = 1.1, 0.3  # intensities
SMALLEST_CORE = 0.3  # radii
BOX_RADII = 1.7  # beyond which no outline reaches
# How edema fades to its edge: share of its brightness there, and radii to the whole of it.
EDEMA_EDGE, EDEMA_RAMP = 0.5, 0.3
EDEMA_TEXTURE, CORE_TEXTURE, RIM_TEXTURE = 0.06, 0.17, 0.12
DARKEST = 0.25  # intensity of blood or calcium, in units of white matter
EDGE_BLUR_MM = 0.6


@dataclass(frozen=True)
class Grade:
    """Ranges (low, high) that the tumors of a grade are drawn from; names as in `Tumor`.

    Cores of gliomas are bright on T2 (grades II and III: T2 of 323 +- 127 ms in the middle, 211 +-
    74 ms around it; doi:10.1186/s12883-019-1590-1). A core that is dark as a whole, of bleeding,
    is the exception, and of the high grade.
    """

    radius: tuple[float, float]
    core: tuple[float, float]
    push: tuple[float, float]  # share of the radius
    bright_core_level: tuple[float, float]
    dark_core_rate: float
    enhancing_rate: float
    necrosis: tuple[float, float] = (0.5, 0.8)
    edema_level: tuple[float, float] = (1.7, 2.4)
    rim_level: tuple[float, float] = (1.25, 2.0)
    dark_core_level: tuple[float, float] = (0.45, 0.75)


GRADES = {
    "HGG": Grade(
        radius=(17, 30),
        core=(0.5, 0.72),
        push=(0.08, 0.28),
        bright_core_level=(1.9, 3.0),
        dark_core_rate=0.06,
        enhancing_rate=1.0,
    ),
    "LGG": Grade(
        radius=(13, 25),
        core=(0.55, 0.85),
        push=(0.05, 0.17),
        bright_core_level=(1.7, 2.6),
        dark_core_rate=0.0,
        enhancing_rate=0.2,
    ),
}


@dataclass(frozen=True)
class Tumor(Drawn):
    """One tumor. Lengths in mm, intensities relative to white matter."""

    grade: str
    center: tuple[float, float, float]  # in the space of the scan
    stretch: tuple[float, float, float]  # relative half axes, product 1
    radius: float  # of the edema
    core: float  # fraction of the radius
    necrosis: float  # fraction of the core
    push: float  # largest shift of the tissue around
    edema_level: float
    rim_level: float
    core_level: float
    enhancing: bool  # whether the core has an enhancing rim (label 4)


def draw(rng: np.random.Generator, number: int, places: Places) -> list[Tumor]:
    """The tumors of patient `number`: grades alternate."""
    grade = list(GRADES)[number % len(GRADES)]
    return draw_tumors(rng, grade, places=places.points, depth=places.depth)


def draw_tumors(
    rng: np.random.Generator, grade: str, *, places: np.ndarray, depth: np.ndarray
) -> list[Tumor]:
    """One or two tumors of a patient.

    Args:
        grade: "HGG" (large, all labels) or "LGG" (smaller, mostly labels 1 and 2).
        places: [n, 3] mm, cerebral tissue.
        depth: [n] mm below the surface of the brain.
    """
    tumors = [_draw_tumor(rng, grade, places, depth, shrink=1.0)]
    if rng.random() < SECOND_TUMOR_RATE:
        second = _draw_tumor(rng, grade, places, depth, shrink=SECOND_TUMOR_SIZE)
        gap = np.linalg.norm(np.subtract(second.center, tumors[0].center))
        if gap > second.radius + tumors[0].radius:
            tumors.append(second)
    return tumors


def _draw_tumor(rng, grade, places, depth, *, shrink):
    ranges = GRADES[grade]
    radius = shrink * rng.uniform(*ranges.radius)
    deep_enough = depth >= min(DEPTH_SHARE * radius, np.quantile(depth, ALWAYS_DEEP_ENOUGH))
    stretch = np.exp(STRETCH_SPREAD * rng.standard_normal(3))
    dark = rng.random() < ranges.dark_core_rate
    return Tumor(
        grade=grade,
        center=tuple(places[rng.choice(np.flatnonzero(deep_enough))]),
        stretch=tuple(stretch / np.prod(stretch) ** (1 / 3)),
        radius=radius,
        core=rng.uniform(*ranges.core),
        necrosis=rng.uniform(*ranges.necrosis),
        push=radius * rng.uniform(*ranges.push),
        edema_level=rng.uniform(*ranges.edema_level),
        rim_level=rng.uniform(*ranges.rim_level),
        core_level=rng.uniform(*(ranges.dark_core_level if dark else ranges.bright_core_level)),
        enhancing=rng.random() < ranges.enhancing_rate,
    )


def pull_back(tumor: Tumor, points: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Where tissue seen at `points` [..., 3] mm was before the tumor pushed it, minus `points`.

    The shift goes toward the center, is largest near the edge of the core and fades over a radius.
    Near the skull, by `outside` [...] mm from the brain, nothing moves.
    """
    offset = (points - np.asarray(tumor.center)) / tumor.radius
    distance = np.linalg.norm(offset, axis=-1, keepdims=True)
    # r exp(-r^2) peaks at r = 1/sqrt(2) with sqrt(1/(2e)); scaled to a peak of 1.
    strength = np.exp(-(distance**2)) * np.sqrt(2 * np.e)
    free = np.clip(-outside / SKULL_MARGIN_MM, 0, 1)[..., None]
    return -tumor.push * strength * offset * free


def grow(
    rng: np.random.Generator,
    tumor: Tumor,
    *,
    image: np.ndarray,
    label: np.ndarray,
    brain: np.ndarray,
    grid: Grid,
    maps: Maps | None = None,
) -> None:
    """Paint a tumor into an image and its labels, in place.

    Args:
        image: [X, Y, Z] float32, in units of white matter.
        label: [X, Y, Z] uint8, BRATS labels so far.
        brain: [X, Y, Z] bool; no tumor outside.
        maps: coarse maps by name, on the grid; gliomas need none.
    """
    box, distance = _distance(tumor, grid)
    regions = _regions(rng, tumor, distance, image[box], brain[box], grid.voxel_size)
    painted = _paint(rng, tumor, regions, image[box], grid.voxel_size)
    # The scanner blurs the tumor as it does the brain.
    image[box] += ndimage.gaussian_filter(painted - image[box], EDGE_BLUR_MM / grid.voxel_size)
    seen = label[box]
    seen[regions.edema & (seen == 0)] = EDEMA
    seen[regions.core] = ENHANCING
    seen[regions.middle] = NECROSIS


def summary(tumors: list[Tumor]) -> dict[str, Any]:
    """What a patient has, for phantom.json."""
    return {"grade": tumors[0].grade}


class _Regions(NamedTuple):
    edema: np.ndarray
    core: np.ndarray  # middle included
    middle: np.ndarray
    edema_depth: np.ndarray  # radii inside its edge


def _regions(rng, tumor, distance, image, brain, voxel_size):
    """Masks [x, y, z] of one tumor, from the distance to its center in radii."""
    radius = tumor.radius / voxel_size  # voxels
    outline = rough(rng, distance.shape, radius)
    avoid_gray = GRAY_BARRIER * np.clip((image - GRAY_FROM) / GRAY_RAMP, 0, 1)
    edema_depth = 1 - distance + outline - avoid_gray
    core_depth = tumor.core - distance + 0.5 * outline + 0.3 * rough(rng, distance.shape, radius)
    core_depth -= VENTRICLE_BARRIER * (
        ndimage.gaussian_filter(image, WIDE_MM / voxel_size) > WIDE_CSF
    )
    middle_depth = tumor.necrosis * tumor.core - distance
    middle_depth += 0.5 * rough(rng, distance.shape, radius)
    # The innermost voxels are core and its middle whatever the outline: no label goes missing.
    core = brain & ((core_depth > 0) | (distance < max(SMALLEST_CORE, 1.5 / radius)))
    middle = core & ((middle_depth > 0) | (distance < max(SMALLEST_CORE / 2, 0.7 / radius)))
    if not tumor.enhancing:
        middle = core
    edema = (edema_depth > 0) & brain & (image < CSF_LIKE) & ~core
    return _Regions(edema, core, middle, edema_depth)


def _paint(rng, tumor, regions, image, voxel_size):
    """The image with the tumor, before blur; edema only ever brightens."""
    shape = image.shape
    texture = random_field(rng, shape, 0.2 * tumor.radius / voxel_size)
    texture = 0.8 * texture + 0.6 * random_field(rng, shape, 3 / voxel_size)
    edema = tumor.edema_level * (1 + EDEMA_TEXTURE * texture)
    share = np.clip(EDEMA_EDGE + regions.edema_depth / EDEMA_RAMP, 0, 1) * regions.edema
    painted = image + share * np.maximum(edema - image, 0)
    middle = tumor.core_level * (1 + CORE_TEXTURE * texture)
    rim = tumor.rim_level * (1 + RIM_TEXTURE * texture)
    core = np.maximum(np.where(regions.middle, middle, rim), DARKEST)
    return np.where(regions.core, core, painted)


def _distance(tumor, grid):
    """Box of slices around a tumor, and in it the distance from the center in radii."""
    box, squares = [], []
    for axis, stretch in enumerate(tumor.stretch):
        middle = (tumor.center[axis] - grid.origin[axis]) / grid.voxel_size
        reach = BOX_RADII * tumor.radius * max(stretch, 1) / grid.voxel_size
        low, high = max(int(middle - reach), 0), min(int(middle + reach) + 2, grid.shape[axis])
        box.append(slice(low, high))
        radii = (np.arange(low, high) - middle) * grid.voxel_size / (stretch * tumor.radius)
        squares.append(radii**2)
    return tuple(box), np.sqrt(sum(np.ix_(*squares))).astype(np.float32)
