"""How well a score separates lesion from healthy voxels.

A voxel is detected at threshold t when `score > t`; the score is the residual, or a baseline.
Every number says over what it was taken: `pooled_*` over all voxels of all subjects, `subject_*`
over the voxels of one subject, `mean_subject_*` the mean of the latter.

Two protocols:
    released   the released code's 401 thresholds and no others; the ROC curve has no end point
               (1, 1), so voxels with a score of exactly 0 are missing from its area.
    all        every distinct score is a threshold; the curve runs from (0, 0) to (1, 1).

Stated answers of the corner cases:
    nothing to find and nothing found (empty/empty)   Dice 1
    nothing to find, something found                  Dice 0, FNR and AUC undefined (NaN)
    all lesion                                        FPR and AUC undefined (NaN)
    all scores equal                                  AUC 1/2 (all); 0 if they are 0 (released)
Undefined values are left out of means over subjects, and the number of subjects that remain is
reported.

Source: You et al., MIDL 2019, sections 2.4 and 4; the released evaluation.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

TP, TN, FP, FN = range(4)  # the order of the released statistics, [subject, 4, threshold]
CHUNK = 1 << 15  # voxels counted at a time; small enough for the second-level cache
LARGEST_SCALE = 1 << 16  # most cells of a lookup table per unit of score
MAX_BINS = 4_000_000  # distinct scores kept of a pooled curve
JOINED_VOXELS = 4_000_000  # voxels sorted into them at a time
NUM_DRAWS = 1000  # bootstrap
INTERVAL = (2.5, 97.5)  # percentiles of a 95 % interval


def released_thresholds() -> np.ndarray:
    """The 401 thresholds of the released evaluation, ascending, in normalized intensity."""
    fine, middle = np.linspace(0, 0.1, 201), np.linspace(0.1, 0.4, 151)
    coarse = np.linspace(0.4, 1, 51)
    return np.concatenate([fine, middle[1:], coarse[1:]])


class ThresholdCounter:
    """Counts TP, TN, FP, FN at many thresholds in one pass over the voxels (`eval.benchmark`).

    Each voxel is looked up once: a table over equal cells of score, at most one threshold in each,
    says how many thresholds lie below the cell, and one comparison settles the rest. Thresholds too
    close for such a table are found by bisection. The integers are those of comparing the array
    with each float64 threshold in turn, for float32 and float64 scores alike.

    Args:
        thresholds: [T], ascending.

    Raises:
        ValueError: if the thresholds are not finite and ascending.
    """

    def __init__(self, thresholds: ArrayLike):
        self.thresholds = np.asarray(thresholds, dtype=np.float64).ravel()
        ascending = (np.diff(self.thresholds) >= 0).all()
        if self.thresholds.size == 0 or not ascending or not np.isfinite(self.thresholds).all():
            raise ValueError("Expected finite thresholds in ascending order.")
        self._tables = {}

    def count(self, scores: ArrayLike, lesion: ArrayLike) -> np.ndarray:
        """Counts [4, T] int64 (TP, TN, FP, FN) of one subject.

        Args:
            scores: any shape, float; integers and float16 are widened.
            lesion: the same number of elements, bool or lesion > 0.

        Raises:
            ValueError: on different sizes or a NaN score.
        """
        scores, lesion = _flat(scores, lesion)
        if scores.dtype not in (np.float32, np.float64):
            scores = scores.astype(np.float64)
        below_of = self._tables.setdefault(scores.dtype, _bins_below(self.thresholds, scores.dtype))
        size = len(self.thresholds) + 1
        all_bins, lesion_bins = np.zeros((2, size), dtype=np.int64)
        for start in range(0, scores.size, CHUNK):
            chunk, in_lesion = scores[start : start + CHUNK], lesion[start : start + CHUNK]
            if np.isnan(chunk.max()):
                raise ValueError("Expected finite scores, got NaN.")
            below = below_of(chunk)
            all_bins += np.bincount(below, minlength=size)
            lesion_bins += np.bincount(below[in_lesion], minlength=size)
        return _counts(lesion_bins, all_bins - lesion_bins)


def _counts(lesion_bins, healthy_bins):
    """[4, T] from voxels per number of thresholds below the score, [T + 1] each."""
    detected_lesion = lesion_bins[::-1].cumsum()[::-1][1:]
    detected_healthy = healthy_bins[::-1].cumsum()[::-1][1:]
    missed = lesion_bins.sum() - detected_lesion
    left = healthy_bins.sum() - detected_healthy
    return np.stack([detected_lesion, left, detected_healthy, missed])


def _bins_below(thresholds, dtype):
    """A function: scores of `dtype` -> the number of thresholds below each."""
    edges = rounded_down(thresholds, dtype)
    cells, scale = _cells(edges)
    if cells is None:
        return lambda scores: np.searchsorted(edges, scores, side="left")
    last = cells[-1] + 1
    edge = np.full(last + 1, np.inf, dtype=dtype)
    edge[cells] = edges
    base = np.searchsorted(cells, np.arange(last + 1), side="left")

    def lookup(scores):
        cell = np.clip(scores * scale, 0, last).astype(np.intp)
        below = base.take(cell)
        below += scores > edge.take(cell)
        return below

    return lookup


def rounded_down(thresholds: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The largest value of `dtype` not above each threshold: `score > t` is the same for both."""
    with np.errstate(over="ignore"):
        edges = thresholds.astype(dtype)
    return np.where(edges > thresholds, np.nextafter(edges, dtype.type(-np.inf)), edges)


