"""Synthetic multiple sclerosis on T2: small lesions of white matter, most at the ventricles."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from preprocessing.phantom.fields import Grid, random_field
from preprocessing.phantom.lesions import Lesion, Maps, Places, box_of, region, share_of
from preprocessing.phantom.tumors import CSF_LIKE, EDEMA, EDGE_BLUR_MM

LABELS = {"edema": EDEMA}
PLURAL = "lesions"  # in phantom.json
COUNT = (5, 60)  # log-uniform
MEDIAN_ML, LOG_SPREAD = 0.08, 1.6  # of the volumes, log-normal
VOLUME_ML, TOTAL_ML = (0.015, 5.0), (1.0, 40.0)
# Levels are log-uniform; the width of an edge is twice its reach on either side.
LEVEL, EDGE_MM, ELONGATION = (1.5, 2.6), (2.0, 3.5), (1.0, 2.2)
LEAST_WHITE, GRAY_BARRIER_MM = 0.3, 4.0  # share of white matter; distance the rest counts for
TEXTURE_MM, TEXTURE = 4.0, 0.09


@dataclass(frozen=True)
class Site:
    """Where in white matter lesions lie. Pairs are (lowest, highest)."""

    rate: float  # share of the lesions
    largest_ml: float
    to_ventricle: tuple[float, float]  # mm
    fall: float  # mm from the ventricle, over which lesions become rarer by 1/e
    white: tuple[float, float]  # share of white matter
    wall_pull: float = 0.0  # by how much a mm from the ventricle counts for more


SITES = {
    "periventricular": Site(
        0.6, 5.0, to_ventricle=(0, 12), fall=1.5, white=(0.5, 1.01), wall_pull=0.6
    ),
    "deep": Site(0.25, 1.0, to_ventricle=(8, np.inf), fall=np.inf, white=(0.9, 1.01)),
    "juxtacortical": Site(0.15, 0.6, to_ventricle=(10, np.inf), fall=np.inf, white=(0.4, 0.75)),
}


def draw(rng: np.random.Generator, number: int, places: Places) -> list[Lesion]:
    """The lesions of a patient; `number` does not matter."""
    count = round(float(np.exp(rng.uniform(*np.log(COUNT)))))
    lesions, total = [], 0.0
    while not TOTAL_ML[0] <= total <= TOTAL_ML[1]:
        lesions = [_draw_lesion(rng, places) for _ in range(count)]
        total = sum(lesion.volume_ml for lesion in lesions)
    return lesions


def _draw_lesion(rng, places):
    name = rng.choice(list(SITES), p=[site.rate for site in SITES.values()])
    site = SITES[name]
    volume_ml = MEDIAN_ML * np.exp(LOG_SPREAD * rng.standard_normal())
    where = rng.choice(len(places.points), p=_chances(site, places))
    return Lesion(
        site=str(name),
        center=tuple(places.points[where]),
        axis=tuple(places.away[where]),
        volume_ml=float(np.clip(volume_ml, VOLUME_ML[0], site.largest_ml)),
        elongation=rng.uniform(*ELONGATION),
        taper=0.0,
        level=float(np.exp(rng.uniform(*np.log(LEVEL)))),
        edge=rng.uniform(*EDGE_MM),
        contrast=0.0,
        push=0.0,
    )


def _chances(site, places):
    """Probability of each place; where no place is like the site, that of white matter."""
    chances = np.exp(-places.to_ventricle / site.fall)
    for values, (low, high) in (
        (places.to_ventricle, site.to_ventricle),
        (places.white, site.white),
    ):
        chances = chances * ((values >= low) & (values <= high))
    chances = chances if chances.any() else np.maximum(places.white, 0)
    return chances / chances.sum()


def grow(
    rng: np.random.Generator,
    lesion: Lesion,
    *,
    image: np.ndarray,
    label: np.ndarray,
    brain: np.ndarray,
    grid: Grid,
    maps: Maps,
) -> None:
    """Paint a lesion into an image and its labels, in place; arguments as `tumors.grow`.

    It takes its volume of white matter beside the lesions there are, and only ever brightens.
    """
    box = box_of(lesion, grid)
    seen, taken, white = image[box], label[box] > 0, maps("white")[box]
    tissue = brain[box] & (white > LEAST_WHITE) & ((seen < CSF_LIKE) | taken)
    barrier = GRAY_BARRIER_MM * (1 - white)
    barrier += SITES[lesion.site].wall_pull * maps("to_ventricle")[box]
    inside, depth = region(rng, lesion, room=tissue & ~taken, barrier=barrier, box=box, grid=grid)
    texture = random_field(rng, seen.shape, TEXTURE_MM / grid.voxel_size)
    level = lesion.level * (1 + TEXTURE * texture)
    change = share_of(lesion, depth) * tissue * np.maximum(level - seen, 0)
    image[box] += ndimage.gaussian_filter(change, EDGE_BLUR_MM / grid.voxel_size)
    label[box][inside] = EDEMA


def summary(lesions: list[Lesion]) -> dict[str, Any]:
    """What a patient has, for phantom.json."""
    return {"lesion_kind": "ms", "lesion_count": len(lesions)}
