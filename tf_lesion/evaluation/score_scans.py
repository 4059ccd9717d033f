"""How well restored scans show their lesions, each scan on its own grid, beside a baseline.

Scores, all of them over the voxels of the restored brain (what of it lies outside the model's
window has residual 0):

    residual    abs(observed - restored), as restore_brats.py --input has written it
    score       the post-processed residual, where it has been written
    equalized   the scan's own intensity, histogram-equalized in the brain: it needs no model

AUC, AUPRC and the largest possible Dice of each; at every stored mask (fpr_0.05) the Dice, the
share of lesions found and the number of false ones. A lesion is a 26-connected component of
labels > 0 in the brain. Writes scans.csv, scans.md and for each scan a picture, SCAN_panel.png.
"""

import argparse
import csv
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.detection.lesions import MM3_PER_ML, lesion_counts
from tf_lesion.evaluation import metrics
from tf_lesion.evaluation.scores import equalized
from tf_lesion.files import InputError, refuse_existing, written_whole
from tf_lesion.report.data import Result, find_results
from tf_lesion.scans.discovery import subject_with_files

EXAMPLE = """example:
  python restore_brats.py --model runs/gmvae --input patients --out maps
  python -m eval.score_scans --results maps --out scores

Takes about 3 s per scan at 1 mm."""

MAPS = ("residual", "score")
COUNTS = ("lesions", "lesion_ml", "outside_brain_ml")
CURVE_HEADS = {"auc": "AUC", "auprc": "AUPRC", "largest_dice": "largest Dice"}
MASK_NUMBERS = ("dice", "lesion_detection_rate", "false_positives")
OVER = ("subject", "pooled", "mean_subject")  # what a row's numbers are taken over
PANEL_SLICES = 5
LOST_SHARE = 0.02  # of the lesion, outside the restored brain; above it a warning says so
NOTES = """\
Largest Dice: at the threshold that suits the truth best. Masks: Dice, lesions found, false ones;
they were made from the score, or from the residual where there is none. Pooled: all voxels and
lesions of all scans. Mean: over scans.
"""


