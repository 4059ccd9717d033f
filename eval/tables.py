"""Tables 1 and 2 of the paper for the user's own data, and with them the figures.

    table1   every method of the configuration, the baselines, and the paper's numbers
    table2   the GMVAE with different numbers of clusters K

Everything they need is made first, part by part; finished parts are reused, a killed run goes on.
"""

import csv
import math

from tf_lesion.evaluation.measurement import YOUDEN

from eval import figures, paper
from eval.runner import parser, prepare, stoppable
from tf_lesion.baselines import METHODS
from tf_lesion.cli.command import command
from tf_lesion.files import written_whole

OURS = "this experiment"
BASELINES = {"equalized": "histogram-equalized intensity", "intensity": "intensity"}
POINTS = {YOUDEN: "DSC_AUC", "dsc1": "DSC1", "dsc5": "DSC5", "dsc10": "DSC10"}
HEADS = ("method", "λ", "DSC_AUC", "pooled AUC", "FPR", "FNR", "DSC1", "DSC5", "DSC10")
MORE_HEADS = ("pooled AUPRC", "largest Dice", "lesions found", "false ones per scan")
NOTES = """\
DSC: mean ± std over subjects. DSC1, DSC5, DSC10: at the thresholds with at most 1, 5, 10 % false \
positives in healthy subjects; no lesion label is used. DSC_AUC, FPR, FNR, lesions found and false \
ones per scan: at the threshold with the largest TPR - FPR, chosen by the labels. Largest Dice: \
mean over subjects of the best that any threshold gives. AUC with a 95 % bootstrap interval over \
subjects. The baselines need no model: bright lesions show in the intensity itself.
"""
WARNING = """\
Rows in italics are the paper's numbers, **measured on other data** (Cam-CAN, BRATS 2017): they \
show its order of methods, and are not to be compared with the rows above number by number.
"""

EXAMPLE = """example:
  python -m eval.tables --config eval/experiment_demo.yaml --dry-run
  python -m eval.tables --config eval/experiment_demo.yaml
"""


def our_row(title, measured, *, tv_weight=None, clusters=None):
    """One row of numbers of a score that `eval.evaluate` measured, by the names of the CSV."""
    low, high = measured["pooled_auc_interval"]
    row = {"data": OURS, "method": title, "clusters": clusters, "lambda": tv_weight}
    row |= {
        "pooled_auc": measured["pooled_auc"],
        "pooled_auc_low": low,
        "pooled_auc_high": high,
        "pooled_fpr": None,
        "pooled_fnr": None,
    }
    for name in POINTS:
        at = measured["points"].get(name, {})
        row[f"mean_subject_{name}"] = at.get("mean_subject_dice")
        row[f"std_subject_{name}"] = at.get("std_subject_dice")
        if name == YOUDEN:
            row["pooled_fpr"], row["pooled_fnr"] = at.get("pooled_fpr"), at.get("pooled_fnr")
        row[f"threshold_{name}"] = at.get("threshold")
    best = measured["points"].get(YOUDEN, {})
    return row | {
        "pooled_auprc": measured["pooled_auprc"],
        "mean_subject_auc": measured["mean_subject_auc"],
        "mean_subject_largest_dice": measured["mean_subject_largest_dice"],
        "std_subject_largest_dice": measured["std_subject_largest_dice"],
        "lesion_detection_rate": best.get("lesion_detection_rate"),
        "false_positives_per_scan": best.get("false_positives_per_scan"),
    }


def paper_row(title, numbers, *, tv_weight=None, clusters=None):
    """One row of the paper's numbers by the same names."""
    row = {"data": paper.DATA, "method": title, "clusters": clusters, "lambda": tv_weight}
    row |= {"pooled_auc": numbers.auc, "pooled_fpr": numbers.fpr, "pooled_fnr": numbers.fnr}
    for name in POINTS:
        mean, std = getattr(numbers, name) or (None, None)
        row |= {f"mean_subject_{name}": mean, f"std_subject_{name}": std}
    return row


def table_1(methods):
    """Rows of Table 1: every method, the baselines, the paper."""
    rows = [
        our_row(
            parts.method.title,
            parts.metrics["scores"]["residual"],
            tv_weight=parts.used_lambda,
            clusters=parts.clusters,
        )
        for parts in methods
    ]
    scores = methods[0].metrics["scores"]
    rows += [our_row(title, scores[name]) for name, title in BASELINES.items()]
    rows += [
        paper_row(METHODS[name].title, numbers, tv_weight=paper.TABLE_1_LAMBDA.get(name))
        for name, numbers in paper.TABLE_1.items()
    ]
    return rows


