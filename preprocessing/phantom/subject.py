"""One synthetic subject: an anatomy deformed, painted, given lesions, and seen by a scanner."""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import from_matvec
from scipy import ndimage
from scipy.spatial.transform import Rotation

from preprocessing.phantom import GLIOMA, MS, PATIENT, STROKE, sclerosis, strokes, tumors
from preprocessing.phantom.anatomy import COARSE_MM, FINEST_MM, Pair, largest_part, to_voxels
from preprocessing.phantom.fields import LATTICE_MM, Grid, random_field, upsample
from preprocessing.phantom.lesions import Places
from preprocessing.phantom.sources import load_atlas, load_label_map
from preprocessing.phantom.tissues import bounded_normal, draw_intensities

PAINT_COARSELY_FROM_MM = 3.0  # voxels of this size and more are sampled from a painting at 2 mm
STEEPEST_QUANTILE, STEEPEST_SHARE = 0.995, 1.5  # what counts as the wall of a ventricle
FAR_OUTSIDE_MM = 20.0  # distance from the brain off the map: ICBM152 ends within the brainstem
LESION_MODULES = {GLIOMA: tumors, STROKE: strokes, MS: sclerosis}
SKULL_GAP_MM = 1.0  # lesions end this far inside the brain
CEREBRAL_SHARE = 0.7  # of a place where a lesion may start
FLATTEST = 1e-6  # slope below which a direction means nothing
# Standard deviations, in voxels, of the blur of a voxel and of linear interpolation.
VOXEL_BLUR, LINEAR_BLUR, LEAST_BLUR = 0.3, 0.4, 0.05
# Standard deviation of a slice profile in its thickness: box (1/sqrt(12)) and linear interpolation
# (1/sqrt(6)) in a row, sqrt(1/12 + 1/6).
SLICE_BLUR = 0.5


@dataclass(frozen=True)
class PhantomSettings:
    """How subjects vary. Lengths in mm, angles in degrees; pairs are the ends of a range."""

    margin: float = 22.0  # around the anatomy in a scan: room for pose, size and deformation
    rotation: float = 5.0  # half range about each axis
    shift: float = 4.0  # half range along each axis
    size_spread: float = 0.025  # of the logarithm of the head's size
    axis_spread: float = 0.02  # of the logarithm of each axis besides
    bend_scales: tuple[float, ...] = (40.0, 20.0, 10.0)  # distance of independent displacements
    bend_spreads: tuple[float, ...] = (2.5, 1.0, 0.5)  # their standard deviation
    ventricle_growth: Pair = (-1.5, 5.0)  # shift of the walls of the ventricles
    texture_scales: tuple[float, ...] = (2.0, 10.0)  # of the unevenness within tissues
    texture_spread: float = 0.028
    psf: Pair = (0.4, 0.6)  # standard deviation of the scanner's blur
    thick_share: float = 0.0  # of the scans, that has thick axial slices
    slice_mm: Pair = (2.0, 5.0)  # their thickness
    rim: Pair = (0.0, 2.5)  # how far the brain mask reaches beyond the closed brain: its mean,
    rim_scales: tuple[float, ...] = (8.0,)  # the scale of how it varies from place to place,
    rim_spreads: tuple[float, ...] = (0.4,)  # and its standard deviation
    edge: float = 2.5  # depth to which a stripped brain is dark in places
    edge_scales: tuple[float, ...] = (9.0, 3.0)  # size of the places
    edge_darkness: Pair = (0.4, 0.4)  # mean and spread of it, share of the intensity
    bias_scale: float = 70.0  # of the logarithm of the bias field
    bias_spread: float = 0.06
    noise: Pair = (0.015, 0.055)  # relative to white matter, at 1 mm
    white_level: Pair = (150.0, 450.0)  # of white matter in scanner units, log-uniform


