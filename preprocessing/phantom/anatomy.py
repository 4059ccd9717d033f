"""Brain anatomies that paint noise-free T2-like images of themselves.

An `Anatomy` also carries the coarse maps that deformation, skull stripping and lesions need. Its
space is RAS, in mm, with the middle of the brain about where MNI space has it.
`preprocessing.phantom.sources` makes anatomies from the ICBM152 maps and from label maps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nibabel.affines import from_matvec
from scipy import ndimage

from preprocessing.phantom.fields import random_field
from preprocessing.phantom.tissues import TISSUE_INDEX, TISSUES

FINEST_MM = 1
COARSE_MM = 2  # grid of the coarse maps
Pair = tuple[float, float]


@dataclass(frozen=True)
class Painting:
    """How wide, sharp, bright and uneven fluid is painted.

    Each subject draws a number within each pair. Lengths in mm; the rest are shares of a tissue, of
    the intensity of fluid, or of the standard deviation of a random field. No source gives these:
    they bring slices near real ones in `preprocessing.cohort_figure` (three patients with multiple
    sclerosis, Lesjak et al., Neuroinformatics 2017, and one with a stroke, outside their lesions).
    """

    csf_cut: Pair  # share of CSF from which on a voxel counts as CSF: how wide sulci are
    csf_edge: float  # softness of that cut
    csf_wobble: float  # how far the cut wanders from place to place, `wobble_mm` the distance
    sulcal_csf: Pair  # intensity of CSF outside the ventricles
    csf_patches: tuple[Pair, ...]  # (scale, spread) of its unevenness: flow, vessels, membranes
    folia_csf: Pair  # share of CSF between the folia of a cerebellum
    wobble_mm: float = 7.0
    csf_range: Pair = (0.1, 1.1)  # darkest and brightest CSF outside the ventricles
    falx_mm: float = 1.0  # half width of the falx
    falx_darkness: Pair = (0.3, 0.7)  # what it takes from CSF
    folia_mm: float = 5.0  # distance between folia as a scan at 1 mm shows them
    folia_center: tuple[float, float, float] = (0.0, -40.0, -32.0)  # the roof of ventricle 4, MNI
    folia_flattening: float = 0.7  # of the shells around it, from left to right
    ventricle_core: float = 0.25  # of the smoothed ventricles, from which on CSF is at its full


@dataclass(frozen=True)
class AtlasPainting(Painting):
    """Besides, for the averaged maps of ICBM152, which have neither crisp edges nor all sulci."""

    csf_cut: Pair = (0.34, 0.5)
    csf_edge: float = 0.06
    csf_wobble: float = 0.07
    sulcal_csf: Pair = (0.75, 0.95)
    csf_patches: tuple[Pair, ...] = ((12.0, 0.12), (3.0, 0.16))
    folia_csf: Pair = (0.04, 0.14)
    white_cut: Pair = (0.36, 0.48)  # these three as those of CSF, between gray and white matter
    white_edge: float = 0.08
    white_wobble: float = 0.08
    deep_white_edge: float = 0.28  # softness among the deep nuclei
    iron: Pair = (0.7, 1.2)  # factor on the darkness of nuclei rich in iron
    fold_mm: float = 13.0  # distance between sulci that are added
    fold_width: float = 0.25
    fold_csf: Pair = (0.25, 0.45)  # what a fold adds to CSF
    fold_gray: float = 0.5  # what it takes from white matter


@dataclass(frozen=True)
class LabelPainting(Painting):
    """Besides, for label maps: vessels in the CSF around the brain, dark because blood flows.

    They are tubes where two random fields of scale `vessel_mm` are both near 0.
    """

    csf_cut: Pair = (0.48, 0.73)
    csf_edge: float = 0.085
    csf_wobble: float = 0.06
    sulcal_csf: Pair = (0.75, 1.0)
    csf_patches: tuple[Pair, ...] = ((12.0, 0.05), (3.0, 0.08))
    folia_csf: Pair = (0.08, 0.22)
    blur_mm: float = 0.65  # standard deviation of the blur of CSF before its cut
    vessel_mm: float = 9.0
    vessel_width: float = 0.22
    vessel_darkness: Pair = (0.7, 1.0)


@dataclass(frozen=True)
class CoarseMaps:
    """Smooth maps of an anatomy on a grid of 2 mm, [X, Y, Z] float32."""

    affine: np.ndarray  # [4, 4], voxel -> mm
    outside: np.ndarray  # signed distance from the closed brain, mm, negative inside
    ventricle: np.ndarray  # smoothed indicator of the ventricles
    to_ventricle: np.ndarray  # distance from the ventricles, mm
    cerebrum: np.ndarray  # share of cerebral white and gray matter
    white: np.ndarray  # share of cerebral white matter
    midline: np.ndarray  # distance from the plane between the hemispheres, mm
    side: np.ndarray  # the same, negative on one side of the plane


@dataclass(frozen=True)
class Anatomy:
    """What both kinds of anatomy share."""

    name: str  # for the records
    shape: tuple[int, ...]  # (X, Y, Z) of the painted image
    affine: np.ndarray  # [4, 4] of the painted image, voxel -> mm, without rotation
    spacing: int  # mm, of the painted image
    coarse: CoarseMaps
    pose: np.ndarray  # [4, 4], mm in MNI space -> mm in the anatomy's own space; rigid

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Center [3] and extent [3] of the bounding box of the closed brain, mm in MNI space."""
        affine = np.linalg.inv(self.pose) @ self.coarse.affine
        return brain_bounds(self.coarse.outside, affine)

    def random_field(self, rng: np.random.Generator, scale_mm: float) -> np.ndarray:
        """Smooth random field on the painted grid, mean 0, standard deviation 1."""
        return random_field(rng, self.shape, scale_mm / self.spacing)

    def from_coarse(self, values: np.ndarray) -> np.ndarray:
        """Linear interpolation of a coarse map on the painted grid, [X, Y, Z] float32."""
        return resample(values, self.coarse.affine, self.affine, self.shape)

    def _fluid(self, rng, intensities):
        """Intensity of CSF by place: full in the ventricles, weaker and uneven elsewhere."""
        how = self.painting
        deep = np.clip(self.from_coarse(self.coarse.ventricle) / how.ventricle_core, 0, 1)
        share = rng.uniform(*how.sulcal_csf)
        for scale_mm, spread in how.csf_patches:
            share = share + spread * self.random_field(rng, scale_mm)
        falx = np.exp(-((self.from_coarse(self.coarse.midline) / how.falx_mm) ** 2))
        share = share - rng.uniform(*how.falx_darkness) * falx
        share = np.clip(share, *how.csf_range) * (1 - self._vessels(rng))
        return intensities["ventricle"] * deep + intensities["csf"] * share * (1 - deep)

    def _vessels(self, rng):
        """Share of the signal of CSF that vessels take; none here."""
        return 0.0

    def _folia(self, rng, wobble):
        """Share of CSF between the folia of a cerebellum: wavy shells around its hilum."""
        how = self.painting
        x, y, z = map(np.subtract, grid_mm(self.affine, self.shape), how.folia_center)
        radius = np.sqrt((how.folia_flattening * x) ** 2 + y**2 + z**2)
        phase = 2 * np.pi * (radius / how.folia_mm + rng.random()) + wobble
        visible = self.spacing <= FINEST_MM
        return rng.uniform(*how.folia_csf) * np.clip(np.cos(phase), 0, 1) * visible


