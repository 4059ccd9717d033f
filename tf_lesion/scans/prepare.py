"""One scan, from its file to aligned, masked, normalised slices, and back to its own grid."""

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from nibabel.affines import from_matvec
from scipy import ndimage

from tf_lesion.files import InputError
from tf_lesion.scans import ALIGN_MODES, MASK_MODES, alignment, brain_mask, intensity
from tf_lesion.scans.brain_mask import Brain
from tf_lesion.scans.confidence import LARGEST_DISAGREEMENT_MM, WHOLE_BRAIN, Confidence
from tf_lesion.scans.finder.find import FoundBrain, find
from tf_lesion.scans.volumes import MniGrid, Scan, ScanSource, load_labels, load_scan

HALF = 0.5  # a voxel is brain when half of it is
DEEP_MM, FAR_MM = 8.0, 10.0  # in the atlas's brain, or away from it, whatever the finder says
USUAL_BRAIN_LITERS = (0.7, 2.1)
LOST_SHARE = 0.02  # of the brain, outside the crop
SMALLEST_OVERLAP = 0.65  # Dice of the brain mask with the atlas's; see `_warnings`
LARGEST_HISTOGRAM_DISTANCE = 0.2  # normalized intensity; see `_warnings`
WHAT_TO_DO = (
    "Check the orientation in the file's header, give a brain mask, or go on all the same with "
    "--allow-poor-alignment."
)
THICKEST_MM = 3.5  # of a slice; lesions thinner than a slice are averaged away


@dataclass(frozen=True)
class ScanSettings:
    """How a scan is prepared; an `InputError` if a value is not one of those allowed."""

    voxel_size: float = 1.0  # mm, of the MNI grid
    align: str = "rigid"  # rigid, center, none
    mask: str = "auto"  # auto, nonzero, atlas; a mask file goes before it
    n4: bool = False  # bias correction
    allow_poor_alignment: bool = False  # go on where nobody knows whether it is right

    def __post_init__(self):
        MniGrid(self.voxel_size)
        for name, allowed in (("align", ALIGN_MODES), ("mask", MASK_MODES)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"Expected {name} to be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}."
                )

    def decisive(self) -> dict[str, Any]:
        """JSON-serializable; the settings that the prepared scan depends on."""
        settings = asdict(self)
        del settings["allow_poor_alignment"]
        return settings

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
    scan_from_grid: np.ndarray  # [4, 4], mm in MNI space -> mm of the scan (RAS); rigid
    scan_from_mni: np.ndarray  # the same with the scale of this brain, as it fits the atlas
    grid: MniGrid
    scan: Scan
    scan_mask: np.ndarray = field(repr=False)  # bool, the brain on the voxels of `scan.data`
    # float32 on the voxels of `scan.data`, the intensities of `image`, exactly 0 outside the brain
    normalized: np.ndarray = field(repr=False)
    quantiles: np.ndarray = field(repr=False)  # [1001] of the brain, normalized, before matching
    brain_kind: str  # how the mask was made: stripped, with skull, mask given, mask of the atlas
    confidence: Confidence
    atlas_overlap: float  # Dice of the brain mask with that of the atlas
    # Of the brain to the reference before matching, normalized intensity; NaN without a reference.
    histogram_distance: float
    warnings: list[str]  # sentences about what looks odd, for the user

    @functools.cached_property
    def brain_box(self) -> tuple[slice, slice, slice]:
        """The box of the voxels of `scan.data` that holds the brain."""
        return ndimage.find_objects(self.scan_mask.astype(np.uint8))[0]

    @functools.cached_property
    def weight_in_box(self) -> np.ndarray:
        """Share of `mask` at the voxels of the box, float32."""
        return self.to_brain_box(self.mask.astype(np.float32), order=1)

    def to_brain_box(self, grid_volume: np.ndarray, *, order: int) -> np.ndarray:
        """A volume on the MNI grid at the voxels of `brain_box`; see `alignment.to_scan`."""
        first = from_matvec(np.eye(3), [part.start for part in self.brain_box])
        shape = [part.stop - part.start for part in self.brain_box]
        return alignment.to_scan(
            grid_volume,
            self.grid,
            self.scan_from_grid,
            shape,
            self.scan.affine @ first,
            order=order,
        )

    @property
    def mutual_information(self) -> float:
        """Nats, of the alignment; NaN if there was none."""
        return self.confidence.mutual_information


