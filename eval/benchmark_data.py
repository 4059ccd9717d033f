"""Reading training batches from a cache, and preparing scans, against one after the other."""

import tempfile
from pathlib import Path

import numpy as np

from eval.benchmark_models import made_up_slices
from eval.benchmark_timing import as_rows, interleaved
from tf_lesion.caches.slices import RELEASED_CROP, RELEASED_SLICE_SHAPE, CacheWriter, SliceCache
from tf_lesion.presets import preset
from tf_lesion.training.distribution import make_placement
from tf_lesion.training.trainer import batch_rows, batches

CACHE_SLICES = 400
BATCHES_TIMED = 50
SLICES_PER_SECOND = 1000.0
SCANS, VOXEL_SIZE = 4, 2.0  # of the cohort that is prepared; mm
PARALLEL_LIMIT = 1.0  # two processes must not be slower than one


def benchmark_cache(*, batch_size, rounds):
    """Slices per second into a training; returns a JSON-serialisable dict with `passed`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.h5"
        x0, x1, y0, y1 = RELEASED_CROP
        brain, _ = made_up_slices(CACHE_SLICES, (x1 - x0, y1 - y0))
        images = np.zeros((CACHE_SLICES, *RELEASED_SLICE_SHAPE), np.float32)
        images[:, x0:x1, y0:y1] = brain[..., 0]
        with CacheWriter(path) as writer:
            writer.append("Train", images, subject_id="0", slice_index=range(CACHE_SLICES))
        with SliceCache(path, "Train") as cache:
            found = _read(cache, batch_size=batch_size, rounds=rounds)
    rows = as_rows(found, unit="slice")
    for row in rows:
        row["slices per second"] = 1 / row["seconds per slice"]
    return {
        "what": f"batches of {batch_size} from a compressed cache of {CACHE_SLICES} slices",
        "rows": rows,
        "passed": rows[-1]["slices per second"] >= SLICES_PER_SECOND,
    }


def _read(cache, *, batch_size, rounds):
    training = {"steps": BATCHES_TIMED, "batch_size": batch_size}
    config = preset("practical").replace(training=training)

    def one_after_the_other():
        for step in range(BATCHES_TIMED):
            rows = batch_rows(step, num_rows=len(cache), batch_size=batch_size, seed=0)
            cache.read(rows)

    def read_ahead():
        for _ in batches(cache, config, 0, make_placement()):
            pass

    ways = {"plain, one after the other": one_after_the_other, "tf.data, read ahead": read_ahead}
    return interleaved(ways, rounds=rounds, units=BATCHES_TIMED * batch_size)


def benchmark_preprocess(*, jobs, rounds):
    """Seconds per scan; returns a JSON-serialisable dict with `passed`."""
    from preprocessing import camcan
    from preprocessing.phantom import __main__ as phantom

    with tempfile.TemporaryDirectory() as folder:
        scans, cache = Path(folder) / "scans", Path(folder) / "cache.h5"
        cohort = ["--healthy", str(SCANS), "--patients", "0", "--voxel-size", str(VOXEL_SIZE)]
        phantom.main(["--out", str(scans), *cohort])

        def prepare(processes):
            source = ["--input", str(scans / "healthy"), "--out", str(cache), "--force"]
            options = ["--voxel-size", str(VOXEL_SIZE), "--test-subjects", "1"]
            camcan.main([*source, *options, "--jobs", str(processes)])

        ways = {"plain, one process": lambda: prepare(1)}
        ways[f"{jobs} processes"] = lambda: prepare(jobs)
        found = interleaved(ways, rounds=rounds, units=SCANS)
    rows = as_rows(found, unit="scan")
    return {
        "what": f"{SCANS} scans of {VOXEL_SIZE:g} mm to a cache",
        "rows": rows,
        "passed": rows[-1]["times faster"] >= PARALLEL_LIMIT,
    }