@dataclass(frozen=True)
class AtlasAnatomy(Anatomy):
    """ICBM152: fractional gray and white matter, sharpened afresh for each subject.

    The maps are averages of many brains, so their sulci are vague. Thresholds that vary smoothly
    from place to place, and random folds of the cortex, give every subject crisp sulci of its own.
    """

    gray: np.ndarray  # share, as all of these [X, Y, Z] float32
    white: np.ndarray  # share
    iron: np.ndarray  # factor on the intensity of tissue; nuclei rich in iron are dark
    cerebellum: np.ndarray  # indicator
    depth: np.ndarray  # 0 in the cortex, 1 among the deep nuclei
    painting = AtlasPainting()

    def paint(self, rng: np.random.Generator, intensities: dict[str, float]) -> np.ndarray:
        """T2-like image [X, Y, Z] float32 in units of white matter; `intensities` by tissue."""
        how = self.painting
        wobble = self.random_field(rng, how.wobble_mm)
        wobble = wobble + 0.5 * self.random_field(rng, how.wobble_mm / 2)
        fold = np.exp(-((self.random_field(rng, how.fold_mm) / how.fold_width) ** 2))
        fold *= self.gray * (1 - self.depth)
        tissue = self.gray + self.white
        csf = 1 - tissue + rng.uniform(*how.fold_csf) * np.clip(2 * fold - 1, 0, 1)
        csf = sigmoid((csf - rng.uniform(*how.csf_cut) + how.csf_wobble * wobble) / how.csf_edge)
        white = self.white / np.maximum(tissue, 1e-3) - how.fold_gray * fold
        edge = how.white_edge + (how.deep_white_edge - how.white_edge) * self.depth
        white = sigmoid((white - rng.uniform(*how.white_cut) - how.white_wobble * wobble) / edge)
        csf += self._folia(rng, wobble) * self.cerebellum * (1 - white) * (1 - csf)
        cortex = intensities["cortex"]
        solid = cortex + (intensities["white"] - cortex) * white
        solid *= 1 + (self.iron - 1) * rng.uniform(*how.iron)
        return (solid + csf * (self._fluid(rng, intensities) - solid)).astype(np.float32)


