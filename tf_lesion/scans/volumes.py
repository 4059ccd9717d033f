"""Volumes and grids: any NIfTI scan as RAS, the MNI grid, writing in the scan's own grid."""

import copy
import itertools
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from tf_lesion.caches.slices import RELEASED_CROP, SIZE_STEP, SMALLEST_SIZE
from tf_lesion.files import InputError, written_whole

# ICBM152 2009a at 1 mm, the grid of the released caches and of the template in nilearn.
MNI_SHAPE_1MM = (197, 233, 189)
MNI_ORIGIN_MM = (-98.0, -134.0, -72.0)  # centre of the first voxel: left, posterior, inferior

SMALLEST_SCAN = 4  # voxels per axis; with fewer there is nothing to align
GRID_TOLERANCE_MM = 0.1  # two headers of one grid differ by the rounding of qform and sform
ORIGIN_STEP_MM = 2.0**-10  # a header's float32 origin, of the flipped scan too, rounds to these
SMALLEST_VOXEL_MM3 = 1e-6  # a determinant below this is a singular affine
ScanSource = str | Path | nib.spatialimages.SpatialImage  # what `load_scan` takes
_UNREADABLE = (
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.wrapstruct.WrapStructError,
    EOFError,
    OSError,
    ValueError,
    zlib.error,
)


@dataclass(frozen=True)
class MniGrid:
    """The grid of the caches: RAS, MNI space, `voxel_size` mm, the field of view of the paper.

    At 1 mm it is the ICBM152 2009a grid of 197 x 233 x 189 voxels with the crop of the released
    code. At another size the first voxel stays in place, the shape is divided and rounded up,
    and the crop is the legal size (34 + 4k) nearest to the released one, on the same center.

    Raises:
        InputError: if `voxel_size` is not positive or leaves no room for a legal crop.
    """

    voxel_size: float = 1.0  # mm

    def __post_init__(self):
        if not 0 < self.voxel_size < math.inf:
            raise InputError(f"Expected a positive voxel size in mm, got {self.voxel_size}.")
        if min(self.slice_shape) < SMALLEST_SIZE:
            raise InputError(
                f"Voxels of {self.voxel_size} mm make slices of {self.slice_shape[0]} x "
                f"{self.slice_shape[1]}; the network needs {SMALLEST_SIZE} x {SMALLEST_SIZE}. "
                "Give a smaller voxel_size."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z) in voxels."""
        return tuple(math.ceil(length / self.voxel_size) for length in MNI_SHAPE_1MM)

    @property
    def slice_shape(self) -> tuple[int, int]:
        """(X, Y) of an axial slice, in voxels."""
        return self.shape[:2]

    @property
    def affine(self) -> np.ndarray:
        """[4, 4] float64, voxel -> mm."""
        return from_matvec(np.diag([float(self.voxel_size)] * 3), MNI_ORIGIN_MM)

    @property
    def crop(self) -> tuple[int, int, int, int]:
        """(x0, x1, y0, y1), the window of a slice that the network sees."""
        x0, x1, y0, y1 = RELEASED_CROP
        return *self._scaled_window(x0, x1, axis=0), *self._scaled_window(y0, y1, axis=1)

    @property
    def crop_window(self) -> tuple[slice, slice]:
        """The crop as a pair of slices, to index [..., X, Y, (Z)]."""
        x0, x1, y0, y1 = self.crop
        return slice(x0, x1), slice(y0, y1)

    def _scaled_window(self, start, stop, *, axis):
        length, wanted = self.shape[axis], (stop - start) / self.voxel_size
        steps = max(0, round((wanted - SMALLEST_SIZE) / SIZE_STEP))
        size = SMALLEST_SIZE + SIZE_STEP * min(steps, (length - SMALLEST_SIZE) // SIZE_STEP)
        first = math.floor((start + stop) / 2 / self.voxel_size - size / 2 + 0.5)
        first = min(max(first, 0), length - size)
        return first, first + size


@dataclass(frozen=True)
class Scan:
    """A scan turned to RAS, and what it takes to write in the file's own grid again."""

    path: Path | None  # None for an image in memory
    # [X, Y, Z] float32, the nearest to RAS that flips and permutations reach
    data: np.ndarray = field(repr=False)
    affine: np.ndarray = field(repr=False)  # [4, 4] float64, voxel of `data` -> mm
    file_shape: tuple[int, ...]  # a trailing axis of length 1 included
    file_affine: np.ndarray = field(repr=False)  # [4, 4] float64, voxel in the file -> mm
    header: nib.Nifti1Header = field(repr=False)

    @property
    def name(self) -> str:
        """What messages call it: its path, or "image in memory"."""
        return name_of(self.path)

    @property
    def voxel_sizes(self) -> np.ndarray:
        """[3] mm along the axes of `data`."""
        return voxel_sizes(self.affine)

    def to_file_orientation(self, array: np.ndarray) -> np.ndarray:
        """An array on the voxels of `data` [X, Y, Z] -> the file's own orientation and shape."""
        if array.shape != self.data.shape:
            raise ValueError(f"Expected an array of shape {self.data.shape}, got {array.shape}.")
        back = ornt_transform(axcodes2ornt("RAS"), io_orientation(self.file_affine))
        return apply_orientation(array, back).reshape(self.file_shape)


