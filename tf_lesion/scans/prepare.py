"""One scan, from its file to aligned, masked, normalised slices, and back to its own grid."""

import math
from dataclasses import dataclass, field

import numpy as np

from tf_lesion.files import InputError
from tf_lesion.scans import ALIGN_MODES, MASK_MODES, alignment, brain_mask, intensity
from tf_lesion.scans.volumes import MniGrid, Scan, ScanSource, load_labels, load_scan

HALF = 0.5  # a voxel is brain when half of it is
POOR_MUTUAL_INFORMATION = {True: 0.33, False: 0.12}  # nats, skull-stripped or not; see `_warnings`
USUAL_BRAIN_LITERS = (0.7, 2.1)
LOST_SHARE = 0.02  # of the brain, outside the crop
SMALLEST_OVERLAP = 0.65  # Dice of the brain mask with the atlas's; see `_warnings`
LARGEST_HISTOGRAM_DISTANCE = 0.2  # normalized intensity; see `_warnings`
THICKEST_MM = 3.5  # of a slice; lesions thinner than a slice are averaged away


@dataclass(frozen=True)
class ScanSettings:
    """How a scan is prepared; `dataclasses.asdict` makes JSON of it.

    Raises:
        InputError: if a value is not one of those allowed.
    """

    voxel_size: float = 1.0  # mm, of the MNI grid
    align: str = "rigid"  # rigid, center, none
    mask: str = "auto"  # auto, nonzero, atlas; a mask file goes before it
    n4: bool = False  # bias correction

    def __post_init__(self):
        MniGrid(self.voxel_size)
        for name, allowed in (("align", ALIGN_MODES), ("mask", MASK_MODES)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"Expected {name} to be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}."
                )

    @property
    def grid(self) -> MniGrid:
        """The `MniGrid`."""
        return MniGrid(self.voxel_size)


@dataclass(frozen=True)
class PreparedScan:
    """A scan in the MNI grid.

    Attributes:
        image: [X, Y, Z] float32, 1e-3 to 1 in the brain, exactly 0 outside.
        mask: [X, Y, Z] bool, brain.
        label: [X, Y, Z] uint8 with the values of the segmentation, or None.
        scan_from_grid: [4, 4], mm in MNI space -> mm of the scan (RAS).
        grid: the `MniGrid`.
        scan: the `Scan`, with all it takes to write in its own grid.
        scan_mask: [x, y, z] bool, the brain on the voxels of `scan.data`.
        mutual_information: nats, of the alignment; NaN if there was none.
        atlas_overlap: Dice of the brain mask with that of the atlas, a fraction.
        histogram_distance: of the brain to the reference before matching, normalized intensity;
            NaN without a reference. See `intensity.histogram_distance`.
        warnings: sentences about what looks odd, for the user.
    """

    image: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)
    label: np.ndarray | None = field(repr=False)
    scan_from_grid: np.ndarray
    grid: MniGrid
    scan: Scan
    scan_mask: np.ndarray = field(repr=False)
    mutual_information: float
    atlas_overlap: float
    histogram_distance: float
    warnings: list[str]


def prepare_scan(
    path: ScanSource,
    *,
    settings: ScanSettings,
    mask_path: ScanSource | None = None,
    label_path: ScanSource | None = None,
    reference: np.ndarray | None = None,
) -> PreparedScan:
    """Read, align, mask and normalise a scan.

    Steps: `load_scan`; brain (file, non-zero voxels or atlas); rigid alignment to MNI; N4 if asked
    for; one linear interpolation onto the grid; min-max inside the brain; histogram matching.

    Args:
        path: T2 scan, a NIfTI file; this and the next two may be nibabel images as well.
        settings: `ScanSettings`.
        mask_path: brain mask on the scan's grid, or None.
        label_path: segmentation on the scan's grid, or None.
        reference: [Q] quantiles of the reference's brain to match to, or None.

    Returns:
        A `PreparedScan`.

    Raises:
        FileNotFoundError, InputError: naming the file that cannot be used, and why.
    """
    scan = load_scan(path)
    label = load_labels(label_path, scan) if label_path is not None else None
    brain = brain_mask.find_brain(scan, mode=settings.mask, mask_path=mask_path)
    try:
        return _prepare(scan, brain, label, settings, reference)
    except InputError as error:
        raise InputError(f"{scan.name}: {error}") from error


def _prepare(scan, brain, label, settings, reference):
    grid = settings.grid
    found = alignment.align(
        scan.data, scan.affine, mode=settings.align, brain=brain, voxel_size=settings.voxel_size
    )
    transform = found.scan_from_grid
    stripped = brain is not None
    if not stripped:
        atlas = alignment.atlas_mask_on(grid, found.atlas_from_grid)
        brain = _mask_to_scan(atlas, grid, transform, scan)
    data = scan.data
    if settings.n4:
        data = intensity.correct_bias(data, brain, scan.voxel_sizes)
    values, mask = _masked_to_grid(data, brain, scan.affine, transform, grid)
    image = intensity.normalize(values, mask)
    distance = math.nan
    if reference is not None:
        distance = intensity.histogram_distance(image, mask, reference)
        image = intensity.match_to_reference(image, mask, reference)
    if label is not None:
        label = alignment.to_grid(label, scan.affine, transform, grid, order=0)
    prepared = PreparedScan(
        image=image,
        mask=mask,
        label=label,
        scan_from_grid=transform,
        grid=grid,
        scan=scan,
        scan_mask=brain,
        mutual_information=found.mutual_information,
        atlas_overlap=_dice(mask, alignment.atlas_mask_on(grid)),
        histogram_distance=distance,
        warnings=[],
    )
    prepared.warnings.extend(_warnings(prepared, stripped=stripped))
    return prepared