def _cells(edges):
    """Cell number of each edge and cells per unit, or (None, None) if two would share a cell."""
    scale = edges.dtype.type(1)
    while edges[0] >= 0 and scale <= LARGEST_SCALE and edges[-1] * scale < LARGEST_SCALE:
        cells = (edges * scale).astype(np.intp)
        if (np.diff(cells) > 0).all():
            return cells, scale
        scale = scale * 2
    return None, None


def _flat(scores, lesion):
    scores, lesion = np.asarray(scores).ravel(), np.asarray(lesion).ravel()
    if scores.size != lesion.size:
        raise ValueError(f"Expected as many labels as scores, got {lesion.size} and {scores.size}.")
    return scores, lesion if lesion.dtype == bool else lesion > 0


# Rates of counts ------------------------------------------------------------------------------


def _ratio(numerator, denominator, *, if_empty=np.nan):
    numerator, denominator = np.broadcast_arrays(
        np.asarray(numerator, float), np.asarray(denominator, float)
    )
    filled = np.full(denominator.shape, float(if_empty))
    return np.divide(numerator, denominator, out=filled, where=denominator > 0)[()]


def dice(counts: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) of counts [..., 4, T]; 1 where nothing is there and nothing found."""
    tp, fp, fn = (counts[..., row, :] for row in (TP, FP, FN))
    return _ratio(2 * tp, 2 * tp + fp + fn, if_empty=1)


def fpr(counts: np.ndarray) -> np.ndarray:
    """FP / (FP + TN) of counts [..., 4, T]; NaN without healthy voxels."""
    return _ratio(counts[..., FP, :], counts[..., FP, :] + counts[..., TN, :])


def fnr(counts: np.ndarray) -> np.ndarray:
    """FN / (FN + TP) of counts [..., 4, T]; NaN without lesion voxels."""
    return _ratio(counts[..., FN, :], counts[..., FN, :] + counts[..., TP, :])


def mean_and_std(values: ArrayLike) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0, as the paper's ±) of the defined values."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return (values.mean(), values.std(ddof=0)) if values.size else (np.nan, np.nan)


# Curves ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """What is detected at each threshold, thresholds ascending.

    Attributes:
        threshold: [D], detected means score > threshold; -inf detects everything.
        tp: [D] lesion voxels detected.
        fp: [D] healthy voxels detected.
        positives: number of lesion voxels.
        negatives: number of healthy voxels.
    """

    threshold: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    positives: int
    negatives: int

    @property
    def tpr(self) -> np.ndarray:
        """[D] TP / (TP + FN)."""
        return _ratio(self.tp, self.positives)

    @property
    def fpr(self) -> np.ndarray:
        """[D] FP / (FP + TN)."""
        return _ratio(self.fp, self.negatives)

    @classmethod
    def from_counts(cls, counts: np.ndarray, thresholds: ArrayLike) -> "Curve":
        """Curve of counts [4, T] at these thresholds only (protocol "released")."""
        positives, negatives = counts[TP, 0] + counts[FN, 0], counts[FP, 0] + counts[TN, 0]
        return cls(np.asarray(thresholds), counts[TP], counts[FP], int(positives), int(negatives))

    @classmethod
    def from_scores(cls, scores: ArrayLike, lesion: ArrayLike) -> "Curve":
        """Curve over every distinct score (>= 0, as float32); ties move together."""
        pooled = PooledScores(max_bins=np.inf)
        pooled.add(scores, lesion)
        return pooled.curve()


def area(curve: Curve) -> float:
    """Area under the ROC curve by the trapezoid rule, from its own points only.

    On a curve over all scores it is the probability that a lesion voxel scores higher than a
    healthy one, ties counting one half. Integers until the last division.
    """
    if not (curve.positives and curve.negatives):
        return np.nan
    tp, width = np.asarray(curve.tp), -np.diff(curve.fp)
    doubled = int(((tp[1:] + tp[:-1]) * width).sum())
    return doubled / (2 * curve.positives * curve.negatives)


def average_precision(curve: Curve) -> float:
    """Area under the precision-recall curve as the sum of recall steps times precision."""
    if not curve.positives:
        return np.nan
    tp = np.append(curve.tp, 0)
    precision = _ratio(curve.tp, curve.tp + curve.fp, if_empty=0)
    return float((-np.diff(tp) * precision).sum() / curve.positives)


def youden_threshold(curve: Curve) -> float:
    """The smallest threshold t >= 0 with the largest TPR - FPR; NaN if a class is missing.

    The threshold behind DSC_AUC. It looks at the labels, so it is optimistic (paper, section 2.4).
    """
    if not (curve.positives and curve.negatives):
        return np.nan
    allowed = curve.threshold >= 0
    best = np.argmax((curve.tpr - curve.fpr)[allowed])
    return float(curve.threshold[allowed][best])


def largest_dice(curve: Curve) -> tuple[float, float]:
    """(Dice, threshold) of the threshold t >= 0 with the largest Dice: the best possible."""
    allowed = curve.threshold >= 0
    tp, fp = curve.tp[allowed], curve.fp[allowed]
    values = _ratio(2 * tp, tp + fp + curve.positives, if_empty=1)
    best = np.argmax(values)
    return float(values[best]), float(curve.threshold[allowed][best])


class PooledScores:
    """Collects the scores of many subjects for one pooled `Curve`, in bounded memory.

    No library pools 1e8 voxels: this keeps the distinct float32 scores with their numbers of
    voxels, which is exact. When there are more than `max_bins`, the last bit of the float32 pattern
    is dropped (again and again if need be) and equal ones are joined: bins of equal relative width,
    1e-6 or so by default.

    Args:
        max_bins: most distinct scores to keep; the default takes about 0.1 GB.
    """

    def __init__(self, *, max_bins: float = MAX_BINS):
        self._max_bins, self._dropped_bits = max_bins, 0
        self._keys, self._counts = np.zeros(0, np.uint32), np.zeros((2, 0), np.int64)
        self._waiting, self._num_waiting = [], 0

    @property
    def method(self) -> str:
        """How the curve is made: "exact" or "binned"."""
        self._join()
        return "binned" if self._dropped_bits else "exact"

    def add(self, scores: ArrayLike, lesion: ArrayLike) -> None:
        """Add voxels; scores >= 0, any shape, rounded to float32."""
        scores, lesion = _flat(scores, lesion)
        patterns = _patterns(scores)
        self._waiting.append((patterns[lesion], patterns[~lesion]))
        self._num_waiting += scores.size
        if self._num_waiting >= JOINED_VOXELS:
            self._join()

    def curve(self) -> Curve:
        """The pooled `Curve`; thresholds are the upper ends of the bins."""
        self._join()
        tp, fp = (np.append(row[::-1].cumsum()[::-1], 0) for row in self._counts)
        last = ((self._keys.astype(np.int64) + 1) << self._dropped_bits) - 1
        upper = last.astype(np.uint32).view(np.float32).astype(np.float64)
        # Scores of 0 are detected only by detecting everything.
        lowest = -np.inf if self._keys.size and self._keys[0] == 0 else 0.0
        return Curve(np.append(lowest, upper), tp, fp, int(tp[0]), int(fp[0]))

    def _join(self):
        """Merge what waits into the sorted distinct scores."""
        if not self._waiting:
            return
        keys, counts = [self._keys], [self._counts]
        for row, parts in enumerate(zip(*self._waiting, strict=True)):
            distinct, number = np.unique(np.concatenate(parts), return_counts=True)
            keys.append(distinct >> self._dropped_bits)
            counts.append(np.zeros((2, distinct.size), np.int64))
            counts[-1][row] = number
        self._waiting, self._num_waiting = [], 0
        keys, counts = np.concatenate(keys), np.concatenate(counts, axis=1)
        order = np.argsort(keys)
        self._keys, self._counts = _joined(keys[order], counts[:, order])
        while self._keys.size > self._max_bins:
            self._dropped_bits += 1
            self._keys, self._counts = _joined(self._keys >> 1, self._counts)


def _patterns(scores):
    """The float32 patterns (uint32) of scores >= 0, which are ordered as the scores."""
    scores = scores.astype(np.float32) + np.float32(0)  # -0 becomes 0
    if scores.size and not scores.min() >= 0:
        raise ValueError("Expected scores of at least 0 and no NaN.")
    return scores.view(np.uint32)


def _joined(keys, counts):
    """Sorted keys [n] and counts [2, n] with equal keys added up."""
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: keys.size])
    if starts.size == keys.size:
        return keys, counts
    return keys[starts], np.add.reduceat(counts, starts, axis=1)


# Bootstrap over subjects ----------------------------------------------------------------------
# Not scipy.stats.bootstrap: here every number is of the same draws, undefined values are left out
# of each, and 1000 pooled areas are one product of matrices.


def bootstrap_weights(
    groups: Sequence[Hashable], *, seed: int = 0, draws: int = NUM_DRAWS
) -> np.ndarray:
    """How often each subject is drawn, [draws, S], when groups are drawn with replacement.

    Args:
        groups: [S], of each subject: those of one group are drawn together, as they are alike.
        seed, draws: of the random numbers.
    """
    group, names = pd.factorize(np.asarray(groups, object))
    number = len(names)
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), draws)
    return drawn[:, group]


def mean_interval(values: ArrayLike, weights: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of [S] values over subjects; NaN values are left out."""
    values = np.asarray(values, float)
    defined = ~np.isnan(values)
    means = _ratio(weights[:, defined] @ values[defined], weights[:, defined].sum(axis=1))
    return _percentiles(means)


def area_interval(counts: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the pooled area, from counts [S, 4, T] of ascending thresholds."""
    tp, fp = weights @ counts[:, TP], weights @ counts[:, FP]
    positives = weights @ (counts[:, TP] + counts[:, FN])[:, 0]
    negatives = weights @ (counts[:, FP] + counts[:, TN])[:, 0]
    doubled = (-np.diff(fp, axis=1) * (tp[:, 1:] + tp[:, :-1])).sum(axis=1)
    return _percentiles(_ratio(doubled, 2.0 * positives * negatives))


def _percentiles(values):
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, INTERVAL)) if values.size else (np.nan, np.nan)
