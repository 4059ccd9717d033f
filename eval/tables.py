"""Tables 1 and 2 of the paper for the user's own data, and with them the figures.

    table1   every method of the configuration, the baselines, and the paper's numbers
    table2   the GMVAE with different numbers of clusters K

Everything they need is made first, part by part; finished parts are reused, a killed run goes on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import paper
from eval.runner import parser, prepared, stoppable
from tf_lesion.cli.command import command
from tf_lesion.cli.options import add
from tf_lesion.files import write_text

OURS = "this experiment"
BASELINES = {"equalized": "histogram-equalized intensity", "intensity": "intensity"}
POINTS = ("dsc_auc", "dsc1", "dsc5", "dsc10")
NUMBERS = (  # columns of `measure`'s scores that the CSV has, in full
    *("pooled_auc", "pooled_auc_low", "pooled_auc_high", "pooled_fpr_dsc_auc"),
    "pooled_fnr_dsc_auc",
    *(f"{what}_{point}" for point in POINTS for what in ("mean_dice", "std_dice", "threshold")),
    *("pooled_auprc", "mean_auc", "mean_largest_dice", "std_largest_dice"),
    *("pooled_lesion_detection_rate_dsc_auc", "mean_false_positives_dsc_auc"),
)
PAIRED = ("auc", "auprc", "largest_dice")  # columns of `Measured.scans`
MARK = " †"
NOTES = """\
DSC: mean ± std over subjects. DSC1, DSC5, DSC10: at the thresholds with at most 1, 5, 10 % false \
positives in healthy subjects; no lesion label is used. DSC_AUC, FPR, FNR, lesions found and false \
ones per scan: at the threshold with the largest TPR - FPR, chosen by the labels. Largest Dice: \
mean over subjects of the best that any threshold gives. AUC with a 95 % bootstrap interval over \
subjects, or groups of them. The baselines need no model: bright lesions show in the intensity \
itself.
"""
WARNING = """\
Rows in italics are the paper's numbers, **measured on other data** (Cam-CAN, BRATS 2017): they \
show its order of methods, and are not to be compared with the rows above number by number.
"""

EXAMPLE = """example:
  python -m eval.tables --config eval/experiment_demo.yaml --dry-run
  python -m eval.tables --config eval/experiment_demo.yaml
"""


def our_row(title: str, scores: dict[str, Any], score: str, **about: Any) -> dict[str, Any]:
    """One row of numbers of a score, with what `about` says of it: lambda, clusters."""
    measured = {name: scores[score].get(name) for name in NUMBERS}
    return {"data": OURS, "method": title, "clusters": None, "lambda": None, **about, **measured}


def paper_row(title: str, printed: paper.PaperRow, **about: Any) -> dict[str, Any]:
    """One row of the paper's numbers by the same names."""
    row = {"data": paper.DATA, "method": title, "clusters": None, "lambda": None, **about}
    row |= {"pooled_auc": printed.auc}
    row |= {"pooled_fpr_dsc_auc": printed.fpr, "pooled_fnr_dsc_auc": printed.fnr}
    for point in POINTS:
        mean, std = getattr(printed, point) or (None, None)
        row |= {f"mean_dice_{point}": mean, f"std_dice_{point}": std}
    return row


