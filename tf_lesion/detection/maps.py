"""Detect in one scan: maps on the scan's own grid, and what a reader must know about them."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd

from tf_lesion.caches.slices import BRAIN_FLOOR
from tf_lesion.calibration.file import Threshold
from tf_lesion.config import AUTO, RestorationConfig
from tf_lesion.detection import facts
from tf_lesion.detection.layout import layout_of, one_scan, save_maps, told_of
from tf_lesion.detection.lesions import label_lesions
from tf_lesion.detection.postprocessing import Postprocessing, anomaly_score, axes_mm
from tf_lesion.detection.progress import Progress
from tf_lesion.detection.settings import (
    aligned_otherwise,
    crop_of,
    healthy_maps,
    own_points,
    postprocessing_of,
    scan_settings,
)
from tf_lesion.detection.table import COLUMNS, lesion_table
from tf_lesion.files import InputError
from tf_lesion.provenance import stamp
from tf_lesion.scans.prepare import PreparedScan, matched_again, prepare_scan, to_scan_grid
from tf_lesion.scans.volumes import ScanSource, image_like

# Change in normalized intensity; where it is larger, fine detail goes too. By eye, on one glioma.
DETAIL_UNTIL = np.float32(0.05)
# How often the histogram is matched without what a restoration takes out, and by every how many
# slices. Chosen on 29 synthetic patients: see the model card.
MATCHINGS, MATCHING_STEP = 2, 4
UNNAMED = "scan"  # the files of an image in memory


@dataclass(frozen=True)
class ScanMaps:
    """What was found in one scan.

    Attributes:
        prepared: the `PreparedScan`.
        volumes: {name: array} on the scan file's own grid. Float32, normalized intensity:
            `normalized` (what was observed), `restored`, `residual`, `uncertainty` (standard
            deviation over the restorations, if there are several), `score` (in its own unit, if
            there is post-processing). Uint8: `brain`, and a mask for each threshold (`fpr_0.05`).
            Unsigned integers: the lesions of each mask, numbered (`labels_fpr_0.05`).
        lesions: one row a lesion and threshold, see `detection.table.lesion_table`.
        facts: JSON-serializable; what `restoration.json` says.
        points: {name: `Threshold`} of the masks.
    """

    prepared: PreparedScan = field(repr=False)
    volumes: dict[str, np.ndarray] = field(repr=False)
    lesions: pd.DataFrame = field(repr=False)
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
        """|observed - restored| on the model's grid, normalized intensity."""
        return self.image("residual")

    @property
    def score(self) -> nib.Nifti1Image | None:
        """The post-processed residual, or None without post-processing."""
        return self.image("score") if "score" in self.volumes else None

    @property
    def normalized(self) -> nib.Nifti1Image:
        """The scan as the model saw it, normalized intensity, 0 outside the brain."""
        return self.image("normalized")

    @property
    def masks(self) -> dict[str, nib.Nifti1Image]:
        """{"fpr_0.05": lesions above the threshold that 5 % of healthy voxels exceed}."""
        return {name: self.image(name) for name in self.points}

    def save(self, folder: str | Path, *, force: bool = False) -> dict[str, Any]:
        """Write all of it into a folder, under the name of the scan; returns the facts."""
        subject = one_scan(self.prepared.scan.path or UNNAMED)
        return save_maps(self, subject, layout_of(subject, folder), force=force)


