"""Counting 5e7 voxels at the released 401 thresholds, against one threshold after the other."""

import resource
import sys
import time
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from tf_lesion.evaluation.metrics import ThresholdCounter, released_thresholds

VOXELS = 50_000_000
CHUNK = 1 << 22
TIMED_THRESHOLDS = 10  # of the plain count; its time grows with their number
LESION_SHARE, NOISE, CONTRAST = 0.05, 0.08, 0.1  # of the made-up residuals
SECONDS_LIMIT, GIGABYTES_LIMIT, SPEEDUP_LIMIT = 10.0, 1.5, 50.0
KILOBYTES_PER_GIGABYTE = 1e6


@dataclass(frozen=True)
class MetricsBenchmark:
    """Outcome of `benchmark_metrics`; times in seconds, memory in gigabytes (1e9 bytes).

    Attributes:
        seconds: one pass over the voxels at all thresholds.
        plain_seconds: four counts from boolean arrays per threshold, as the released code does,
            timed on some thresholds and scaled to all.
        lean_seconds: the leanest count per threshold that we know of (one comparison, two counts).
        peak_gigabytes: largest memory of the process up to the end of the pass.
        equal: whether all integers agree.
    """

    voxels: int
    thresholds: int
    seconds: float
    plain_seconds: float
    lean_seconds: float
    peak_gigabytes: float
    equal: bool

    @property
    def passed(self):
        """Whether the promises hold: time, memory, speed-up, same integers."""
        fast = self.seconds <= SECONDS_LIMIT and self.plain_seconds / self.seconds >= SPEEDUP_LIMIT
        return fast and self.peak_gigabytes <= GIGABYTES_LIMIT and self.equal


def made_up_residuals(voxels, *, seed=0):
    """Residuals [voxels] float32 and lesion [voxels] bool, made chunk by chunk."""
    generator = np.random.default_rng(seed)
    scores, lesion = np.empty(voxels, np.float32), np.empty(voxels, bool)
    for start in range(0, voxels, CHUNK):
        part = slice(start, min(start + CHUNK, voxels))
        lesion[part] = generator.random(part.stop - start, dtype=np.float32) < LESION_SHARE
        noise = NOISE * generator.standard_normal(part.stop - start, dtype=np.float32)
        scores[part] = np.abs(noise + np.float32(CONTRAST) * lesion[part])
    return scores, lesion


def plain_count(scores, lesion, threshold):
    """TP, TN, FP, FN at one threshold, from whole boolean arrays."""
    detected = scores > threshold
    return [
        np.sum(detected & lesion),
        np.sum(~detected & ~lesion),
        np.sum(detected & ~lesion),
        np.sum(~detected & lesion),
    ]


def lean_count(scores, lesion, threshold, positives):
    """The same with one comparison and two counts, given the number of lesion voxels."""
    detected = scores > threshold
    tp = np.count_nonzero(detected & lesion)
    fp = np.count_nonzero(detected) - tp
    return [tp, scores.size - positives - fp, fp, positives - tp]


def benchmark_metrics(voxels=VOXELS, *, seed=0, progress=True):
    """Time one pass against counting each threshold in turn; returns a `MetricsBenchmark`."""
    scores, lesion = made_up_residuals(voxels, seed=seed)
    thresholds = released_thresholds()
    started = time.perf_counter()
    counts = ThresholdCounter(thresholds).count(scores, lesion)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KILOBYTES_PER_GIGABYTE
    positives = np.count_nonzero(lesion)
    started, lean = time.perf_counter(), []
    for threshold in tqdm(thresholds, "lean count", unit="threshold", disable=not progress):
        lean.append(lean_count(scores, lesion, threshold, positives))
    lean_seconds = time.perf_counter() - started
    timed = np.linspace(0, len(thresholds) - 1, TIMED_THRESHOLDS).astype(int)
    started = time.perf_counter()
    plain = [plain_count(scores, lesion, threshold) for threshold in thresholds[timed]]
    plain_seconds = (time.perf_counter() - started) * len(thresholds) / len(timed)
    equal = np.array_equal(counts.T, lean) and np.array_equal(counts.T[timed], plain)
    return MetricsBenchmark(
        voxels, len(thresholds), seconds, plain_seconds, lean_seconds, peak, equal
    )


def print_metrics(measured):
    """Print a `MetricsBenchmark`."""
    print(f"{measured.voxels:.0e} voxels at {measured.thresholds} thresholds")
    for name, seconds in (
        ("one pass", measured.seconds),
        ("each threshold in turn, four counts", measured.plain_seconds),
        ("each threshold in turn, leanest", measured.lean_seconds),
    ):
        print(f"{name:38} {seconds:8.2f} s {seconds / measured.seconds:8.1f} x")
    print(f"peak memory {measured.peak_gigabytes:.2f} GB")
    print(f"same integers: {'yes' if measured.equal else 'NO'}")
    if not measured.passed:
        print(
            f"failed: expected at most {SECONDS_LIMIT:g} s and {GIGABYTES_LIMIT:g} GB, "
            f"{SPEEDUP_LIMIT:g} x faster than four counts per threshold, same integers",
            file=sys.stderr,
        )