# For label maps: they vary among themselves, and they come in the pose of MNI space, so that what
# is left of rotation and shift is the error of rigid alignment.
LABEL_MAP_SETTINGS = PhantomSettings(
    margin=14.0,
    rotation=2.5,
    shift=2.0,
    ventricle_growth=(-5.0, 0.5),
    texture_scales=(2.0, 6.0, 16.0),
    texture_spread=0.042,
    psf=(0.25, 0.55),
    thick_share=0.35,
    slice_mm=(2.0, 4.0),
    rim=(-1.0, 1.5),
    edge=2.0,
    edge_darkness=(0.3, 0.35),
    rim_scales=(30.0, 8.0),
    rim_spreads=(0.7, 0.3),
)


@dataclass(frozen=True)
class Phantom:
    """One synthetic scan."""

    image: np.ndarray  # [X, Y, Z] int16, scanner units, 0 outside the brain and only there
    twin: np.ndarray | None  # `image` without its lesions, but pushed alike; None if healthy
    label: np.ndarray  # [X, Y, Z] uint8, BRATS labels 0, 1, 2, 4; 0 throughout in the healthy
    affine: np.ndarray  # [4, 4], voxel -> mm
    facts: dict[str, Any]  # what was drawn, JSON-serializable


def make_phantom(
    seed: int,
    kind: int,
    number: int,
    *,
    voxel_size: float = 1.0,
    label_maps: Sequence[Path] = (),
    lesions: str = GLIOMA,
) -> Phantom:
    """Synthesize one subject.

    Args:
        kind: HEALTHY, PATIENT, or HELD_OUT for the healthy to test on.
        number: index among its kind, from 0.
        voxel_size: mm.
        label_maps: FreeSurfer label maps to take in turn; if empty, the ICBM152 maps.
        lesions: GLIOMA, STROKE or MS, what a patient has.

    Raises:
        InputError: if a label map cannot be used.
    """
    settings = default_settings(label_maps)
    rng = np.random.default_rng([seed, kind, number])
    shape_rng, paint_rng, scan_rng, lesion_rng = rng.spawn(4)
    spacing = COARSE_MM if voxel_size >= PAINT_COARSELY_FROM_MM else FINEST_MM
    if label_maps:
        which = anatomy_of(kind, number, len(label_maps))
        anatomy = load_label_map(str(label_maps[which]), spacing)
    else:
        anatomy = load_atlas(spacing)
    grid = Grid.around(*anatomy.bounds(), voxel_size, settings.margin)
    points, coarse = grid.lattice(), anatomy.coarse
    source = _deform(shape_rng, anatomy, points, settings)
    drawn, module = [], LESION_MODULES[lesions]
    if kind == PATIENT:
        drawn = module.draw(lesion_rng, number, _places(coarse, points, source))
        source = _push(drawn, anatomy, grid, source)
    image = _paint(paint_rng, anatomy, grid, source, settings)
    outside = _sample(coarse.outside, coarse.affine, grid, source, beyond=FAR_OUTSIDE_MM)
    outside -= scan_rng.uniform(*settings.rim)
    rim = zip(settings.rim_scales, settings.rim_spreads, strict=True)
    ragged = sum(spread * grid.random_field(scan_rng, scale) for scale, spread in rim)
    brain = largest_part(outside < ragged)
    label = np.zeros(grid.shape, np.uint8)
    room = brain & (outside < -SKULL_GAP_MM)

    def seen(image, rng):
        image = image * _edge(rng, outside, grid, settings)
        return _scan(rng, image, brain, grid, settings)

    @functools.cache
    def maps(name):
        return _sample(getattr(coarse, name), coarse.affine, grid, source)

    twin = seen(image, copy.deepcopy(scan_rng))[0] if drawn else None
    for lesion in drawn:
        module.grow(lesion_rng, lesion, image=image, label=label, brain=room, grid=grid, maps=maps)
    scan, facts = seen(image, scan_rng)
    facts = {"anatomy": anatomy.name, **facts}
    if drawn:
        facts |= _lesion_facts(module, drawn, label, voxel_size)
    return Phantom(image=scan, twin=twin, label=label, affine=grid.affine, facts=facts)


