"""A measured scan, and restored slices of a cache as such scans, one in memory at a time.

    residual    |observed - restored|
    score       the same post-processed, if that was asked for: `detection.postprocessing`
    intensity   the observed intensity: lesions are often bright on T2
    equalized   the same, histogram-equalized within each subject's brain

The last two need no model and are known to be hard to beat on bright lesions, so they stand beside
every result. The other source of scans, a folder of maps, is `evaluation.maps`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nibabel.affines import from_matvec
from skimage import exposure

from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import SliceCache
from tf_lesion.detection.postprocessing import (
    VOXEL_CENTER,
    HealthyMaps,
    Postprocessing,
    anomaly_score,
    axes_mm,
)
from tf_lesion.files import InputError

BASELINES = ("intensity", "equalized")
AVERAGES = ("seeds", "flip")  # post-processing that is done while restoring
LARGEST_SUBJECT = 256  # slices; a 1 mm MNI volume has 189, more are surely several subjects


class Mask(NamedTuple):
    """A detection: `score > threshold`, or the given voxels where it was made elsewhere."""

    name: str
    score: str
    threshold: float
    detected: np.ndarray | None = None  # [X, Y, Z] bool


@dataclass(frozen=True)
class LabeledScan:
    """One scan to be measured; only voxels of the brain count.

    Attributes:
        name: of the subject.
        affine: [4, 4] voxel -> mm, or None where the file does not say: no milliliters then.
        brain: [X, Y, Z] bool, the voxels that were restored.
        truth: [X, Y, Z] bool, lesion.
        scores: {name: [X, Y, Z] of 0 or more}, larger where a lesion is more likely.
        masks: detections at thresholds that do not come from the labels.
        whole: whether neighbors in the arrays are so in the scan; else no lesions are counted.
    """

    name: str
    affine: np.ndarray | None
    brain: np.ndarray
    truth: np.ndarray
    scores: Mapping[str, np.ndarray]
    masks: Sequence[Mask] = ()
    whole: bool = True


@dataclass(frozen=True)
class Scans:
    """Scans that are read again each time one goes over them."""

    number: int
    read: Callable[[], Iterator[LabeledScan]]

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[LabeledScan]:
        return self.read()


def equalized(observed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Intensity histogram-equalized in the brain, float32, 0 outside; any shape."""
    if not mask.any():
        return np.zeros_like(observed)
    return exposure.equalize_hist(observed, mask=mask).astype(np.float32) * mask


# Restored slices and their cache ----------------------------------------------------------------


@dataclass(frozen=True)
class SubjectSlices:
    """The slices of one subject, in axial order.

    Attributes:
        subject_id: name of the subject.
        rows: [n] rows in the cache.
        slice_index: [n] axial positions, -1 if unknown.
        observed: [n, H, W] float32, normalized intensity.
        restored: [n, H, W] float32.
        mask: [n, H, W] bool, brain.
        label: [n, H, W] bool, lesion; all false when labels were not asked for.
        variants: {name: what makes this score of the residual}.
        healthy: `HealthyMaps` [n, H, W] for them, or None.
        axes_mm: positions along x, y and z in the MNI grid for them, or None.
    """

    subject_id: str
    rows: np.ndarray
    slice_index: np.ndarray
    observed: np.ndarray
    restored: np.ndarray
    mask: np.ndarray
    label: np.ndarray
    variants: Mapping[str, Postprocessing]
    healthy: HealthyMaps | None = None
    axes_mm: tuple | None = None

    @property
    def truth(self) -> np.ndarray:
        """[n, H, W] bool, lesion inside the brain."""
        return self.label & self.mask

    def score(self, name: str) -> np.ndarray:
        """Anomaly score [n, H, W] float32, 0 outside the brain."""
        if name in self.variants:
            images, where = (self.observed, self.restored, self.mask), self.axes_mm
            settings = self.variants[name]
            return anomaly_score(*images, settings=settings, healthy=self.healthy, axes=where)
        if name == "equalized":
            return equalized(self.observed, self.mask)
        if name == "intensity":
            return np.maximum(self.observed, 0) * self.mask
        return np.abs(self.observed - self.restored) * self.mask


