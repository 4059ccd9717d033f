"""Brain anatomies that paint noise-free T2-like images of themselves.

An `Anatomy` also carries the coarse maps that deformation, skull stripping and tumors need. Its
space is RAS, in mm, with the middle of the brain about where MNI space has it.
`preprocessing.anatomy_sources` makes anatomies from the ICBM152 maps and from label maps.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from preprocessing.fields import random_field
from preprocessing.tissues import TISSUE_INDEX, TISSUES

FINEST_MM = 1
COARSE_MM = 2  # grid of the coarse maps

# How sharp the painted edges are and how they wander: shares of a tissue.
CSF_EDGE, WHITE_EDGE, DEEP_WHITE_EDGE = 0.06, 0.08, 0.28
LABEL_CSF_EDGE = 0.07
CSF_WOBBLE, WHITE_WOBBLE, LABEL_CSF_WOBBLE = 0.07, 0.08, 0.06
WOBBLE_MM = 7.0
# Share of CSF at which a voxel of the blurred maps counts as CSF, by subject: width of the sulci.
ATLAS_CSF_CUT, LABEL_CSF_CUT = (0.34, 0.5), (0.55, 0.78)
WHITE_CUT = (0.36, 0.48)
LABEL_BLUR_MM = 0.7
IRON = (0.7, 1.2)  # factor on the darkness of nuclei rich in iron

FOLD_MM, FOLD_WIDTH = 13.0, 0.25  # sulci that are added to the averaged ICBM152 maps
FOLD_CSF, FOLD_GRAY = (0.25, 0.45), 0.5  # what a fold adds to CSF and takes from white matter
FOLIA_MM = 5.0  # distance between folia of the cerebellum as a T2 scan at 1 mm shows them
FOLIA_CSF = (0.04, 0.14)  # share of CSF between them
FOLIA_CENTER_MM = (0.0, -40.0, -32.0)  # MNI: roof of the fourth ventricle
FOLIA_FLATTENING = 0.7

SULCAL_CSF = (0.75, 0.95)  # intensity of sulcal CSF, share of its full one
CSF_PATCHES = ((12.0, 0.12), (3.0, 0.16))  # scale in mm and spread: flow, vessels, membranes
LABEL_SULCAL_CSF = (0.85, 1.05)
LABEL_CSF_PATCHES = ((12.0, 0.05), (3.0, 0.08))
FALX_HALF_WIDTH_MM, FALX_DARKNESS = 1.0, (0.3, 0.7)
DARKEST_CSF, BRIGHTEST_CSF = 0.1, 1.1
# Vessels in the CSF around the brain, dark because their blood flows: tubes where two random fields
# of this scale are both near 0, and how dark they are by subject.
VESSEL_MM, VESSEL_WIDTH, VESSEL_DARKNESS = 9.0, 0.12, (0.3, 0.9)
VENTRICLE_CORE = 0.25  # of the smoothed ventricles, from which on CSF has its full intensity


@dataclass(frozen=True)
class CoarseMaps:
    """Smooth maps of an anatomy on a grid of 2 mm, [X, Y, Z] float32.

    Attributes:
        affine: [4, 4], voxel -> mm.
        outside: signed distance from the closed brain, mm, negative inside.
        ventricle: smoothed indicator of the ventricles.
        cerebrum: share of cerebral white and gray matter.
        midline: distance from the plane between the hemispheres, mm.
    """

    affine: np.ndarray
    outside: np.ndarray
    ventricle: np.ndarray
    cerebrum: np.ndarray
    midline: np.ndarray


@dataclass(frozen=True)
class Anatomy:
    """What both kinds of anatomy share.

    Attributes:
        name: for the records.
        affine: [4, 4] of the painted image, voxel -> mm, without rotation.
        spacing: mm, of the painted image.
        coarse: `CoarseMaps`.
        pose: [4, 4], mm in MNI space -> mm in the anatomy's own space; rigid.
    """

    name: str
    affine: np.ndarray
    spacing: int
    coarse: CoarseMaps
    pose: np.ndarray
    sulcal_csf, csf_patches = SULCAL_CSF, CSF_PATCHES

    def bounds(self):
        """Center [3] and extent [3] of the bounding box of the closed brain, mm in MNI space."""
        affine = np.linalg.inv(self.pose) @ self.coarse.affine
        return brain_bounds(self.coarse.outside, affine)

    def in_pose(self, points):
        """Places [..., 3] in MNI space -> in the anatomy's own space, both in mm."""
        return points @ self.pose[:3, :3].T + self.pose[:3, 3]

    def random_field(self, rng, scale_mm):
        """Smooth random field on the painted grid, mean 0, standard deviation 1."""
        return random_field(rng, self.shape, scale_mm / self.spacing)

    def from_coarse(self, values):
        """Linear interpolation of a coarse map on the painted grid, [X, Y, Z] float32."""
        values = np.asarray(values, dtype=np.float32)
        return resample(values, self.coarse.affine, self.affine, self.shape)

    def _fluid(self, rng, intensities):
        """Intensity of CSF by place: full in the ventricles, weaker and uneven elsewhere."""
        deep = np.clip(self.from_coarse(self.coarse.ventricle) / VENTRICLE_CORE, 0, 1)
        share = rng.uniform(*self.sulcal_csf)
        for scale_mm, spread in self.csf_patches:
            share = share + spread * self.random_field(rng, scale_mm)
        falx = np.exp(-((self.from_coarse(self.coarse.midline) / FALX_HALF_WIDTH_MM) ** 2))
        share = np.clip(share - rng.uniform(*FALX_DARKNESS) * falx, DARKEST_CSF, BRIGHTEST_CSF)
        share = share * (1 - self._vessels(rng))
        return intensities["ventricle"] * deep + intensities["csf"] * share * (1 - deep)

    def _vessels(self, rng):
        """Share of the signal of CSF that vessels take; none here."""
        return 0.0

    def _folia(self, rng, wobble):
        """Share of CSF between the folia of a cerebellum: wavy shells around its hilum."""
        x, y, z = (
            axis - middle
            for axis, middle in zip(grid_mm(self.affine, self.shape), FOLIA_CENTER_MM, strict=True)
        )
        radius = np.sqrt((FOLIA_FLATTENING * x) ** 2 + y**2 + z**2)
        phase = 2 * np.pi * (radius / FOLIA_MM + rng.random()) + wobble
        visible = self.spacing <= FINEST_MM
        return rng.uniform(*FOLIA_CSF) * np.clip(np.cos(phase), 0, 1) * visible