def table_2(methods):
    """Rows of Table 2: the GMVAEs by K, the paper's."""
    ours = sorted((m for m in methods if m.clusters is not None), key=lambda m: m.clusters)
    rows = [
        our_row(
            f"K = {parts.clusters}",
            parts.metrics["scores"]["residual"],
            tv_weight=parts.used_lambda,
            clusters=parts.clusters,
        )
        for parts in ours
    ]
    rows += [paper_row(f"K = {k}", numbers, clusters=k) for k, numbers in paper.TABLE_2.items()]
    return rows


# Output ---------------------------------------------------------------------------------------


def write_csv(path, rows):
    """Write rows as CSV, all numbers in full; what a row lacks stays empty."""
    with written_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(path, rows, *, title, cohort):
    """Write rows as a Markdown table with its notes."""
    described = (
        f"{cohort['subjects']} subjects ({cohort['subjects_without_lesion']} without a lesion), "
        f"{cohort['slices']} slices, {cohort['lesion_voxels']:,} of {cohort['brain_voxels']:,} "
        f"brain voxels are lesion."
    )
    lines = [_line([*HEADS, *MORE_HEADS]), _line(["---"] * len(HEADS + MORE_HEADS))]
    lines += [_line(cells(row)) for row in rows]
    with written_whole(path) as temporary:
        parts = (f"# {title}", described, "\n".join(lines), NOTES, WARNING)
        temporary.write_text("\n\n".join(part.strip() for part in parts) + "\n")


def cells(row):
    """The cells of one Markdown row; the paper's in italics."""
    digits = 3 if row["data"] == OURS else paper.DIGITS
    interval = ""
    if row.get("pooled_auc_low") is not None:
        interval = f" [{number(row['pooled_auc_low'])}, {number(row['pooled_auc_high'])}]"
    name = row["method"] if row["data"] == OURS else f"{row['method']} ({row['data']})"
    found = [
        name,
        number(row["lambda"], digits=2),
        _dice(row, YOUDEN, digits),
        number(row["pooled_auc"], digits=digits) + interval,
        number(row["pooled_fpr"], digits=digits),
        number(row["pooled_fnr"], digits=digits),
        *(_dice(row, point, digits) for point in ("dsc1", "dsc5", "dsc10")),
        number(row.get("pooled_auprc")),
        _dice(row, "largest_dice", digits),
        number(row.get("lesion_detection_rate")),
        number(row.get("false_positives_per_scan"), digits=1),
    ]
    return found if row["data"] == OURS else [f"*{cell}*" for cell in found]


def number(value, *, digits=3):
    """A number with so many digits, "-" for none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _dice(row, name, digits):
    mean, std = row.get(f"mean_subject_{name}"), row.get(f"std_subject_{name}")
    return "-" if mean is None else f"{number(mean, digits=digits)} ± {number(std, digits=digits)}"


def _line(items):
    return f"| {' | '.join(items)} |"


def write_tables(experiment, methods):
    """Write table1 and, with a GMVAE, table2 as CSV and Markdown; returns the paths."""
    cohort = methods[0].metrics["cohort"]
    tables = {"table1": ("Table 1: methods", table_1(methods))}
    if any(parts.clusters is not None for parts in methods):
        tables["table2"] = ("Table 2: clusters of the GMVAE", table_2(methods))
    paths = []
    for name, (title, rows) in tables.items():
        paths += [experiment.out / f"{name}.csv", experiment.out / f"{name}.md"]
        write_csv(paths[-2], rows)
        write_markdown(paths[-1], rows, title=title, cohort=cohort)
    return paths


@stoppable
@command
def main(argv=None):
    """Make what is missing, then the tables and figures."""
    arguments = parser(
        "python -m eval.tables",
        "The paper's Tables 1 and 2 for your own data, and its figures.",
        EXAMPLE,
    )
    arguments.add_argument("--tables-only", action="store_true", help="leave the figures out")
    options = arguments.parse_args(argv)

    def parts_of(method):
        return method.for_tables if options.tables_only else method.for_figures

    prepared = prepare(options, parts_of)
    if prepared is None:
        return 0
    paths = write_tables(*prepared)
    if not options.tables_only:
        paths += figures.draw_all(*prepared)
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
