"""Lesions of painted heads: blobs of any intensity, inside the brain and at its edge."""

import numpy as np

from preprocessing.phantom.anatomy import sigmoid
from preprocessing.phantom.fields import random_field

WITH_LESIONS = 0.4  # share of heads
MOST_LESIONS = 4
VOLUME_ML = (0.5, 110.0)  # log-uniform
AT_SURFACE, SURFACE_MM = 0.5, 5.0  # share of lesions whose center is this near the surface
OPACITY = (0.5, 1.0)
ROUGHNESS, SOFTNESS = (0.1, 0.4), (0.03, 0.3)  # of the radius
REACH = 1.7  # radii, of the box that holds a lesion
BEYOND_MM = 1.0  # lesions end where the brain does, or a little later
BRIGHTEST = 1.3


def add_lesions(rng, image, outside, step, levels):
    """Blend lesions into `image`, in place.

    Args:
        rng: `np.random.Generator`.
        image: [X, Y, Z] float32.
        outside: [X, Y, Z] signed distance from the brain, mm.
        step: mm per voxel.
        levels: [C] intensities of tissues.

    Returns:
        (share [X, Y, Z] float32 of lesion or None, facts).
    """
    if rng.random() >= WITH_LESIONS:
        return None, {"lesions_ml": []}
    share = np.zeros_like(image)
    volumes = []
    places = np.argwhere(outside[::2, ::2, ::2] < 0) * 2
    near = places[outside[tuple(places.T)] > -SURFACE_MM]
    for _ in range(rng.integers(1, MOST_LESIONS + 1)):
        volume = float(np.exp(rng.uniform(*np.log(VOLUME_ML))))
        center = rng.choice(near if rng.random() < AT_SURFACE else places)
        level = rng.choice([rng.uniform(0, BRIGHTEST), rng.choice(levels)])
        blob, box = _blob(rng, image.shape, center, volume, step)
        blob = blob * (outside[box] < BEYOND_MM)
        texture = 1 + 0.1 * rng.standard_normal(blob.shape, dtype=np.float32)
        opacity = rng.uniform(*OPACITY) * blob
        image[box] += opacity * (np.float32(level) * texture - image[box])
        share[box] = np.maximum(share[box], blob)
        volumes.append(round(volume, 1))
    return share, {"lesions_ml": volumes}


def _blob(rng, shape, center, volume, step):
    """(soft indicator [x, y, z] float32, slices of it in the volume)."""
    radius = (3 * volume / (4 * np.pi)) ** (1 / 3) * 10 / step  # ml = cm^3; voxels
    reach = int(np.ceil(REACH * radius)) + 1
    box = tuple(
        slice(max(c - reach, 0), min(c + reach + 1, n)) for c, n in zip(center, shape, strict=True)
    )
    axes = [np.arange(b.start, b.stop) - c for b, c in zip(box, center, strict=True)]
    flat = np.exp(0.25 * rng.standard_normal(3))
    flat /= flat.prod() ** (1 / 3)
    x, y, z = np.meshgrid(
        *[a / (radius * f) for a, f in zip(axes, flat, strict=True)], indexing="ij", sparse=True
    )
    distance = np.sqrt(x**2 + y**2 + z**2).astype(np.float32)
    distance = distance + rng.uniform(*ROUGHNESS) * random_field(
        rng, distance.shape, max(radius / 2, 1.5)
    )
    return sigmoid((1 - distance) / rng.uniform(*SOFTNESS) * 2).astype(np.float32), box
