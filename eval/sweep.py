"""Restoring the same slices at many lambdas with one compiled loop, without writing the images.

Long sweeps keep what is finished in a small JSON file beside their output, so that a killed one
goes on with the lambda it was at.
"""

import numpy as np
from tqdm import tqdm

from tf_lesion.caches.restore import chosen_rows
from tf_lesion.caches.slices import SliceCache
from tf_lesion.calibration.tv_weight import restored_batches
from tf_lesion.evaluation import metrics


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
