"""What may be done to a residual before it is thresholded; every step is opt-in.

    seeds=N      mean of N restorations, each with a noise of its own
    flip         mean with the restoration of the slices mirrored left to right
    normalize    centered and scaled by what healthy brains show at the same place in MNI space
    relative     divided by what is expected at the place: half of it is what healthy brains show
                 there, half what this brain shows on the other side
    signed       only what the restoration made darker: lesions that are bright on T2
    median=N     3-D median of N x N x N voxels: takes out specks
    smooth=N     3-D Gaussian of N mm (standard deviation) within the brain
    support=N    plus the geometric mean of the score and of its 3-D Gaussian of N mm: what lies
                 amid more of its kind counts more
    contralateral  times the cube root of how far the scan is above the brain's median, relative to
                 the other side: what is brighter than its mirror image counts more
    erode=N      0 within N voxels of the brain's edge, in the plane of the slice
    scale        divided by the scan's own level: the mean of the lowest 80 % of its brain's scores

They are done in this order. The first two make the restored image, the others the score.
"""

import copy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from scipy import ndimage

from tf_lesion.config import RestorationConfig
from tf_lesion.files import InputError
from tf_lesion.scans.volumes import MNI_ORIGIN_MM

SPECK_VOXELS = 3  # edge of the median that the brightness of `contralateral` is taken after
VOXEL_CENTER = 0.5  # voxels from its edge
BLOCK_MM = 4.0  # of the healthy maps: fine enough for a ventricle, coarse enough for few subjects
SMOOTHING_MM = 6.0  # standard deviation, over anatomies that differ by about as much
MIRROR_SMOOTHING_MM = 4.0  # standard deviation: no brain is quite symmetric
MIRROR_SHARE = 0.5  # the rest is the healthy share
LEAST_BRIGHTNESS = 0.01  # of `contralateral`: what is as dark as most of the brain is not lost
MIRROR_LEAST = 0.05  # share of brain around a mirrored place below which the healthy maps weigh in
RELATIVE_FLOOR = 0.03  # normalized intensity, added to what is expected
LEVEL_SHARE = 0.8  # of the brain, the part of the lowest scores
LEAST_LEVEL = 1e-7  # normalized intensity: what rounding to float32 leaves
NONE = "none"
NORMALIZED = "normalized intensity"  # unit of images and residuals
SHARED_VARIANCE = 1.0  # share of the whole brain's variance added to the local one


