"""Timing ways to do the same beside each other: counting voxels, reading batches, preparing scans.

Each benchmark returns a table with a row per way, the plain one first, and facts, `passed` among
them: whether what docs/performance.md promises holds.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tf_lesion.evaluation.metrics import ThresholdCounter, released_thresholds

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to RESET, it sets the peak memory to what is in use
KILOBYTES_PER_GIGABYTE = 1e6

TIMED_THRESHOLDS = 10  # of the plain count; its time grows with their number
LESION_SHARE, NOISE, CONTRAST = 0.05, 0.08, 0.1  # of the made-up residuals
SECONDS_LIMIT, GIGABYTES_LIMIT, SPEEDUP_LIMIT = 10.0, 1.5, 50.0  # of metrics
CACHE_SLICES, BATCHES_TIMED = 400, 50
CROPPED, PADDED = (158, 198), ((0, 0), (22, 17), (17, 18))  # pixels: 197 x 233 in the file
SLICES_PER_SECOND = 1000.0  # at least, from a cache
SCANS, VOXEL_SIZE = 4, 2.0  # of the cohort that is prepared; mm
PARALLEL_LIMIT = 1.0  # two processes must not be slower than one

Found = tuple[pd.DataFrame, dict[str, Any]]


def interleaved(
    ways: Mapping[str, Callable], *, rounds: int, unit: str, units: int = 1
) -> pd.DataFrame:
    """Time every way in turn, round after round, so that what disturbs one disturbs all.

    Args:
        ways: {name: function without arguments}; each is called once before, untimed.
        rounds: times each is measured.
        unit: of the work, for the name of the column.
        units: units of work in one call.

    Returns:
        Table indexed by way: median seconds per unit, times faster than the first, and the peak
        memory of the process in GB (1e9 bytes) where the system tells it (Linux).
    """
    seconds, peaks = [], []
    for function in ways.values():
        function()
    for _ in range(rounds):
        timed = {name: timed_once(function) for name, function in ways.items()}
        seconds.append({name: took / units for name, (_, took, _) in timed.items()})
        peaks.append({name: peak for name, (*_, peak) in timed.items()})
    return as_table(pd.DataFrame(seconds).median(), pd.DataFrame(peaks).max(), unit=unit)


def timed_once(function: Callable) -> tuple[Any, float, float]:
    """(result, seconds, peak memory of the process in GB; NaN where the system does not tell)."""
    if RESET.exists():
        RESET.write_text(RESET_PEAK, encoding="utf-8")
    started = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - started
    if not STATUS.exists():
        return result, seconds, np.nan
    line = next(
        line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    )
    return result, seconds, float(line.split()[1]) / KILOBYTES_PER_GIGABYTE


def as_table(seconds: pd.Series, peaks: pd.Series, *, unit: str) -> pd.DataFrame:
    """The table of `interleaved`."""
    columns = {f"seconds per {unit}": seconds, "times faster": seconds.iloc[0] / seconds}
    return pd.DataFrame({**columns, "peak GB": peaks}).rename_axis("way").dropna(axis=1)


# Counting voxels --------------------------------------------------------------------------------


def benchmark_metrics(*, voxels: int, seed: int) -> Found:
    """One pass over the voxels at all thresholds, against counting each threshold in turn."""
    generator = np.random.default_rng(seed)
    lesion = generator.random(voxels, dtype=np.float32) < LESION_SHARE
    scores = NOISE * generator.standard_normal(voxels, dtype=np.float32)
    scores = np.abs(scores + np.float32(CONTRAST) * lesion).astype(np.float32)
    thresholds = released_thresholds()
    timed = np.linspace(0, len(thresholds) - 1, TIMED_THRESHOLDS).astype(int)
    counts, seconds, peak = timed_once(lambda: ThresholdCounter(thresholds).count(scores, lesion))
    plain, seconds_of_some, peak_of_some = timed_once(
        lambda: [plain_count(scores, lesion, at) for at in thresholds[timed]]
    )
    ways = ["plain, each threshold in turn", "one pass"]
    took = [seconds_of_some * len(thresholds) / len(timed), seconds]
    table = as_table(pd.Series(took, ways), pd.Series([peak_of_some, peak], ways), unit="count")
    equal = np.array_equal(counts.T[timed], plain)
    fast = seconds <= SECONDS_LIMIT and table["times faster"].iloc[-1] >= SPEEDUP_LIMIT
    return table, {
        "what": f"{voxels:.0e} voxels at {len(thresholds)} thresholds",
        "same integers": equal,
        "passed": bool(fast and equal and not peak > GIGABYTES_LIMIT),
    }


def plain_count(scores: np.ndarray, lesion: np.ndarray, threshold: float) -> list[int]:
    """TP, TN, FP, FN at one threshold from whole boolean arrays, as the released code counts."""
    detected = scores > threshold
    pairs = ((detected, lesion), (~detected, ~lesion), (detected, ~lesion), (~detected, lesion))
    return [np.sum(first & second) for first, second in pairs]


# Batches and scans ------------------------------------------------------------------------------


def made_up_slices(
    count: int, shape: tuple[int, int], *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ellipses with smooth noise in them, images and masks [count, H, W, 1] float32."""
    from scipy.ndimage import gaussian_filter

    x, y = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
    mask = np.broadcast_to((x / 0.85) ** 2 + (y / 0.9) ** 2 < 1, (count, *shape))
    noise = np.random.default_rng(seed).normal(size=(count, *shape))
    smooth = gaussian_filter(noise, (0, 3, 3))
    images = np.clip(0.5 + 0.1 * smooth / smooth.std(), 0.05, 1) * mask
    return images[..., None].astype(np.float32), mask[..., None].astype(np.float32)


