"""How well scores show lesions: the one place where scans are measured.

Two passes over the scans, one in memory at a time: the first collects the pooled curves and what
belongs to one scan alone, the second counts at the thresholds that the first has given. Names say
what a number was taken over: in the table of scans over one scan; in that of scores `pooled_*` over
all voxels and lesions together, `mean_*` and `std_*` (ddof 0) over scans, `*_low` and `*_high` are
the ends of a 95 % bootstrap interval over scans, or over groups of them that are alike.
"""

import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tf_lesion.detection.lesions import Counting, lesion_counts, voxel_ml
from tf_lesion.evaluation import metrics
from tf_lesion.evaluation.scans import LabeledScan, Mask
from tf_lesion.files import InputError

PROTOCOLS = ("all", "released")
YOUDEN = "dsc_auc"
SESSION = "_ses-"  # what follows the subject in the name of a scan
SIZES_ML = (0, 0.1, 1, 10, math.inf)
SIZE_NAMES = ("below 0.1 ml", "0.1 to 1 ml", "1 to 10 ml", "10 ml or more")
CURVE_POINTS = 1000  # of the stored ROC curve and of the bootstrap, which integrates it


@dataclass(frozen=True)
class Measured:
    """What `measure` found.

    Attributes:
        scans: a row per scan and score, the index counts the scans. `scan`, `slices`,
            `brain_voxels`, `lesion_voxels`, `lesions` (see `Counting`), `lesion_ml`,
            `outside_brain_ml` (lesion where no brain was restored), `score`, those of
            `curve_numbers`, and for each mask P `dice_P`, `fpr_P`, `fnr_P`, `lesions_found_P`,
            `lesion_detection_rate_P` and `false_positives_P`.
        scores: a row per score: mean over the scans of each number above, pooled numbers, and
            `threshold_P`. `pooled_lesion_detection_rate_P` is over all lesions,
            `mean_false_positives_P` false ones per scan.
        sizes: a row per score, mask and size of lesions, `lesions` and those `found` in all scans
            whose voxels have a known size.
        roc: {score: `threshold`, `fpr`, `tpr` [D] of the pooled curve, at most `CURVE_POINTS`}.
        masks: names of all masks, `YOUDEN` first.
    """

    scans: pd.DataFrame
    scores: pd.DataFrame
    sizes: pd.DataFrame
    roc: dict[str, dict[str, np.ndarray]]
    masks: list[str]

    @property
    def cohort(self) -> dict[str, int]:
        """Numbers of subjects, slices, brain and lesion voxels."""
        scans = self.scans[~self.scans.index.duplicated()]
        return {
            "subjects": len(scans),
            "subjects_without_lesion": int((scans["lesion_voxels"] == 0).sum()),
            **{
                name: int(scans[name].sum()) for name in ("slices", "brain_voxels", "lesion_voxels")
            },
        }

    def as_json(self) -> dict[str, Any]:
        """`cohort` and `scores` with the ROC curves; what is undefined is None."""
        rows = self.scores.to_dict("records")
        scores = {row["score"]: {**row, "roc": self.roc[row["score"]]} for row in rows}
        sizes = self.sizes.to_dict("records")
        content = {"cohort": self.cohort, "scores": scores, "lesions_by_size": sizes}
        text = json.dumps(content, default=lambda array: array.tolist())
        return json.loads(text, parse_constant=lambda _: None)  # for NaN and infinity


