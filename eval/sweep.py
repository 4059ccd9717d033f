"""Pooled AUC of the patients along a choice: of lambda (Figure 2 a), of the step (Figure 3)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from tqdm import tqdm

from tf_lesion.caches.restore import chosen_rows
from tf_lesion.caches.slices import SliceCache
from tf_lesion.calibration.tv_weight import Kept, restored_batches
from tf_lesion.evaluation import metrics
from tf_lesion.evaluation.scans import Cohort


def auc_by_lambda(
    restorer: Any,
    caches: Sequence[dict[str, Any]],
    grid: Sequence[float],
    *,
    kept: Kept,
    max_slices: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> list[float]:
    """Pooled AUC of the residual of patients at each lambda, NaN without lesions.

    The same slices are restored at every lambda with one compiled loop; no image is written.

    Args:
        restorer: `Restorer`.
        caches: of the patients, [dict of arguments of `SliceCache`].
        grid: lambdas.
        kept: finished lambdas, so that a killed sweep goes on with the one it was at.
        max_slices: a random subset of so many slices of each cache.
        seed: of the subset.
        batch_size: slices at once.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(SliceCache(**arguments)) for arguments in caches]
        rows = [chosen_rows(len(cache), max_slices, seed=seed) for cache in opened]
        missing = [weight for weight in grid if f"{weight:g}" not in kept.results]
        total = sum(map(len, rows)) * restorer.restoration.steps * len(missing)
        bar = stack.enter_context(tqdm(total=total, desc="AUC by lambda", unit="slice-step"))

        def residuals(weight: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            given = {"tv_weight": weight, "batch_size": batch_size, "on_progress": bar.update}
            for cache, chosen in zip(opened, rows, strict=True):
                batches = restored_batches(restorer, cache, chosen, **given)
                for batch, observed, restored, mask in batches:
                    label = cache.label(batch)[..., 0]
                    yield np.abs(observed - restored)[mask], label[mask]

        for weight in missing:
            kept.add(f"{weight:g}", pooled_area(residuals(weight)))
    return [kept.results[f"{weight:g}"] for weight in grid]


def pooled_auc(cohorts: Iterable[Cohort]) -> float:
    """AUC of the residual over all brain voxels of all subjects."""
    subjects = (subject for cohort in cohorts for subject in cohort.subjects())
    return pooled_area(
        (subject.score("residual")[subject.mask], subject.truth[subject.mask])
        for subject in subjects
    )


def pooled_area(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """AUC of (scores [V], lesion [V]) taken together."""
    pooled = metrics.PooledScores()
    for scores, lesion in parts:
        pooled.add(scores, lesion)
    return float(metrics.area(pooled.curve()))
