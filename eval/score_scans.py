"""How well restored scans show their lesions, each scan on its own grid, beside a baseline.

Scores, all of them over the voxels of the restored brain:

    residual    abs(observed - restored), as restore_brats.py --input has written it
    score       the post-processed residual, where it has been written
    equalized   the scan's own intensity, histogram-equalized in the brain: it needs no model

AUC, AUPRC and the largest possible Dice of each; at every stored mask (fpr_0.05) the Dice, the share
of lesions found and the number of false ones. A lesion is a 26-connected component of labels > 0 in
the brain. Writes scans.csv (all numbers), scans.md and for each scan a picture, SCAN_panel.png.
"""

import argparse
import csv
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from eval import metrics
from eval.lesions import MM3_PER_ML, lesion_counts
from eval.report_data import Result, find_results
from eval.scores import equalized
from eval.tables import number
from preprocessing.discovery import subject_with_files
from tf_lesion.files import HelpFormatter, InputError, command, refuse_existing, written_whole

EXAMPLE = """example:
  python restore_brats.py --model runs/gmvae --input patients --out maps
  python -m eval.score_scans --results maps --out scores"""

CURVE_NUMBERS = {"auc": "AUC", "auprc": "AUPRC", "largest_dice": "largest Dice"}
MASK_NUMBERS = ("dice", "lesion_detection_rate", "false_positives")
PANEL_SLICES = 5
LOST_SHARE = 0.02  # of the lesion, outside the restored brain; above it a warning says so
NOTES = (
    "Largest Dice: at the threshold that suits the truth best. Masks: Dice, share of lesions "
    "found, false ones per scan; they belong to the score, or without one to the residual."
)
POOLED_NOTES = "Pooled: over the voxels or lesions of all scans. Mean: over scans."


# One scan ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskCounts:
    """What one stored mask finds in one scan: voxels [4, 1] as in `metrics`, `LesionCounts`."""

    voxels: np.ndarray
    lesions: object

    def numbers(self):
        """{name: value} of `MASK_NUMBERS`."""
        found, total = self.lesions.found, self.lesions.lesions
        values = (
            float(metrics.dice(self.voxels)[0]),
            found / total if total else np.nan,
            self.lesions.false_positives,
        )
        return dict(zip(MASK_NUMBERS, values, strict=True))


@dataclass(frozen=True)
class Measured:
    """One score of one scan.

    Attributes:
        row: what the table says; numbers of this scan alone begin with `subject_`.
        values: [V] score of the voxels of the brain.
        truth: [V] bool, lesion.
        masks: {name: `MaskCounts`}, empty if the masks are not of this score.
    """

    row: dict
    values: np.ndarray = field(repr=False)
    truth: np.ndarray = field(repr=False)
    masks: dict = field(repr=False)


def measure(result, name):
    """The `Measured` of every score of a scan.

    Args:
        result: `report_data.Result` with a truth.
        name: of the scan.

    Raises:
        FileNotFoundError, InputError: if a file is missing, or on another grid than the scan.
    """
    # Voxels of the brain that are restored to 0 exactly do not occur, some below 0 do.
    brain, truth = result.brain, result.truth & result.brain
    voxel_ml = abs(np.linalg.det(result.scan.affine[:3, :3])) / MM3_PER_ML
    about = {
        "scan": name,
        "lesions": lesion_counts(truth, truth).lesions,
        "lesion_ml": np.count_nonzero(truth) * voxel_ml,
        "outside_brain_ml": np.count_nonzero(result.truth & ~brain) * voxel_ml,
    }
    maps = [key for key in ("residual", "score") if key in result.facts["files"]]
    volumes = {key: result.volume(key) for key in maps}
    volumes["equalized"] = equalized(result.scan.data, brain)
    masks = {key: _mask_counts(result.volume(key), brain, truth) for key in result.facts["lesions"]}
    return [
        _measured(
            {**about, "score": key},
            volume[brain],
            truth[brain],
            masks if key == maps[-1] else {},
        )
        for key, volume in volumes.items()
    ]


def _mask_counts(detected, brain, truth):
    detected = (detected > 0) & brain
    voxels = metrics.count_at(detected[brain], truth[brain], [0.0])
    return MaskCounts(voxels, lesion_counts(detected, truth))


