"""One scan, from its file to aligned, masked, normalised slices, and back to its own grid."""

import functools
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
    """How a scan is prepared; an `InputError` if a value is not one of those allowed."""

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
        """Where the scan will lie."""
        return MniGrid(self.voxel_size)


@dataclass(frozen=True)
class PreparedScan:
    """A scan in the MNI grid, [X, Y, Z], and in its own."""

    image: np.ndarray = field(repr=False)  # float32, 1e-3 to 1 in the brain, exactly 0 outside
    mask: np.ndarray = field(repr=False)  # bool, brain
    label: np.ndarray | None = field(repr=False)  # uint8, the values of the segmentation
    scan_from_grid: np.ndarray  # [4, 4], mm in MNI space -> mm of the scan (RAS)
    grid: MniGrid
    scan: Scan
    scan_mask: np.ndarray = field(repr=False)  # bool, the brain on the voxels of `scan.data`
    mutual_information: float  # nats, of the alignment; NaN if there was none
    atlas_overlap: float  # Dice of the brain mask with that of the atlas
    # Of the brain to the reference before matching, normalized intensity; NaN without a reference.
    histogram_distance: float
    warnings: list[str]  # sentences about what looks odd, for the user


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
        mask_path: brain mask on the scan's grid.
        label_path: segmentation on the scan's grid.
        reference: [Q] quantiles of the brain to match to; None leaves the histogram as it is.

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
    usual_information = POOR_MUTUAL_INFORMATION[brain is not None]
    atlas = alignment.atlas_mask_on(grid)
    if brain is None:
        fitted = alignment.atlas_mask_on(grid, found.atlas_from_grid).astype(np.float32)
        brain = alignment.to_scan(fitted, grid, transform, scan.data.shape, scan.affine) >= HALF
    data = scan.data
    if settings.n4:
        data = intensity.correct_bias(data, brain, scan.voxel_sizes)
    to_grid = functools.partial(
        alignment.to_grid, affine=scan.affine, scan_from_grid=transform, grid=grid
    )
    values, weight = _brain_means(data, brain, to_grid)
    mask = weight >= HALF
    image = intensity.normalize(values, mask)
    distance = math.nan
    if reference is not None:
        distance = intensity.histogram_distance(image, mask, reference)
        image = intensity.match_to_reference(image, mask, reference)
    if label is not None:
        label = to_grid(label, order=0)
    prepared = PreparedScan(
        image=image,
        mask=mask,
        label=label,
        scan_from_grid=transform,
        grid=grid,
        scan=scan,
        scan_mask=brain,
        mutual_information=found.mutual_information,
        atlas_overlap=2 * float(np.sum(mask & atlas)) / float(mask.sum() + atlas.sum()),
        histogram_distance=distance,
        warnings=[],
    )
    prepared.warnings.extend(_warnings(prepared, usual_information))
    return prepared


def _brain_means(volume, brain, resample):
    """(values, weight of the brain): averages over brain voxels only, so there is no dark rim."""
    weight, total = resample(brain.astype(np.float32)), resample(np.where(brain, volume, 0))
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0), weight


def to_scan_grid(grid_volume: np.ndarray, prepared: PreparedScan, *, order: int = 1) -> np.ndarray:
    """A volume on the MNI grid -> the scan file's own shape and orientation, for `save_like`.

    It is 0 outside the brain, and nothing outside the brain is read. `order` 1 is for images
    (float32), 0 for labels (type kept, bool as uint8).
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
    else:
        values, _ = _brain_means(grid_volume, prepared.mask, back)
    return scan.to_file_orientation(np.where(prepared.scan_mask, values, 0).astype(values.dtype))


def _warnings(prepared, usual_information):
    """What looks odd.

    The limits on mutual information come from five real scans. Skull-stripped ones reach 0.41 to
    0.57 nats when aligned, and 0.20 to 0.30 when turned upside down or back to front, which no
    rigid search recovers; the one with a skull 0.19, and 0.06 to 0.11.

    Their brain masks overlap with the atlas's by a Dice of 0.73 to 0.97 (lowest for small brains),
    four of them shifted by 40 mm by 0.51 to 0.56; upside down it is hardly less than aligned. Their
    histograms are 0.02 to 0.17 apart from each other and from phantoms', and 0.19 to 0.51 from
    those of the same scans with dark and bright exchanged.
    """
    if prepared.mutual_information < usual_information:  # never, if it is NaN
        yield (
            f"poor alignment to MNI (mutual information {prepared.mutual_information:.2f} nats, "
            f"usually above {usual_information:.2f}); look at the result, or give a brain mask."
        )
    if prepared.atlas_overlap < SMALLEST_OVERLAP:
        yield (
            f"the brain mask and the atlas's overlap little (Dice {prepared.atlas_overlap:.2f}, "
            f"usually above {SMALLEST_OVERLAP}): a wrong mask, a poor alignment or a part of a "
            "brain."
        )
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
    if prepared.histogram_distance > LARGEST_HISTOGRAM_DISTANCE:
        yield (
            f"unusual histogram: {prepared.histogram_distance:.2f} from the reference, usually "
            f"below {LARGEST_HISTOGRAM_DISTANCE}; is this a T2 scan, and the mask that of a brain?"
        )
