"""What was measured, as Markdown tables for people; the numbers in full are in the CSV files."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from tf_lesion.evaluation.measure import Measured

NOTES = """\
Pooled: all voxels and lesions of all scans; mean: over scans, ± std. Intervals: 95 %, bootstrap \
over scans, those of one subject or group together. dsc_auc: the threshold with the largest \
TPR - FPR; it and the largest Dice are chosen by the labels. Lesions: connected, in the brain, \
through neighbors among the slices that were kept; "-" where slices lack in between. Unless \
asked otherwise, 26 neighbors connect, and one voxel of a lesion is enough to find it.
"""


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits, "-" for none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def plus_minus(mean: float | None, std: float | None, digits: int = 3) -> str:
    """Mean ± std."""
    return "-" if number(mean) == "-" else f"{number(mean, digits)} ± {number(std, digits)}"


def with_interval(row: Any, name: str, digits: int = 3) -> str:
    """A number of a row and, if it has one, its interval `NAME_low` to `NAME_high`."""
    low, high = (number(row.get(f"{name}_{end}"), digits) for end in ("low", "high"))
    return number(row.get(name), digits) + (f" [{low}, {high}]" if low != "-" else "")


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table of texts, its columns padded for the terminal."""
    lines = [list(rows[0]), *([row[name] for name in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def report(
    measured: Measured, *, each_scan: bool = True, missing: Sequence[tuple[str, str, bool]] = ()
) -> str:
    """The tables of scores, masks and, if wanted, scans; what their columns mean, what is missing.

    Args:
        measured: what was measured.
        each_scan: whether the scans have a table.
        missing: (name, reason, whether it is damaged) of each scan that is in none.
    """
    scores = measured.scores.to_dict("records")
    tables = [[_score(row) for row in scores]]
    tables.append(
        [
            _mask(row, name)
            for row in scores
            for name in measured.masks
            if number(row.get(f"threshold_{name}")) != "-"
        ]
    )
    tables.append(_sizes(measured.sizes))
    if each_scan:
        tables.append(_scans(measured.scans, measured.masks))
    lost = "".join(f"\n* {name}: {reason}" for name, reason, _ in missing)
    whole = len(missing) + measured.cohort["subjects"]
    told = (
        [f"{len(missing)} of {whole} scans are missing in all figures:\n{lost}\n"] if lost else []
    )
    return "\n\n".join([*(markdown(rows) for rows in tables if rows), NOTES, *told])


def _score(row):
    return {
        "score": row["score"],
        "pooled AUC": with_interval(row, "pooled_auc"),
        "mean AUC": plus_minus(row["mean_auc"], row["std_auc"]),
        "pooled AUPRC": number(row["pooled_auprc"]),
        "mean AUPRC": number(row["mean_auprc"]),
        "largest Dice": plus_minus(row["mean_largest_dice"], row["std_largest_dice"]),
    }


def _mask(row, name):
    return {
        "score": row["score"],
        "threshold": f"{name}, > {number(row[f'threshold_{name}'])}",
        "mean Dice": plus_minus(row[f"mean_dice_{name}"], row[f"std_dice_{name}"]),
        "pooled FPR": number(row[f"pooled_fpr_{name}"]),
        "pooled FNR": number(row[f"pooled_fnr_{name}"]),
        "lesions found": number(row[f"pooled_lesion_detection_rate_{name}"]),
        "false per scan": number(row[f"mean_false_positives_{name}"], 1),
    }


def _sizes(sizes: pd.DataFrame):
    """Lesions found, of those there are, by their size."""
    if not len(sizes):
        return []
    counted = sizes.assign(of=sizes["found"].astype(str) + " of " + sizes["lesions"].astype(str))
    wide = counted.pivot_table("of", ["score", "mask"], "size", "first", sort=False, observed=True)
    return [
        {"score": score, "mask": mask, **row}
        for (score, mask), row in wide.to_dict("index").items()
    ]


def _scans(scans: pd.DataFrame, masks):
    return [
        {
            "scan": row["scan"],
            "score": row["score"],
            "lesions": number(row["lesions"], 0),
            "ml": number(row["lesion_ml"], 2),
            "AUC": number(row["auc"]),
            "AUPRC": number(row["auprc"]),
            "largest Dice": number(row["largest_dice"]),
            **{f"Dice {name}": number(row[f"dice_{name}"]) for name in masks},
        }
        for row in scans.to_dict("records")
    ]
