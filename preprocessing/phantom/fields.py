"""Voxel grids and smooth random fields on them, by cubic B-splines on a coarse lattice.

Everything here is plain elementwise arithmetic in a fixed order, with no matrix products: the same
numbers come out whatever the number of threads, which lets a seed fix a cohort byte for byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nibabel.affines import from_matvec
from scipy import ndimage

LATTICE_MM = 4.0  # between control points of the deformation
SPLINE_SUPPORT = 4  # control points that reach a place, per axis (cubic B-spline)
# Standard deviation of a cubic B-spline with independent N(0, 1) control points, averaged over
# places: (integral of B3^2)^(1/2) = sqrt(151/315) per axis, three axes.
SPLINE_NOISE_STD = (151 / 315) ** 1.5
ISOTROPIC_FROM = 4  # voxels
# The variance of a cubic B-spline is 1/3 control point^2. Dense control points (half as far apart)
# need a blur of 1 to come to the same width: 1/3 + 1^2 = 4 * 1/3.
CONTROL_BLUR = 1.0
# Of the blurred noise: its kernel is nearly a Gaussian of variance 4/3, per axis 1/sqrt(4 pi s^2).
BLURRED_NOISE_STD = (16 * np.pi / 3) ** (-0.75)


def lattice_size(length: int, step: float) -> int:
    """Number of control points, `step` voxels apart, that cover an axis of `length` voxels."""
    return int(np.ceil((length - 1) / step)) + SPLINE_SUPPORT


def lattice_positions(length: int, step: float) -> np.ndarray:
    """[n] voxel coordinates of the control points; the first lies one step before voxel 0."""
    return ((np.arange(lattice_size(length, step)) - 1) * step).astype(np.float32)


def _spline_weights(length, step):
    """First control point [L] and cubic B-spline weights [4, L] of each voxel of an axis."""
    place = np.arange(length) / step
    first = np.floor(place).astype(int)
    t = (place - first).astype(np.float32)
    weights = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    return first, np.stack(weights) / np.float32(6)


def upsample(lattice: np.ndarray, shape: Sequence[int], step: float) -> np.ndarray:
    """Cubic B-spline [X, Y, Z] float32 through a lattice [a, b, c] of control points.

    They lie at `lattice_positions` of each axis, `step` voxels apart. Linear functions of place
    are reproduced exactly.
    """
    values = np.asarray(lattice, dtype=np.float32)
    for axis, length in enumerate(shape):
        first, weights = _spline_weights(length, step)
        weights = np.expand_dims(weights, [1 + other for other in range(3) if other != axis])
        values = sum(w * np.take(values, first + k, axis=axis) for k, w in enumerate(weights))
    return values


def random_field(rng: np.random.Generator, shape: Sequence[int], scale: float) -> np.ndarray:
    """Smooth Gaussian random field [X, Y, Z] float32, mean 0, standard deviation about 1.

    A cubic B-spline with independent control points, `scale` voxels apart; 1 or less is white
    noise. Large patches of that look like boxes, so from ISOTROPIC_FROM voxels on, the control
    points are twice as dense and blurred: the same correlation without preferred directions.
    """
    if scale <= 1:
        return rng.standard_normal(shape, dtype=np.float32)
    isotropic = scale >= ISOTROPIC_FROM
    step = scale / 2 if isotropic else scale
    control = rng.standard_normal([lattice_size(n, step) for n in shape], dtype=np.float32)
    if isotropic:
        control = ndimage.gaussian_filter(control, CONTROL_BLUR, mode="wrap")
    std = BLURRED_NOISE_STD if isotropic else SPLINE_NOISE_STD
    return upsample(control / np.float32(std), shape, step)


@dataclass(frozen=True)
class Grid:
    """The voxels of a scan, RAS, without rotation; `origin` [3] is the center of voxel 0 in mm."""

    shape: tuple
    voxel_size: float
    origin: np.ndarray

    @classmethod
    def around(
        cls, center: np.ndarray, extent: np.ndarray, voxel_size: float, margin: float
    ) -> "Grid":
        """The grid that holds a box, by center [3] and extent [3], and a margin, in mm."""
        shape = np.ceil((extent + 2 * margin) / voxel_size).astype(int)
        origin = np.round(center - (shape - 1) / 2 * voxel_size)
        return cls(tuple(shape.tolist()), voxel_size, origin)

    @property
    def affine(self) -> np.ndarray:
        """[4, 4], voxel -> mm."""
        return from_matvec(np.diag([float(self.voxel_size)] * 3), self.origin)

    @property
    def lattice_step(self) -> float:
        """Distance of the deformation's control points in voxels."""
        return LATTICE_MM / self.voxel_size

    def lattice(self) -> np.ndarray:
        """[a, b, c, 3] places in mm of the control points of the deformation."""
        axes = [lattice_positions(n, self.lattice_step) * self.voxel_size for n in self.shape]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1) + self.origin

    def random_field(self, rng: np.random.Generator, scale_mm: float) -> np.ndarray:
        """Smooth random field [X, Y, Z], mean 0, standard deviation 1."""
        return random_field(rng, self.shape, scale_mm / self.voxel_size)
