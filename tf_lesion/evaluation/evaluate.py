"""How well restored slices show the lesions: AUC, Dice, lesions found, beside two baselines.

Two passes over the subjects, one in memory at a time: the first collects the pooled curves and what
belongs to one subject alone, the second counts at the thresholds that the first has given.
"""

import argparse
import csv
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
from eval.thresholds import load_thresholds, model_id
from tqdm import tqdm

from tf_lesion import __version__
from tf_lesion.caches.slices import read_counts
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.detection.lesions import stack_volume
from tf_lesion.detection.postprocessing import Postprocessing
from tf_lesion.evaluation import metrics, plots
from tf_lesion.evaluation.measurement import YOUDEN, Census, ScoreEvaluation
from tf_lesion.evaluation.scores import Cohort
from tf_lesion.files import InputError, refuse_existing, written_whole

PROTOCOLS = ("all", "released")
PANEL_SLICES = 7  # columns of the paper's Figure 1
PANEL_POINTS = ("dsc5", YOUDEN)  # the first of these that is there makes the panel's detection

HEADS = ("score", "AUC", "mean AUC", "AUPRC", "FPR", "FNR", "best", "lesions", "FP/scan")
NOTES = (
    "AUC, AUPRC, FPR, FNR: all voxels pooled; FPR, FNR, lesions found and false positives per scan "
    "at DSC_AUC's threshold.",
    "mean AUC, DSC*, best (largest possible Dice): mean over subjects, ± std. DSC_AUC and best "
    "choose their thresholds by the labels.",
)

EXAMPLE = """example:
  python -m eval.evaluate --restored restored.h5 --cache patients.h5 --out results \\
      --thresholds thresholds.json
"""