def table_1(methods: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of Table 1: every method, the baselines, the paper."""
    from tf_lesion.baselines import METHODS

    rows = [_method_row(parts.method.title, parts) for parts in methods]
    scores = methods[0].metrics["scores"]
    rows += [our_row(title, scores, name) for name, title in BASELINES.items()]
    return rows + [
        paper_row(METHODS[name].title, printed, **{"lambda": paper.TABLE_1_LAMBDA.get(name)})
        for name, printed in paper.TABLE_1.items()
    ]


def table_2(methods: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of Table 2: the GMVAEs by K, the paper's."""
    ours = sorted((m for m in methods if m.clusters is not None), key=lambda m: m.clusters)
    rows = [_method_row(f"K = {parts.clusters}", parts) for parts in ours]
    printed = paper.TABLE_2.items()
    return rows + [paper_row(f"K = {k}", numbers, clusters=k) for k, numbers in printed]


def pairs(experiment: Any, methods: Sequence[Any]) -> list[dict[str, Any]]:
    """Each other method and baseline against the first method, on the same scans.

    Returns:
        Rows of `method`, `against`, and for each of `PAIRED` the mean difference over scans that
        have both, with its 95 % bootstrap interval, `NAME`, `NAME_low` and `NAME_high`.
    """
    from tf_lesion.evaluation import metrics
    from tf_lesion.evaluation.measure import groups_of, read_groups

    def of(parts, score):
        return parts.scans[parts.scans["score"] == score].reset_index(drop=True)

    first, *others = methods
    compared = [(_title(parts), of(parts, "residual")) for parts in others]
    compared += [(title, of(first, name)) for name, title in BASELINES.items()]
    its_own = of(first, "residual")
    groups = experiment.groups and read_groups(experiment.groups)
    alike = groups_of(list(its_own["scan"]), groups)
    weights = metrics.bootstrap_weights(alike, seed=experiment.seed)
    rows = []
    for title, scans in compared:
        row = {"method": title, "against": _title(first)}
        for name in PAIRED:
            difference = scans[name] - its_own[name]
            low, high = metrics.mean_interval(difference, weights)
            row |= {name: difference.mean(), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def _title(parts):
    """The method's name, marked if labels chose it."""
    return parts.method.title + (MARK if parts.method.chosen_by else "")


def _method_row(title, parts):
    title += MARK if parts.method.chosen_by else ""
    about = {"lambda": parts.used_lambda, "clusters": parts.clusters}
    return our_row(title, parts.metrics["scores"], "residual", **about)


# Output ---------------------------------------------------------------------------------------


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One Markdown row; the paper's in italics."""
    from tf_lesion.evaluation.tables import number, plus_minus, with_interval

    digits = 3 if row["data"] == OURS else paper.DIGITS

    def dice(name):
        return plus_minus(row.get(f"mean_{name}"), row.get(f"std_{name}"), digits)

    found = {
        "method": row["method"] if row["data"] == OURS else f"{row['method']} ({row['data']})",
        "λ": number(row["lambda"], 2),
        "DSC_AUC": dice("dice_dsc_auc"),
        "pooled AUC": with_interval(row, "pooled_auc", digits),
        "FPR": number(row["pooled_fpr_dsc_auc"], digits),
        "FNR": number(row["pooled_fnr_dsc_auc"], digits),
        **{point.upper(): dice(f"dice_{point}") for point in POINTS[1:]},
        "pooled AUPRC": number(row.get("pooled_auprc")),
        "largest Dice": dice("largest_dice"),
        "lesions found": number(row.get("pooled_lesion_detection_rate_dsc_auc")),
        "false ones per scan": number(row.get("mean_false_positives_dsc_auc"), 1),
    }
    return found if row["data"] == OURS else {name: f"*{cell}*" for name, cell in found.items()}


def _pair_cells(row):
    from tf_lesion.evaluation.tables import with_interval

    columns = zip(("AUC", "AUPRC", "largest Dice"), PAIRED, strict=True)
    return {"method": row["method"], **{title: with_interval(row, name) for title, name in columns}}


def write_table(
    path: Path, rows: Sequence[dict[str, Any]], title: str, cohort: dict, more: Sequence[str] = ()
) -> list[Path]:
    """Write a table as CSV, all numbers in full, and as Markdown with its notes and `more`."""
    import pandas as pd

    from tf_lesion.evaluation.tables import markdown

    table = pd.DataFrame(rows).astype({"clusters": "Int64"})
    write_text(path.with_suffix(".csv"), table.to_csv(index=False))
    described = (
        f"{cohort['subjects']} subjects ({cohort['subjects_without_lesion']} without a lesion), "
        f"{cohort['slices']} slices, {cohort['lesion_voxels']:,} of {cohort['brain_voxels']:,} "
        f"brain voxels are lesion."
    )
    table = markdown([cells(row) for row in rows])
    parts = (f"# {title}", described, table, *more, NOTES, WARNING)
    write_text(path.with_suffix(".md"), "\n\n".join(part.strip() for part in parts) + "\n")
    return [path.with_suffix(".csv"), path.with_suffix(".md")]


def write_tables(experiment: Any, methods: Sequence[Any]) -> list[Path]:
    """Write table1, pairs.csv and, with a GMVAE, table2; returns the paths."""
    import pandas as pd

    from tf_lesion.evaluation.tables import markdown

    cohort, out = methods[0].metrics["cohort"], experiment.out
    marked = {parts.method.chosen_by for parts in methods} - {None}
    marks = [f"{MARK.strip()} chosen by {reason}: no held-out result." for reason in sorted(marked)]
    compared = pairs(experiment, methods)
    write_text(out / "pairs.csv", pd.DataFrame(compared).to_csv(index=False))
    paths = [out / "pairs.csv"]
    more = [*marks, f"Differences from {_title(methods[0])}, mean over the same scans:"]
    more.append(markdown([_pair_cells(row) for row in compared]))
    paths += write_table(out / "table1", table_1(methods), "Table 1: methods", cohort, more)
    if any(parts.clusters is not None for parts in methods):
        title = "Table 2: clusters of the GMVAE"
        paths += write_table(out / "table2", table_2(methods), title, cohort, marks)
    return paths


@stoppable
@command
def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, then the tables and figures."""
    arguments = parser("python -m eval.tables", __doc__, EXAMPLE)
    add(arguments, "--tables-only")
    options = arguments.parse_args(argv)

    def parts_of(method):
        return method.for_tables if options.tables_only else method.for_figures

    with prepared(options, parts_of) as made:
        if made is None:
            return 0
        paths = write_tables(*made)
        if not options.tables_only:
            from eval.figures import draw_all

            paths += draw_all(*made)
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