@dataclass(frozen=True)
class Postprocessing:
    """Which steps are done; see the module."""

    seeds: int = 1
    flip: bool = False
    normalize: bool = False
    relative: bool = False
    signed: bool = False
    median: int = 1  # voxels, odd
    smooth: int = 0  # millimeters
    support: int = 0  # millimeters
    contralateral: bool = False
    erode: int = 0  # voxels
    scale: bool = False

    def __post_init__(self):
        least_of = {"seeds": 1, "median": 1, "smooth": 0, "support": 0, "erode": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise InputError(f"Expected {name} of {least} or more, got {getattr(self, name)}.")
        if self.median % 2 == 0:
            raise InputError(f"Expected an odd median, got {self.median}.")
        if self.normalize and self.relative:
            raise InputError("Expected normalize or relative, got both.")

    @classmethod
    def parse(cls, text: str) -> "Postprocessing":
        """The steps of "seeds=4,signed,median=3"; of "" and "none" no step.

        Raises:
            InputError: on an unknown step, a number where none belongs, or none where one does.
        """
        kinds, chosen = {field.name: field.type for field in fields(cls)}, {}
        text = "" if text == NONE else text
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, number = part.partition("=")
            usable = name in kinds and (number.isdigit() if kinds[name] is int else not number)
            if not usable:
                known = ", ".join(f"{n}=N" if kind is int else n for n, kind in kinds.items())
                raise InputError(f"Expected steps of {known}, separated by commas, got {part!r}.")
            chosen[name] = int(number) if kinds[name] is int else True
        return cls(**chosen)

    def __str__(self):
        default = asdict(Postprocessing())
        chosen = {name: value for name, value in asdict(self).items() if value != default[name]}
        return ",".join(n if value is True else f"{n}={value}" for n, value in chosen.items())

    @property
    def unit(self) -> str:
        """What the score is in."""
        if self.scale:
            return "multiples of the scan's own level"
        if self.normalize:
            return "healthy standard deviations"
        return "multiples of what is expected" if self.relative else NORMALIZED

    @property
    def needs_healthy(self) -> bool:
        """Whether `HealthyMaps` are needed."""
        return self.normalize or self.relative

    @property
    def needs_axes(self) -> bool:
        """Whether positions in MNI space are needed."""
        return self.needs_healthy or self.smooth > 0 or self.support > 0 or self.contralateral

    def restoration(self, restoration: RestorationConfig) -> RestorationConfig:
        """A `RestorationConfig` that averages as these steps say."""
        return replace(restoration, seeds=self.seeds, flip=self.flip)


def anomaly_score(
    observed: np.ndarray,
    restored: np.ndarray,
    mask: np.ndarray,
    *,
    settings: Postprocessing,
    healthy: "HealthyMaps | None" = None,
    axes: Any = None,
) -> np.ndarray:
    """Score [n, H, W] float32 of axial slices in order, 0 outside the brain.

    Args:
        observed, restored: [n, H, W], normalized intensity.
        mask: [n, H, W] bool, brain.
        settings: `Postprocessing`.
        healthy: `HealthyMaps` at these voxels, [n, H, W]; only if the settings need them.
        axes: positions along x, y and z, mm, as of `axes_mm`; likewise.

    Returns:
        With `scale` in multiples of the scan's own level, else with `normalize` in healthy standard
        deviations, with `relative` in multiples of what is expected, else normalized intensity.
    """
    change = observed - restored
    if not settings.signed:
        change = np.abs(change)
    if settings.normalize:
        change = healthy.normalize(change, signed=settings.signed)
    if settings.relative:
        usual = healthy.change if settings.signed else healthy.size
        opposite = _other_side(change, mask, usual=usual, axes=axes)
        expected = MIRROR_SHARE * opposite + (1 - MIRROR_SHARE) * usual
        change = change / (np.maximum(expected, 0) + RELATIVE_FLOOR)
    score = np.maximum(change, 0) * mask
    if settings.median > 1:
        score = ndimage.median_filter(score, settings.median)
    if settings.smooth:
        score = _blur_within(score, mask, settings.smooth, axes)
    if settings.support:
        score = score + np.sqrt(score * _blur_within(score, mask, settings.support, axes))
    if settings.contralateral:
        score = score * np.cbrt(_brighter_than_opposite(observed, mask, axes))
    inside = mask
    if settings.erode:
        reach = ndimage.generate_binary_structure(3, 1)
        reach[0] = reach[2] = False  # slices may be several millimeters apart
        inside = ndimage.binary_erosion(mask, reach, iterations=settings.erode)
    if settings.scale:
        score = score / own_level(score, mask)
    return (score * inside).astype(np.float32)


def own_level(score: np.ndarray, mask: np.ndarray) -> float:
    """The mean of the lower `LEVEL_SHARE` of the brain's scores, at least `LEAST_LEVEL`.

    What a prior changes in healthy tissue is several times as much in one scanner's scans as in
    another's; its own level says how much. A lesion moves the lower scores little: one of a twelfth
    of the brain raised the mean of drawn ones by less than a half.
    """
    values = np.sort(score[mask > 0])
    lower = values[: int(LEVEL_SHARE * values.size)].astype(np.float64)
    return max(float(lower.mean()), LEAST_LEVEL) if lower.size else LEAST_LEVEL


def _pixel_mm(axes):
    return abs(axes[0][1] - axes[0][0])


def _blur_slices(values, sigma_mm, axes):
    """Gaussian in the plane of each slice, zeros outside."""
    sigma = sigma_mm / _pixel_mm(axes)
    values = np.asarray(values, np.float32)
    return ndimage.gaussian_filter(values, (0, sigma, sigma), mode="constant")


def _blur(values, sigma_mm, axes):
    """3-D Gaussian; slices may lie anywhere along z, and each counts the same."""
    z = np.asarray(axes[2], np.float32)
    weights = np.exp(-0.5 * ((z[:, None] - z) / sigma_mm) ** 2)
    return np.tensordot(weights, _blur_slices(values, sigma_mm, axes), axes=1)


def _blur_within(values, mask, sigma_mm, axes):
    """3-D Gaussian within the brain."""
    total, weight = (_blur(part, sigma_mm, axes) for part in (values * mask, mask))
    return total / np.maximum(weight, np.finfo(np.float32).tiny)


def _other_side(change, mask, *, usual, axes):
    """Smoothed change at the mirrored place; where there is no brain, `usual`; [n, H, W]."""
    x, voxel_mm = np.asarray(axes[0]), _pixel_mm(axes)
    midline = VOXEL_CENTER * voxel_mm - MNI_ORIGIN_MM[0]  # the center of the first voxel stays
    opposite = (2 * midline - x - x[0]) / voxel_mm  # columns, linear in between
    share = np.maximum(1 - np.abs(opposite[:, None] - np.arange(len(x))), 0).astype(np.float32)
    mirrored = (share @ part.astype(np.float32) for part in (change * mask, mask))
    total, weight = (_blur_slices(part, MIRROR_SMOOTHING_MM, axes) for part in mirrored)
    return (total + MIRROR_LEAST * usual) / (weight + MIRROR_LEAST)


def _brighter_than_opposite(observed, mask, axes):
    """How far above the brain's median, in units of what is so at the mirrored place; [n, H, W]."""
    usual = np.median(observed[mask > 0]) if np.any(mask) else 0.0
    opposite = _other_side(observed, mask, usual=usual, axes=axes)
    above, there = (
        np.maximum(values - usual, 0)
        for values in (ndimage.median_filter(observed * mask, SPECK_VOXELS), opposite)
    )
    return above / (there + RELATIVE_FLOOR) + LEAST_BRIGHTNESS


def axes_mm(
    shape: tuple[int, ...], voxel_size: float, *, corner: tuple[int, ...] = (0, 0, 0)
) -> list[np.ndarray]:
    """Positions of the voxel centers along each axis of the MNI grid, mm from its corner.

    Args:
        shape: voxels along x, y and perhaps z.
        voxel_size: mm.
        corner: first voxel along each axis.
    """
    return [
        (first + np.arange(count) + VOXEL_CENTER) * voxel_size
        for first, count in zip(corner, shape, strict=False)
    ]


# What healthy brains show ---------------------------------------------------------------------


@dataclass(frozen=True)
class HealthyMaps:
    """Means over healthy subjects of the change d = observed - restored, any shape."""

    change: np.ndarray  # d
    size: np.ndarray  # |d|
    power: np.ndarray  # square root of the mean of d^2, floor included: see `HealthyResidual`

    def normalize(self, change: np.ndarray, *, signed: bool) -> np.ndarray:
        """(change - healthy mean) / healthy standard deviation, of d or of |d|."""
        mean = self.change if signed else self.size
        return (change - mean) / np.sqrt(self.power**2 - mean**2)

    def at(self, axes_mm: Any) -> "HealthyMaps":
        """The blocks of `HealthyResidual.maps` at positions along x, y and z, [n, H, W]."""
        x, y, z = (np.asarray(axis) / BLOCK_MM - VOXEL_CENTER for axis in axes_mm)
        places = np.stack(np.meshgrid(z, x, y, indexing="ij"))[[1, 2, 0]]
        return HealthyMaps(
            *(
                ndimage.map_coordinates(block, places, order=1, mode="nearest")
                for block in vars(self).values()
            )
        )


class HealthyResidual:
    """Collects `HealthyMaps` in MNI space, smooth and in coarse blocks.

    The variance of the whole brain is added to that of each place, so that a quiet place is not
    blown up on the word of a few subjects.

    Args:
        shape_mm: (x, y, z) extent of the MNI grid, millimeters.
    """

    def __init__(self, shape_mm: Any):
        blocks = [int(np.ceil(extent / BLOCK_MM)) for extent in shape_mm]
        self._sums = np.zeros((3, *blocks))
        self._counts = np.zeros(blocks)

    def add(
        self, observed: np.ndarray, restored: np.ndarray, mask: np.ndarray, axes_mm: Any
    ) -> None:
        """Take the slices [n, H, W] of a subject; `axes_mm` are positions along x, y and z."""
        self._add(observed, restored, mask, axes_mm, sign=1)

    def without(self, *slices: Any) -> "HealthyResidual":
        """What was collected but for a subject, given as to `add`."""
        others = copy.deepcopy(self)
        others._add(*slices, sign=-1)
        return others

    def _add(self, observed, restored, mask, axes_mm, *, sign):
        z, x, y = np.nonzero(mask)
        places = [axis[index] for axis, index in zip(axes_mm, (x, y, z), strict=True)]
        blocks = tuple((np.asarray(place) // BLOCK_MM).astype(int) for place in places)
        change = (observed - restored)[z, x, y].astype(np.float64)
        np.add.at(self._counts, blocks, sign)
        for sums, values in zip(self._sums, (change, np.abs(change), change**2), strict=True):
            np.add.at(sums, blocks, sign * values)

    def maps(self) -> HealthyMaps:
        """`HealthyMaps` of the blocks; where no brain was seen, those of the nearest."""
        if not self._counts.any():
            raise InputError("Expected healthy brain voxels, but the brain mask is empty.")
        sigma = SMOOTHING_MM / BLOCK_MM
        counts = ndimage.gaussian_filter(self._counts, sigma)
        seen = counts > np.finfo(np.float32).eps * counts.max()
        nearest = tuple(ndimage.distance_transform_edt(~seen, return_indices=True)[1])
        found = [
            (ndimage.gaussian_filter(sums, sigma) / np.where(seen, counts, 1))[nearest]
            for sums in self._sums
        ]
        mean, _, square = self._sums.sum(axis=(1, 2, 3)) / self._counts.sum()
        found[2] += SHARED_VARIANCE * (square - mean**2)
        found[2] = np.sqrt(found[2])
        # Rounded as files hold them, so that they are the same before and after.
        return HealthyMaps(*(blocks.astype(np.float16).astype(np.float32) for blocks in found))