def _dice(mask, other):
    return 2 * np.count_nonzero(mask & other) / (np.count_nonzero(mask) + np.count_nonzero(other))


def _mask_to_scan(mask, grid, transform, scan):
    weight = alignment.to_scan(
        mask.astype(np.float32), grid, transform, scan.data.shape, scan.affine
    )
    return weight >= HALF


def _masked_to_grid(volume, brain, affine, transform, grid):
    """(values, mask) on the grid; values are averages over brain voxels only: no dark rim."""
    weight = alignment.to_grid(brain.astype(np.float32), affine, transform, grid)
    total = alignment.to_grid(np.where(brain, volume, 0), affine, transform, grid)
    mask = weight >= HALF
    return np.divide(total, weight, out=np.zeros_like(total), where=mask), mask


def to_scan_grid(grid_volume: np.ndarray, prepared: PreparedScan, *, order: int = 1) -> np.ndarray:
    """A volume on the MNI grid -> the scan file's own shape and orientation, 0 outside the brain.

    Args:
        grid_volume: [X, Y, Z] on `prepared.grid`; only its brain voxels are read.
        prepared: the `PreparedScan`.
        order: 1 for images (float32), 0 for labels (type kept, bool as uint8).

    Returns:
        An array of shape `prepared.scan.file_shape`, for `save_like`.
    """
    scan, grid, transform = prepared.scan, prepared.grid, prepared.scan_from_grid
    grid_volume = np.asarray(grid_volume)
    if grid_volume.shape != grid.shape:
        raise ValueError(f"Expected a volume of shape {grid.shape}, got {grid_volume.shape}.")
    if grid_volume.dtype == bool:
        grid_volume = grid_volume.astype(np.uint8)

    def back(volume):
        return alignment.to_scan(volume, grid, transform, scan.data.shape, scan.affine, order=order)

    if order == 0:
        values = back(grid_volume)
    else:  # averages over brain voxels only, as on the way in
        weight = back(prepared.mask.astype(np.float32))
        total = back(np.where(prepared.mask, grid_volume, 0))
        values = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return scan.to_file_orientation(np.where(prepared.scan_mask, values, 0).astype(values.dtype))


def _warnings(prepared, *, stripped):
    """What looks odd.

    The limits on mutual information come from five real scans. Skull-stripped ones reach 0.41 to
    0.57 nats when aligned, and 0.20 to 0.30 when turned upside down or back to front, which no
    rigid search recovers; the one with a skull 0.19, and 0.06 to 0.11.

    Their brain masks overlap with the atlas's by a Dice of 0.73 to 0.97 (lowest for small brains),
    four of them shifted by 40 mm by 0.51 to 0.56; upside down it is hardly less than aligned. Their
    histograms are 0.02 to 0.17 apart from each other and from phantoms', and 0.19 to 0.51 from
    those of the same scans with dark and bright exchanged.
    """
    return [
        *_alignment_warnings(prepared, POOR_MUTUAL_INFORMATION[stripped]),
        *_brain_warnings(prepared),
        *_intensity_warnings(prepared),
    ]


def _alignment_warnings(prepared, usual):
    information, overlap = prepared.mutual_information, prepared.atlas_overlap
    if not math.isnan(information) and information < usual:
        yield (
            f"poor alignment to MNI (mutual information {information:.2f} nats, usually above "
            f"{usual:.2f}); look at the result, or give a brain mask."
        )
    if overlap < SMALLEST_OVERLAP:
        yield (
            f"the brain mask and the atlas's overlap little (Dice {overlap:.2f}, usually above "
            f"{SMALLEST_OVERLAP}): a wrong mask, a poor alignment or a part of a brain."
        )


def _brain_warnings(prepared):
    volume = brain_mask.liters(prepared.scan_mask, prepared.scan.affine)
    low, high = USUAL_BRAIN_LITERS
    if not low <= volume <= high:
        yield f"unusual brain volume: {volume:.2f} liters, usually {low} to {high}."
    mask, crop = prepared.mask, prepared.grid.crop_window
    lost = 1 - np.count_nonzero(mask[crop]) / np.count_nonzero(mask)
    if lost > LOST_SHARE:
        yield f"{lost:.0%} of the brain lie outside the crop; is the alignment right?"
    sizes = prepared.scan.voxel_sizes
    if sizes.max() > max(THICKEST_MM, prepared.grid.voxel_size):
        slices = prepared.scan.data.shape[int(sizes.argmax())]
        yield (
            f"few slices: {slices}, {sizes.max():.1f} mm apart; what is thinner than that is "
            "averaged away."
        )


def _intensity_warnings(prepared):
    if prepared.histogram_distance > LARGEST_HISTOGRAM_DISTANCE:
        yield (
            f"unusual histogram: {prepared.histogram_distance:.2f} from the reference, usually "
            f"below {LARGEST_HISTOGRAM_DISTANCE}; is this a T2 scan, and the mask that of a brain?"
        )