@dataclass(frozen=True)
class LabelAnatomy(Anatomy):
    """A label map: one tissue per voxel of 1 mm, indices of `TISSUES`."""

    tissue: np.ndarray  # [X, Y, Z] uint8
    painting = LabelPainting()

    def paint(self, rng: np.random.Generator, intensities: dict[str, float]) -> np.ndarray:
        """T2-like image [X, Y, Z] float32 in units of white matter; `intensities` by tissue.

        Label maps show sulci one voxel wide or not at all. A cut on the blurred share of CSF makes
        them wider or narrower than a voxel, by subject and by place.
        """
        levels = {**intensities, "csf": intensities["cortex"], "background": intensities["cortex"]}
        solid = self._mean_of([levels[name] for name in TISSUES])
        csf = self._mean_of([name in ("csf", "background") for name in TISSUES])
        how = self.painting
        wobble = self.random_field(rng, how.wobble_mm)
        csf = ndimage.gaussian_filter(csf, how.blur_mm / self.spacing)
        cut = rng.uniform(*how.csf_cut)
        csf = sigmoid((csf - cut + how.csf_wobble * wobble) / how.csf_edge)
        cerebellar = self._mean_of([name == "cerebellar_cortex" for name in TISSUES])
        csf += self._folia(rng, wobble) * cerebellar * (1 - csf)
        return (solid + csf * (self._fluid(rng, intensities) - solid)).astype(np.float32)

    def _vessels(self, rng):
        how = self.painting
        fields = [self.random_field(rng, how.vessel_mm) for _ in range(2)]
        tubes = np.exp(-sum((field / how.vessel_width) ** 2 for field in fields))
        return rng.uniform(*how.vessel_darkness) * tubes

    def _mean_of(self, values):
        """Mean over painted voxels of one value per tissue, float32."""
        return block_mean(np.asarray(values, dtype=np.float32)[self.tissue], self.spacing)


def indicator(tissue: np.ndarray, *names: str) -> np.ndarray:
    """Float32 indicator of voxels whose tissue has one of the names."""
    return np.isin(tissue, [TISSUE_INDEX[name] for name in names]).astype(np.float32)


def block_mean(values: np.ndarray, step: int) -> np.ndarray:
    """Mean over cubes of `step` voxels, float32; a rest at the end of an axis is left out."""
    values = np.asarray(values, dtype=np.float32)
    if step == 1:
        return values
    X, Y, Z = (n // step for n in values.shape)
    cubes = values[: X * step, : Y * step, : Z * step].reshape(X, step, Y, step, Z, step)
    return cubes.mean(axis=(1, 3, 5), dtype=np.float32)


def coarser_affine(affine: np.ndarray, step: int) -> np.ndarray:
    """Affine of the grid whose voxels are cubes of `step` voxels."""
    return affine @ from_matvec(np.diag([float(step)] * 3), [(step - 1) / 2] * 3)


def to_voxels(points: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxel coordinates of places in mm, [..., 3], for an affine without rotation."""
    return (points - affine[:3, 3]) / np.diag(affine)[:3]


def grid_mm(affine: np.ndarray, shape: Sequence[int]) -> list[np.ndarray]:
    """Place in mm of each voxel of a grid without rotation: three arrays that broadcast."""
    axes = [affine[k, k] * np.arange(n) + affine[k, 3] for k, n in enumerate(shape)]
    return np.meshgrid(*[axis.astype(np.float32) for axis in axes], indexing="ij", sparse=True)


def resample(
    values: np.ndarray, affine: np.ndarray, to_affine: np.ndarray, to_shape: Sequence[int]
) -> np.ndarray:
    """Linear interpolation of a volume on another grid; neither is rotated."""
    ratio = np.diag(to_affine)[:3] / np.diag(affine)[:3]
    offset = to_voxels(to_affine[:3, 3], affine)
    return ndimage.affine_transform(
        values, ratio, offset, output_shape=to_shape, order=1, mode="nearest"
    )


def brain_bounds(outside: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Center [3] and extent [3], in mm, of the box around voxels with a negative `outside`."""
    places = np.argwhere(outside < 0) @ affine[:3, :3].T + affine[:3, 3]
    low, high = places.min(axis=0), places.max(axis=0)
    return (low + high) / 2, high - low + COARSE_MM


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected piece of a mask that is not empty."""
    parts, _ = ndimage.label(mask)
    return parts == np.bincount(parts[mask]).argmax()


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-values)), without overflow; `scipy.special.expit` rounds in another way."""
    return 1 / (1 + np.exp(np.clip(-values, -30, 30)))
