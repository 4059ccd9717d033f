"""Anomaly scores of a cohort, subject by subject: the residual and two baselines.

    residual    |observed - restored|
    score       the same post-processed, if that was asked for: see `eval.postprocessing`
    intensity   the observed intensity: lesions are often bright on T2
    equalized   the same, histogram-equalised within each subject's brain

The baselines need no model and are known to be hard to beat on bright lesions, so they
stand beside every result.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
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

SCORES = ("residual", "intensity", "equalized")
AVERAGES = ("seeds", "flip")  # post-processing that is done while restoring
LARGEST_SUBJECT = 256  # slices; a 1 mm MNI volume has 189, more are surely several subjects


@dataclass(frozen=True)
class SubjectScores:
    """The slices of one subject, in axial order.

    Attributes:
        subject_id: name of the subject.
        rows: [n] rows in the cache.
        slice_index: [n] axial positions, -1 if unknown.
        observed: [n, H, W] float32, normalized intensity.
        restored: [n, H, W] float32.
        mask: [n, H, W] bool, brain.
        truth: [n, H, W] bool, lesion inside the brain; all false when labels were not asked for.
        postprocessing: what makes `score`, or None.
        healthy: `HealthyMaps` [n, H, W] for it, or None.
        axes_mm: positions along x, y and z in the MNI grid for it, or None.
    """

    subject_id: str
    rows: np.ndarray
    slice_index: np.ndarray
    observed: np.ndarray
    restored: np.ndarray
    mask: np.ndarray
    truth: np.ndarray
    postprocessing: Postprocessing | None = None
    healthy: HealthyMaps | None = None
    axes_mm: tuple | None = None

    def score(self, name):
        """Anomaly score [n, H, W] float32, 0 outside the brain."""
        return {
            "residual": self._residual,
            "score": self._score,
            "intensity": self._intensity,
            "equalized": self._equalized,
        }[name]()

    def _residual(self):
        return np.abs(self.observed - self.restored) * self.mask

    def _score(self):
        return self.processed(self.postprocessing)

    def processed(self, settings):
        """Score [n, H, W] after the steps of a `Postprocessing`."""
        images = (self.observed, self.restored, self.mask)
        return anomaly_score(*images, settings=settings, healthy=self.healthy, axes=self.axes_mm)

    def _intensity(self):
        return np.maximum(self.observed, 0) * self.mask

    def _equalized(self):
        return equalized(self.observed, self.mask)


def equalized(observed, mask):
    """Intensity histogram-equalized in the brain, float32, 0 outside; any shape."""
    if not mask.any():
        return np.zeros_like(observed)
    return exposure.equalize_hist(observed, mask=mask).astype(np.float32) * mask


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
        postprocessing: `Postprocessing`, for a `score` beside the others.
        healthy: `HealthyMaps` in blocks, for its `normalize` or `relative`.
    """

    restored: Path
    cache: Path
    labels: Path | None = None
    counts: np.ndarray | None = None
    crop: tuple | None = None
    step: int | None = None
    postprocessing: Postprocessing | None = None
    healthy: HealthyMaps | None = None

    @property
    def settings(self):
        """How the slices were restored, and post-processed if they are."""
        with RestoredReader(self.restored) as reader:
            settings = reader.settings
        return settings | ({"postprocessing": str(self.postprocessing)} if self._processed else {})

    @property
    def scores(self):
        """Names of the scores there are."""
        return (*SCORES[:1], "score", *SCORES[1:]) if self._processed else SCORES

    @property
    def _processed(self):
        return self.postprocessing is not None

    def positions_by_subject(self):
        """[(subject index, positions in the restored file)], in order of the cache."""
        with RestoredReader(self.restored) as reader, self.open_cache() as cache:
            reader.check_cache(cache)
            rows = reader.rows
            subject, axial = cache.index.subject[rows], cache.index.slice_index[rows]
        order = np.lexsort((rows, axial, subject))
        starts = np.flatnonzero(np.diff(subject[order], prepend=-1))
        groups = np.split(order, starts[1:])
        self._check_subject_sizes(groups)
        return list(zip(subject[order][starts], groups, strict=True))

    def subjects(self, *, with_truth=True):
        """Yield the `SubjectScores` of each subject.

        Args:
            with_truth: read the labels too.

        Raises:
            InputError: if the two files do not belong together or labels are missing.
        """
        groups = self.positions_by_subject()
        self._check_averages()
        with RestoredReader(self.restored) as reader, self.open_cache() as cache:
            self._check_labels(cache, with_truth)
            for subject, positions in groups:
                rows = reader.rows[positions]
                axes = self._axes(cache, rows)
                images = self._read(reader, positions)
                mask = cache.mask(rows)[..., 0]
                yield SubjectScores(
                    subject_id=cache.index.subject_ids[subject],
                    rows=rows,
                    slice_index=cache.index.slice_index[rows],
                    observed=cache.read(rows)[..., 0],
                    restored=self._finite(images[..., 0], rows),
                    mask=mask,
                    truth=cache.label(rows)[..., 0] & mask if with_truth else np.zeros_like(mask),
                    postprocessing=self.postprocessing,
                    healthy=self._healthy_maps(axes),
                    axes_mm=axes,
                )

    def open_cache(self):
        """The cache, an open `SliceCache`."""
        return SliceCache(
            self.cache, "Test", crop=self.crop, counts=self.counts, label_path=self.labels
        )

    def _check_averages(self):
        used = self.settings if self._processed else {}
        for name in AVERAGES:
            wanted = getattr(self.postprocessing, name, None)
            if name in used and used[name] != wanted:
                raise InputError(
                    f"{self.restored} was restored with {name} {used[name]}, the post-processing "
                    f"asks for {wanted}; restore the slices with the same --postprocess."
                )

    def _axes(self, cache, rows):
        if not self._processed or not self.postprocessing.needs_axes:
            return None
        return cache_axes_mm(cache, rows)

    def _healthy_maps(self, axes):
        if not self._processed or not self.postprocessing.needs_healthy:
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
        return reader.read_step(self.step, positions)

    def _check_subject_sizes(self, groups):
        largest = max(len(group) for group in groups)
        if largest > LARGEST_SUBJECT:
            raise InputError(
                f"{self.cache} does not say which of its slices belong to which subject (one has "
                f"{largest}); give the slices per subject with --subjects."
            )

    def _check_labels(self, cache, with_truth):
        if with_truth and not cache.has_label:
            raise InputError(
                f"{self.labels or self.cache}: no dataset 'Label'; give the file that has the "
                f"lesion labels with --labels."
            )

    def _finite(self, images, rows):
        bad = ~np.isfinite(images).all(axis=(1, 2))
        if bad.any():
            raise InputError(f"{self.restored}: slice of row {rows[bad][0]} is NaN or infinite.")
        return images


def cache_axes_mm(cache, rows):
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
