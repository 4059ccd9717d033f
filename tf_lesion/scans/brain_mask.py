"""Where the brain is: from the non-zero voxels of a skull-stripped scan, or from the atlas.

The rule of the mode "auto". A scan counts as skull-stripped when both hold:

* at least `BACKGROUND_SHARE` of its voxels equal the background, the most frequent value on the
  faces of the volume, to within `NEAR_BACKGROUND` of the brightest voxels (real air has noise; a
  stripped scan may hold a few specks and small negative values);
* what is left, largest connected piece, holes filled, faint voxels not counted, is at most
  `LARGEST_BRAIN_LITERS`. A head is more than twice a brain, even when its air was set to zero.

Faint voxels differ from the background by less than `FAINT_SHARE` of the piece's median. The rim of
the mask of a brain lies where the scan rises through half of its median (`RIM_SHARE`), as it does
in a scan of any voxel size: interpolation spreads a brain by a voxel, and splines ring around it.

Any other scan has its skull, and its mask is that of the atlas.
"""

import numpy as np
from scipy import ndimage

from tf_lesion.files import InputError
from tf_lesion.scans.volumes import Scan, ScanSource, load_labels, name_of

BACKGROUND_SHARE = 0.3  # a brain fills about half of the smallest box around it
NEAR_BACKGROUND = 1e-3  # of the 99.9th percentile of the distance to the background
LARGEST_BRAIN_LITERS = 2.2  # intracranial volume of adults: 1.1 to 1.9
SMALLEST_BRAIN_LITERS = 0.2  # less is a fragment; half a brain in a slab passes
FAINT_SHARE = 0.2
RIM_SHARE = 0.5


def liters(mask: np.ndarray, affine: np.ndarray) -> float:
    """Volume of a mask; exact for sheared voxels, where `nibabel.imagestats` is not."""
    return float(np.count_nonzero(mask)) * abs(np.linalg.det(affine[:3, :3])) / 1e6  # mm^3


def find_brain(
    scan: Scan, *, mode: str = "auto", mask_path: ScanSource | None = None
) -> np.ndarray | None:
    """The brain of a scan before any alignment.

    Args:
        mode: "auto" (the rule above), "nonzero" (take the scan for skull-stripped) or "atlas".
        mask_path: a mask (file or image) on the scan's own grid, brain > 0; before `mode`.

    Returns:
        [X, Y, Z] bool, or None if the atlas is to tell once the scan is aligned.

    Raises:
        InputError: if the mask is on another grid than the scan or holds too little.
    """
    if mask_path is not None:
        mask = load_labels(mask_path, scan) > 0
        _check_volume(mask, scan.affine, name_of(mask_path))
        return mask
    if mode == "atlas":
        return None
    faces = [scan.data.take(end, axis=axis).ravel() for axis in range(3) for end in (0, -1)]
    found, counts = np.unique(np.concatenate(faces), return_counts=True)
    distance = np.abs(scan.data - found[counts.argmax()])  # from the background
    foreground = distance > NEAR_BACKGROUND * np.percentile(distance, 99.9)
    piece = _largest_piece(foreground)
    median = np.median(distance[piece])
    full = piece & (distance >= FAINT_SHARE * median)
    if mode == "nonzero":
        _check_volume(full, scan.affine, scan.name)
    elif 1 - foreground.mean() < BACKGROUND_SHARE or not (
        SMALLEST_BRAIN_LITERS <= liters(full, scan.affine) <= LARGEST_BRAIN_LITERS
    ):
        return None
    return _largest_piece(piece & (distance >= RIM_SHARE * median))


def _check_volume(mask, affine, name):
    volume = liters(mask, affine)
    if volume < SMALLEST_BRAIN_LITERS:
        raise InputError(
            f"{name}: expected a brain mask of at least {SMALLEST_BRAIN_LITERS} liters, got "
            f"{volume:.3f}; give another, or take the atlas's (mask 'atlas')."
        )


def _largest_piece(foreground):
    """The largest connected piece of a mask, specks cut off, holes filled; empty stays empty.

    Bridges one voxel thick are cut before the pieces are compared (specks often hang on by one),
    and the rim that this takes off is put back.
    """
    core = ndimage.binary_opening(foreground)
    if not core.any():
        core = foreground
    labels, count = ndimage.label(core)
    if count == 0:
        return np.zeros_like(foreground)
    largest = np.bincount(labels.ravel())[1:].argmax() + 1
    piece = ndimage.binary_dilation(labels == largest, mask=foreground)
    return ndimage.binary_fill_holes(piece)