def evaluate(
    cohorts,
    *,
    protocol="all",
    thresholds=None,
    seed=0,
    panel_slices=PANEL_SLICES,
    progress=True,
):
    """Measure the residual and the baselines on one or several cohorts, pooled in the given order.

    Args:
        cohorts: list of `Cohort`.
        protocol: "all" or "released".
        thresholds: `Thresholds` from healthy subjects, or None.
        seed: of the bootstrap.
        panel_slices: columns of the panel.
        progress: show a progress bar.

    Returns:
        (results, panel): what was measured as nested dictionaries, and the `Panel` slices.

    Raises:
        InputError: if files do not belong together, or no brain voxel is left.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"Expected a protocol of {', '.join(PROTOCOLS)}, got {protocol!r}.")
    points = thresholds.points if thresholds else {}
    scores = {name: ScoreEvaluation(protocol, points.get(name, ())) for name in cohorts[0].scores}
    census, panel = Census(), Panel(panel_slices)
    for subject in _each(cohorts, "pooled curves", progress):
        census.add(subject)
        panel.consider(subject)
        for name, measured in scores.items():
            measured.first_pass(subject.score(name)[subject.mask], subject.truth[subject.mask])
    census.check()
    for measured in scores.values():
        measured.close_first_pass()
    for subject in _each(cohorts, "thresholds", progress):
        volume_of = _volume_maker(subject)
        for name, measured in scores.items():
            inside = subject.mask
            measured.second_pass(subject.score(name)[inside], subject.truth[inside], volume_of)
    weights = metrics.bootstrap_weights(len(census.subject_ids), seed=seed)
    results = {name: measured.result(weights) for name, measured in scores.items()}
    return {"cohort": census.summary(), "scores": results}, panel


def _each(cohorts, what, progress):
    total = sum(len(cohort.positions_by_subject()) for cohort in cohorts)
    subjects = (subject for cohort in cohorts for subject in cohort.subjects())
    return tqdm(subjects, what, total=total, unit="subject", disable=not progress)


def _volume_maker(subject):
    """A function: brain voxels [V] -> volume [H, W, Z], or None if axial positions are unknown."""
    known = (subject.slice_index >= 0).all()

    def volume_of(values):
        slices = np.zeros(subject.mask.shape, dtype=bool)
        slices[subject.mask] = values
        return stack_volume(slices, subject.slice_index) if known else None

    return volume_of


class Panel:
    """The slices for the picture: the largest lesion of each subject, of those the largest few."""

    def __init__(self, num_slices=PANEL_SLICES):
        self._num_slices, self._kept = num_slices, []

    def consider(self, subject):
        """Look at one subject; keep its slice with the most lesion pixels if that is large."""
        areas = subject.truth.sum(axis=(1, 2))
        best = int(np.argmax(areas))
        title = f"{subject.subject_id}\nslice {subject.slice_index[best]}"
        images = (subject.observed, subject.restored, subject.score("residual"), subject.truth)
        self._kept.append((int(areas[best]), title, *(image[best].copy() for image in images)))
        self._kept.sort(key=lambda kept: -kept[0])
        del self._kept[self._num_slices :]

    def arrays(self):
        """What is kept: titles [n]; observed, restored, residual and truth [n, H, W]."""
        names = ("area", "titles", "observed", "restored", "residual", "truth")
        arrays = dict(zip(names, map(np.stack, zip(*self._kept, strict=True)), strict=True))
        del arrays["area"]
        return arrays

    def write(self, path, points, *, pdf=False, force=True):
        """Draw the slices, the detection at the first of `PANEL_POINTS` in `points`."""
        name = next((name for name in PANEL_POINTS if name in points), None)
        threshold = points[name]["threshold"] if name else math.inf
        arrays = self.arrays()
        plots.panel(
            path,
            **arrays,
            detection=arrays["residual"] > threshold,
            threshold_name=f"{name.upper()}, > {threshold:.3f}" if name else "no threshold",
            pdf=pdf,
            force=force,
        )


# Output ---------------------------------------------------------------------------------------


def table(results):
    """The printed table: one row per score, columns as in the paper's Table 1."""
    names = list(dict.fromkeys(n for score in results["scores"].values() for n in score["points"]))
    lines = [[*HEADS[:6], *(name.upper() for name in names), *HEADS[6:]]]
    lines += [_row(score, measured, names) for score, measured in results["scores"].items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join([*rows, *NOTES])


def _row(score, measured, names):
    at = measured["points"].get(YOUDEN, {})
    pooled = [measured[key] for key in ("pooled_auc", "mean_subject_auc", "pooled_auprc")]
    return [
        score,
        *map(_number, [*pooled, at.get("pooled_fpr"), at.get("pooled_fnr")]),
        *(_plus_minus(measured["points"].get(name)) for name in names),
        _number(measured["mean_subject_largest_dice"]),
        _number(at.get("lesion_detection_rate")),
        _number(at.get("false_positives_per_scan"), digits=1),
    ]


def _number(value, *, digits=3):
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _plus_minus(point):
    if point is None:
        return "-"
    return f"{_number(point['mean_subject_dice'])}±{_number(point['std_subject_dice'])}"


def _plain(value):
    """JSON-serialisable copy; NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def write_results(results, out, *, force=False):
    """Write `metrics.json` and `subjects.csv` into the folder `out`."""
    out = Path(out)
    with written_whole(out / "metrics.json", force=force) as temporary:
        temporary.write_text(json.dumps(_plain(results), indent=1) + "\n")
    cohort = results["cohort"]
    columns = {name[8:]: cohort[name] for name in cohort if name.startswith("subject_")}
    for score, measured in results["scores"].items():
        columns |= {f"{score}_{name}": values for name, values in measured["subjects"].items()}
        for point, at in measured["points"].items():
            columns[f"{score}_{point}"] = at["subjects"]["dice"]
    with written_whole(out / "subjects.csv", force=force) as temporary, temporary.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def parser():
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m eval.evaluate",
        description="Measure how well restored slices show the lesions.",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    add = arguments.add_argument
    add(
        "--restored",
        required=True,
        type=Path,
        nargs="+",
        help="restored slices, a file per cache",
    )
    add("--cache", required=True, type=Path, nargs="+", help="the caches they came from, in order")
    add("--out", required=True, type=Path, help="folder for metrics.json, subjects.csv, panel.png")
    add("--labels", type=Path, nargs="+", help="files with Label, for caches without")
    add("--subjects", type=Path, nargs="+", help="slices per subject (.npy), for released caches")
    add(
        "--crop",
        type=int,
        nargs=4,
        metavar=("X0", "X1", "Y0", "Y1"),
        help="window, pixels, as in the restoration",
    )
    add("--thresholds", type=Path, help="thresholds of the same model on healthy subjects")
    add("--postprocess", help="also measure the residual after these steps, as in restore_brats.py")
    add("--healthy", type=Path, help="healthy maps of eval.healthy_residual, for its normalize")
    add("--protocol", choices=PROTOCOLS, default="all", help="all voxels, or the 401 thresholds")
    add("--seed", type=int, default=0, help="of the bootstrap intervals")
    add("--pdf", action="store_true", help="also write panel.pdf")
    add("--force", action="store_true", help="overwrite the results in --out")
    return arguments


def _cohorts(options):
    files = {"--cache": options.cache, "--labels": options.labels, "--subjects": options.subjects}
    number = len(options.restored)
    for flag, paths in files.items():
        if paths is not None and len(paths) != number:
            raise InputError(f"Expected {number} files with {flag}, one per --restored.")
    labels = options.labels or [None] * number
    counts = [read_counts(path) for path in options.subjects or ()] or [None] * number
    steps = Postprocessing.parse(options.postprocess) if options.postprocess else None
    return [
        Cohort(*paths, postprocessing=steps, healthy=options.healthy)
        for paths in zip(options.restored, options.cache, labels, counts, strict=True)
    ]


def _load_thresholds(path, cohorts):
    thresholds = None
    for cohort in cohorts if path else ():
        used = cohort.settings
        thresholds = load_thresholds(path, model_id=model_id(used), restoration=used)
    return thresholds


@command
def main(argv=None):
    """Evaluate restored slices: write the results, print the table."""
    options = parser().parse_args(argv)
    for name in ("metrics.json", "subjects.csv", "panel.png"):
        refuse_existing(options.out / name, force=options.force)
    cohorts = _cohorts(options)
    thresholds = _load_thresholds(options.thresholds, cohorts)
    results, panel = evaluate(
        cohorts, protocol=options.protocol, thresholds=thresholds, seed=options.seed
    )
    settings = {
        "protocol": options.protocol,
        "seed": options.seed,
        "restored": [str(cohort.restored) for cohort in cohorts],
        "cache": [str(cohort.cache) for cohort in cohorts],
        "restoration": [cohort.settings for cohort in cohorts],
        "thresholds": asdict(thresholds) if thresholds else None,
    }
    results = {"tf_lesion_version": __version__, "settings": settings, **results}
    write_results(results, options.out, force=options.force)
    points = results["scores"]["residual"]["points"]
    panel.write(options.out / "panel.png", points, pdf=options.pdf, force=options.force)
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