def measure(
    scans: Iterable[LabeledScan],
    *,
    protocol: str = "all",
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    counting: Counting | None = None,
    progress: Callable[..., Iterable] | None = None,
) -> Measured:
    """Measure every score of the scans, alone and pooled.

    Args:
        scans: gone over twice; a `Scans` or a list.
        protocol: "all" scores are thresholds, or the 401 of the "released" code; see `metrics`.
        seed: of the bootstrap.
        groups: {scan: its group}, all of which the bootstrap draws or leaves, such as the anatomy
            that phantoms share; by default the subject, of which there may be several sessions.
        counting: what is a lesion, and when it is found; by default `Counting()`.
        progress: a function (scans, text) -> scans that shows a bar, such as `tqdm`.

    Raises:
        InputError: on an unknown protocol, if there is no voxel of a brain, or if a smallest
            lesion is given for a scan whose voxels have no known size.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"Expected a protocol of {', '.join(PROTOCOLS)}, got {protocol!r}.")
    counting = counting or Counting()
    bar = progress or (lambda scans, text: scans)
    scores: dict[str, _Score] = {}
    about = []
    for number, scan in enumerate(bar(scans, "curves")):
        about.append({"number": number, **_about(scan, counting)})
        for name, values in scan.scores.items():
            score = scores.setdefault(name, _Score(name, released=protocol == "released"))
            masks = [mask for mask in scan.masks if mask.score == name]
            score.first_pass(number, values[scan.brain], scan.truth[scan.brain], masks)
    if not sum(row["brain_voxels"] for row in about):
        raise InputError("Expected brain voxels, but the brain mask is empty in every slice.")
    alike = groups_of([row["scan"] for row in about], groups)
    for score in scores.values():
        score.close_first_pass()
    for number, scan in enumerate(bar(scans, "masks")):
        for name in scan.scores:
            scores[name].second_pass(number, scan, about[number], counting)
    weights = metrics.bootstrap_weights(alike, seed=seed)
    rows = [about[number] | row for score in scores.values() for number, row in score.rows.items()]
    return Measured(
        scans=pd.DataFrame(rows).set_index("number").sort_index(kind="stable"),
        scores=pd.DataFrame([score.over_all(weights) for score in scores.values()]),
        sizes=pd.DataFrame([row for score in scores.values() for row in score.by_size()]),
        roc={name: score.roc for name, score in scores.items()},
        masks=list(dict.fromkeys(name for score in scores.values() for name in score.points)),
    )


def groups_of(names: Sequence[str], groups: Mapping[str, str] | None) -> list[Hashable]:
    """What each scan is drawn together with; `groups` as of `measure`.

    Raises:
        InputError: if a scan has no group.
    """
    if groups is None:  # names of several cohorts may repeat
        numbered = enumerate(names)
        return [name.partition(SESSION)[0] if SESSION in name else n for n, name in numbered]
    for name in names:
        if name not in groups:
            raise InputError(
                f"Expected a group for every scan, there is none for {name}; add its row."
            )
    return [groups[name] for name in names]


def read_groups(path: Path) -> dict[str, str]:
    """{scan: its group} of a CSV file with these two columns.

    Raises:
        InputError: if it is no such file.
    """
    try:
        table = pd.read_csv(path, dtype=str).dropna()
        return dict(zip(table["scan"], table["group"], strict=True))
    except (KeyError, ValueError) as error:  # pandas' errors of form are values that are wrong
        raise InputError(f"{path}: expected the columns scan and group in a CSV file.") from error


def _count_lesions(scan, detected, counting):
    """The `LesionCounts` of a detection [X, Y, Z] in the brain; None where neighbors are none."""
    if not scan.whole:
        return None
    if counting.smallest_ml and scan.affine is None:
        raise InputError(
            f"{scan.name}: Expected the size of a voxel for a smallest lesion in ml, but its cache "
            f"does not say where slices lie; leave the smallest lesion out."
        )
    ml = math.nan if scan.affine is None else voxel_ml(scan.affine)
    return lesion_counts(detected, scan.truth & scan.brain, voxel_ml=ml, counting=counting)


def _about(scan, counting):
    """What the truth of a scan holds."""
    truth = scan.truth & scan.brain
    lesions = _count_lesions(scan, truth, counting)
    ml = math.nan if scan.affine is None else voxel_ml(scan.affine)
    return {
        "scan": scan.name,
        "slices": int(scan.brain.any(axis=(0, 1)).sum()),
        "brain_voxels": int(scan.brain.sum()),
        "lesion_voxels": int(truth.sum()),
        "lesions": lesions.lesions if lesions else math.nan,
        "lesion_ml": truth.sum() * ml,
        "outside_brain_ml": (scan.truth & ~scan.brain).sum() * ml,
    }


class _Score:
    """One score over all scans: `first_pass`, `close_first_pass`, `second_pass`, `over_all`."""

    def __init__(self, name, *, released):
        self._name, self._released = name, released
        self.rows, self.points, self._counts, self._at_masks = {}, {}, [], {}
        self._lesions = {}
        self._pooled = metrics.PooledScores()
        self._counter = metrics.ThresholdCounter(metrics.released_thresholds())

    def first_pass(self, number, values, truth, masks):
        """Take the brain voxels [V] of one scan."""
        if self._released:
            self._counts.append(self._counter.count(values, truth))
            curve = metrics.Curve.from_counts(self._counts[-1], self._counter.thresholds)
        else:
            self._pooled.add(values, truth)
            curve = metrics.Curve.from_scores(values, truth)
        self.rows[number] = {"score": self._name, **curve_numbers(curve)}
        for mask in masks:
            self.points.setdefault(mask.name, mask.threshold)

    def close_first_pass(self):
        """Fix the thresholds at which the second pass counts; forget the pooled scores."""
        if self._released:
            total = np.sum(self._counts, axis=0)
            curve, method = metrics.Curve.from_counts(total, self._counter.thresholds), "released"
        else:
            curve, method = self._pooled.curve(), self._pooled.method
        at = spread(curve)
        self.roc = {name: getattr(curve, name)[at] for name in ("threshold", "fpr", "tpr")}
        points = {YOUDEN: metrics.youden_threshold(curve), **self.points}
        self.points = {name: value for name, value in points.items() if not math.isnan(value)}
        self._whole = {"auc_method": method, **_named("pooled", curve_numbers(curve))}
        grid = self.roc["threshold"]
        grid = np.concatenate([grid[np.isfinite(grid)], list(self.points.values())])
        self._counter = metrics.ThresholdCounter(np.unique(grid))
        self._pooled, self._counts = None, []

    def second_pass(self, number, scan, about, counting):
        """Count one scan at the thresholds."""
        values, truth = scan.scores[self._name][scan.brain], scan.truth[scan.brain]
        self._counts.append(self._counter.count(values, truth))
        masks = [mask for mask in scan.masks if mask.score == self._name]
        if YOUDEN in self.points:
            masks.insert(0, Mask(YOUDEN, self._name, self.points[YOUDEN]))
        for mask in masks:
            counts, lesions = _counts(mask, scan, about, counting)
            if lesions:
                self._lesions.setdefault(mask.name, []).append(lesions)
            self._at_masks.setdefault(mask.name, []).append(counts)
            self.rows[number] |= _named("", _rates(counts), mask.name)

    def by_size(self):
        """Rows of `Measured.sizes`."""
        for mask, scans in self._lesions.items():
            volumes = np.concatenate([scan.volumes_ml for scan in scans])
            hit = np.concatenate([scan.hit for scan in scans])[~np.isnan(volumes)]
            bins = pd.cut(volumes[~np.isnan(volumes)], SIZES_ML, right=False, labels=SIZE_NAMES)
            for name in SIZE_NAMES:
                of_size = {
                    "lesions": int((bins == name).sum()),
                    "found": int(hit[bins == name].sum()),
                }
                yield {"score": self._name, "mask": mask, "size": name, **of_size}

    def over_all(self, weights):
        """The numbers over all scans; `weights` [draws, scans] are of the bootstrap."""
        weights = weights[:, list(self.rows)]
        low, high = self._area_interval(weights)
        frame = pd.DataFrame(self.rows.values()).drop(columns="score")
        row = {"score": self._name, "scans": len(frame), **self._whole}
        row |= {"scans_with_auc": int(frame["auc"].count())}
        row |= {"pooled_auc_low": low, "pooled_auc_high": high}
        for name, values in frame.items():
            row[f"mean_{name}"], row[f"std_{name}"] = metrics.mean_and_std(values)
            interval = metrics.mean_interval(values, weights)
            row[f"mean_{name}_low"], row[f"mean_{name}_high"] = interval
        for name, counts in self._at_masks.items():
            row[f"threshold_{name}"] = self.points[name]
            row |= _named("pooled", _rates(np.sum(counts, axis=0)), name)
        return row

    def _area_interval(self, weights):
        counts = np.stack(self._counts)
        if self._released:
            inside = np.isin(self._counter.thresholds, metrics.released_thresholds())
            return metrics.area_interval(counts[..., inside], weights)
        # The end point, at which everything is detected, goes before the first threshold.
        tp, tn, fp, fn = (counts[:, row, :1] for row in range(4))
        end = np.stack([tp + fn, 0 * tn, fp + tn, 0 * fn], axis=1)
        return metrics.area_interval(np.concatenate([end, counts], axis=2), weights)


def curve_numbers(curve: metrics.Curve) -> dict[str, float]:
    """AUC, AUPRC, largest Dice and its threshold."""
    best, threshold = metrics.largest_dice(curve)
    return {
        "auc": metrics.area(curve),
        "auprc": metrics.average_precision(curve),
        "largest_dice": best,
        "largest_dice_threshold": threshold,
    }


def _named(over, numbers, mask=""):
    return {"_".join(filter(None, (over, name, mask))): value for name, value in numbers.items()}


def _counts(mask, scan, about, counting):
    """[TP, TN, FP, FN, lesions, found, false ones] of one scan, and its `LesionCounts`.

    Where these are unknown, they are None, and the last three numbers NaN.
    """
    detected = mask.detected
    if detected is None:
        detected = scan.scores[mask.score] > np.float64(mask.threshold)
    detected, truth = detected & scan.brain, scan.truth & scan.brain
    tp, positives = np.count_nonzero(detected & truth), np.count_nonzero(detected)
    fn, fp = about["lesion_voxels"] - tp, positives - tp
    counts = [tp, about["brain_voxels"] - tp - fp - fn, fp, fn]
    lesions = _count_lesions(scan, detected, counting)
    if lesions is None:
        return np.array([*counts, math.nan, math.nan, math.nan]), None
    found = (lesions.lesions, lesions.found, lesions.false_positives)
    return np.array([*counts, *found], float), lesions


def _rates(counts):
    """The numbers of a mask, of [TP, TN, FP, FN, lesions, found, false ones]."""
    voxels, (lesions, found, false) = counts[:4, None], counts[4:]
    return {
        "dice": float(metrics.dice(voxels)[0]),
        "fpr": float(metrics.fpr(voxels)[0]),
        "fnr": float(metrics.fnr(voxels)[0]),
        "lesions_found": float(found),
        "lesion_detection_rate": float(found / lesions) if lesions else math.nan,
        "false_positives": float(false),
    }


def spread(curve: metrics.Curve) -> np.ndarray:
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