class PoorAlignmentError(InputError):
    """The brain or its alignment is not to be trusted, for these reasons.

    `prepared` is what was made of the scan.
    """

    def __init__(self, prepared: PreparedScan, doubts: list[str]):
        super().__init__(f"{prepared.scan.name}: {'; '.join(doubts)}. {WHAT_TO_DO}")
        self.prepared, self.doubts = prepared, doubts


def prepare_scan(
    path: ScanSource,
    *,
    settings: ScanSettings,
    mask_path: ScanSource | None = None,
    label_path: ScanSource | None = None,
    reference: np.ndarray | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> PreparedScan:
    """Read, align, mask and normalise a scan.

    Steps: `load_scan`; brain and pose by the finder; rigid alignment to MNI; N4 if asked for; one
    linear interpolation onto the grid; min-max inside the brain; histogram matching.

    Args:
        path: T2 scan, a NIfTI file; this and the next two may be nibabel images as well.
        mask_path: brain mask on the scan's grid.
        label_path: segmentation on the scan's grid.
        reference: [Q] quantiles of the brain to match to; None leaves the histogram as it is.
        on_stage: called with "reading", "finding" (the brain) and "aligning" as these begin.

    Raises:
        FileNotFoundError, InputError: naming the file that cannot be used, and why.
        PoorAlignmentError: if brain and alignment are not to be trusted, unless that is allowed.
    """
    begin = on_stage or (lambda name: None)
    begin("reading")
    scan = load_scan(path)
    scan = replace(scan, data=intensity.from_background(scan.data))
    label = load_labels(label_path, scan) if label_path is not None else None
    found = None
    if settings.align == "rigid" or (mask_path is None and settings.mask != "nonzero"):
        begin("finding")
        found = find(scan.data, scan.affine)
    brain = brain_mask.brain_of(scan, found, mode=settings.mask, mask_path=mask_path)
    begin("aligning")
    try:
        prepared = _prepare(scan, found, brain, label, settings, reference)
    except InputError as error:
        raise InputError(f"{scan.name}: {error}") from error
    doubts = list(prepared.confidence.doubts())
    if doubts and not settings.allow_poor_alignment:
        raise PoorAlignmentError(prepared, doubts)
    prepared.warnings[:0] = [f"{doubt}; look at the result." for doubt in doubts]
    return prepared


def _prepare(scan, found, brain, label, settings, reference):
    grid = settings.grid
    placed, confidence = _align(scan, found, brain, settings)
    if settings.align == "rigid" and not any(confidence.doubts()):
        brain = brain_mask.within_bounds(
            brain, scan, placed.scan_from_mni, deep_mm=DEEP_MM, far_mm=FAR_MM
        )
    transform = placed.scan_from_grid
    atlas = alignment.atlas_mask_on(grid)
    data = scan.data
    if settings.n4:
        data = intensity.correct_bias(data, brain.mask, scan.voxel_sizes)
    to_grid = functools.partial(
        alignment.to_grid, affine=scan.affine, scan_from_grid=transform, grid=grid
    )
    values, weight = brain_means(data, brain.mask, to_grid)
    mask = weight >= HALF
    image = intensity.normalize(values, mask)
    quantiles = intensity.brain_quantiles(image, mask)
    distance = math.nan
    if reference is not None:
        distance = intensity.histogram_distance(image, mask, reference)
        image = intensity.match_to_reference(image, mask, reference)
    points = intensity.transfer(values, image, mask)
    if label is not None:
        label = to_grid(label, order=0)
    prepared = PreparedScan(
        image=image,
        mask=mask,
        label=label,
        scan_from_grid=transform,
        scan_from_mni=placed.scan_from_mni,
        grid=grid,
        scan=scan,
        scan_mask=brain.mask,
        normalized=intensity.transferred(data, brain.mask, points),
        quantiles=quantiles,
        brain_kind=brain.kind,
        confidence=confidence,
        atlas_overlap=2 * float(np.sum(mask & atlas)) / float(mask.sum() + atlas.sum()),
        histogram_distance=distance,
        warnings=[],
    )
    prepared.warnings.extend(_warnings(prepared))
    return prepared


def matched_again(
    prepared: PreparedScan, restored: np.ndarray, reference: np.ndarray
) -> PreparedScan:
    """The scan with the intensities that match its restored brain to the reference.

    Args:
        prepared: a scan that was matched as a whole.
        restored: [X, Y, Z] on its grid, restored from that.
        reference: [Q] quantiles of the brain to match to.
    """
    points = intensity.matching_of(restored, prepared.mask, reference)
    return replace(
        prepared,
        image=intensity.transferred(prepared.image, prepared.mask, points),
        normalized=intensity.transferred(prepared.normalized, prepared.scan_mask, points),
    )


def _align(scan: Scan, found: FoundBrain | None, brain: Brain, settings: ScanSettings):
    """(`Alignment`, `Confidence`) of a scan."""
    start = _start(scan, found, brain, settings)
    placed = alignment.Alignment(start, start)
    if settings.align == "rigid":
        size = settings.voxel_size
        placed = alignment.align(
            scan.data, scan.affine, brain=brain.mask, start=start, voxel_size=size
        )
    overlap, covered = alignment.agreement(brain.mask, scan.affine, placed.scan_from_mni)
    if settings.align == "rigid" and start is found.scan_from_mni:
        placed = alignment.towards(placed, found.scan_from_grid)
    return placed, Confidence(
        overlap=overlap if settings.align == "rigid" else math.nan,  # else nothing was fitted
        disagreement_mm=math.nan if found is None else found.disagreement_mm,
        mutual_information=placed.mutual_information,
        moved_mm=placed.moved_mm,
        covered=covered,
        rim_share=brain.rim_share,
    )


def _start(scan, found, brain, settings):
    """[4, 4] mm in MNI space -> mm of the scan, before the registration."""
    if settings.align == "none":
        return np.eye(4)
    if settings.align == "rigid" and found.disagreement_mm < LARGEST_DISAGREEMENT_MM:
        return found.scan_from_mni
    return alignment.center_start(brain.mask, scan.affine)


def brain_means(
    volume: np.ndarray, brain: np.ndarray, resample: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """(values, weight of the brain): averages over brain voxels only, so there is no dark rim."""
    weight, total = resample(brain.astype(np.float32)), resample(np.where(brain, volume, 0))
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0), weight


def to_scan_grid(grid_volume: np.ndarray, prepared: PreparedScan, *, order: int = 1) -> np.ndarray:
    """A volume on the MNI grid -> the scan file's own shape and orientation, for `save_like`.

    It is 0 outside the brain, and nothing outside the brain is read. `order` 1 is for images
    (float32), 0 for labels (type kept, bool as uint8).
    """
    scan, grid = prepared.scan, prepared.grid
    grid_volume = np.asarray(grid_volume)
    if grid_volume.shape != grid.shape:
        raise ValueError(f"Expected a volume of shape {grid.shape}, got {grid_volume.shape}.")
    if grid_volume.dtype == bool:
        grid_volume = grid_volume.astype(np.uint8)
    if order == 0:
        values = prepared.to_brain_box(grid_volume, order=0)
    else:
        total = prepared.to_brain_box(np.where(prepared.mask, grid_volume, 0), order=1)
        weight = prepared.weight_in_box
        values = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    whole = np.zeros(scan.data.shape, values.dtype)
    box = prepared.brain_box
    whole[box] = np.where(prepared.scan_mask[box], values, 0)
    return scan.to_file_orientation(whole)


def _warnings(prepared):
    """What looks odd, but is no reason to stop.

    Brain masks of five real scans overlap with the atlas's by a Dice of 0.73 to 0.97 (lowest for
    small brains), four of them shifted by 40 mm by 0.51 to 0.56. Their histograms are 0.02 to 0.17
    apart from each other and from phantoms', and 0.19 to 0.51 from those of the same scans with
    dark and bright exchanged.
    """
    yield from prepared.confidence.cautions()
    covered = prepared.confidence.covered
    if covered < WHOLE_BRAIN:
        yield (
            f"only about {covered:.0%} of a brain lie in the field of view; the alignment is as "
            "sure as that allows."
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