@dataclass(frozen=True)
class AtlasAnatomy(Anatomy):
    """ICBM152: fractional gray and white matter, sharpened afresh for each subject.

    The maps are averages of many brains, so their sulci are vague. Thresholds that vary smoothly
    from place to place, and random folds of the cortex, give every subject crisp sulci of its own.

    Attributes, all [X, Y, Z] float32:
        gray, white: shares.
        iron: factor on the intensity of tissue; nuclei rich in iron are dark.
        cerebellum: indicator.
        depth: 0 in the cortex, 1 among the deep nuclei.
    """

    gray: np.ndarray
    white: np.ndarray
    iron: np.ndarray
    cerebellum: np.ndarray
    depth: np.ndarray

    @property
    def shape(self):
        """(X, Y, Z) of the painted image."""
        return self.gray.shape

    def paint(self, rng, intensities):
        """T2-like image [X, Y, Z] float32 in units of white matter; `intensities` by tissue."""
        wobble = self.random_field(rng, WOBBLE_MM) + 0.5 * self.random_field(rng, WOBBLE_MM / 2)
        fold = np.exp(-((self.random_field(rng, FOLD_MM) / FOLD_WIDTH) ** 2))
        fold *= self.gray * (1 - self.depth)
        tissue = self.gray + self.white
        csf = 1 - tissue + rng.uniform(*FOLD_CSF) * np.clip(2 * fold - 1, 0, 1)
        csf = sigmoid((csf - rng.uniform(*ATLAS_CSF_CUT) + CSF_WOBBLE * wobble) / CSF_EDGE)
        white = self.white / np.maximum(tissue, 1e-3) - FOLD_GRAY * fold
        edge = WHITE_EDGE + (DEEP_WHITE_EDGE - WHITE_EDGE) * self.depth
        white = sigmoid((white - rng.uniform(*WHITE_CUT) - WHITE_WOBBLE * wobble) / edge)
        csf += self._folia(rng, wobble) * self.cerebellum * (1 - white) * (1 - csf)
        gray_level = intensities["cortex"]
        solid = gray_level + (intensities["white"] - gray_level) * white
        solid *= 1 + (self.iron - 1) * rng.uniform(*IRON)
        return _float32(solid + csf * (self._fluid(rng, intensities) - solid))


