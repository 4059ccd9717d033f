"""Detect in one scan: maps on the scan's own grid, and what a reader must know about them."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from tf_lesion.calibration.file import Threshold
from tf_lesion.config import AUTO, RestorationConfig
from tf_lesion.detection.layout import layout_of, one_scan, save_maps, told_of
from tf_lesion.detection.lesions import find_lesions
from tf_lesion.detection.postprocessing import Postprocessing, anomaly_score, axes_mm
from tf_lesion.detection.progress import Progress
from tf_lesion.files import InputError
from tf_lesion.provenance import stamp
from tf_lesion.scans.prepare import PreparedScan, ScanSettings, prepare_scan, to_scan_grid
from tf_lesion.scans.volumes import MniGrid, ScanSource, image_like

NO_REFERENCE = "no reference histogram comes with this model: intensities not matched."
SEEN_SHARE = 0.95  # of the brain; below it a warning says so
DIGITS = 3  # of milliliters and millimeters
UNNAMED = "scan"  # the files of an image in memory


@dataclass(frozen=True)
class ScanMaps:
    """What was found in one scan.

    Attributes:
        prepared: the `PreparedScan`.
        volumes: {name: array} on the scan file's own grid: `restored` and `residual` float32,
            normalized intensity, `score` float32 if there is post-processing, and one uint8 mask
            for each threshold (`fpr_0.05`).
        facts: JSON-serializable; what `restoration.json` says.
        points: {name: `Threshold`} of the masks.
    """

    prepared: PreparedScan = field(repr=False)
    volumes: dict[str, np.ndarray] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)
    points: dict[str, Threshold]

    def image(self, name: str) -> nib.Nifti1Image:
        """A volume as a nibabel image with the scan's affine, as it is written."""
        return image_like(self.prepared.scan, self.volumes[name])

    @property
    def restored(self) -> nib.Nifti1Image:
        """The restored brain, normalized intensity, 0 outside the brain."""
        return self.image("restored")

    @property
    def residual(self) -> nib.Nifti1Image:
        """|observed - restored|, normalized intensity."""
        return self.image("residual")

    @property
    def score(self) -> nib.Nifti1Image | None:
        """The post-processed residual, or None without post-processing."""
        return self.image("score") if "score" in self.volumes else None

    @property
    def masks(self) -> dict[str, nib.Nifti1Image]:
        """{"fpr_0.05": lesions above the threshold that 5 % of healthy voxels exceed}."""
        return {name: self.image(name) for name in self.points}

    def save(self, folder: str | Path, *, force: bool = False) -> dict[str, Any]:
        """Write all of it into a folder, under the name of the scan; returns the facts."""
        subject = one_scan(self.prepared.scan.path or UNNAMED)
        return save_maps(self, subject, layout_of(subject, folder), force=force)