def _measured(row, values, truth, masks):
    row |= _named("subject", curve_numbers(metrics.Curve.from_scores(values, truth)))
    for name, counts in masks.items():
        row |= _named("subject", counts.numbers(), name)
    return Measured(row, values, truth, masks)


def curve_numbers(curve):
    """{name: value} of `CURVE_NUMBERS`."""
    values = metrics.area(curve), metrics.average_precision(curve), metrics.largest_dice(curve)[0]
    return dict(zip(CURVE_NUMBERS, values, strict=True))


def _named(over, numbers, mask=""):
    """Numbers with what they were taken over in front, and the mask behind."""
    end = f"_{mask}" if mask else ""
    return {f"{over}_{name}{end}": value for name, value in numbers.items()}


# All scans --------------------------------------------------------------------------------------


class Cohort:
    """Collects one score of many scans."""

    def __init__(self):
        self.rows = []
        self._pooled, self._masks = metrics.PooledScores(), {}

    def add(self, measured):
        """Take one scan."""
        self.rows.append(measured.row)
        self._pooled.add(measured.values, measured.truth)
        for name, counts in measured.masks.items():
            self._masks.setdefault(name, []).append(counts)

    def row(self):
        """Numbers `pooled_*` over all scans and `mean_subject_*`, undefined ones left out."""
        row = {"scan": f"all {len(self.rows)} scans", "score": self.rows[0]["score"]}
        for name in ("lesions", "lesion_ml", "outside_brain_ml"):
            row[name] = sum(scan[name] for scan in self.rows)
        row |= _named("pooled", curve_numbers(self._pooled.curve()))
        for name, counts in self._masks.items():
            row |= _named("pooled", _pooled_mask(counts), name)
        columns = dict.fromkeys(name for scan in self.rows for name in scan)
        for name in (name for name in columns if name.startswith("subject_")):
            of_scans = [scan.get(name, np.nan) for scan in self.rows]
            row[f"mean_{name}"] = metrics.mean_and_std(of_scans)[0]
        return row


def _pooled_mask(counts):
    """Dice of all voxels and share of all lesions; false ones are counted per scan."""
    lesions = sum(scan.lesions.lesions for scan in counts)
    found = sum(scan.lesions.found for scan in counts)
    values = metrics.dice(sum(scan.voxels for scan in counts))[0], found / max(lesions, 1)
    return dict(zip(MASK_NUMBERS, values, strict=False))