def anatomy_of(kind: int, number: int, count: int) -> int:
    """Which of `count` anatomies a subject has: one after the other.

    Grades of patients alternate: where they are even, each round of anatomies begins one later, so
    that every anatomy has every grade.
    """
    if kind == PATIENT and count % 2 == 0:
        number += number // count
    return number % count


def default_settings(label_maps: Sequence[Path]) -> PhantomSettings:
    """The `PhantomSettings` for label maps, or for ICBM152 if there are none."""
    return LABEL_MAP_SETTINGS if label_maps else PhantomSettings()


def _deform(rng, anatomy, points, settings):
    """Where each place of the scan [a, b, c, 3] lies in the anatomy, both in mm."""
    center, _ = anatomy.bounds()
    source = points - center - rng.uniform(-settings.shift, settings.shift, 3)
    angles = rng.uniform(-settings.rotation, settings.rotation, 3)
    source = source @ Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    log_size = settings.size_spread * bounded_normal(rng)
    log_size = log_size + settings.axis_spread * bounded_normal(rng, 3)
    mirror = [rng.choice([-1.0, 1.0]), 1.0, 1.0]  # doubles the number of anatomies
    source = source * mirror / np.exp(log_size) + center
    for scale, spread in zip(settings.bend_scales, settings.bend_spreads, strict=True):
        bend = [random_field(rng, source.shape[:3], scale / LATTICE_MM) for _ in range(3)]
        source = source + spread * np.stack(bend, axis=-1)
    source = source @ anatomy.pose[:3, :3].T + anatomy.pose[:3, 3]
    # Places sampled nearer to the ventricles make these larger.
    slopes = np.gradient(anatomy.coarse.ventricle)
    steepest = np.quantile(np.sqrt(sum(slope**2 for slope in slopes)), STEEPEST_QUANTILE)
    slopes = [_at(slope / steepest, anatomy.coarse.affine, source) for slope in slopes]
    walls = np.clip(np.stack(slopes, axis=-1), -STEEPEST_SHARE, STEEPEST_SHARE)
    return source + rng.uniform(*settings.ventricle_growth) * walls


def _places(coarse, points, source):
    """The `Places` of cerebral tissue among `points`, which lie at `source` in the anatomy."""

    def at(name):
        return _at(getattr(coarse, name), coarse.affine, source)

    depth, to_ventricle = -at("outside"), at("to_ventricle")
    cerebral = at("cerebrum") > CEREBRAL_SHARE
    fields = (points, depth, at("white"), to_ventricle, _uphill(depth), _uphill(to_ventricle))
    return Places(*(values[cerebral] for values in fields))


def _uphill(values):
    """Direction [a, b, c, 3] in which values [a, b, c] rise, of length 1."""
    slopes = np.stack(np.gradient(values), axis=-1)
    return slopes / np.maximum(np.linalg.norm(slopes, axis=-1, keepdims=True), FLATTEST)


def _push(lesions, anatomy, grid, source):
    """Mass effect of all lesions: where the places of the scan lie in the anatomy because of it."""
    points, coarse = grid.lattice(), anatomy.coarse
    outside = _at(coarse.outside, coarse.affine, source)
    pulled = points + sum(tumors.pull_back(lesion, points, outside) for lesion in lesions)
    # The first control point of the deformation lies one before voxel 0.
    affine = from_matvec(np.diag([LATTICE_MM] * 3), grid.origin - LATTICE_MM)
    axes = [_at(axis, affine, pulled) for axis in np.moveaxis(source, -1, 0)]
    return np.stack(axes, axis=-1)