class RestoredVolume(NamedTuple):
    """A scan restored on the grid, [X, Y, Z]; see `restoration.Restored` for the spread."""

    image: np.ndarray
    spread: np.ndarray
    slices: np.ndarray  # [n] indices of the restored axial slices


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
        matches_again: whether scans are matched to the reference without what is taken out.

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
        self.matches_again = prior.reference is not None and restoration.keeps_healthy
        self.described = {
            **described,
            "matched_again": self.matches_again,
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
        scored = ("score",) if self._scored else ()
        repeated = ("uncertainty",) if self._repeats > 1 else ()
        labels = (f"labels_{name}" for name in self.points)
        first = ("restored", "residual", *scored, *repeated, "normalized", "brain")
        return (*first, *self.points, *labels)

    @property
    def thresholded(self) -> str:
        """The map that the masks are made from: `score`, or `residual` without post-processing."""
        return "score" if self._scored else "residual"

    @property
    def _scored(self):
        return self.postprocessing != Postprocessing()

    @property
    def _repeats(self):
        return self._restorer.restoration.repeats

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
        restored = self.restore_volume(prepared, progress)
        if progress is not None:
            progress.stage("writing")  # from here to the last file
        volumes = self._images(prepared, restored)
        seen = self._seen(prepared)
        tables = [pd.DataFrame(columns=COLUMNS)]
        for name, point in self.points.items():
            above = volumes[self.thresholded] > np.float64(point.threshold)
            volumes[name] = above.astype(np.uint8)
            numbers = label_lesions(above, prepared.scan.file_affine)
            volumes[f"labels_{name}"] = numbers
            tables.append(self._lesions(numbers, volumes, seen, prepared, point))
        lesions = pd.concat([t for t in tables if len(t)] or tables[:1], ignore_index=True)
        told = {**told_of("brain_mask", mask), **self._facts(prepared, restored, seen, lesions)}
        ordered = {name: volumes[name] for name in self.volume_names}
        return ScanMaps(prepared, ordered, lesions, told, self.points)

    def _images(self, prepared, restored):
        """The images of the scan on its own grid.

        What is finer than the model's grid stays in the restored image as far as the model left its
        place as it was; in the residual there is what the model changed.
        """
        changed = restored.image - prepared.image
        change, healthy, residual = (
            to_scan_grid(volume, prepared)
            for volume in (changed, restored.image, np.abs(changed) * prepared.mask)
        )
        to_file = prepared.scan.to_file_orientation
        brain, normalized = to_file(prepared.scan_mask), to_file(prepared.normalized)
        kept = np.exp(-np.square(change / DETAIL_UNTIL))
        healthy += kept * (normalized - (healthy - change))
        healthy = np.where(brain, np.maximum(healthy, np.float32(BRAIN_FLOOR)), np.float32(0))
        images = {"brain": brain.astype(np.uint8), "normalized": normalized}
        images |= {"restored": healthy, "residual": residual}
        if self._repeats > 1:
            images["uncertainty"] = to_scan_grid(restored.spread, prepared)
        if self._scored:
            images["score"] = to_scan_grid(self.score_volume(prepared, restored.image), prepared)
        return images

    def _lesions(self, numbers, volumes, seen, prepared, point):
        return lesion_table(
            numbers,
            score=volumes[self.thresholded],
            residual=volumes["residual"],
            seen=seen,
            affine=prepared.scan.file_affine,
            scan_from_mni=prepared.scan_from_mni,
            target_fpr=point.target_fpr,
        )

    def prepare(
        self,
        scan: ScanSource,
        *,
        mask: ScanSource | None = None,
        label: ScanSource | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> PreparedScan:
        """The `PreparedScan` of a scan, as it is restored; errors as of `detect`.

        A lesion takes part in the histogram that is matched, and so dims itself and moves the rest.
        Where restoring leaves healthy tissue as it is, the restored brain is matched in its place.
        """
        reference = self.prior.reference
        prepared = prepare_scan(
            scan,
            settings=self.scan_settings,
            mask_path=mask,
            label_path=label,
            reference=reference,
            on_stage=on_stage,
        )
        if not self.matches_again:
            return prepared
        slices = self._slices(prepared, max(self.slice_step, MATCHING_STEP))
        for _ in range(MATCHINGS):
            restored = self._restored(prepared, slices)
            prepared = matched_again(prepared, restored.image, reference)
        return prepared

    def restore_volume(
        self, prepared: PreparedScan, progress: Progress | None = None
    ) -> RestoredVolume:
        """Restore the axial slices with brain of a `PreparedScan`.

        The change of slices left out is interpolated from their neighbors; outside the crop the
        volume is the observed one.
        """
        slices = self._slices(prepared, self.slice_step)
        ascent = self._restorer.restoration
        with _shown(progress, len(slices) * ascent.steps * ascent.repeats) as advance:
            return self._restored(prepared, slices, advance)

    def _slices(self, prepared, step):
        """[n], every so many of the axial slices with brain inside the window."""
        inside = prepared.mask[crop_of(self.prior, prepared.grid)].any(axis=(0, 1))
        if not inside.any():
            raise InputError(
                f"{prepared.scan.name}: expected brain inside the model's window, found none; is "
                "it aligned? Try align rigid."
            )
        return np.flatnonzero(inside)[::step]

    def _restored(self, prepared, slices, advance=None):
        """The `RestoredVolume` of these slices; `advance` is told the steps taken."""
        from tf_lesion.restoration import restore

        window = crop_of(self.prior, prepared.grid)
        observed = np.moveaxis(prepared.image[window], 2, 0)[..., None]
        mask = np.moveaxis(prepared.mask[window], 2, 0)[..., None]
        change, spread = np.zeros((2, len(slices), *observed.shape[1:3]), np.float32)
        for start in range(0, len(slices), self.batch_size):
            part = slice(start, start + self.batch_size)
            chosen = slices[part]
            restored = restore(
                self._restorer, observed[chosen], mask[chosen], chosen, on_progress=advance
            )
            change[part] = (restored.images - observed[chosen])[..., 0]
            spread[part] = restored.spread[..., 0]
        volume, uncertain = prepared.image.copy(), np.zeros_like(prepared.image)
        volume[window] += _between(change, slices, len(mask)) * prepared.mask[window]
        uncertain[window] = _between(spread, slices, len(mask)) * prepared.mask[window]
        return RestoredVolume(volume, uncertain, slices)

    def score_volume(self, prepared: PreparedScan, restored: np.ndarray) -> np.ndarray:
        """The post-processed anomaly score [X, Y, Z] on the grid."""
        images = (prepared.image, restored, self._examined(prepared))
        settings, healthy = self.postprocessing, None
        axes = axes_mm(prepared.grid.shape, prepared.grid.voxel_size)
        if settings.needs_healthy:
            healthy = healthy_maps(self.prior).at(axes)
        slices = (np.moveaxis(volume, 2, 0) for volume in images)
        score = anomaly_score(*slices, settings=settings, healthy=healthy, axes=axes)
        return np.moveaxis(score, 0, 2)

    def _facts(self, prepared, restored, seen, lesions):
        told = facts.preparation_facts(prepared, seen)
        warnings = facts.warnings_of(
            prepared, told["examined_fraction"], matched=self.prior.reference is not None
        )
        warnings += aligned_otherwise(self.prior, self.scan_settings)
        of, unit = self.thresholded, self.postprocessing.unit
        return {
            **stamp(),
            **told_of("input", prepared.scan.source),
            **({} if prepared.scan.series is None else {"series": prepared.scan.series.facts()}),
            **self.described,
            **told,
            "slices_restored": len(restored.slices),
            "lesions": facts.lesion_facts(lesions, self.points, of=of, unit=unit),
            "warnings": warnings,
            "qc": facts.verdict(warnings),
        }

    def _seen(self, prepared):
        """Uint8 in the file's shape: brain that was inside the model's window."""
        return to_scan_grid(self._examined(prepared), prepared, order=0)

    def _examined(self, prepared):
        """[X, Y, Z] bool on the grid, the same."""
        window = crop_of(self.prior, prepared.grid)
        examined = np.zeros_like(prepared.mask)
        examined[window] = prepared.mask[window]
        return examined


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


def _between(change, slices, count):
    """Changes [n, H, W] of some axial slices -> [H, W, count], linear in between."""
    from scipy.interpolate import interp1d

    if len(slices) == 1:
        return np.repeat(change[0][..., None], count, axis=2)
    ends = (change[0], change[-1])
    line = interp1d(slices, change, axis=0, bounds_error=False, fill_value=ends)
    return np.moveaxis(line(np.arange(count)).astype(np.float32), 0, 2)
