r"""What each post-processing step does for detection, alone and together.

    python -m eval.compare_postprocessing --restored restored.h5 --cache patients.h5 \
        --steps normalize,signed,median=3,erode=2 --healthy runs/gmvae/healthy_residual.npz \
        --out steps.csv

seeds and flip are done while restoring: give a file for each of them to --restored as well, made by
restore_brats.py --postprocess seeds=4 and so on.
"""

import argparse
import csv
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.detection.postprocessing import Postprocessing
from tf_lesion.evaluation import metrics
from tf_lesion.evaluation.scores import AVERAGES, Cohort
from tf_lesion.files import InputError, refuse_existing, written_whole

BASELINE = "equalized"
MEASURES = ("pooled_auc", "pooled_auprc", "mean_subject_auc", "mean_subject_auprc")


def variants_of(steps, *, every=False):
    """{name: `Postprocessing`}: none of the steps, each alone, all; or every combination.

    Args:
        steps: `Postprocessing`; what averages restorations is left out, files differ in it.
        every: all combinations.
    """
    none = Postprocessing()
    names = [f.name for f in fields(steps) if f.name not in AVERAGES]
    names = [name for name in names if getattr(steps, name) != getattr(none, name)]
    counts = range(len(names) + 1) if every else dict.fromkeys((0, 1, len(names)))
    chosen = [part for count in counts for part in combinations(names, count)]
    made = [replace(none, **{name: getattr(steps, name) for name in part}) for part in chosen]
    return {str(variant) or "plain": variant for variant in made}


def compare(cohorts, variants, *, progress=True):
    """Measure every variant on every cohort of restored slices.

    Args:
        cohorts: [`Cohort`], with healthy maps if a variant normalizes.
        variants: {name: `Postprocessing`}.
        progress: show a progress bar.

    Returns:
        [{restored, seeds, flip, steps, and `MEASURES`}], the baseline last in each cohort.
    """
    rows = []
    for cohort in cohorts:
        pooled = {name: metrics.PooledScores() for name in (*variants, BASELINE)}
        curves = {name: [] for name in pooled}
        subjects = tqdm(
            cohort.subjects(), str(cohort.restored), unit="subject", disable=not progress
        )
        for subject in subjects:
            inside, truth = subject.mask, subject.truth[subject.mask]
            for name in pooled:
                score = (
                    subject.score(BASELINE)
                    if name == BASELINE
                    else subject.processed(variants[name])
                )
                pooled[name].add(score[inside], truth)
                curve = metrics.Curve.from_scores(score[inside], truth)
                curves[name].append((metrics.area(curve), metrics.average_precision(curve)))
        used = {name: cohort.settings.get(name) for name in AVERAGES}
        for name, scores in pooled.items():
            curve = scores.curve()
            values = (metrics.area(curve), metrics.average_precision(curve))
            values += tuple(np.nanmean(curves[name], axis=0).tolist())
            measured = dict(zip(MEASURES, values, strict=True))
            rows.append({"restored": str(cohort.restored), **used, "steps": name, **measured})
    return rows


def parser():
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m eval.compare_postprocessing",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add = arguments.add_argument
    add("--restored", required=True, type=Path, nargs="+", help="restored slices of patients")
    add("--cache", required=True, type=Path, nargs="+", help="their cache, or a cache for each")
    add("--steps", required=True, help="as in restore_brats.py --postprocess")
    add("--healthy", type=Path, help="healthy maps of eval.healthy_residual, for normalize")
    add("--all-combinations", action="store_true", help="not only each step alone and all together")
    add("--out", required=True, type=Path, help="CSV to write")
    add("--force", action="store_true", help="overwrite --out")
    return arguments


@command
def main(argv=None):
    """Measure, print and write the comparison."""
    options = parser().parse_args(argv)
    refuse_existing(options.out, force=options.force)
    steps = Postprocessing.parse(options.steps)
    caches = options.cache * (len(options.restored) if len(options.cache) == 1 else 1)
    if len(caches) != len(options.restored):
        raise InputError(
            f"Expected one --cache, or one for each of {len(options.restored)} restored files, got "
            f"{len(caches)}."
        )
    cohorts = [
        Cohort(restored, cache, postprocessing=_score_steps(steps), healthy=options.healthy)
        for restored, cache in zip(options.restored, caches, strict=True)
    ]
    cohorts = [_with_own_averages(cohort) for cohort in cohorts]
    rows = compare(cohorts, variants_of(steps, every=options.all_combinations))
    with written_whole(options.out, force=options.force) as temporary, temporary.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))
    return 0


def _score_steps(steps):
    return replace(steps, **{name: getattr(Postprocessing(), name) for name in AVERAGES})


def _with_own_averages(cohort):
    used = {name: cohort.settings[name] for name in AVERAGES if name in cohort.settings}
    return replace(cohort, postprocessing=replace(cohort.postprocessing, **used))


def table(rows):
    """The rows as text."""
    heads = [name.replace("_", " ") for name in MEASURES]
    width = max(len(row["steps"]) for row in rows)
    lines = []
    for number, row in enumerate(rows):
        if number == 0 or row["restored"] != rows[number - 1]["restored"]:
            averaged = ", ".join(f"{name} {row[name]}" for name in AVERAGES)
            lines += [f"{row['restored']} ({averaged})", "  ".join([" " * width, *heads])]
        values = [f"{row[name]:{len(head)}.3f}" for name, head in zip(MEASURES, heads, strict=True)]
        lines.append("  ".join([row["steps"].ljust(width), *values]))
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
