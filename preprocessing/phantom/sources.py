"""Where anatomies come from: the ICBM152 maps shipped with nilearn, or FreeSurfer label maps."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine, from_matvec
from nilearn import datasets
from scipy import ndimage
from scipy.spatial.transform import Rotation

from preprocessing.phantom.anatomy import (
    COARSE_MM,
    FINEST_MM,
    AtlasAnatomy,
    CoarseMaps,
    LabelAnatomy,
    block_mean,
    brain_bounds,
    coarser_affine,
    grid_mm,
    indicator,
    largest_part,
    resample,
    sigmoid,
)
from preprocessing.phantom.tissues import FREESURFER, HEMISPHERES, TISSUE_INDEX, tissue_of_labels
from tf_lesion.files import InputError
from tf_lesion.scans.finder.canonical import LANDMARKS
from tf_lesion.scans.volumes import load_scan

LABEL_MAP_PATTERNS = ("*.nii.gz", "*.nii")
VOXEL_TOLERANCE_MM = 0.1
MNI_BRAIN_CENTER = (0.0, -18.0, 6.0)  # mm, middle of the bounding box of the ICBM152 brain
FEWEST_LANDMARKS = 4  # for a rotation
BOX_MARGIN_MM = 12
# Sulci and cisterns narrower than twice this belong to the brain mask.
CLOSING_MM, LABEL_CLOSING_MM = 6.0, 12.0
DISTANCE_BLUR, MIDLINE_BLUR = 0.8, 1.0  # coarse voxels
VENTRICLE_BLUR_MM = 6.0
NOWHERE_MM = 1000.0  # distance from what is not there
DEPTH_RAMP_MM = (22.0, 34.0)  # below the surface, from cortex to deep nuclei


@dataclass(frozen=True)
class Nucleus:
    """What the ICBM152 maps do not delineate: a soft ellipsoid on either side, in MNI mm."""

    center: tuple[float, float, float]  # |x|, y, z
    radii: tuple[float, float, float]  # half axes
    factor: float = 1.0  # on the intensity at its center
    softness: float = 0.1  # width of its edge, in half axes


# Places read off the ICBM152 2009a T1 template.
IRON_NUCLEI = (
    Nucleus((19.0, -5.0, -1.0), (5.0, 8.5, 6.0), factor=0.7, softness=0.25),  # pallidum
    Nucleus((25.5, 3.0, 1.0), (5.0, 13.0, 8.5), factor=0.88, softness=0.3),  # putamen
    Nucleus((13.0, 11.0, 9.0), (5.0, 9.0, 9.0), factor=0.92, softness=0.3),  # caudate
    Nucleus((12.0, -18.0, 8.0), (9.0, 13.0, 8.0), factor=0.9, softness=0.3),  # thalamus
    Nucleus((5.0, -20.0, -8.5), (3.2, 3.5, 4.0), factor=0.75, softness=0.4),  # red nucleus
    Nucleus((10.0, -17.0, -12.0), (5.0, 4.5, 3.0), factor=0.78, softness=0.4),  # nigra
    Nucleus((15.0, -57.0, -34.0), (6.0, 7.0, 5.0), factor=0.85, softness=0.4),  # dentate
)
CEREBELLUM = Nucleus((0.0, -62.0, -38.0), (54.0, 38.0, 27.0))
BRAINSTEM = Nucleus((0.0, -30.0, -35.0), (20.0, 16.0, 32.0))


@functools.lru_cache(maxsize=2)
def load_atlas(spacing: int) -> AtlasAnatomy:
    """The ICBM152 2009a anatomy, painted at `spacing` 1 or 2 mm."""
    loaders = (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    images = [load(resolution=FINEST_MM) for load in loaders]
    hull = np.asarray(datasets.load_mni152_brain_mask(resolution=FINEST_MM).dataobj) > 0
    gray, white = (image.get_fdata(dtype=np.float32) * hull for image in images)
    box = _brain_box(gray + white > 0.5)
    fine_affine = images[0].affine @ _shift(box)
    shares = (block_mean(share[box], COARSE_MM) for share in (gray + white, white))
    coarse = _atlas_maps(*shares, fine_affine)
    gray, white = (block_mean(share[box], spacing) for share in (gray, white))
    affine = coarser_affine(fine_affine, spacing)
    place = grid_mm(affine, gray.shape)
    depth = -resample(coarse.outside, coarse.affine, affine, gray.shape)
    darkness = [1 + (n.factor - 1) * _ellipsoids(place, n) for n in IRON_NUCLEI]
    return AtlasAnatomy(
        name="icbm152_2009a",
        shape=gray.shape,
        affine=affine,
        spacing=spacing,
        coarse=coarse,
        pose=np.eye(4),
        gray=gray,
        white=white,
        iron=functools.reduce(np.multiply, darkness),
        cerebellum=_ellipsoids(place, CEREBELLUM),
        depth=np.interp(depth, DEPTH_RAMP_MM, (0, 1)).astype(np.float32),
    )


def _atlas_maps(tissue, white, fine_affine):
    """Coarse maps from the share of gray and white matter together, and of white [X, Y, Z]."""
    affine = coarser_affine(fine_affine, COARSE_MM)
    outside = signed_distance(tissue > 0.5)
    x, y, z = place = grid_mm(affine, tissue.shape)
    # Deep CSF is ventricle, but for the cistern behind the third ventricle.
    cistern = (np.abs(x) < 10) & (y < -27) & (z < 22)
    ventricular = (outside < -18) & (np.abs(x) < 45) & (z > -25) & ~cistern
    behind = np.maximum(_ellipsoids(place, CEREBELLUM), _ellipsoids(place, BRAINSTEM))
    side = np.broadcast_to(x, tissue.shape).astype(np.float32)
    ventricle = (1 - tissue) * ventricular
    return CoarseMaps(
        affine=affine,
        outside=outside,
        ventricle=_smooth_ventricle(ventricle),
        to_ventricle=_distance_to(ventricle),
        cerebrum=tissue * (1 - behind),
        white=white * (1 - behind),
        midline=np.abs(side),
        side=side,
    )


def find_label_maps(folder: str | Path) -> list[Path]:
    """Sorted paths of the label maps in `folder`; none is an `InputError` naming the pattern."""
    found = sorted(path for pattern in LABEL_MAP_PATTERNS for path in Path(folder).glob(pattern))
    if not found:
        raise InputError(
            f"Expected FreeSurfer label maps {' or '.join(LABEL_MAP_PATTERNS)} in {folder}, found "
            "none; give the folder that holds them as --label-maps."
        )
    return found


@functools.lru_cache(maxsize=32)
def load_label_map(path: str, spacing: int) -> LabelAnatomy:
    """Anatomy of a FreeSurfer label map, painted at `spacing` 1 or 2 mm.

    The file holds whole numbers, in any orientation, in voxels of 1 mm. Of the labels from
    FIRST_EXTRACEREBRAL on, only bone counts, where the closed brain reaches it.

    Raises:
        InputError: if the file is not such a volume, or lacks white matter, cortex or ventricles.
    """
    labels = read_labels(path)
    tissue = tissue_of_labels(labels)
    for name in ("white", "cortex", "ventricle"):
        if not (tissue == TISSUE_INDEX[name]).any():
            raise InputError(
                f"{path}: expected a FreeSurfer label map, but it has no cerebral {name} (labels "
                f"{FREESURFER[name]}); was it made by recon-all or SynthSeg?"
            )
    solid = largest_part(indicator(tissue, "background", "csf", "bone") == 0)
    box = _brain_box(solid)
    fine_affine = _shift(box)
    coarse = _label_maps(tissue[box], labels[box], solid[box], fine_affine)
    center, _ = brain_bounds(coarse.outside, coarse.affine)
    for affine in (fine_affine, coarse.affine):
        affine[:3, 3] += MNI_BRAIN_CENTER - center
    return LabelAnatomy(
        name=Path(path).name.removesuffix(".gz").removesuffix(".nii"),
        shape=tuple(n // spacing for n in tissue[box].shape),
        affine=coarser_affine(fine_affine, spacing),
        spacing=spacing,
        coarse=coarse,
        pose=_pose(labels[box], fine_affine),
        tissue=tissue[box],
    )


def _pose(labels, affine):
    """Rigid [4, 4], mm in MNI space -> mm of a label map: the best fit of LANDMARKS (Kabsch)."""
    numbers = [n for name in LANDMARKS for n in FREESURFER[name][:2]]
    wanted = np.array([(s * x, y, z) for x, y, z in LANDMARKS.values() for s in (-1, 1)])
    present = np.isin(numbers, labels)
    if present.sum() < FEWEST_LANDMARKS:
        return np.eye(4)
    numbers, wanted = np.array(numbers)[present], wanted[present]
    found = ndimage.center_of_mass(np.ones_like(labels), labels, numbers)
    found = apply_affine(affine, np.array(found))
    middles = wanted.mean(axis=0), found.mean(axis=0)
    turn, _ = Rotation.align_vectors(found - middles[1], wanted - middles[0])
    rotation = turn.as_matrix()
    return from_matvec(rotation, middles[1] - rotation @ middles[0])


def _label_maps(tissue, labels, solid, fine_affine):
    """Coarse maps of a label map."""
    share = block_mean(solid, COARSE_MM)
    ventricle = block_mean(indicator(tissue, "ventricle", "choroid"), COARSE_MM)
    behind = indicator(tissue, "brainstem", "cerebellar_white", "cerebellar_cortex")
    side = _side(labels)
    return CoarseMaps(
        affine=coarser_affine(fine_affine, COARSE_MM),
        outside=signed_distance(share > 0.5, LABEL_CLOSING_MM),
        ventricle=_smooth_ventricle(ventricle),
        to_ventricle=_distance_to(ventricle),
        cerebrum=share - ventricle - block_mean(behind, COARSE_MM),
        white=block_mean(indicator(tissue, "white"), COARSE_MM),
        midline=np.abs(side),
        side=side,
    )


def read_labels(path: str | Path) -> np.ndarray:
    """Labels [X, Y, Z] int32, RAS; negative numbers are 0."""
    scan = load_scan(path)
    if np.abs(scan.voxel_sizes - FINEST_MM).max() > VOXEL_TOLERANCE_MM:
        raise InputError(
            f"{path}: expected a label map with voxels of {FINEST_MM} mm, got voxels of "
            f"{np.round(scan.voxel_sizes, 2)} mm; resample it (mri_convert --conform -rt nearest)."
        )
    if not np.array_equal(scan.data, np.rint(scan.data)):
        raise InputError(f"{path}: expected whole numbers (a label map), got fractions.")
    return np.maximum(scan.data, 0).astype(np.int32)


def _brain_box(mask):
    """Slices of the bounding box of a mask at 1 mm, with a margin, of even lengths."""
    box = []
    for used, length in zip(ndimage.find_objects(mask.astype(int))[0], mask.shape, strict=True):
        low, high = max(used.start - BOX_MARGIN_MM, 0), min(used.stop + BOX_MARGIN_MM, length)
        box.append(slice(low, high - (high - low) % COARSE_MM))
    return tuple(box)


def _shift(box):
    """[4, 4], voxel of `volume[box]` -> voxel of `volume`."""
    return from_matvec(np.eye(3), [part.start for part in box])


def _ellipsoids(place, nucleus):
    """Indicator of a `Nucleus`, [X, Y, Z] float32 in [0, 1]."""
    x, y, z = place
    offsets = (np.abs(x) - nucleus.center[0], y - nucleus.center[1], z - nucleus.center[2])
    radius = np.sqrt(sum((d / r) ** 2 for d, r in zip(offsets, nucleus.radii, strict=True)))
    return sigmoid((1 - radius) / (nucleus.softness / 2)).astype(np.float32)


def signed_distance(mask: np.ndarray, closing_mm: float = CLOSING_MM) -> np.ndarray:
    """Signed distance in mm from the closing of a coarse mask, negative inside, smooth."""
    wide = ndimage.distance_transform_edt(~mask) * COARSE_MM <= closing_mm
    closed = ndimage.distance_transform_edt(wide) * COARSE_MM > closing_mm
    closed = ndimage.binary_fill_holes(closed | mask)
    distance = ndimage.distance_transform_edt(~closed) - ndimage.distance_transform_edt(closed)
    return (ndimage.gaussian_filter(distance, DISTANCE_BLUR) * COARSE_MM).astype(np.float32)


def _smooth_ventricle(share):
    return ndimage.gaussian_filter(share.astype(np.float32), VENTRICLE_BLUR_MM / COARSE_MM)


def _distance_to(share):
    """Distance from where the share is above a half, mm; NOWHERE_MM if it is so nowhere."""
    if not (share > 0.5).any():
        return np.full(share.shape, NOWHERE_MM, np.float32)
    return (ndimage.distance_transform_edt(share <= 0.5) * COARSE_MM).astype(np.float32)


def _side(labels):
    """Half the difference of the distances from the two hemispheres, mm, on the coarse grid."""
    left, right = (
        ndimage.distance_transform_edt(block_mean(np.isin(labels, side), COARSE_MM) < 0.5)
        for side in HEMISPHERES
    )
    difference = ndimage.gaussian_filter(left - right, MIDLINE_BLUR)
    return (difference * COARSE_MM / 2).astype(np.float32)