class Detector:
    """A prior, set up once for any number of scans.

    Args:
        prior: `Prior`.
        restoration: `RestorationConfig`; that of the calibration by default.
        postprocess: steps that make the `score`; "auto" for the calibration's own, "" or "none"
            for none.
        points: thresholds of the score, or of the residual where there is no post-processing; by
            default those of the calibration, if they hold for this restoration.
        align: "rigid", "center" or "none"; by default as the training scans.
        allow_poor_alignment: go on with a scan whose brain or alignment is not to be trusted.
        seed: of the noise.
        batch_size: slices at once; it changes speed and memory, not the maps.
        slice_step: restore every n-th axial slice and interpolate the change in between.

    Attributes:
        described: JSON-serializable; what decides the maps.
        unfit: why the calibration's thresholds do not hold, "" if they do.

    Raises:
        InputError: if a value makes no sense.
    """

    def __init__(
        self,
        prior: Any,
        restoration: RestorationConfig | None = None,
        *,
        postprocess: str = AUTO,
        points: Sequence[Threshold] | None = None,
        align: str | None = None,
        allow_poor_alignment: bool = False,
        seed: int = 0,
        batch_size: int = 16,
        slice_step: int = 1,
    ):
        for name, value in (("batch_size", batch_size), ("slice_step", slice_step)):
            if value < 1:
                raise InputError(f"Expected {name} of 1 or more, got {value}.")
        self.prior, self.batch_size, self.slice_step = prior, batch_size, slice_step
        self.postprocessing = postprocessing_of(prior, postprocess)
        self.scan_settings = replace(
            scan_settings(prior, align=align), allow_poor_alignment=allow_poor_alignment
        )
        restoration = self.postprocessing.restoration(restoration or prior.calibrated())
        described, self.unfit = prior.describe(restoration, seed=seed), ""
        if points is None:
            points, self.unfit = own_points(prior, described, self.postprocessing)
        self.points = {point.key: point for point in points}
        self._restorer = prior.restorer(restoration, seed=seed)
        self.described = {
            **described,
            "slice_step": slice_step,
            "postprocessing": str(self.postprocessing),
            "scan_settings": self.scan_settings.decisive(),
            "training_cache_identity": prior.data.get("cache_identity"),
            "calibration_cache_identity": getattr(prior.calibration, "cache_identity", None),
            "points": {name: point.known() for name, point in self.points.items()},
        }

    @property
    def volume_names(self) -> tuple[str, ...]:
        """Names of the maps of every scan."""
        score = ("score",) if self._scored else ()
        return ("restored", "residual", *score, *self.points)

    @property
    def thresholded(self) -> str:
        """The map that the masks are made from: `score`, or `residual` without post-processing."""
        return "score" if self._scored else "residual"

    @property
    def _scored(self):
        return self.postprocessing != Postprocessing()

    def detect(
        self,
        scan: ScanSource,
        *,
        mask: ScanSource | None = None,
        progress: Progress | None = None,
    ) -> ScanMaps:
        """The `ScanMaps` of a scan, a path or a nibabel image, optionally with its brain mask.

        `progress` is told the stages; without one, a bar shows the restoration.

        Raises:
            FileNotFoundError, InputError: if the scan cannot be used, or its restoration diverges;
                `PoorAlignmentError` if its brain or alignment is not to be trusted.
        """
        prepared = self.prepare(scan, mask=mask, on_stage=progress and progress.stage)
        restored, slices = self.restore_volume(prepared, progress)
        if progress is not None:
            progress.stage("writing")  # from here to the last file
        residual = np.abs(prepared.image - restored) * prepared.mask
        volumes = {"restored": restored, "residual": residual}
        if self._scored:
            volumes["score"] = self.score_volume(prepared, restored)
        volumes = {name: to_scan_grid(volume, prepared) for name, volume in volumes.items()}
        for name, point in self.points.items():
            above = volumes[self.thresholded] > np.float64(point.threshold)
            volumes[name] = above.astype(np.uint8)
        facts = {**told_of("brain_mask", mask), **self._facts(prepared, volumes, slices)}
        return ScanMaps(prepared, volumes, facts, self.points)

    def prepare(
        self,
        scan: ScanSource,
        *,
        mask: ScanSource | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> PreparedScan:
        """The `PreparedScan` of a scan, as it is restored; errors as of `detect`."""
        return prepare_scan(
            scan,
            settings=self.scan_settings,
            mask_path=mask,
            reference=self.prior.reference,
            on_stage=on_stage,
        )

    def restore_volume(
        self, prepared: PreparedScan, progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Restore the axial slices with brain of a `PreparedScan`.

        Returns:
            (volume [X, Y, Z] on the grid, indices of the restored slices). The change of slices
            left out is interpolated from their neighbors; outside the crop it is the observed
            volume.
        """
        from tf_lesion.restoration import restore

        window = crop_of(self.prior, prepared.grid)
        observed = np.moveaxis(prepared.image[window], 2, 0)[..., None]
        mask = np.moveaxis(prepared.mask[window], 2, 0)[..., None]
        slices = np.flatnonzero(mask.any(axis=(1, 2, 3)))[:: self.slice_step]
        if slices.size == 0:
            raise InputError(
                f"{prepared.scan.name}: expected brain inside the model's window, found none; is "
                "it aligned? Try align rigid."
            )
        change = np.zeros((len(slices), *observed.shape[1:3]), np.float32)
        ascent = self._restorer.restoration
        total = len(slices) * ascent.steps * ascent.repeats
        with _shown(progress, total) as advance:
            for start in range(0, len(slices), self.batch_size):
                part = slice(start, start + self.batch_size)
                chosen = slices[part]
                restored, _ = restore(
                    self._restorer,
                    observed[chosen],
                    mask[chosen],
                    chosen,
                    on_progress=advance,
                )
                change[part] = (restored - observed[chosen])[..., 0]
        volume = prepared.image.copy()
        volume[window] += _between(change, slices, len(mask)) * prepared.mask[window]
        return volume, slices

    def score_volume(self, prepared: PreparedScan, restored: np.ndarray) -> np.ndarray:
        """The post-processed anomaly score [X, Y, Z] on the grid."""
        images = (prepared.image, restored, prepared.mask)
        settings, healthy = self.postprocessing, None
        axes = axes_mm(prepared.grid.shape, prepared.grid.voxel_size)
        if settings.needs_healthy:
            healthy = _healthy_maps(self.prior).at(axes)
        slices = (np.moveaxis(volume, 2, 0) for volume in images)
        score = anomaly_score(*slices, settings=settings, healthy=healthy, axes=axes)
        return np.moveaxis(score, 0, 2)

    def _facts(self, prepared, volumes, slices):
        seen = self._seen(prepared)
        brain_ml = _milliliters(prepared.scan_mask, prepared.scan)
        examined = _milliliters(seen, prepared.scan) / brain_ml
        warnings = [*prepared.scan.warnings, *prepared.warnings]
        if self.prior.reference is None:
            warnings.append(NO_REFERENCE)
        if examined < SEEN_SHARE:
            warnings.append(f"only {examined:.0%} of the brain were examined.")
        return {
            **stamp(),
            **told_of("input", prepared.scan.source),
            **({} if prepared.scan.series is None else {"series": prepared.scan.series.facts()}),
            **self.described,
            "scan": _scan_facts(prepared.scan),
            "scan_from_grid": prepared.scan_from_grid.tolist(),
            "brain_ml": brain_ml,
            "examined_fraction": examined,
            "slices_restored": len(slices),
            "mutual_information": _number(prepared.mutual_information),
            "brain": {"kind": prepared.brain_kind, **prepared.confidence.facts()},
            "atlas_overlap": prepared.atlas_overlap,
            "histogram_distance": _number(prepared.histogram_distance),
            "lesions": {
                name: self._lesion_facts(name, volumes, prepared.scan) for name in self.points
            },
            "warnings": warnings,
        }

    def _seen(self, prepared):
        """[x, y, z] bool on `scan.data`: brain that was inside the model's window."""
        window = crop_of(self.prior, prepared.grid)
        seen = np.zeros_like(prepared.mask)
        seen[window] = prepared.mask[window]
        return to_scan_grid(seen, prepared, order=0) > 0

    def _lesion_facts(self, name, volumes, scan):
        found = find_lesions(volumes[name], volumes["residual"], scan.file_affine)
        largest = found[0] if found else None
        point = self.points[name]
        return {
            "of": self.thresholded,
            "unit": self.postprocessing.unit,
            "threshold": point.threshold,
            "target_fpr": point.target_fpr,
            "healthy_fpr": point.fpr,
            **point.left_out(),
            "volume_ml": _rounded(sum(lesion.volume_ml for lesion in found)),
            "count": len(found),
            "largest_ml": _rounded(largest.volume_ml) if largest else 0.0,
            "largest_center_mm": [_rounded(mm) for mm in largest.center_mm] if largest else None,
        }


@contextlib.contextmanager
def _shown(progress, total):
    """What is to be called as the restoration goes on."""
    from tqdm import tqdm

    if progress is not None:
        progress.stage("restoring", total)
        yield progress.advance
        return
    with tqdm(total=total, desc="restoring", unit="slice-step") as bar:
        yield bar.update


def postprocessing_of(prior: Any, steps: str) -> Postprocessing:
    """The `Postprocessing` of a text; "auto" is the calibration's own, if there is one."""
    if steps != AUTO:
        return Postprocessing.parse(steps)
    return Postprocessing() if prior.calibration is None else prior.calibration.steps()


def own_points(
    prior: Any, described: dict[str, Any], processing: Postprocessing
) -> tuple[tuple[Threshold, ...], str]:
    """Thresholds of the prior's calibration, and why there are none ("" if there are).

    Args:
        prior: `Prior`.
        described: how scans will be restored.
        processing: steps of the score; without any, thresholds are those of the residual.
    """
    if prior.calibration is None:
        return (), f"{prior.path} has no calibration; make one with tf-lesion calibrate."
    score = "score" if str(processing) else "residual"
    try:
        return prior.calibration.thresholds(
            score, restoration=described, postprocessing=str(processing)
        ), ""
    except InputError as error:
        return (), str(error)


def _healthy_maps(prior):
    if prior.calibration is None or prior.calibration.healthy is None:
        raise InputError(
            f"Expected healthy maps with {prior.path} for normalize or relative; make them with "
            f"tf-lesion calibrate."
        )
    return prior.calibration.healthy


def scan_settings(prior: Any, *, align: str | None = None) -> ScanSettings:
    """`ScanSettings` of the training cache; those of the released code where the run has none."""
    stored = dict(prior.data.get("preprocessing", {}).get("scan", {}))
    stored["align"] = align or stored.get("align", "rigid")
    return ScanSettings(**stored)


def crop_of(prior: Any, grid: MniGrid) -> tuple[slice, slice]:
    """The window (x, y) of the grid's slices that the model was trained on.

    Raises:
        InputError: if the grid's is of another size than the model's slices.
    """
    network = prior.config.network
    x0, x1, y0, y1 = prior.data.get("crop", grid.crop)
    if (x1 - x0, y1 - y0) != (network.height, network.width):
        raise InputError(
            f"{prior.path} restores {network.height} x {network.width} slices, the grid of "
            f"{grid.voxel_size:g} mm is cropped to {x1 - x0} x {y1 - y0}."
        )
    return slice(x0, x1), slice(y0, y1)


def _between(change, slices, count):
    """Changes [n, H, W] of some axial slices -> [H, W, count], linear in between."""
    from scipy.interpolate import interp1d

    if len(slices) == 1:
        return np.repeat(change[0][..., None], count, axis=2)
    ends = (change[0], change[-1])
    line = interp1d(slices, change, axis=0, bounds_error=False, fill_value=ends)
    return np.moveaxis(line(np.arange(count)).astype(np.float32), 0, 2)


def _scan_facts(scan):
    from nibabel import aff2axcodes

    return {
        "shape": list(scan.file_shape),
        "voxel_sizes_mm": [round(float(size), 4) for size in scan.voxel_sizes],
        "orientation": "".join(aff2axcodes(scan.file_affine)),
        "orientation_from": scan.placed_by,
    }


def _milliliters(mask, scan):
    return float(np.count_nonzero(mask)) * abs(np.linalg.det(scan.affine[:3, :3])) / 1e3


def _rounded(value):
    return round(value, DIGITS)


def _number(value):
    return None if math.isnan(value) else value
