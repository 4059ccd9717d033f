"""Making a calibration: lambda, restored healthy slices, healthy maps, thresholds of scores."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_lesion.caches.restore import check_restored, restore_to_file
from tf_lesion.calibration.file import HEALTHY_SLICES, Calibration
from tf_lesion.calibration.thresholds import check, find_thresholds, left_out
from tf_lesion.calibration.tv_weight import select
from tf_lesion.config import AUTO, TARGETS
from tf_lesion.detection.postprocessing import HealthyResidual, Postprocessing
from tf_lesion.evaluation.scans import Cohort, cache_axes_mm
from tf_lesion.files import InputError
from tf_lesion.provenance import stamp


def calibrate(
    prior: Any,
    cache: str | Path,
    *,
    restored: str | Path,
    tv_weight: float | str | None = None,
    grid: Sequence[float] = (),
    grid_steps: int | None = None,
    grid_slices: int | None = None,
    steps: int | None = None,
    solver: str | None = None,
    postprocess: str = "",
    targets: Sequence[float] = TARGETS,
    method: str = "exact",
    max_slices: int | None = None,
    counts: np.ndarray | None = None,
    crop: tuple[int, ...] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    chosen_by: dict[str, str] | None = None,
    force: bool = False,
) -> Calibration:
    """Choose for a prior, on `Test` of a healthy cache, all that detection needs.

    Thresholds and healthy maps are those of all subjects. How they do on others is measured by
    leaving out one subject after the other (`thresholds.left_out`). A score that needs healthy
    maps then takes, for each subject, those of all the others: one map a subject, so the maps by
    which the others are scored still know the one that is left out. With one subject, and with
    the method "golden", rates are in sample only.

    Args:
        prior: `Prior`.
        cache: the healthy cache.
        restored: file of its restored slices: made, gone on with, or reused if it is just that.
        tv_weight: lambda; "auto" chooses it from `grid`; the prior's own by default.
        grid: lambdas to choose from.
        grid_steps, grid_slices: restoration steps and random slices of that choice.
        steps, solver: of the restoration; the prior's own by default.
        postprocess: steps that make the `score`; "" for none.
        targets: largest healthy false positive rates.
        method: of the residual's thresholds, "exact" or "golden".
        max_slices: restore a random subset of so many.
        counts, crop: of the cache, where it does not say or another is wanted.
        seed: of the noise and of the subsets.
        batch_size: slices at once; it changes speed and memory, not the numbers.
        chosen_by: {"tv_weight", "postprocessing": what decided}, where it was not healthy slices.
        force: restore again, whatever is there.

    Raises:
        InputError: if cache, prior and files do not belong together, or a value makes no sense.
    """
    check(targets, method)
    common = {"seed": seed, "batch_size": batch_size, "crop": crop}
    processing, choice = Postprocessing.parse(postprocess), {}
    reasons = {**(chosen_by or {}), "thresholds": HEALTHY_SLICES}
    partial = Path(restored).with_suffix(".lambda.json")  # a killed calibration goes on with it
    if tv_weight == AUTO:
        if not grid:
            raise InputError("Expected a grid of lambdas to choose tv_weight from, got none.")
        sweep = {"steps": grid_steps, "max_slices": grid_slices, "counts": counts}
        if force:
            partial.unlink(missing_ok=True)
        choice = select(prior, cache, grid, partial=partial, **sweep, **common)
        tv_weight, reasons["tv_weight"] = choice["tv_weight"], HEALTHY_SLICES
    restoration = prior.restoration(tv_weight=tv_weight, steps=steps, solver=solver)
    restoration = processing.restoration(restoration)
    wanted = {"restoration": restoration, "seed": seed, "crop": crop, "max_slices": max_slices}
    if Path(restored).exists() and not force:
        check_restored(restored, prior, cache, **wanted)
    else:
        restore_to_file(prior, cache, restored, batch_size=batch_size, force=force, **wanted)
    cohort = Cohort(restored, cache, counts=counts, crop=crop)
    _check_unchanged(choice, cohort)
    collected = healthy_residual(cohort, needed=processing.needs_healthy)
    healthy = collected.maps() if collected else None
    variants = {"score": processing} if str(processing) else {}
    scored = dataclasses.replace(cohort, variants=variants, healthy=healthy)
    made = Calibration(
        model_identity=prior.identity,
        restoration=prior.describe(restoration, seed=seed),
        points={
            score: _points(scored, score, targets, method=method, collected=collected)
            for score in scored.scores
        },
        tv_weight=restoration.tv_weight if "tv_weight" in prior.uses else None,
        curve=tuple(choice.get("curve", ())),
        postprocessing=str(processing),
        healthy=healthy,
        method=method,
        cache_identity=cohort.settings.get("cache_identity"),
        cohort=_described(cohort) | _described_choice(choice),
        chosen_by=reasons,
        made_with=stamp(),
    )
    if choice:
        partial.unlink(missing_ok=True)
    return made


def _check_unchanged(choice, cohort):
    """Lambda and thresholds are of one cache, whatever happened to the file between them."""
    chosen_on = choice.get("cohort", {}).get("cache_identity")
    if chosen_on not in (None, cohort.settings.get("cache_identity")):
        raise InputError(f"{cohort.cache} was replaced while it was in use; start again.")


def _points(cohort, score, targets, *, method, collected):
    """Thresholds of a score, with the rates of left-out subjects where they are exact."""
    if score not in cohort.variants:
        cohort = dataclasses.replace(cohort, variants={})  # the others need no healthy maps
    method = method if score == "residual" else "exact"
    found = find_thresholds(lambda: _scores(cohort, score), targets, method=method)
    if method != "exact" or len(cohort.positions_by_subject()) < 2:
        return found
    return left_out(found, _scores(cohort, score, collected=collected))


def _scores(cohort, score, *, collected=None):
    """Scores of the brain of each subject; with `collected` by the healthy maps of the others."""
    for subject in cohort.subjects(with_truth=False):
        if collected is not None and subject.healthy is not None:
            slices = subject.observed, subject.restored, subject.mask, subject.axes_mm
            others = collected.without(*slices).maps()
            subject = dataclasses.replace(subject, healthy=others.at(subject.axes_mm))
        yield subject.score(score)[subject.observed > 0]


def healthy_residual(cohort: Cohort, *, needed: bool = False) -> HealthyResidual | None:
    """`HealthyResidual` of the restored slices of healthy subjects.

    Args:
        cohort: `Cohort` of the healthy.
        needed: whether to fail if the cache does not say where its slices lie; else None.
    """
    with cohort.open_cache() as cache:
        known = cache.grid_affine is not None and (cache.index.slice_index >= 0).all()
        if not (known or needed):
            return None
        voxel_size = np.abs(np.diag(cache.grid_affine)[:3]) if known else 1
        depth = int(cache.index.slice_index.max()) + 1
        found = HealthyResidual(np.array([*cache.slice_shape, depth]) * voxel_size)
        for subject in cohort.subjects(with_truth=False):
            axes = cache_axes_mm(cache, subject.rows)
            found.add(subject.observed, subject.restored, subject.mask, axes)
    return found


def _described(cohort):
    counts = [
        (len(subject.rows), int((subject.observed > 0).sum()))
        for subject in cohort.subjects(with_truth=False)
    ]
    slices, voxels = zip(*counts, strict=True)
    return {
        "cache": str(cohort.cache),
        "subjects": len(counts),
        "slices": sum(slices),
        "voxels": sum(voxels),
    }


def _described_choice(choice):
    """What lambda was chosen on, if it was."""
    told = {name: choice[name] for name in ("steps", "solver") if name in choice}
    return {"tv_weight": {**choice["cohort"], **told}} if choice else {}