@dataclass(frozen=True)
class Cohort:
    """Restored slices and the cache they came from; read one subject at a time.

    Attributes:
        restored: path of the restored slices.
        cache: path of the cache.
        labels: path of a file with `Label`, when the cache has none.
        counts: slices per subject, when the cache does not say.
        crop: (x0, x1, y0, y1) that the slices were restored with, when not the cache's own.
        step: take the images kept after this many restoration steps, not the last ones.
        variants: {name: `Postprocessing`} of more scores of the residual; the averages of one that
            is called `score` must be those that the slices were restored with.
        healthy: `HealthyMaps` in blocks, for `normalize` or `relative`.
    """

    restored: Path
    cache: Path
    labels: Path | None = None
    counts: np.ndarray | None = None
    crop: tuple | None = None
    step: int | None = None
    variants: Mapping[str, Postprocessing] = field(default_factory=dict)
    healthy: HealthyMaps | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """How the slices were restored, and post-processed if they are."""
        with RestoredReader(self.restored) as reader:
            settings = dict(reader.settings)
        if "score" in self.variants:
            settings["postprocessing"] = str(self.variants["score"])
        return settings

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores there are."""
        return ("residual", *self.variants, *BASELINES)

    def positions_by_subject(self) -> list[tuple[int, np.ndarray]]:
        """[(subject index, positions in the restored file)], in order of the cache."""
        with RestoredReader(self.restored) as reader, self.open_cache() as cache:
            reader.check_cache(cache)
            rows = reader.rows
            subject, axial = cache.index.subject[rows], cache.index.slice_index[rows]
        order = np.lexsort((rows, axial, subject))
        starts = np.flatnonzero(np.diff(subject[order], prepend=-1))
        groups = np.split(order, starts[1:])
        largest = max(len(group) for group in groups)
        if largest > LARGEST_SUBJECT:
            raise InputError(
                f"{self.cache} does not say which of its slices belong to which subject (one has "
                f"{largest}); give the slices per subject (counts)."
            )
        return list(zip(subject[order][starts], groups, strict=True))

    def subjects(self, *, with_truth: bool = True) -> Iterator[SubjectSlices]:
        """Yield the `SubjectSlices` of each subject.

        Args:
            with_truth: read the labels too.

        Raises:
            InputError: if the two files do not belong together or labels are missing.
        """
        groups = self.positions_by_subject()
        self._check_averages()
        steps = self.variants.values()
        with RestoredReader(self.restored) as reader, self.open_cache() as cache:
            reader.check_cache(cache)  # it may have been replaced since
            if with_truth and not cache.has_label:
                raise InputError(
                    f"{self.labels or self.cache}: no dataset 'Label'; give the file that has the "
                    f"lesion labels (labels)."
                )
            for subject, positions in groups:
                rows = reader.rows[positions]
                axes = cache_axes_mm(cache, rows) if any(s.needs_axes for s in steps) else None
                images = self._read(reader, positions)
                mask = cache.mask(rows)[..., 0]
                yield SubjectSlices(
                    subject_id=cache.index.subject_ids[subject],
                    rows=rows,
                    slice_index=cache.index.slice_index[rows],
                    observed=cache.read(rows)[..., 0],
                    restored=self._finite(images[..., 0], rows),
                    mask=mask,
                    label=cache.label(rows)[..., 0] if with_truth else np.zeros_like(mask),
                    variants=self.variants,
                    healthy=self._healthy_maps(axes),
                    axes_mm=axes,
                )

    def open_cache(self) -> SliceCache:
        """The cache, an open `SliceCache`."""
        return SliceCache(
            self.cache, "Test", crop=self.crop, counts=self.counts, label_path=self.labels
        )

    def _check_averages(self):
        for name in AVERAGES if "score" in self.variants else ():
            wanted = getattr(self.variants["score"], name)
            used = self.settings.get(name, wanted)
            if used != wanted:
                raise InputError(
                    f"{self.restored} was restored with {name} {used}, the post-processing asks "
                    f"for {wanted}; restore the slices with the same steps."
                )

    def _healthy_maps(self, axes):
        if not any(steps.needs_healthy for steps in self.variants.values()):
            return None
        if self.healthy is None:
            raise InputError("normalize and relative need the healthy maps of a calibration.")
        return self.healthy.at(axes)

    def _read(self, reader, positions):
        if self.step is None:
            return reader.read(positions)
        if self.step not in reader.trajectory_steps:
            kept = ", ".join(map(str, reader.trajectory_steps)) or "none"
            raise InputError(
                f"{self.restored} does not hold the images after step {self.step}; it holds {kept}."
            )
        return reader.read(positions, f"Trajectory/{self.step}")

    def _finite(self, images, rows):
        bad = ~np.isfinite(images).all(axis=(1, 2))
        if bad.any():
            raise InputError(f"{self.restored}: slice of row {rows[bad][0]} is NaN or infinite.")
        return images


def from_cache(
    cohorts: Sequence[Cohort], *, points: Mapping[str, Sequence[Any]] | None = None
) -> Scans:
    """The subjects of one or several cohorts as `LabeledScan`s, in the given order.

    Args:
        cohorts: of restored slices.
        points: {score: [`calibration.Threshold`]} from healthy subjects.
    """
    masks = [
        Mask(point.name, score, point.threshold)
        for score, found in (points or {}).items()
        for point in found
    ]

    def read():
        for cohort in cohorts:
            with cohort.open_cache() as cache:
                affine, corner = cache.grid_affine, cache.crop[::2]
            for subject in cohort.subjects():
                yield _stacked(subject, cohort.scores, masks, affine, corner)

    return Scans(sum(len(cohort.positions_by_subject()) for cohort in cohorts), read)


def _stacked(subject, names, masks, affine, corner):
    """The `LabeledScan` of `SubjectSlices`: slices that are next to each other among the kept.

    With every n-th slice alone a voxel is n slices high. Where no such n is known, or other slices
    lack in between, neighbors in the arrays are none in the scan.
    """
    index = subject.slice_index
    steps = np.unique(np.diff(index)) if (index >= 0).all() else np.zeros(0)
    whole = len(index) == 1 or (len(steps) == 1 and steps[0] > 0)
    if affine is not None:
        height = steps[0] if whole and len(steps) else 1
        affine = affine @ from_matvec(np.diag([1, 1, height]), (*corner, index.min()))
    brain, truth = np.moveaxis(subject.mask, 0, -1), np.moveaxis(subject.label, 0, -1)
    scores = {name: np.moveaxis(subject.score(name), 0, -1) for name in names}
    return LabeledScan(subject.subject_id, affine, brain, truth, scores, masks, whole)


def largest_lesions(cohorts: Sequence[Cohort], number: int) -> dict[str, np.ndarray]:
    """The slices of the paper's pictures: the largest lesion of each subject, of those the largest.

    Returns:
        titles [n]; observed, restored, residual and truth [n, H, W].
    """
    kept = []
    plain = [replace(cohort, variants={}) for cohort in cohorts]
    for subject in (subject for cohort in plain for subject in cohort.subjects()):
        areas = subject.truth.sum(axis=(1, 2))
        best = int(np.argmax(areas))
        title = f"{subject.subject_id}\nslice {subject.slice_index[best]}"
        images = (subject.observed, subject.restored, subject.score("residual"), subject.truth)
        kept.append((areas[best], title, *(image[best].copy() for image in images)))
        kept = sorted(kept, key=lambda case: -case[0])[:number]
    names = ("titles", "observed", "restored", "residual", "truth")
    return dict(zip(names, map(np.stack, list(zip(*kept, strict=True))[1:]), strict=True))


def cache_axes_mm(cache: SliceCache, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Positions of some slices' voxels along x, y and z in the MNI grid, mm from its corner.

    Raises:
        InputError: if the cache does not say where its slices lie.
    """
    index = cache.index.slice_index[rows]
    if cache.grid_affine is None or (index < 0).any():
        raise InputError(
            f"{cache.path} does not say where its slices lie in MNI space; make it with "
            f"preprocessing.camcan or preprocessing.brats."
        )
    x, y = axes_mm(cache.shape, float(cache.grid_affine[0, 0]), corner=cache.crop[::2])
    return x, y, (index + VOXEL_CENTER) * float(cache.grid_affine[2, 2])
