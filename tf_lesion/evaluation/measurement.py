"""Measuring one score over a cohort in two passes, and counting what the cohort holds."""

import math

import numpy as np

from tf_lesion.detection import lesions
from tf_lesion.evaluation import metrics
from tf_lesion.files import InputError

CURVE_POINTS = 1000  # of the stored ROC curve and of the bootstrap, which integrates it
YOUDEN = "dsc_auc"


class ScoreEvaluation:
    """Measures one score over a cohort; see `first_pass`, `second_pass`, `result`, in that order.

    Args:
        protocol: "all" or "released".
        points: [`Threshold`] from healthy subjects, possibly none.
    """

    def __init__(self, protocol, points=()):
        self._released = protocol == "released"
        self._healthy = list(points)
        self._pooled = metrics.PooledScores()
        self._counter = metrics.ThresholdCounter(metrics.released_thresholds())
        self._counts, self._curves, self._lesions = [], [], []

    def first_pass(self, scores, truth):
        """Take the brain voxels [V] of one subject."""
        if self._released:
            self._counts.append(self._counter.count(scores, truth))
            curve = metrics.Curve.from_counts(self._counts[-1], self._counter.thresholds)
        else:
            self._pooled.add(scores, truth)
            curve = metrics.Curve.from_scores(scores, truth)
        self._curves.append(
            (
                metrics.area(curve),
                metrics.average_precision(curve),
                *metrics.largest_dice(curve)[:1],
            )
        )

    def close_first_pass(self):
        """Fix the thresholds at which the second pass counts; forget the pooled scores."""
        if self._released:
            total = np.sum(self._counts, axis=0)
            curve = metrics.Curve.from_counts(total, self._counter.thresholds)
        else:
            curve = self._pooled.curve()
        points = {YOUDEN: metrics.youden_threshold(curve)}
        points |= {point.name: point.threshold for point in self._healthy}
        self.points = {name: value for name, value in points.items() if not math.isnan(value)}
        self._pooled_numbers = self._measure_pooled(curve)
        grid = self._pooled_numbers["roc"]["threshold"]
        grid = np.concatenate([grid[np.isfinite(grid)], list(self.points.values())])
        self._counter = metrics.ThresholdCounter(np.unique(grid))
        self._pooled, self._counts = None, []

    def _measure_pooled(self, curve):
        best, best_threshold = metrics.largest_dice(curve)
        rows = _spread(curve)
        return {
            "auc_method": "released" if self._released else self._pooled.method,
            "pooled_auc": metrics.area(curve),
            "pooled_auprc": metrics.average_precision(curve),
            "pooled_largest_dice": best,
            "pooled_largest_dice_threshold": best_threshold,
            "roc": {
                "threshold": curve.threshold[rows],
                "fpr": curve.fpr[rows],
                "tpr": curve.tpr[rows],
            },
        }

    def second_pass(self, scores, truth, volume_of):
        """Count one subject; `volume_of` makes a volume [H, W, Z] of its brain voxels [V]."""
        self._counts.append(self._counter.count(scores, truth))
        solid = volume_of(truth)
        self._lesions.append(
            {
                name: lesions.lesion_counts(volume_of(scores > value), solid)
                for name, value in self.points.items()
            }
            if solid is not None
            else {}
        )

    def result(self, weights):
        """Everything measured, JSON-serialisable but for NaN; `weights` are bootstrap weights."""
        counts = np.stack(self._counts)
        auc, auprc, best = np.array(self._curves, float).T
        return {
            **self._pooled_numbers,
            "pooled_auc_interval": self._area_interval(counts, weights),
            **_mean("subject_auc", auc, weights),
            **_mean("subject_auprc", auprc, weights),
            **_mean("subject_largest_dice", best, weights),
            "subjects_with_auc": int((~np.isnan(auc)).sum()),
            "points": {name: self._point(name, counts, weights) for name in self.points},
            "subjects": {"auc": auc, "auprc": auprc, "largest_dice": best},
        }

    def _area_interval(self, counts, weights):
        if self._released:
            inside = np.isin(self._counter.thresholds, metrics.released_thresholds())
            return metrics.area_interval(counts[..., inside], weights)
        return metrics.area_interval(_closed(counts), weights)

    def _point(self, name, counts, weights):
        column = int(np.searchsorted(self._counter.thresholds, self.points[name]))
        at, total = counts[..., [column]], counts[..., [column]].sum(axis=0)
        dice = metrics.dice(at)[:, 0]
        return {
            "threshold": self.points[name],
            **_mean("subject_dice", dice, weights),
            "pooled_dice": metrics.dice(total)[0],
            "pooled_fpr": metrics.fpr(total)[0],
            "pooled_fnr": metrics.fnr(total)[0],
            **self._lesion_wise(name),
            "subjects": {"dice": dice},
        }

    def _lesion_wise(self, name):
        found = [scan[name] for scan in self._lesions if name in scan]
        if len(found) < len(self._lesions):
            return {"lesion_detection_rate": math.nan, "false_positives_per_scan": math.nan}
        total, hits = sum(scan.lesions for scan in found), sum(scan.found for scan in found)
        return {
            "lesions": total,
            "lesion_detection_rate": hits / total if total else math.nan,
            "false_positives_per_scan": float(np.mean([s.false_positives for s in found])),
        }


def _spread(curve):
    """Rows of at most `CURVE_POINTS` points: both ends of equal steps along the ROC curve.

    Both ends, because a curve with a large plateau (residuals of 0) has a corner beside it.
    """
    along = np.asarray(curve.tp) / max(curve.positives, 1)
    along = along + np.asarray(curve.fp) / max(curve.negatives, 1)
    if len(along) <= CURVE_POINTS:
        return np.arange(len(along))
    wanted = np.linspace(along[-1], along[0], CURVE_POINTS // 2)
    rows = np.searchsorted(-along, -wanted, side="left")
    return np.unique(np.clip([rows - 1, rows], 0, len(along) - 1))


def _closed(counts):
    """Counts with the end point at which everything is detected put before the first threshold."""
    tp, tn, fp, fn = (counts[:, row, :1] for row in range(4))
    end = np.stack([tp + fn, 0 * tn, fp + tn, 0 * fn], axis=1)
    return np.concatenate([end, counts], axis=2)


def _mean(name, values, weights):
    mean, std = metrics.mean_and_std(values)
    return {
        f"mean_{name}": mean,
        f"std_{name}": std,
        f"mean_{name}_interval": metrics.mean_interval(values, weights),
    }


class Census:
    """Counts what was evaluated."""

    def __init__(self):
        self.subject_ids, self.slices, self.voxels, self.lesion_voxels = [], [], [], []

    def add(self, subject):
        """Count one subject."""
        self.subject_ids.append(subject.subject_id)
        self.slices.append(len(subject.rows))
        self.voxels.append(int(subject.mask.sum()))
        self.lesion_voxels.append(int(subject.truth.sum()))

    def check(self):
        """Raise `InputError` when there is nothing to measure."""
        if not sum(self.voxels):
            raise InputError("Expected brain voxels, but the brain mask is empty in every slice.")

    def summary(self):
        """Numbers of subjects, slices, brain and lesion voxels."""
        return {
            "subjects": len(self.subject_ids),
            "subjects_without_lesion": self.lesion_voxels.count(0),
            "slices": sum(self.slices),
            "brain_voxels": sum(self.voxels),
            "lesion_voxels": sum(self.lesion_voxels),
            "subject_ids": self.subject_ids,
            "subject_slices": self.slices,
            "subject_brain_voxels": self.voxels,
            "subject_lesion_voxels": self.lesion_voxels,
        }