# One scan ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One score of one scan.

    Attributes:
        row: the numbers by the names of the CSV, those of the score and masks as `subject_*`.
        values: [V] score of the voxels of the brain.
        truth: [V] bool, lesion.
        masks: {name: (counts [4, 1] as in `metrics`, `LesionCounts`)}, if made of this score.
    """

    row: dict
    values: np.ndarray = field(repr=False)
    truth: np.ndarray = field(repr=False)
    masks: dict = field(repr=False)


def measure(result, name):
    """[`Measured`], one for each score of a scan.

    Args:
        result: `report_data.Result` with a truth.
        name: of the scan.

    Raises:
        FileNotFoundError, InputError: if a file is missing, or on another grid than the scan.
    """
    brain, truth = result.brain, result.truth & result.brain
    voxel_ml = abs(np.linalg.det(result.scan.affine[:3, :3])) / MM3_PER_ML
    lesions = lesion_counts(truth, truth).lesions
    volumes_ml = [np.count_nonzero(part) * voxel_ml for part in (truth, result.truth & ~brain)]
    about = {"scan": name, **dict(zip(COUNTS, (lesions, *volumes_ml), strict=True))}
    volumes = {key: result.volume(key) for key in MAPS if key in result.facts["files"]}
    made_from = list(volumes)[-1]
    volumes["equalized"] = equalized(result.scan.data, brain)
    measured = []
    for score, volume in volumes.items():
        points = result.facts["lesions"] if score == made_from else ()
        masks = {point: _counts(result.volume(point), brain, truth) for point in points}
        curve = metrics.Curve.from_scores(volume[brain], truth[brain])
        row = {**about, "score": score, **_named("subject", curve_numbers(curve))}
        for point, counts in masks.items():
            row |= _named("subject", mask_numbers([counts]), point)
        measured.append(Measured(row, volume[brain], truth[brain], masks))
    return measured


def _counts(mask, brain, truth):
    detected = (mask > 0) & brain
    return metrics.count_at(detected[brain], truth[brain], [0.0]), lesion_counts(detected, truth)


def curve_numbers(curve):
    """{name: value} as in `CURVE_HEADS`."""
    values = metrics.area(curve), metrics.average_precision(curve), metrics.largest_dice(curve)[0]
    return dict(zip(CURVE_HEADS, values, strict=True))


def mask_numbers(scans):
    """{name: value} of `MASK_NUMBERS` of [(counts, `LesionCounts`)] taken together."""
    counts, lesions = zip(*scans, strict=True)
    total, found = sum(scan.lesions for scan in lesions), sum(scan.found for scan in lesions)
    false = sum(scan.false_positives for scan in lesions)
    values = metrics.dice(np.sum(counts, axis=0))[0], found / total if total else np.nan, false
    return dict(zip(MASK_NUMBERS, values, strict=True))


def _named(over, numbers, mask=""):
    return {f"{over}_{name}{mask and '_'}{mask}": value for name, value in numbers.items()}


# All scans --------------------------------------------------------------------------------------


class Cohort:
    """One score of many scans."""

    def __init__(self, score):
        self._score, self._rows, self._masks = score, [], {}
        self._pooled = metrics.PooledScores()

    def add(self, measured):
        """Take one scan."""
        self._rows.append(measured.row)
        self._pooled.add(measured.values, measured.truth)
        for name, counts in measured.masks.items():
            self._masks.setdefault(name, []).append(counts)

    def rows(self):
        """Two rows: `pooled_*` over all voxels and lesions, `mean_subject_*` over the scans."""
        about = {"score": self._score}
        pooled = {"scan": f"pooled over {len(self._rows)}", **about}
        pooled |= {name: sum(row[name] for row in self._rows) for name in COUNTS}
        pooled |= _named("pooled", curve_numbers(self._pooled.curve()))
        for name, scans in self._masks.items():
            pooled |= _named("pooled", mask_numbers(scans), name)
        mean = {"scan": f"mean over {len(self._rows)}", **about}
        for name in dict.fromkeys(name for row in self._rows for name in row):
            if name in COUNTS or name.startswith("subject_"):
                values = [row.get(name, np.nan) for row in self._rows]
                key = name if name in COUNTS else f"mean_{name}"
                mean[key] = metrics.mean_and_std(values)[0]
        return [pooled, mean]


def read_results(folders, *, seg=None, seg_pattern=None):
    """{name: `Result`} of the restored scans that have a truth; warns of those that have none.

    Args:
        folders: of maps, at any depth.
        seg: segmentation of the one scan.
        seg_pattern: glob of the segmentations from the folder of each scan, with {subject}.

    Raises:
        FileNotFoundError, InputError: if there are no maps or no truth, or one scan twice.
    """
    paths = [path for folder in folders for path in find_results(folder)]
    if seg and len(paths) > 1:
        raise InputError(f"--seg is for one scan, found {len(paths)}; give --seg-pattern.")
    results = [Result.read(path, truth=seg) for path in paths]
    scan, times = Counter(result.scan_path for result in results).most_common(1)[0]
    if times > 1:
        raise InputError(f"Expected each scan once in --results, got {times} maps of {scan}.")
    found = {}
    for name, result in zip(names_of(results), results, strict=True):
        try:
            found[name] = _with_truth(result, seg_pattern)
        except InputError as problem:
            print(f"warning: {name} is left out: {problem}", file=sys.stderr)
    if not found:
        raise InputError("Expected a segmentation of one scan at least; try --seg-pattern.")
    return found


def names_of(results):
    """One name for each scan; where names repeat, the folders of the maps go before them."""
    names = [result.facts["name"].replace("/", "_") for result in results]
    if len(set(names)) < len(names):
        names = [f"{r.facts_path.parent.name}_{n}" for r, n in zip(results, names, strict=True)]
    if len(set(names)) < len(names):
        raise InputError(f"Expected scans with different names, got {', '.join(sorted(names))}.")
    return names


def _with_truth(result, seg_pattern):
    if seg_pattern:
        scan, name = result.scan_path, result.facts["name"]
        subject = subject_with_files(name, scan, scan.parent, seg_pattern=seg_pattern)
        if subject.problem:
            raise InputError(subject.problem)
        return Result.read(result.facts_path, truth=subject.label)
    if result.truth_path is None:
        noted = result.facts.get("truth")
        raise InputError(f"no segmentation {'at ' + noted if noted else 'was noted'}.")
    return result


# Output -----------------------------------------------------------------------------------------


def draw(path, result, rows, *, force=False):
    """Write the picture of a scan: the slices with most lesion, and the AUC of its `rows`."""
    from tf_lesion.evaluation import plots
    from tf_lesion.report.pictures import montage_figure, montage_slices

    area = np.count_nonzero(result.truth & result.brain, axis=(0, 1))
    chosen = np.sort(np.argsort(-area, kind="stable")[:PANEL_SLICES])
    chosen = chosen[area[chosen] > 0]
    if not chosen.size:
        chosen = montage_slices(result.brain, result.mask, count=PANEL_SLICES)
    figure = montage_figure(result, chosen)
    areas = ", ".join(f"{row['score']} {row['subject_auc']:.3f}" for row in rows)
    figure.suptitle(f"{rows[0]['scan']}: AUC of {areas}", color="white", fontsize=9)
    key = f"truth: blue, dashed{f'; {result.point}: yellow' if result.point else ''}"
    figure.supxlabel(key, color="white", fontsize=8)
    plots.save(figure, path, force=force)


def table(rows):
    """A Markdown table, its columns padded for the terminal."""
    start = "subject_dice_"
    masks = [name.removeprefix(start) for name in _columns(rows) if name.startswith(start)]
    heads = ["scan", "score", "lesions", "ml", *CURVE_HEADS.values()]
    lines = [heads + [f"{mask}: Dice, found, false" for mask in masks]]
    for row in rows:
        counts = [f"{round(row['lesions'], 1):g}", f"{row['lesion_ml']:.2f}"]
        numbers = [_shown(row, name) for name in CURVE_HEADS]
        lines.append([row["scan"], row["score"], *counts, *numbers])
        lines[-1] += [_mask_cell(row, mask) for mask in masks]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _mask_cell(row, mask):
    names = [f"{name}_{mask}" for name in MASK_NUMBERS]
    cells = [
        _shown(row, name, form) for name, form in zip(names, ("0.3f", "0.0%", "g"), strict=True)
    ]
    return "" if set(cells) == {"-"} else ", ".join(cells)


def _shown(row, name, form="0.3f"):
    value = next((row[f"{over}_{name}"] for over in OVER if f"{over}_{name}" in row), np.nan)
    return "-" if np.isnan(value) else format(value, form)


def _columns(rows):
    return list(dict.fromkeys(name for row in rows for name in row))


def write_tables(out, rows, *, force=False):
    """Write `scans.csv`, all numbers in full, and `scans.md`; returns the text of the latter."""
    with written_whole(out / "scans.csv", force=force) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)
    text = f"{table(rows)}\n\n{NOTES}"
    with written_whole(out / "scans.md", force=force) as path:
        path.write_text(text)
    return text


def parser():
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m eval.score_scans",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    add = arguments.add_argument
    add(
        "--results", required=True, type=Path, nargs="+", help="folders of restore_brats.py --input"
    )
    add("--out", required=True, type=Path, help="folder for the tables and pictures")
    add = arguments.add_mutually_exclusive_group().add_argument
    add(
        "--seg",
        type=Path,
        help="segmentation of the one scan, NIfTI on its grid; default: CASE_seg beside CASE_t2",
    )
    add("--seg-pattern", help="glob of segmentations from the folder of each scan, with {subject}")
    arguments.add_argument("--force", action="store_true", help="overwrite")
    return arguments


@command
def main(argv=None):
    """Measure restored scans: write tables and pictures, print the table."""
    options = parser().parse_args(argv)
    from tqdm import tqdm

    results = read_results(options.results, seg=options.seg, seg_pattern=options.seg_pattern)
    panels = {name: options.out / f"{name}_panel.png" for name in results}
    for path in (options.out / "scans.csv", options.out / "scans.md", *panels.values()):
        refuse_existing(path, force=options.force)
    rows, cohorts = [], {}
    for name, result in tqdm(results.items(), "scans", unit="scan"):
        result = replace(result)  # a copy forgets the volumes it has read when it goes
        measured = measure(result, name)
        for part in measured:
            score = part.row["score"]
            cohorts.setdefault(score, Cohort(score)).add(part)
        rows += [part.row for part in measured]
        draw(panels[name], result, [part.row for part in measured], force=options.force)
        _warn_of_lost(rows[-1])
    if len(results) > 1:
        rows += [row for cohort in cohorts.values() for row in cohort.rows()]
    print(write_tables(options.out, rows, force=options.force), end="")
    return 0


def _warn_of_lost(row):
    lost = row["outside_brain_ml"]
    if lost > LOST_SHARE * (lost + row["lesion_ml"]):
        text = f"{lost:.2f} ml of its lesions are outside the restored brain and not counted"
        print(f"warning: {row['scan']}: {text}.", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