def load_scan(source: ScanSource) -> Scan:
    """Read a NIfTI scan as a float32 volume in RAS.

    Any orientation, voxel size, number type, scaling; `.nii`, `.nii.gz` or a nibabel image.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: for a file that is truncated or no NIfTI, that is not 3-D, that is empty or
            constant, that holds NaN or infinite values, or whose affine is singular.
    """
    scan = _read(source)
    values = scan.data
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise InputError(
            f"{scan.name}: {bad} of {values.size} voxels are NaN or infinite; expected finite "
            "intensities. Replace them (0 outside the brain) and try again."
        )
    if values.min() == values.max():
        raise InputError(
            f"{scan.name}: every voxel is {values.flat[0]:g}; expected a scan with contrast. "
            "Is this file empty or a blank mask?"
        )
    return scan


def load_labels(source: ScanSource, scan: Scan) -> np.ndarray:
    """Read a segmentation or mask on the grid of `scan` as [X, Y, Z] uint8 in RAS.

    Fractional values are rounded, so that a label written as 0.9999 is 1. All zero is allowed.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: as for `load_scan`; and if the values are not 0 to 255, or the shape or affine
            is another than that of the scan.
    """
    labels = _read(source)
    rounded, top = np.rint(labels.data), np.iinfo(np.uint8).max
    if not (np.isfinite(rounded).all() and rounded.min() >= 0 and rounded.max() <= top):
        raise InputError(
            f"{labels.name}: expected labels from 0 to {top}, got NaN or other values."
        )
    _check_same_grid(labels, scan)
    return rounded.astype(np.uint8)


def image_like(scan: Scan, array: np.ndarray) -> nib.Nifti1Image:
    """`array`, in the scan file's own shape, as an image with the scan's affine, codes and units.

    Bool becomes uint8, and float64 float32.
    """
    if array.shape != tuple(scan.file_shape):
        raise ValueError(f"Expected an array of shape {scan.file_shape}, got {array.shape}.")
    array = np.asarray(array)
    stored = {"b": np.uint8, "f": np.float32}.get(array.dtype.kind, array.dtype)
    header = nib.Nifti1Header.from_header(scan.header, check=False)
    header.set_data_dtype(stored)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the scan does not fit
    header["descrip"] = b"tf_lesion"
    return nib.Nifti1Image(array.astype(stored), scan.file_affine, header)


def save_like(scan: Scan, array: np.ndarray, path: str | Path) -> None:
    """Write the `image_like` of an array to a path that ends in `.nii` or `.nii.gz`."""
    if not str(path).endswith((".nii", ".nii.gz")):
        raise InputError(f"Expected a name that ends in .nii or .nii.gz, got {path}.")
    image = image_like(scan, array)
    with written_whole(path) as temporary:
        nib.save(image, temporary)


def name_of(source: ScanSource | None) -> str:
    """What messages call a file, or an image."""
    return str(source) if isinstance(source, str | Path) else "image in memory"


def _read(source):
    """A `Scan` with everything checked but its values."""
    name, is_file = name_of(source), isinstance(source, str | Path)
    if is_file and not Path(source).exists():
        raise FileNotFoundError(f"No such scan: {name}")
    try:
        image = nib.load(source) if is_file else source
        values = np.asanyarray(image.dataobj)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name}: expected a NIfTI file (.nii, .nii.gz), but it cannot be read: it is "
            f"truncated or of another kind ({reason})."
        ) from error
    if not isinstance(image, nib.Nifti1Pair):
        kind = type(image).__name__
        raise InputError(f"{name}: expected a NIfTI file (.nii, .nii.gz), got {kind}; convert it.")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine)) < SMALLEST_VOXEL_MM3:
        raise InputError(
            f"{name}: its affine is singular, so the voxels have no volume: "
            f"{np.round(image.affine[:3], 3).tolist()}. Repair the header (sform, qform)."
        )
    values = _as_volume(name, values)
    orientation = io_orientation(image.affine)
    affine = image.affine @ inv_ornt_aff(orientation, values.shape)
    # A flip moves the origin, and headers hold it in float32: without this, one scan in two
    # orientations would be aligned to MNI with different last digits.
    affine[:3, 3] = np.rint(affine[:3, 3] / ORIGIN_STEP_MM) * ORIGIN_STEP_MM
    return Scan(
        path=Path(source) if is_file else None,
        data=np.ascontiguousarray(apply_orientation(values, orientation)),
        affine=affine,
        file_shape=tuple(image.shape),
        file_affine=np.asarray(image.affine, dtype=np.float64),
        header=copy.deepcopy(image.header),
    )


def _as_volume(name, values):
    if values.dtype.kind not in "biuf":  # bool, int, unsigned, float
        raise InputError(f"{name}: expected numbers, got voxels of type {values.dtype}.")
    shape = values.shape
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise InputError(
            f"{name}: expected a 3-D volume, got {values.ndim}-D data of shape {shape}; "
            "write one volume to a file of its own."
        )
    if min(values.shape) < SMALLEST_SCAN:
        raise InputError(
            f"{name}: expected at least {SMALLEST_SCAN} voxels along each axis, got {shape}."
        )
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _check_same_grid(labels, scan):
    if labels.data.shape != scan.data.shape:
        raise InputError(
            f"{labels.name}: expected the grid of its scan {scan.name}, {scan.data.shape} voxels "
            f"in RAS, got {labels.data.shape}; resample it to the scan."
        )
    corners = list(itertools.product(*[(0, n - 1) for n in scan.data.shape]))
    apart = np.abs(apply_affine(labels.affine - scan.affine, corners)).max()
    if apart > GRID_TOLERANCE_MM:
        raise InputError(
            f"{labels.name}: expected the affine of its scan {scan.name}, but corners of the two "
            f"grids are {apart:.1f} mm apart; resample it to the scan."
        )
