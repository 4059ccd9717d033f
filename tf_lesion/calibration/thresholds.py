"""Thresholds from healthy subjects: the smallest with at most 1, 5, 10 % false positives.

No lesion label is used: whatever is detected in a healthy brain is false. A voxel is detected when
`residual > t`; the voxels are those with an observed intensity above 0.

    exact    the smallest t with share(residual > t) <= target, by order statistics (paper,
             section 2.4). t is one of the residuals, or 0. It never exceeds the target; the next
             smaller residual would.
    golden   the released code's golden section search on |FPR(t) - target|. It may exceed the
             target, and on a plateau it returns the same wrong value for every target. Unlike the
             released search it ends when all residuals are 0 (with t = 0).
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from tf_lesion.calibration.file import Threshold
from tf_lesion.config import TARGETS
from tf_lesion.evaluation.metrics import rounded_down
from tf_lesion.files import InputError

METHODS = ("exact", "golden")
GOLDEN_SHARE = (3 - math.sqrt(5)) / 2  # of the wider part of the bracket, 0.382
GOLDEN_TOLERANCE = 1e-8  # width of the last bracket over the sum of its two inner points
HALF_BITS = 16  # streaming counts the upper, then the lower half of the 32-bit pattern


def find_thresholds(
    chunks: Callable[[], Iterable[np.ndarray]],
    targets: Sequence[float] = TARGETS,
    *,
    method: str = "exact",
) -> tuple[Threshold, ...]:
    """The `Threshold`s of a healthy score.

    Args:
        chunks: a function that returns an iterator over float32 scores >= 0, the same each time.
        targets: largest false positive rates, fractions below 1.
        method: "exact" or "golden"; the latter holds all scores in memory.

    Raises:
        InputError: on an unknown method, a target outside [0, 1), or no healthy voxel.
    """
    check(targets, method)
    if method == "exact":
        found, _ = streamed_thresholds(chunks, targets)
    else:
        scores = np.sort(np.concatenate(list(chunks())))
        values = [golden_section_threshold(scores, target) for target in targets]
        found = [(value, share_above(scores, value)) for value in values]
    pairs = zip(targets, found, strict=True)
    return tuple(sorted((Threshold(t, *pair) for t, pair in pairs), key=lambda p: p.target_fpr))


def left_out(points: Sequence[Threshold], subjects: Iterable[np.ndarray]) -> tuple[Threshold, ...]:
    """The points with the rates of subjects that were left out in turn.

    For each subject: the exact threshold of all the others' scores for the same target, and the
    share of its own scores above. Sorted scores wait in a temporary folder, 4 bytes a voxel, and
    one subject is in memory at a time.

    Args:
        points: thresholds of all subjects.
        subjects: float32 scores >= 0 of one subject after the other; those without are passed over.

    Returns:
        The points; as they are, if fewer than two subjects have scores.
    """
    with tempfile.TemporaryDirectory() as folder:
        ordered = [
            _kept_sorted(scores, Path(folder) / f"{number}.npy")
            for number, scores in enumerate(subjects)
            if scores.size
        ]
        if len(ordered) < 2:
            return tuple(points)
        return tuple(_with_left_out(point, ordered) for point in points)


def _kept_sorted(scores, path):
    """Ascending 32-bit patterns of scores, in a file."""
    np.save(path, np.sort(_pattern(scores).astype(np.uint32)))
    return np.load(path, mmap_mode="r")


def _with_left_out(point, ordered):
    rates = []
    for number, own in enumerate(ordered):
        limit = _limit(ordered[:number] + ordered[number + 1 :], point.target_fpr)
        rates.append(_above(own, limit) / len(own))
    return dataclasses.replace(
        point,
        left_out_fpr=float(np.mean(rates)),
        left_out_smallest=min(rates),
        left_out_largest=max(rates),
    )


def _limit(ordered, target_fpr):
    """Pattern of the exact threshold of several subjects, by bisection."""
    allowed = allowed_positives(sum(map(len, ordered)), target_fpr)
    low, high = 0, max(int(own[-1]) for own in ordered)
    while low < high:
        middle = (low + high) // 2
        if sum(_above(own, middle) for own in ordered) > allowed:
            low = middle + 1
        else:
            high = middle
    return low


def _above(ordered, pattern):
    # A Python integer would make searchsorted copy everything to int64.
    return len(ordered) - int(np.searchsorted(ordered, np.uint32(pattern), side="right"))


def check(targets: Sequence[float], method: str) -> None:
    """Raise `InputError` on an unknown method, or a target outside [0, 1)."""
    if method not in METHODS:
        raise InputError(f"Expected a method of {', '.join(METHODS)}, got {method!r}.")
    for target in targets:
        allowed_positives(1, target)


def allowed_positives(total: int, target_fpr: float) -> int:
    """How many of `total` voxels may be detected: the largest n with n / total <= target."""
    if not 0 <= target_fpr < 1:
        raise InputError(f"Expected a false positive rate in [0, 1), got {target_fpr}.")
    number = math.floor(target_fpr * total)
    if (number + 1) / total <= target_fpr:  # the product was rounded down
        return number + 1
    return number - 1 if number / total > target_fpr else number


def streamed_thresholds(
    chunks: Callable[[], Iterable[np.ndarray]], targets_fpr: Sequence[float]
) -> tuple[list[tuple[float, float]], int]:
    """The smallest t >= 0 with share(score > t) <= target: one of the float32 scores.

    For more scores than fit into memory, and exact where `np.quantile(method="inverted_cdf")`
    rounds the rank. Two passes: the first counts the upper halves of the 32-bit patterns (ordered
    as the values), which gives each target's bin and its rank inside; the second counts the lower
    halves there.
    Memory: one chunk and 0.5 MB per target.

    Args:
        chunks: a function that returns an iterator over float32 arrays >= 0, the same each time.
        targets_fpr: the targets, fractions below 1.

    Returns:
        ([(threshold, rate)] per target, number of voxels); rate = share(residual > threshold).
    """
    upper = np.zeros(1 << HALF_BITS, dtype=np.int64)
    for pattern in map(_pattern, chunks()):
        upper += np.bincount(pattern >> HALF_BITS, minlength=upper.size)
    total = int(upper.sum())
    _require_voxels(total)
    ranks = [allowed_positives(total, target) for target in targets_fpr]
    places = [_place(upper, rank) for rank in ranks]
    lower = {bin_: np.zeros_like(upper) for bin_, _ in places}
    for pattern in map(_pattern, chunks()):
        for bin_, counts in lower.items():
            low = pattern[pattern >> HALF_BITS == bin_] & (1 << HALF_BITS) - 1
            counts += np.bincount(low, minlength=counts.size)
    found = []
    for (bin_, above), rank in zip(places, ranks, strict=True):
        low, above_low = _place(lower[bin_], rank - above)
        value = np.uint32(bin_ << HALF_BITS | low).view(np.float32)
        found.append((float(value), (above + above_low) / total))
    return found, total


def _place(counts, rank):
    """(bin that holds the value of this rank, values in higher bins); rank 0 is the largest."""
    above = counts[::-1].cumsum()[::-1]
    bin_ = int(np.flatnonzero(above > rank)[-1])
    return bin_, int(above[bin_] - counts[bin_])


def _pattern(residuals):
    residuals = np.asarray(residuals, dtype=np.float32).ravel() + np.float32(0)  # -0 becomes 0
    if residuals.size and not (residuals.min() >= 0 and np.isfinite(residuals.max())):
        raise InputError("Expected finite residuals of at least 0.")
    return residuals.view(np.uint32).astype(np.int64)


def _checked(residuals):
    residuals = np.asarray(residuals).ravel()
    _require_voxels(residuals.size)
    if not (residuals.min() >= 0 and np.isfinite(residuals.max())):
        raise InputError("Expected finite residuals of at least 0.")
    return residuals


def _require_voxels(number):
    if number == 0:
        raise InputError("Expected residuals of healthy brain voxels, got none.")


def golden_section_threshold(
    residuals: np.ndarray, target_fpr: float, *, tolerance: float = GOLDEN_TOLERANCE
) -> float:
    """The released search: golden section for the t that minimizes |share(residual > t) - target|.

    Starts from the smallest, mean and largest residual. Each step puts a point into the wider part
    of the bracket, at 0.382 of it, and keeps the side of the strictly smaller value. Ends when the
    bracket is narrower than `tolerance` times the sum of its inner points, or has no width (the
    released search goes on for ever there), and answers with its middle.

    The function is a staircase with plateaus, so the answer can be a local minimum.

    Args:
        residuals: any shape, >= 0; sorted and held in memory.
        target_fpr: the rate to come near to, a fraction.
        tolerance: relative width at the end.

    Source: Kiefer (1953); You et al., MIDL 2019, section 2.4.
    """
    ordered = np.sort(_checked(residuals))
    low, middle, high = float(ordered[0]), float(ordered.mean(dtype=np.float64)), float(ordered[-1])

    def distance(threshold):
        return abs(share_above(ordered, threshold) - target_fpr)

    while high > low:
        upper_is_wider = high - middle > middle - low
        part = (high if upper_is_wider else low) - middle
        point = middle + GOLDEN_SHARE * part
        if abs(high - low) < tolerance * (abs(middle) + abs(point)):
            break
        better = distance(point) < distance(middle)
        if upper_is_wider:
            low, middle, high = (middle, point, high) if better else (low, middle, point)
        else:
            low, middle, high = (low, point, middle) if better else (point, middle, high)
    return (low + high) / 2


def share_above(ordered: np.ndarray, threshold: float) -> float:
    """Share of ascending values that are > threshold (a float64), exactly, without a copy."""
    edge = rounded_down(np.float64(threshold), ordered.dtype)
    return (ordered.size - np.searchsorted(ordered, edge, side="right")) / ordered.size
