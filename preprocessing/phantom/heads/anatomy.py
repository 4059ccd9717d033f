"""Whole heads as label maps: what each voxel is, where the brain ends, where MNI space lies."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from preprocessing.phantom.anatomy import (
    COARSE_MM,
    block_mean,
    coarser_affine,
    indicator,
    largest_part,
)
from preprocessing.phantom.sources import (
    LABEL_CLOSING_MM,
    read_labels,
    signed_distance,
)
from preprocessing.phantom.tissues import FREESURFER, TISSUES, tissue_of_labels
from tf_lesion.files import InputError
from tf_lesion.scans.finder import canonical

# Numbers of SynthSeg's label maps outside of the brain, named by where they lie. Of the soft
# tissue, what lies within FAT_MM of the skin is taken for fat.
EXTRACEREBRAL = {
    "artery": (502,),
    "eye": (506,),
    "muscle": (507,),
    "lens": (508,),
    "mucosa": (509,),
    "skin": (511,),
    "cord": (512, 530),
    "marrow": (514,),
    "spongy": (516,),
}
CLASSES = (*TISSUES, *EXTRACEREBRAL, "fat", "air")
CLASS_INDEX = {name: number for number, name in enumerate(CLASSES)}
FAT_MM = 7.0
AIR_MARGIN_MM = 6


@dataclass(frozen=True)
class HeadAnatomy:
    """One head. Its space is RAS in mm, along the voxels; (0, 0, 0) is in the middle of the brain.

    Attributes:
        name: of the file, for the records.
        classes: [X, Y, Z] uint8, indices of CLASSES, voxels of 1 mm.
        affine: [4, 4], voxel of `classes` -> mm.
        outside: [x, y, z] float32, signed distance from the closed brain, mm, negative inside.
        outside_affine: [4, 4], voxel of `outside` -> mm.
        mni_from_head: [4, 4], mm -> mm in MNI space; affine, the best fit of the landmarks.
        landmarks: [20, 3] mm, centers of structures, those of `finder.canonical.landmarks`.
    """

    name: str
    classes: np.ndarray
    affine: np.ndarray
    outside: np.ndarray
    outside_affine: np.ndarray
    mni_from_head: np.ndarray
    landmarks: np.ndarray


def load_head(path: str | Path) -> HeadAnatomy:
    """The `HeadAnatomy` of a FreeSurfer label map of a whole head, voxels of 1 mm.

    Raises:
        InputError: if it is no such map, or lacks a structure that the landmarks need.
    """
    labels = read_labels(path)
    numbers = [n for name in canonical.LANDMARKS for n in FREESURFER[name][:2]]
    missing = sorted(set(numbers) - set(np.unique(labels)))
    if missing:
        raise InputError(
            f"{path}: expected a whole head with all landmarks, but it lacks the FreeSurfer labels "
            f"{', '.join(map(str, missing))}."
        )
    labels = labels[_head_box(labels > 0)]
    tissue = tissue_of_labels(labels)
    solid = largest_part(indicator(tissue, "background", "csf", "bone") == 0)
    outside = signed_distance(block_mean(solid, COARSE_MM) > 0.5, LABEL_CLOSING_MM)
    landmarks = np.array(ndimage.center_of_mass(np.ones_like(labels), labels, numbers))
    affine = np.eye(4)
    affine[:3, 3] = -landmarks.mean(axis=0)
    landmarks = landmarks + affine[:3, 3]
    return HeadAnatomy(
        name=Path(path).name.removesuffix(".gz").removesuffix(".nii"),
        classes=_classes(labels, tissue),
        affine=affine,
        outside=outside,
        outside_affine=coarser_affine(affine, COARSE_MM),
        mni_from_head=fit_affine(landmarks, canonical.landmarks()),
        landmarks=landmarks,
    )


@functools.lru_cache(maxsize=1)
def load_heads(paths: tuple[Path, ...]) -> list[HeadAnatomy]:
    """`load_head` of each path; they stay in memory, some 10 MB each."""
    return [load_head(path) for path in paths]


def fit_affine(points: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least-squares [4, 4] that takes points [N, 3] to wanted [N, 3]."""
    with_one = np.column_stack([points, np.ones(len(points))])
    matrix = np.eye(4)
    matrix[:3] = np.linalg.lstsq(with_one, wanted, rcond=None)[0].T
    return matrix


def _head_box(head):
    box = []
    for axis in range(3):
        used = np.flatnonzero(head.any(axis=tuple({0, 1, 2} - {axis})))
        low, high = max(used[0] - AIR_MARGIN_MM, 0), used[-1] + 1 + AIR_MARGIN_MM
        box.append(slice(low, min(high, head.shape[axis])))
    return tuple(box)


def _classes(labels, tissue):
    classes = tissue.copy()
    classes[labels == 0] = CLASS_INDEX["air"]
    for name, numbers in EXTRACEREBRAL.items():
        classes[np.isin(labels, numbers)] = CLASS_INDEX[name]
    near_skin = ndimage.distance_transform_edt(classes != CLASS_INDEX["skin"]) <= FAT_MM
    classes[(classes == CLASS_INDEX["muscle"]) & near_skin] = CLASS_INDEX["fat"]
    return classes
