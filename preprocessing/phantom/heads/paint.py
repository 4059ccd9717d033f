"""Painted heads: scans with skull, in any contrast, pose and acquisition, and where the brain is.

For the brain finder: to train and to test it. After the ideas of SynthSeg (Billot et al., Medical
Image Analysis 2023) and SynthStrip (Hoopes et al., NeuroImage 2022): what a network has seen in
every contrast, it finds in any. A head is a pure function of (seed, number, anatomies, voxel size).
"""

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from preprocessing.phantom.anatomy import COARSE_MM, coarser_affine
from preprocessing.phantom.fields import random_field
from preprocessing.phantom.heads import geometry as geometries
from preprocessing.phantom.heads import lesions
from preprocessing.phantom.heads.acquisition import acquire, draw_acquisition, resample_bands
from preprocessing.phantom.heads.anatomy import HeadAnatomy
from preprocessing.phantom.heads.contrast import draw_contrast

STREAM = 7  # apart from the other generators of the package
TEXTURE, TEXTURE_MM = (0.0, 0.1), 3.0  # standard deviation, of the intensity; and its scale
BIAS, BIAS_MM = (0.0, 0.35), (60.0, 160.0)  # standard deviation of the logarithm; scale
GAMMA_SPREAD = 0.25  # of the logarithm
STRIPPED, PARTLY, DEFACED = 0.3, 0.1, 0.15  # shares of heads
STRIP_MM, STRIP_SPREAD_MM, STRIP_WAVES_MM = (0.0, 1.5), (0.0, 1.2), (10.0, 40.0)
PARTLY_MM, PARTLY_SPREAD_MM = (4.0, 22.0), (1.0, 7.0)
DEFACE_MARGIN_MM, DEFACE_DEGREES = (3.0, 25.0), (0.0, 60.0)


@dataclass(frozen=True)
class Head:
    """A painted scan with the truth about it. Places in mm are those of the scan.

    Attributes:
        image: [X, Y, Z] float32, as acquired, RAS.
        affine: [4, 4], voxel of `image` -> mm.
        outside: [x, y, z] float32, signed distance from the brain mask, mm, negative inside. On a
            finer or equal grid: the voxels that were painted.
        outside_affine: [4, 4], voxel of `outside` -> mm.
        lesion: [x, y, z] float32, share of lesion, or None.
        geometry: `geometries.Geometry`; its `mni` tells where places lie.
        landmarks: [20, 3] mm, of `finder.canonical.landmarks`.
        facts: what was drawn.
    """

    image: np.ndarray = field(repr=False)
    affine: np.ndarray
    outside: np.ndarray = field(repr=False)
    outside_affine: np.ndarray
    lesion: np.ndarray | None = field(repr=False)
    geometry: geometries.Geometry
    landmarks: np.ndarray
    facts: dict


def paint_head(anatomies, seed, number, *, fine_mm=1.0):
    """Head `number` of a seed.

    Args:
        anatomies: list of `HeadAnatomy`; one is drawn.
        seed, number: whole numbers.
        fine_mm: voxels painted, before the acquisition makes them larger.

    Returns:
        A `Head`.
    """
    rng = np.random.default_rng([STREAM, seed, number])
    anatomy: HeadAnatomy = anatomies[rng.integers(len(anatomies))]
    contrast, levels = draw_contrast(rng)
    step = 1 if fine_mm < COARSE_MM else COARSE_MM
    image = levels[anatomy.classes]
    if step > 1:
        image = _halved(image)
    affine = coarser_affine(anatomy.affine, step)
    outside = anatomy.outside
    if step < COARSE_MM:
        outside = ndimage.affine_transform(
            outside, [step / COARSE_MM] * 3, -0.25, output_shape=image.shape, order=1,
            mode="nearest",
        )  # fmt: skip
    else:
        outside = outside[tuple(slice(n) for n in image.shape)]
    _add_texture(rng, image, step)
    lesion, lesion_facts = lesions.add_lesions(rng, image, outside, step, levels)
    image, outside, cover = _cover(rng, image, outside, affine, anatomy, step)
    geometry = geometries.draw_geometry(rng, anatomy, fine_mm, tight=cover == "stripped")
    points = geometry.head_voxels(affine)
    image, outside = (
        ndimage.map_coordinates(values, points, order=1, mode=mode)
        for values, mode in ((image, "constant"), (outside, "nearest"))
    )
    if lesion is not None:
        lesion = ndimage.map_coordinates(lesion, points, order=1, mode="constant")
    image *= np.exp(
        rng.uniform(*BIAS) * random_field(rng, image.shape, rng.uniform(*BIAS_MM) / fine_mm)
    )
    acquisition = draw_acquisition(rng, fine_mm, geometry.fine_affine, image.shape)
    image, scan_affine = acquire(rng, image, acquisition, clean_air=cover == "stripped")
    image = _gamma(image, np.exp(GAMMA_SPREAD * rng.standard_normal()))
    return Head(
        image=image,
        affine=scan_affine,
        outside=outside,
        outside_affine=geometry.fine_affine,
        lesion=lesion,
        geometry=geometry,
        landmarks=geometry.to_scan(anatomy.landmarks),
        facts={
            "anatomy": anatomy.name,
            "contrast": contrast,
            "cover": cover,
            **lesion_facts,
            **geometry.facts,
            **acquisition.facts,
        },
    )


