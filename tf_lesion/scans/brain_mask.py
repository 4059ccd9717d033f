"""Where the brain is: as the brain finder sees it, or the voxels that skull stripping left.

The finder (`tf_lesion.scans.finder`) says of every voxel how far it is from the surface of the
brain. Where at least `STRIPPED_SHARE` of the voxels in a rim around that surface, `RIM_MM` outside,
hold nothing but a constant background, somebody stripped the skull, and the mask is what was left:
the largest connected piece that differs from the background, holes filled. Its edge lies where the
scan rises through half (`EDGE_SHARE`) of its median, or of what lies just inside where that is
less, so that a dark lesion at the surface stays. So it does in a scan of any voxel size:
interpolation spreads a brain by a voxel or two, and splines ring around it. Deeper than
`EDGE_VOXELS` nothing is cut off, however dark.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from tf_lesion.files import InputError
from tf_lesion.scans import alignment
from tf_lesion.scans.finder.find import FoundBrain
from tf_lesion.scans.intensity import BACKGROUND_SHARE, background_of, distance_from
from tf_lesion.scans.volumes import Scan, ScanSource, load_mask, name_of

STRIPPED, SKULL, GIVEN, ATLAS = "stripped", "with skull", "mask given", "mask of the atlas"
RIM_MM, STRIPPED_SHARE = (4.0, 10.0), 0.75
EDGE_MM = 0.75  # how far out a brain with skull goes on; .5 is best for four stripped real ones
SMALLEST_BRAIN_LITERS = 0.2  # of a mask that is given; less is a fragment
EDGE_SHARE, EDGE_VOXELS = 0.5, 2
INSIDE_VOXELS = 5  # edge of the cube in which the deeper voxels say what lies just inside


class Brain(NamedTuple):
    """A brain mask on the voxels of a scan.

    mask [X, Y, Z] bool; kind, one of STRIPPED, SKULL, GIVEN, ATLAS; share of the rim around the
    brain that is background, NaN where nobody looked.
    """

    mask: np.ndarray
    kind: str
    rim_share: float = np.nan


def within_bounds(
    brain: Brain, scan: Scan, scan_from_mni: np.ndarray, *, deep_mm: float, far_mm: float
) -> Brain:
    """The finder's mask with what lies deep in the atlas's brain, without what lies far from it.

    So a large lesion, which the network may leave out, stays in the mask. Masks that were given or
    left by skull stripping stay as they are.

    Args:
        brain: `Brain`.
        scan: `Scan`.
        scan_from_mni: [4, 4], from the registration, with the scale of this brain.
        deep_mm: from the surface of the atlas's brain, inwards, as large as this brain.
        far_mm: outwards.
    """
    if brain.kind != SKULL:
        return brain
    outside = alignment.atlas_distance_in(scan_from_mni, scan.data.shape, scan.affine)
    mask = (brain.mask | (outside < -deep_mm)) & (outside < far_mm)
    return brain._replace(mask=_largest_piece(mask))


def liters(mask: np.ndarray, affine: np.ndarray) -> float:
    """Volume of a mask; exact for sheared voxels, where `nibabel.imagestats` is not."""
    return float(np.count_nonzero(mask)) * abs(np.linalg.det(affine[:3, :3])) / 1e6  # mm^3


def brain_of(
    scan: Scan, found: FoundBrain | None, *, mode: str = "auto", mask_path: ScanSource | None = None
) -> Brain:
    """The brain of a scan.

    Args:
        scan: `Scan`, of intensities as `intensity.from_background` leaves them.
        found: what the finder says about it; "nonzero" and a mask do without.
        mode: "auto" (the finder's mask, or what skull stripping left), "nonzero" (the scan is
            stripped) or "atlas" (the atlas's mask as the finder puts it).
        mask_path: a mask (file or image) on the scan's own grid, brain > 0; before `mode`.

    Raises:
        InputError: if the mask is on another grid than the scan or holds too little.
    """
    if mask_path is not None:
        mask = load_mask(mask_path, scan)
        _check_volume(mask, scan.affine, name_of(mask_path))
        return Brain(mask, GIVEN)
    if mode == "atlas":
        shape, pose = scan.data.shape, found.scan_from_mni
        return Brain(alignment.atlas_mask_in(pose, shape, scan.affine), ATLAS)
    background, share = background_of(scan.data)
    distance = distance_from(background, scan.data)
    if mode == "nonzero":
        mask = what_was_left(distance)
        _check_volume(mask, scan.affine, scan.name)
        return Brain(mask, STRIPPED)
    outside = found.outside_on(scan.data.shape, scan.affine)
    share = _background_share(distance, outside) if share > BACKGROUND_SHARE else 0.0
    if share >= STRIPPED_SHARE:
        return Brain(what_was_left(distance), STRIPPED, share)
    return Brain(_largest_piece(outside < EDGE_MM), SKULL, share)


def _background_share(distance, outside):
    """Share of the rim around the brain that is background; 0 without a rim."""
    low, high = RIM_MM
    rim = (outside > low) & (outside < high)
    return float((distance[rim] == 0).mean()) if rim.any() else 0.0


def what_was_left(distance: np.ndarray) -> np.ndarray:
    """[X, Y, Z] bool, the brain in a stripped scan, without its faint edge.

    `distance` [X, Y, Z] is that of its intensities from the background.
    """
    piece = _largest_piece(distance > 0)
    if not piece.any():
        return piece
    usual = np.median(distance[piece])
    deep = ndimage.binary_erosion(piece, iterations=EDGE_VOXELS, border_value=1)
    total, share = (
        ndimage.uniform_filter(part.astype(np.float64), INSIDE_VOXELS)
        for part in (np.where(deep, distance, 0), deep)
    )
    inside = np.divide(
        total, share, out=np.full_like(total, usual), where=share > 0.5 / INSIDE_VOXELS**3
    )
    return _largest_piece(deep | (piece & (distance >= EDGE_SHARE * np.minimum(inside, usual))))


def _check_volume(mask, affine, name):
    volume = liters(mask, affine)
    if volume < SMALLEST_BRAIN_LITERS:
        raise InputError(
            f"{name}: expected a brain mask of at least {SMALLEST_BRAIN_LITERS} liters, got "
            f"{volume:.3f}; give another, or leave it to the finder (mask 'auto')."
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