def read_results(folders, *, seg=None, seg_pattern=None):
    """[(name, `Result`)] of the restored scans that have a truth; warns of those that have none.

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
    twice = [path for path, n in Counter(result.scan_path for result in results).items() if n > 1]
    if twice:
        raise InputError(f"Expected each scan once, {twice[0]} was restored twice in --results.")
    found = []
    for name, result in zip(names_of(results), results, strict=True):
        result, problem = _with_truth(result, seg_pattern)
        if problem:
            print(f"warning: {name}: {problem}; left out", file=sys.stderr)
        else:
            found.append((name, result))
    if not found:
        raise InputError(
            "Expected a segmentation of at least one scan, found none; give --seg or --seg-pattern."
        )
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
    """(`Result`, what is wrong with its truth or "")."""
    if seg_pattern:
        scan, name = result.scan_path, result.facts["name"]
        subject = subject_with_files(name, scan, scan.parent, seg_pattern=seg_pattern)
        if subject.problem:
            return result, subject.problem
        result = Result.read(result.facts_path, truth=subject.label)
    if result.truth_path is None:
        noted = result.facts.get("truth")
        return result, f"its segmentation {noted} is gone" if noted else "it has no segmentation"
    return result, ""


# Output -----------------------------------------------------------------------------------------


def draw(path, result, rows, *, force=False):
    """Write the picture of a scan: the slices with most lesion, with what was measured."""
    from eval import plots
    from eval.report_pictures import montage_figure, montage_slices

    area = np.count_nonzero(result.truth & result.brain, axis=(0, 1))
    chosen = np.sort(np.argsort(-area, kind="stable")[:PANEL_SLICES])
    chosen = chosen[area[chosen] > 0]
    if not chosen.size:
        chosen = montage_slices(result.brain, result.mask, count=PANEL_SLICES)
    figure = montage_figure(result, chosen)
    areas = ", ".join(f"{row['score']} {number(row['subject_auc'])}" for row in rows)
    figure.suptitle(f"{rows[0]['scan']}: AUC {areas}", color="white", fontsize=9)
    figure.supxlabel("truth: blue, dashed; detected: yellow", color="white", fontsize=8)
    plots.save(figure, path, force=force)


def table(rows, masks, *, over):
    """A Markdown table of rows whose numbers begin with `over`, its columns padded."""
    mask_heads = [f"{name}: Dice, found, false" for name in masks]
    lines = [["scan", "score", "lesions", "ml", *CURVE_NUMBERS.values(), *mask_heads]]
    for row in rows:
        numbers = [number(row[f"{over}_{name}"]) for name in CURVE_NUMBERS]
        cells = [_mask_cell(row, over, name) for name in masks]
        ml = number(row["lesion_ml"], digits=2)
        lines.append([row["scan"], row["score"], str(row["lesions"]), ml, *numbers, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _mask_cell(row, over, mask):
    if f"{over}_dice_{mask}" not in row:
        return ""
    dice, share, false = (row.get(f"{over}_{name}_{mask}", np.nan) for name in MASK_NUMBERS)
    found = "-" if np.isnan(share) else f"{share:.0%}"
    return f"{number(dice)}, {found}, {number(false, digits=1)}"


def write_tables(out, rows, cohort, *, force=False):
    """Write `scans.csv` and `scans.md`; returns the text of the latter."""
    columns = dict.fromkeys(name for row in [*rows, *cohort] for name in row)
    with written_whole(out / "scans.csv", force=force) as temporary:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(rows + cohort)
    start = "subject_dice_"
    masks = [name.removeprefix(start) for name in columns if name.startswith(start)]
    parts = [table(rows, masks, over="subject"), NOTES]
    for over, title in (("pooled", "Pooled"), ("mean_subject", "Mean")) if cohort else ():
        parts += [f"{title}:", table(cohort, masks, over=over)]
    text = "\n\n".join([*parts, *([POOLED_NOTES] if cohort else [])]) + "\n"
    with written_whole(out / "scans.md", force=force) as temporary:
        temporary.write_text(text)
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
    truth = arguments.add_mutually_exclusive_group()
    truth.add_argument(
        "--seg",
        type=Path,
        help="segmentation of the one scan, NIfTI on its grid; default: CASE_seg beside CASE_t2",
    )
    truth.add_argument(
        "--seg-pattern", help="glob of segmentations, from the folder of each scan, with {subject}"
    )
    add("--force", action="store_true", help="overwrite")
    return arguments


@command
def main(argv=None):
    """Measure restored scans: write tables and pictures, print the table."""
    options = parser().parse_args(argv)
    from tqdm import tqdm

    results = read_results(options.results, seg=options.seg, seg_pattern=options.seg_pattern)
    panels = [options.out / f"{name}_panel.png" for name, _ in results]
    for path in (options.out / "scans.csv", options.out / "scans.md", *panels):
        refuse_existing(path, force=options.force)
    cohorts = {}
    rows = []
    for panel, (name, result) in zip(panels, tqdm(results, "scans", unit="scan"), strict=True):
        result = replace(result)  # a copy forgets the volumes it has read when it goes
        measured = measure(result, name)
        for score in measured:
            cohorts.setdefault(score.row["score"], Cohort()).add(score)
        rows += [score.row for score in measured]
        draw(panel, result, [score.row for score in measured], force=options.force)
        _warn_of_lost(measured[0].row)
    several = [cohort.row() for cohort in cohorts.values()] if len(results) > 1 else []
    print(write_tables(options.out, rows, several, force=options.force), end="")
    return 0


def _warn_of_lost(row):
    lost = row["outside_brain_ml"]
    if lost > LOST_SHARE * (lost + row["lesion_ml"]):
        text = f"{lost:.2f} ml of its lesions are outside the restored brain, not counted"
        print(f"warning: {row['scan']}: {text}.", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
