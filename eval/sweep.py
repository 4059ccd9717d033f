"""Restoring the same slices at many lambdas with one compiled loop, without writing the images.

Long sweeps keep what is finished in a small JSON file beside their output, so that a killed one
goes on with the lambda it was at.
"""

import json
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tf_lesion.caches.slices import SliceCache
from tf_lesion.evaluation import metrics
from tf_lesion.files import InputError, write_json
from tf_lesion.restoration import chosen_rows, restore

GRID_SLACK = 1e-9  # of a step: rounding must not add a point at the end of the grid
GRID_DIGITS = 10  # 0.2 * 9 is 1.8, not 1.8000000000000003


def parse_grid(text):
    """Lambdas of "start:stop:step" (without the stop, as in Python) or of "0.6,1.8,3".

    Raises:
        InputError: if the text is neither, or holds no lambda, a negative one, or one twice.
    """
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            count = math.ceil((stop - start) / step - GRID_SLACK)
            grid = [round(start + number * step, GRID_DIGITS) for number in range(count)]
        else:
            grid = [float(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"Expected a grid like 0:4:0.2 or 0.6,1.8,3, got {text!r}.") from error
    if not grid or not all(math.isfinite(weight) and weight >= 0 for weight in grid):
        raise InputError(f"Expected a grid of lambdas of 0 or more, got {text!r}.")
    if len(set(grid)) < len(grid):
        raise InputError(f"Expected different lambdas, got {text!r}.")
    return grid


class Kept:
    """Results by name in a JSON file that is rewritten after each; gone on with after a kill.

    Args:
        path: the file, deleted by `discard` when all is done.
        settings: JSON-serialisable; results kept with other settings are refused.
        hint: what to do then, the end of the error message.
    """

    def __init__(self, path, settings, *, hint="--force starts over"):
        self.path = Path(path)
        self._settings = json.loads(json.dumps(settings))
        self.results = {}
        if not self.path.exists():
            return
        try:
            stored = json.loads(self.path.read_text())
            settings, self.results = stored["settings"], dict(stored["results"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} holds no unfinished results; {hint}.") from error
        if settings != self._settings:
            raise InputError(f"{self.path} was begun with other settings; {hint}.")

    def add(self, name, result):
        """Keep one result."""
        self.results[name] = result
        write_json(self.path, {"settings": self._settings, "results": self.results})

    def discard(self):
        """Delete the file: the results are elsewhere now."""
        self.path.unlink(missing_ok=True)


def restored_batches(restorer, cache, rows, *, tv_weight, batch_size, on_progress=None):
    """Restore rows of a cache batch by batch.

    Args:
        restorer: `Restorer`.
        cache: open `SliceCache`.
        rows: [n] rows of the cache; they seed the noise.
        tv_weight: lambda.
        batch_size: slices at once.
        on_progress: called with the number of slice-steps just taken.

    Yields:
        (rows [B], observed [B, H, W], restored [B, H, W], brain mask [B, H, W] bool).
    """
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        observed, mask = cache.read(batch), cache.mask(batch)
        images, _ = restore(
            restorer, observed, mask, batch, tv_weight=tv_weight, on_progress=on_progress
        )
        yield batch, observed[..., 0], images[..., 0], mask[..., 0]


def check_size(loaded, cache):
    """Raise `InputError` unless the model restores slices of the cache's size."""
    network = loaded.config.network
    if cache.shape != (network.height, network.width):
        raise InputError(
            f"{loaded.path} restores {network.height} x {network.width} slices, {cache.path} has "
            f"{cache.shape[0]} x {cache.shape[1]}; make the cache with the --voxel-size of the "
            f"training cache, or give --crop."
        )


def auc_by_lambda(
    restorer, cohorts, grid, *, max_slices=None, seed=0, batch_size=16, kept=None, progress=True
):
    """Pooled AUC of the residual of patients at each lambda (Figure 2 a).

    Args:
        restorer: `Restorer`.
        cohorts: the patients' caches, [dict of arguments of `SliceCache`].
        grid: lambdas.
        max_slices: a random subset of so many slices of each cache.
        seed: of the subset.
        batch_size: slices at once.
        kept: `Kept` results of an earlier start.
        progress: show a progress bar.

    Returns:
        [AUC] per lambda, NaN without lesions.
    """
    done = kept.results if kept else {}
    caches = [SliceCache(**arguments) for arguments in cohorts]
    try:
        rows = [chosen_rows(len(cache), max_slices, seed=seed) for cache in caches]
        steps = sum(map(len, rows)) * restorer.restoration.steps
        missing = [weight for weight in grid if f"{weight:g}" not in done]
        with tqdm(
            total=steps * len(missing),
            desc="AUC by lambda",
            unit="slice-step",
            disable=not progress,
        ) as bar:
            for weight in missing:
                area = _pooled_auc(restorer, caches, rows, weight, batch_size, bar.update)
                done[f"{weight:g}"] = area
                if kept:
                    kept.add(f"{weight:g}", area)
    finally:
        for cache in caches:
            cache.close()
    return [done[f"{weight:g}"] for weight in grid]


def _pooled_auc(restorer, caches, rows_of_caches, tv_weight, batch_size, on_progress):
    pooled = metrics.PooledScores()
    for cache, rows in zip(caches, rows_of_caches, strict=True):
        for batch, observed, restored, mask in restored_batches(
            restorer,
            cache,
            rows,
            tv_weight=tv_weight,
            batch_size=batch_size,
            on_progress=on_progress,
        ):
            pooled.add(np.abs(observed - restored)[mask], cache.label(batch)[..., 0][mask])
    return float(metrics.area(pooled.curve()))


def pooled_auc(cohorts):
    """AUC of the residual over all brain voxels of all subjects."""
    pooled = metrics.PooledScores()
    for cohort in cohorts:
        for subject in cohort.subjects():
            pooled.add(subject.score("residual")[subject.mask], subject.truth[subject.mask])
    return float(metrics.area(pooled.curve()))