def _paint(rng, anatomy, grid, source, settings):
    """The subject without noise, in units of white matter, on the grid of the scan."""
    painted = anatomy.paint(rng, draw_intensities(rng))
    for scale_mm in settings.texture_scales:
        painted *= 1 + settings.texture_spread * anatomy.random_field(rng, scale_mm)
    blur = np.hypot(rng.uniform(*settings.psf), VOXEL_BLUR * grid.voxel_size)
    blur = np.sqrt(max(blur**2 - (LINEAR_BLUR * anatomy.spacing) ** 2, LEAST_BLUR**2))
    painted = ndimage.gaussian_filter(painted, blur / anatomy.spacing, truncate=3)
    return _sample(painted, anatomy.affine, grid, source)


def _at(values, affine, points):
    """Linear interpolation of a map at places in mm, [..., 3] -> [...]."""
    voxels = np.moveaxis(to_voxels(points, affine), -1, 0)
    return ndimage.map_coordinates(values, voxels, order=1, mode="nearest")


def _sample(values, affine, grid, source, *, beyond=None):
    """Linear interpolation of a map on the whole grid, from the lattice of places `source`.

    Off the map, the nearest value holds, or `beyond` if given.
    """
    lattice = np.moveaxis(to_voxels(source, affine), -1, 0)
    voxels = np.stack([upsample(axis, grid.shape, grid.lattice_step) for axis in lattice])
    mode = "nearest" if beyond is None else "constant"
    return ndimage.map_coordinates(values, voxels, order=1, mode=mode, cval=beyond or 0)


def _edge(rng, outside, grid, settings):
    """Factor on the intensity at the edge of the stripped brain: dark dura and bone in places."""
    near = np.clip(1 + outside / settings.edge, 0, 1)
    mean, spread = settings.edge_darkness
    fields = [grid.random_field(rng, scale) for scale in settings.edge_scales]
    return 1 - near * np.clip(mean + spread * sum(fields), 0, 0.95)


def _scan(rng, image, brain, grid, settings):
    """The scanner's view [X, Y, Z] int16: slices, bias, Rician noise, 0 outside the brain."""
    bias = np.exp(settings.bias_spread * grid.random_field(rng, settings.bias_scale))
    # Noise falls with the volume of a voxel in a real scan; its square root is a compromise.
    noise = np.float32(rng.uniform(*settings.noise) / np.sqrt(grid.voxel_size))
    slice_mm = rng.uniform(*settings.slice_mm) if rng.random() < settings.thick_share else 0.0
    blur = SLICE_BLUR * slice_mm / grid.voxel_size
    real, imaginary = (rng.standard_normal(grid.shape, dtype=np.float32) for _ in range(2))
    if blur > LEAST_BLUR:
        image = ndimage.gaussian_filter1d(image, blur, axis=2)
        real, imaginary = (_smooth_noise(field, blur) for field in (real, imaginary))
    real, imaginary = image * bias + noise * real, noise * imaginary
    white_level = float(np.exp(rng.uniform(*np.log(settings.white_level))))
    scan = np.clip(np.rint(white_level * np.hypot(real, imaginary)), 1, np.iinfo(np.int16).max)
    facts = {"white_level": round(white_level, 2), "noise": round(float(noise), 4)}
    facts["slice_mm"] = round(slice_mm, 2)
    return np.where(brain, scan, 0).astype(np.int16), facts


def _smooth_noise(noise, blur):
    """White noise along the third axis as interpolation between slices leaves it, same strength."""
    smooth = ndimage.gaussian_filter1d(noise, blur, axis=2)
    return smooth / np.float32(smooth.std())


def _lesion_facts(module, lesions, label, voxel_size):
    """What the patient has, volumes in ml by label, and the lesions."""
    milliliters = {
        name: round(float((label == number).sum() * voxel_size**3 / 1000), 3)
        for name, number in module.LABELS.items()
    }
    return {
        **module.summary(lesions),
        "lesion_ml": round(sum(milliliters.values()), 3),
        "label_ml": milliliters,
        module.PLURAL: [lesion.to_json() for lesion in lesions],
    }