def benchmark_cache(*, batch_size: int, rounds: int) -> Found:
    """Slices per second into a training, one batch after the other and read ahead."""
    from tf_lesion.caches.slices import CacheWriter, SliceCache
    from tf_lesion.presets import preset
    from tf_lesion.training.distribution import make_placement
    from tf_lesion.training.trainer import batch_rows, batches

    training = {"steps": BATCHES_TIMED, "batch_size": batch_size}
    config = preset("practical").replace(training=training)
    images = np.pad(made_up_slices(CACHE_SLICES, CROPPED)[0][..., 0], PADDED)

    def one_after_the_other():
        for step in range(BATCHES_TIMED):
            cache.read(batch_rows(step, num_rows=len(cache), batch_size=batch_size, seed=0))

    def read_ahead():
        for _ in batches(cache, config, 0, make_placement()):
            pass

    ways = {"plain, one after the other": one_after_the_other, "tf.data, read ahead": read_ahead}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.h5"
        with CacheWriter(path) as writer:
            writer.append("Train", images, subject_id="0", slice_index=range(CACHE_SLICES))
        with SliceCache(path, "Train") as cache:
            units = BATCHES_TIMED * batch_size
            table = interleaved(ways, rounds=rounds, unit="slice", units=units)
    table["slices per second"] = 1 / table["seconds per slice"]
    return table, {
        "what": f"batches of {batch_size} from a compressed cache of {CACHE_SLICES} slices",
        "passed": bool(table["slices per second"].iloc[-1] >= SLICES_PER_SECOND),
    }


def benchmark_preprocess(*, jobs: int, rounds: int) -> Found:
    """Seconds per scan from NIfTI to a cache, by one process and by several."""
    from preprocessing import camcan
    from preprocessing.phantom import __main__ as phantom

    with tempfile.TemporaryDirectory() as folder:
        scans, cache = Path(folder) / "scans", Path(folder) / "cache.h5"
        cohort = ["--healthy", SCANS, "--patients", 0, "--voxel-size", VOXEL_SIZE]
        phantom.main([*map(str, ("--out", scans, *cohort))])

        def prepare(processes):
            source = ["--input", scans / "healthy", "--out", cache, "--force", "--jobs", processes]
            options = ["--voxel-size", VOXEL_SIZE, "--test-subjects", 1]
            camcan.main([*map(str, (*source, *options))])

        ways = {"plain, one process": lambda: prepare(1)}
        ways[f"{jobs} processes"] = lambda: prepare(jobs)
        table = interleaved(ways, rounds=rounds, unit="scan", units=SCANS)
    return table, {
        "what": f"{SCANS} scans of {VOXEL_SIZE:g} mm to a cache",
        "passed": bool(table["times faster"].iloc[-1] >= PARALLEL_LIMIT),
    }