@dataclass(frozen=True)
class LabelAnatomy(Anatomy):
    """A label map: one tissue per voxel of 1 mm, indices of `TISSUES`."""

    tissue: np.ndarray  # [X, Y, Z] uint8
    sulcal_csf, csf_patches = LABEL_SULCAL_CSF, LABEL_CSF_PATCHES

    @property
    def shape(self):
        """(X, Y, Z) of the painted image."""
        return tuple(n // self.spacing for n in self.tissue.shape)

    def paint(self, rng, intensities):
        """T2-like image [X, Y, Z] float32 in units of white matter; `intensities` by tissue.

        Label maps show sulci one voxel wide or not at all. A cut on the blurred share of CSF makes
        them wider or narrower than a voxel, by subject and by place.
        """
        levels = {**intensities, "csf": intensities["cortex"], "background": intensities["cortex"]}
        solid = self._mean_of([levels[name] for name in TISSUES])
        csf = self._mean_of([name in ("csf", "background") for name in TISSUES])
        wobble = self.random_field(rng, WOBBLE_MM)
        csf = ndimage.gaussian_filter(csf, LABEL_BLUR_MM / self.spacing)
        cut = rng.uniform(*LABEL_CSF_CUT)
        csf = sigmoid((csf - cut + LABEL_CSF_WOBBLE * wobble) / LABEL_CSF_EDGE)
        cerebellar = self._mean_of([name == "cerebellar_cortex" for name in TISSUES])
        csf += self._folia(rng, wobble) * cerebellar * (1 - csf)
        return _float32(solid + csf * (self._fluid(rng, intensities) - solid))

    def _vessels(self, rng):
        fields = [self.random_field(rng, VESSEL_MM) for _ in range(2)]
        tubes = np.exp(-sum((field / VESSEL_WIDTH) ** 2 for field in fields))
        return rng.uniform(*VESSEL_DARKNESS) * tubes

    def _mean_of(self, values):
        """Mean over painted voxels of one value per tissue, float32."""
        return block_mean(np.asarray(values, dtype=np.float32)[self.tissue], self.spacing)


def indicator(tissue, *names):
    """Float32 indicator of voxels whose tissue has one of the names."""
    return np.isin(tissue, [TISSUE_INDEX[name] for name in names]).astype(np.float32)


def block_mean(values, step):
    """Mean over cubes of `step` voxels, float32; a rest at the end of an axis is left out."""
    values = np.asarray(values, dtype=np.float32)
    if step == 1:
        return values
    X, Y, Z = (n // step for n in values.shape)
    cubes = values[: X * step, : Y * step, : Z * step].reshape(X, step, Y, step, Z, step)
    return cubes.mean(axis=(1, 3, 5), dtype=np.float32)


def coarser_affine(affine, step):
    """Affine of the grid whose voxels are cubes of `step` voxels."""
    result = np.array(affine, dtype=float)
    result[:3, :3] *= step
    result[:3, 3] += affine[:3, :3] @ np.full(3, (step - 1) / 2)
    return result


def to_voxels(points, affine):
    """Voxel coordinates of places in mm, [..., 3], for an affine without rotation."""
    return (points - affine[:3, 3]) / np.diag(affine)[:3]


def grid_mm(affine, shape):
    """Place in mm of each voxel of a grid without rotation: three arrays that broadcast."""
    axes = [affine[k, k] * np.arange(n) + affine[k, 3] for k, n in enumerate(shape)]
    return np.meshgrid(*[axis.astype(np.float32) for axis in axes], indexing="ij", sparse=True)


def resample(values, affine, to_affine, to_shape):
    """Linear interpolation of a volume on another grid; neither is rotated."""
    ratio = np.diag(to_affine)[:3] / np.diag(affine)[:3]
    offset = to_voxels(to_affine[:3, 3], affine)
    return ndimage.affine_transform(
        values, ratio, offset, output_shape=to_shape, order=1, mode="nearest"
    )


def brain_bounds(outside, affine):
    """Center [3] and extent [3], in mm, of the box around voxels with a negative `outside`."""
    places = np.argwhere(outside < 0) @ affine[:3, :3].T + affine[:3, 3]
    low, high = places.min(axis=0), places.max(axis=0)
    return (low + high) / 2, high - low + COARSE_MM


def sigmoid(values):
    """1 / (1 + exp(-values)), without overflow."""
    return 1 / (1 + np.exp(np.clip(-values, -30, 30)))


def _float32(values):
    return values.astype(np.float32)