def on_acquired(values, head):
    """Values [x, y, z] on the painted voxels -> [X, Y, Z] on those of the scan."""
    return resample_bands(values, head.outside_affine, head.affine, head.image.shape)


def _halved(image):
    """Mean over cubes of two voxels, axis by axis; an odd voxel at the end is left out."""
    for axis in range(3):
        n = image.shape[axis] // 2 * 2
        first, second = ([slice(None)] * 3 for _ in range(2))
        first[axis], second[axis] = slice(0, n, 2), slice(1, n, 2)
        image = (image[tuple(first)] + image[tuple(second)]) * np.float32(0.5)
    return image


def _add_texture(rng, image, step):
    size = rng.uniform(*TEXTURE)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image *= 1 + np.float32(size) * noise
    image *= 1 + np.float32(size / 2) * random_field(rng, image.shape, TEXTURE_MM / step * 2)
    np.maximum(image, 0, out=image)


def _gamma(image, exponent):
    top = float(np.percentile(image[::2, ::2, ::2], 99.5)) or 1.0
    return (np.clip(image / top, 0, None) ** np.float32(exponent)).astype(np.float32)


def _cover(rng, image, outside, affine, anatomy, step):
    """Strip the skull, wholly or partly, or cut off the face: (image, outside, what was done)."""
    kind = rng.choice(
        ["stripped", "partly", "defaced", "whole"],
        p=[STRIPPED, PARTLY, DEFACED, 1 - STRIPPED - PARTLY - DEFACED],
    )
    if kind in ("stripped", "partly"):
        waves = random_field(rng, image.shape, rng.uniform(*STRIP_WAVES_MM) / step)
        if kind == "stripped":
            margin = rng.normal(*STRIP_MM) + rng.uniform(*STRIP_SPREAD_MM) * waves
            margin = np.clip(margin, -3, 4)
        else:
            margin = rng.uniform(*PARTLY_MM) + rng.uniform(*PARTLY_SPREAD_MM) * waves
            margin = np.maximum(margin, 1.0)
        image = np.where(outside < margin, image, 0)
        if kind == "stripped":  # what was left is the brain
            outside = outside - margin
    elif kind == "defaced":
        angle = np.deg2rad(rng.uniform(*DEFACE_DEGREES))
        normal = np.array([0, np.cos(angle), -np.sin(angle)]) @ anatomy.mni_from_head[:3, :3]
        depth = sum(
            (normal[k] * (np.arange(n) * affine[k, k])).reshape(
                [-1 if j == k else 1 for j in range(3)]
            )
            for k, n in enumerate(image.shape)
        )
        normal_length = np.linalg.norm(normal)
        margin = rng.uniform(*DEFACE_MARGIN_MM) * normal_length
        image = np.where(depth > depth[outside < 0].max() + margin, 0, image)
    return image.astype(np.float32, copy=False), outside.astype(np.float32, copy=False), str(kind)
