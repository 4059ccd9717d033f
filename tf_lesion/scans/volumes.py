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
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from tf_lesion.caches.slices import RELEASED_CROP, SIZE_STEP, SMALLEST_SIZE
from tf_lesion.files import InputError, written_whole
from tf_lesion.scans import MOST_VOXELS
from tf_lesion.scans.dicom.choice import find_series
from tf_lesion.scans.dicom.files import is_exam
from tf_lesion.scans.dicom.series import Series
from tf_lesion.scans.discovery import problem_of

# ICBM152 2009a at 1 mm, the grid of the released caches and of the template in nilearn.
MNI_SHAPE_1MM = (197, 233, 189)
MNI_ORIGIN_MM = (-98.0, -134.0, -72.0)  # centre of the first voxel: left, posterior, inferior

SMALLEST_SCAN = 4  # voxels per axis; with fewer there is nothing to align
GRID_TOLERANCE_MM = 0.1  # two headers of one grid differ by the rounding of qform and sform
ORIGIN_STEP_MM = 2.0**-10  # a header's float32 origin, of the flipped scan too, rounds to these
FLATTEST = 1e-6  # volume of a voxel by the product of its sides; below, the affine is singular
MM_PER_UNIT = {1: 1e3, 2: 1.0, 3: 1e-3}  # by the code in xyzt_units: meter, mm, micrometer
UNIT_BITS = 7  # of xyzt_units; the others are those of time
FORMS_APART_MM = 1.0  # of the corners; qform and sform that disagree by more are told
# Of the largest side: a head with neck is below, a slab of a brain above. A header beyond them is
# in other units, or damaged, and would size what is computed.
SMALLEST_EXTENT_MM, LARGEST_EXTENT_MM = 5.0, 1000.0
MOST_COMPRESSED = 1032  # times, by gzip
LARGE_BYTES, MOST_COMPRESSED_IF_LARGE = 2**28, 250  # of a scan that is not blank; most: 2 to 20
ScanSource = str | Path | nib.spatialimages.SpatialImage | Series  # what `load_scan` takes
_UNREADABLE = (
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.wrapstruct.WrapStructError,
    EOFError,
    OSError,
    OverflowError,
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
    mm_per_unit: float = 1.0  # of length in the header
    placed_by: str = "sform"  # what says where it lies: sform, qform or nothing
    warnings: tuple[str, ...] = ()  # sentences about its header, for the user
    series: Series | None = None  # of DICOM, that it was converted from

    @property
    def name(self) -> str:
        """What messages call it: its path, or "image in memory"."""
        return name_of(self.path)

    @property
    def source(self) -> Path | Series | None:
        """What it was read from."""
        return self.path if self.series is None else self.series

    def as_stored(self) -> np.ndarray:
        """The values in the file's orientation, of the file's type where that holds them."""
        values, kind = self.to_file_orientation(self.data), self.header.get_data_dtype()
        whole = kind.kind in "iu" and np.array_equal(values, np.rint(values))
        return values.astype(kind) if whole else values

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
    """Read a scan as a float32 volume in RAS.

    Any orientation, voxel size, number type, scaling; `.nii`, `.nii.gz` or a nibabel image; a
    folder of DICOM, a zip of one, or a `Series` of them.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: for a file that is truncated or no NIfTI, that is not 3-D, that is empty or
            constant, that holds NaN or infinite values, or whose affine is singular or is not of
            the size of a head. What the header alone shows is refused before voxels are read.
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
    """Read a segmentation on the grid of `scan` as [X, Y, Z] uint8 in RAS.

    Fractional values are rounded, so that a label written as 0.9999 is 1. All zero is allowed.

    Raises:
        FileNotFoundError: if there is no such file.
        InputError: as for `load_scan`; and if the values are not 0 to 255, or the shape or affine
            is another than that of the scan.
    """
    labels = _read(source, grid_of=scan)
    rounded, top = np.rint(labels.data), np.iinfo(np.uint8).max
    if not (np.isfinite(rounded).all() and rounded.min() >= 0 and rounded.max() <= top):
        raise InputError(
            f"{labels.name}: expected labels from 0 to {top}, got NaN or other values."
        )
    return rounded.astype(np.uint8)


def load_map(source: ScanSource, scan: Scan) -> np.ndarray:
    """Read a volume on the grid of `scan` as [X, Y, Z] float32 in RAS.

    Raises:
        FileNotFoundError, InputError: as for `load_labels`, but any finite values are allowed.
    """
    volume = _read(source, grid_of=scan)
    if not np.isfinite(volume.data).all():
        raise InputError(f"{volume.name}: expected finite values, got NaN or infinite ones.")
    return volume.data


def load_mask(source: ScanSource, scan: Scan) -> np.ndarray:
    """Read a brain mask on the grid of `scan` as [X, Y, Z] bool in RAS: brain where it is above 0.

    So of probabilities and of masks that were interpolated every voxel with some brain is brain.

    Raises:
        FileNotFoundError, InputError: as for `load_map`.
    """
    return load_map(source, scan) > 0


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
    affine = np.diag([1 / scan.mm_per_unit] * 3 + [1.0]) @ scan.file_affine
    return nib.Nifti1Image(array.astype(stored), affine, header)


def save_like(scan: Scan, array: np.ndarray, path: str | Path) -> None:
    """Write the `image_like` of an array to a path that ends in `.nii` or `.nii.gz`."""
    if not str(path).endswith((".nii", ".nii.gz")):
        raise InputError(f"Expected a name that ends in .nii or .nii.gz, got {path}.")
    image = image_like(scan, array)
    with written_whole(path) as temporary:
        nib.save(image, temporary)


def name_of(source: ScanSource | None) -> str:
    """What messages call a file, or an image."""
    if isinstance(source, Series):
        return str(source.path)
    return str(source) if isinstance(source, str | Path) else "image in memory"


def _read(source, *, grid_of=None):
    """A `Scan` with everything checked but its values, on the grid of another one if given."""
    if isinstance(source, str | Path) and is_exam(source):
        source = find_series(source)
    name, is_file = name_of(source), isinstance(source, str | Path)
    series = source if isinstance(source, Series) else None
    if is_file and not Path(source).exists():
        raise FileNotFoundError(problem_of(Path(source)))
    if is_file and Path(source).is_file():
        Path(source).open("rb").close()  # a file that may not be read is not called damaged
    if series is not None:
        image = series.image()
    else:
        image = _readable(name, nib.load, source) if is_file else source
    if not isinstance(image, nib.Nifti1Pair):
        kind = type(image).__name__
        raise InputError(f"{name}: expected a NIfTI file (.nii, .nii.gz), got {kind}; convert it.")
    shape = _checked_shape(name, image)
    mm_per_unit = MM_PER_UNIT.get(int(image.header["xyzt_units"]) & UNIT_BITS, 1.0)
    file_affine, placed_by, warnings = _placed(name, image, mm_per_unit)
    _check_extents(name, shape, file_affine, image.header)
    orientation = io_orientation(file_affine)
    affine = file_affine @ inv_ornt_aff(orientation, shape)
    # A flip moves the origin, and headers hold it in float32: without this, one scan in two
    # orientations would be aligned to MNI with different last digits.
    affine[:3, 3] = np.rint(affine[:3, 3] / ORIGIN_STEP_MM) * ORIGIN_STEP_MM
    if grid_of is not None:
        turned = tuple(shape[axis] for axis in np.argsort(orientation[:, 0]))
        _check_placed(name, shape, file_affine, placed_by, grid_of)
        _check_same_grid(name, turned, affine, grid_of)
    if is_file:
        _check_file_size(name, image, of_scan=grid_of is None)
    values = _readable(name, np.asanyarray, image.dataobj)
    with np.errstate(over="ignore"):
        values = values.reshape(shape).astype(np.float32)
    return Scan(
        path=Path(source) if is_file else series and series.path,
        data=np.ascontiguousarray(apply_orientation(values, orientation)),
        affine=affine,
        file_shape=tuple(image.shape),
        file_affine=file_affine,
        header=copy.deepcopy(image.header),
        mm_per_unit=mm_per_unit,
        placed_by=placed_by,
        warnings=warnings,
        series=series,
    )


def _readable(name, read, what):
    """`read(what)`, whose failures are those of the file."""
    try:
        return read(what)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name}: expected a NIfTI file (.nii, .nii.gz), but it cannot be read: it is "
            f"truncated or of another kind ({reason})."
        ) from error


def _checked_shape(name, image):
    """The three lengths of a volume of numbers."""
    kind, shape = image.get_data_dtype(), image.shape
    if kind.kind not in "biuf":  # bool, int, unsigned, float
        raise InputError(f"{name}: expected numbers, got voxels of type {kind}.")
    if any(length != 1 for length in shape[3:]) or len(shape) < 3:
        raise InputError(
            f"{name}: expected a 3-D volume, got {len(shape)}-D data of shape {shape}; "
            "write one volume to a file of its own."
        )
    if min(shape[:3]) < SMALLEST_SCAN:
        raise InputError(
            f"{name}: expected at least {SMALLEST_SCAN} voxels along each axis, got {shape}."
        )
    return shape[:3]


def _placed(name, image, mm_per_unit):
    """(affine to mm, the form that it is from, warnings about it)."""
    header, to_mm = image.header, np.diag([mm_per_unit] * 3 + [1.0])
    coded = {"sform": header.get_sform, "qform": header.get_qform}
    read = {form: _readable(name, lambda get: get(coded=True)[0], coded[form]) for form in coded}
    there = {form: to_mm @ affine for form, affine in read.items() if affine is not None}
    if not there:
        affine = header.get_best_affine() if image.affine is None else image.affine
        there = {"nothing": to_mm @ affine}
    usable = {form: affine for form, affine in there.items() if not _is_singular(affine)}
    if not usable:
        shown = np.round(next(iter(there.values()))[:3], 3).tolist()
        raise InputError(
            f"{name}: its affine is singular, so the voxels have no volume: {shown}. Repair the "
            f"header (sform, qform)."
        )
    form, affine = next(iter(usable.items()))
    return affine, form, tuple(_doubts(there, usable, image.shape[:3]))


def _is_singular(affine):
    sides = np.prod(np.linalg.norm(affine[:3, :3], axis=0)) if np.isfinite(affine).all() else 0.0
    return not abs(np.linalg.det(affine[:3, :3])) > FLATTEST * sides if sides else True


def _doubts(there, usable, shape):
    """Sentences about what the header leaves open: which side is left is never guessed at."""
    if "nothing" in usable:
        yield (
            "the header knows no orientation (qform and sform code 0): which side is left, and "
            "every position in mm, is a guess."
        )
    if len(usable) < len(there):
        (bad,) = there.keys() - usable.keys()
        yield f"the {bad} of the header is singular; the {next(iter(usable))} was used."
    if len(usable) == 2:
        apart = _apart_mm(usable["sform"], usable["qform"], shape)
        sides = {aff2axcodes(affine) for affine in usable.values()}
        if apart > FORMS_APART_MM:
            yield (
                f"qform and sform of the header are up to {apart:.1f} mm apart; positions follow "
                f"the sform{', and so does which side is left' if len(sides) > 1 else ''}."
            )


def _check_extents(name, shape, affine, header):
    extents = voxel_sizes(affine) * shape
    if SMALLEST_EXTENT_MM <= extents.max() <= LARGEST_EXTENT_MM and math.prod(shape) <= MOST_VOXELS:
        return
    told = " x ".join(f"{extent:.4g}" for extent in extents)
    raise InputError(
        f"{name}: expected a head, {SMALLEST_EXTENT_MM:g} to {LARGEST_EXTENT_MM:g} mm long, of "
        f"{MOST_VOXELS} voxels at most; the header tells of {told} mm and "
        f"{' x '.join(map(str, shape))} voxels. Repair its affine or its unit of length "
        f"(xyzt_units {int(header['xyzt_units'])})."
    )


def _check_file_size(name, image, *, of_scan):
    """Refuse a file that cannot hold what its header tells of, before memory is taken for it."""
    path = Path(image.file_map["image"].filename)
    needed = math.prod(image.shape) * image.get_data_dtype().itemsize
    most = MOST_COMPRESSED_IF_LARGE if of_scan and needed > LARGE_BYTES else MOST_COMPRESSED
    size = path.stat().st_size * (most if path.suffix.lower() == ".gz" else 1)
    if size < needed:
        raise InputError(
            f"{name}: expected a NIfTI file (.nii, .nii.gz), but it cannot be read: its header "
            f"tells of {needed} bytes, and {path.stat().st_size} are there; it is truncated or "
            f"blank."
        )


def _apart_mm(first, second, shape):
    """How far apart two grids are, at the corner where they are most."""
    corners = list(itertools.product(*[(0, n - 1) for n in shape]))
    return np.abs(apply_affine(first - second, corners)).max()


def _check_placed(name, shape, affine, placed_by, scan):
    """Refuse the voxels of a scan where one header of the two knows no orientation."""
    placed = ((name, placed_by), (scan.name, scan.placed_by))
    unplaced = [one for one, by in placed if by == "nothing"]
    apart = _apart_mm(affine, scan.file_affine, shape)
    if unplaced and shape == scan.file_shape[:3] and apart > GRID_TOLERANCE_MM:
        raise InputError(
            f"{name}: expected the affine of its scan {scan.name}, but the header of "
            f"{unplaced[0]} knows no orientation (qform and sform code 0). If both have the same "
            f"voxels, give it the affine and the codes of the other (as fslcpgeom does)."
        )


def _check_same_grid(name, shape, affine, scan):
    if shape != scan.data.shape:
        raise InputError(
            f"{name}: expected the grid of its scan {scan.name}, {scan.data.shape} voxels in RAS, "
            f"got {shape}; resample it to the scan."
        )
    apart = _apart_mm(affine, scan.affine, scan.data.shape)
    if apart > GRID_TOLERANCE_MM:
        raise InputError(
            f"{name}: expected the affine of its scan {scan.name}, but corners of the two "
            f"grids are {apart:.1f} mm apart; resample it to the scan."
        )
