"""A page to look at for every restored scan: viewer, slices, lesions, curves, how it was made.

One HTML file per scan that needs no network and no other file; for a cohort a table of the
subjects as well, the worst first.
"""

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.files import InputError, refuse_existing, written_whole

EXAMPLE = """example:
  python restore_brats.py --model runs/gmvae --input patient_t2.nii.gz --out maps \\
      --thresholds thresholds.json
  python -m eval.report --results maps

Takes about 15 s per scan at 1 mm."""

MOST_LESIONS = 15  # rows of the table
VERSION_NAMES = ("python", "tensorflow", "numpy", "nibabel", "SimpleITK")


@dataclass(frozen=True)
class Column:
    """A column of the table of subjects: heading, how its numbers are shown, how it is sorted."""

    label: str
    shown: str = "{}"
    sorted: str = ""


def percent(rate, digits=0):
    """0.05 -> "5 %"."""
    return f"{100 * rate:.{digits}f} %"


def point_name(result):
    """What the pictures are thresholded at, in words; "" without thresholds."""
    if result.point is None:
        return ""
    return f"the {100 * result.facts['lesions'][result.point]['target_fpr']:g} % threshold"


# One scan ---------------------------------------------------------------------------------------


def page(result, *, evaluation=None, index=""):
    """The HTML of one scan.

    Args:
        result: `report_data.Result`.
        evaluation: metrics of eval.evaluate, or None.
        index: address of the table of subjects, for a link to it.

    Returns:
        (html, {name: number} for the table of subjects).
    """
    from tf_lesion.report import pictures

    measured = result.against_truth()
    return _template("page.html").render(
        name=result.facts["name"],
        facts=result.facts,
        index=index,
        figures=_key_figures(result, measured),
        viewer=pictures.viewer(result),
        shown_from=f"{pictures.shown_range(result)[0]:.3f}",
        montage=pictures.montage(result),
        colors={"mask": pictures.MASK_COLOR, "truth": pictures.TRUTH_COLOR},
        point=result.point,
        point_name=point_name(result),
        truth=measured,
        thresholds=_threshold_rows(result, measured),
        curves=_curves(result, measured, evaluation),
        settings=_settings(result, evaluation),
        **_lesion_rows(result),
    ), _numbers(result, measured)


def _template(name):
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    return environment.get_template(name)


def number(value, digits):
    """A number of so many decimals, a dash if there is none (the rate of an empty truth)."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _numbers(result, measured):
    facts = result.facts
    at = facts["lesions"].get(result.point, {})
    truth = measured["points"].get(result.point, {}) if measured else {}
    return {
        "volume_ml": at.get("volume_ml", math.nan),
        "count": at.get("count", math.nan),
        "largest_ml": at.get("largest_ml", math.nan),
        "dice": truth.get("dice", math.nan),
        "auc": measured["auc"] if measured else math.nan,
        "examined": facts["examined_fraction"],
        "warnings": len(facts["warnings"]),
    }


def _key_figures(result, measured):
    numbers = _numbers(result, measured)
    shown = [
        ("lesion volume", f"{numbers['volume_ml']:.1f}", "ml"),
        ("lesions", f"{numbers['count']}", ""),
        ("largest lesion", f"{numbers['largest_ml']:.1f}", "ml"),
    ]
    shown = shown if result.point else []
    if measured:
        shown.append(("AUC", number(numbers["auc"], 3), ""))
        if result.point:
            shown.append(("Dice", number(numbers["dice"], 3), ""))
    shown.append(("brain", f"{result.facts['brain_ml']:.0f}", "ml"))
    shown.append(("brain examined", f"{100 * numbers['examined']:.1f}", "%"))
    return [{"label": label, "value": value, "unit": unit} for label, value, unit in shown]


def _threshold_rows(result, measured):
    return [
        {
            "name": percent(at["target_fpr"], 1).replace(".0 ", " "),
            **at,
            "truth": measured and measured["points"][name],
        }
        for name, at in result.facts["lesions"].items()
    ]


def _lesion_rows(result):
    overlaps = result.lesion_overlaps()
    rows = [
        {
            "volume_ml": lesion.volume_ml,
            "center_mm": [round(mm) for mm in lesion.center_mm],
            "mean_residual": lesion.mean_residual,
            "true": share > 0,
        }
        for lesion, share in zip(result.lesions, overlaps, strict=True)
    ]
    rest = rows[MOST_LESIONS:]
    return {
        "lesions": rows[:MOST_LESIONS],
        "more_lesions": len(rest),
        "more_ml": sum(row["volume_ml"] for row in rest),
    }


def _curves(result, measured, evaluation):
    import markupsafe

    from tf_lesion.report import pictures

    series, shown = {}, []
    if measured and not math.isnan(measured["auc"]):
        series[f"this scan (AUC {measured['auc']:.3f})"] = (
            result.curve.fpr[::-1],
            result.curve.tpr[::-1],
        )
    if evaluation:
        residual, number = evaluation["scores"]["residual"], evaluation["cohort"]["subjects"]
        label = f"{number} subjects, pooled (AUC {residual['pooled_auc']:.3f})"
        series[label] = (residual["roc"]["fpr"][::-1], residual["roc"]["tpr"][::-1])
    if series:
        caption = "ROC curve: voxels of the brain, at every threshold."
        shown.append({"svg": pictures.roc(series), "caption": caption})
    if measured and not math.isnan(measured["auc"]):
        marked = {
            percent(at["target_fpr"]): at["threshold"] for at in result.facts["lesions"].values()
        }
        best = f"Largest Dice {measured['best_dice']:.3f} at {measured['best_threshold']:.3f}"
        shown.append(
            {
                "svg": pictures.threshold_curves(result.curve, marked),
                "caption": f"{best}, chosen by the truth. Gray lines: thresholds from healthy "
                "brains.",
            }
        )
    return [{**curve, "svg": markupsafe.Markup(curve["svg"])} for curve in shown]


def _settings(result, evaluation):
    facts = result.facts
    shape = " x ".join(map(str, facts["scan"]["shape"]))
    sizes = " x ".join(f"{size:g}" for size in facts["scan"]["voxel_sizes_mm"])
    every = f"every {facts['slice_step']}th" if facts["slice_step"] > 1 else "every"
    rows = [
        (
            "scan",
            f"{result.scan_path}: {shape} voxels of {sizes} mm, {facts['scan']['orientation']}",
        ),
        ("truth", result.truth_path or "none"),
        ("model", f"{facts['model']}, {facts['model_path']} ({facts['model_identity']})"),
        ("lambda", f"{facts['tv_weight']:g} per unit intensity"),
        (
            "restoration",
            f"{facts['steps']} steps, {every} axial slice ({facts['slices_restored']} restored), "
            f"{facts['precision']}, seed {facts['seed']}",
        ),
        ("thresholds", _threshold_text(facts)),
        ("alignment", _alignment_text(facts)),
        ("histogram", _histogram_text(facts)),
        ("versions", _version_text(facts)),
    ]
    if evaluation:
        residual = evaluation["scores"]["residual"]
        low, high = residual["pooled_auc_interval"]
        text = f"{evaluation['cohort']['subjects']} subjects, pooled AUC "
        rows.append(("cohort", f"{text}{residual['pooled_auc']:.3f} ({low:.3f} to {high:.3f})"))
    return rows


def _threshold_text(facts):
    texts = [
        f"{at['threshold']:.4f} ({percent(at['healthy_fpr'], 2)} of healthy voxels above it, "
        f"at most {100 * at['target_fpr']:g} % wanted)"
        for at in facts["lesions"].values()
    ]
    return "; ".join(texts) or "none given"


def _alignment_text(facts):
    information = facts["mutual_information"]
    measured = "" if information is None else f", mutual information {information:.2f} nats"
    overlap = f", overlap of the brain with the atlas's (Dice) {facts['atlas_overlap']:.2f}"
    return f"{facts['scan_settings']['align']} to MNI{measured}{overlap}"


def _histogram_text(facts):
    distance = facts["histogram_distance"]
    if distance is None:
        return "not matched"
    return f"matched to the reference, {distance:.3f} away from it before (normalized intensity)"


def _version_text(facts):
    names = [f"{name} {facts['versions'][name]}" for name in VERSION_NAMES]
    commit = f" ({facts['commit'][:10]})" if facts["commit"] else ""
    return ", ".join([f"tf_lesion {facts['tf_lesion_version']}{commit}", *names])


# A cohort ---------------------------------------------------------------------------------------

COLUMNS = {
    "name": Column("subject"),
    "volume_ml": Column("lesions ml", "{:.1f}"),
    "count": Column("lesions", "{:.0f}"),
    "largest_ml": Column("largest ml", "{:.1f}"),
    "dice": Column("Dice", "{:.3f}"),
    "auc": Column("AUC", "{:.3f}"),
    "examined": Column("brain examined", "{:.1%}"),
    "warnings": Column("warnings", "{}"),
}


def index_page(rows, *, failed=(), shown_at=""):
    """The HTML of the table of subjects.

    Worst first: the lowest Dice where there is a truth, else the largest volume of lesions.

    Args:
        rows: [{name, page, and the numbers of `page`}].
        failed: [(name, reason)] of scans without results.
        shown_at: what the numbers are measured at.
    """
    names = [name for name in COLUMNS if name == "name" or _any_number(rows, name)]
    by_dice = "dice" in names
    key, direction = ("dice", "ascending") if by_dice else ("volume_ml", "descending")
    if key not in names:
        key, direction = "warnings", "descending"
    rows = sorted(rows, key=lambda row: _rank(row[key], descending=direction == "descending"))
    columns = [
        Column(COLUMNS[name].label, sorted=direction if name == key else "") for name in names
    ]
    cells = [
        {
            "page": row["page"],
            "cells": [{"value": row[name], "text": _text(name, row[name])} for name in names],
        }
        for row in rows
    ]
    order = {"dice": "lowest Dice", "volume_ml": "most lesion volume", "warnings": "most warnings"}
    return _template("index.html").render(
        rows=cells, columns=columns, failed=failed, order=order[key], point_name=shown_at
    )


def _any_number(rows, name):
    return any(not math.isnan(row[name]) for row in rows)


def _rank(value, *, descending):
    if math.isnan(value):
        return (1, 0)  # nothing known: after the rest
    return (0, -value if descending else value)


def _text(name, value):
    if name == "name":
        return value
    return "–" if math.isnan(value) else COLUMNS[name].shown.format(value)


def write_report(results, out, *, evaluation=None, failed=(), cohort=False, force=False):
    """Write the page of one scan to `out`; or the table of a cohort, with the pages beside it.

    Args:
        results: list of `report_data.Result`.
        out: HTML file.
        evaluation: metrics of eval.evaluate, or None.
        failed: [(name, reason)] of scans without results.
        cohort: write the table.
        force: overwrite.
    """
    from tqdm import tqdm

    out = Path(out)
    if not cohort:
        _write(out, page(results[0], evaluation=evaluation)[0], force=force)
        return
    names = [result.facts["name"].replace("/", "_") for result in results]
    pages = [out.with_name(f"{name}.html") for name in names]
    if len({*pages, out}) <= len(pages):
        raise InputError(f"Expected different names of the scans in the cohort, got {names}.")
    for path in (out, *pages):
        refuse_existing(path, force=force)
    rows = []
    for result, path in zip(tqdm(results, "pages", unit="scan"), pages, strict=True):
        result = replace(result)  # a copy forgets the volumes it has read when it goes
        html, numbers = page(result, evaluation=evaluation, index=out.name)
        _write(path, html, force=force)
        rows.append({"name": result.facts["name"], "page": path.name, **numbers})
    _write(out, index_page(rows, failed=failed, shown_at=point_name(results[0])), force=force)


def _write(path, html, *, force):
    with written_whole(path, force=force) as temporary:
        temporary.write_text(html, encoding="utf-8")


def parser():
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m eval.report",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    hidden = argparse.SUPPRESS
    arguments.set_defaults(truth=None, scan=None, evaluation=None, out=None)
    add = arguments.add_argument
    add("--results", required=True, type=Path, help="the --out of restore_brats.py --input")
    add(
        "--truth",
        type=Path,
        default=hidden,
        help="segmentation of the one scan, NIfTI on its grid; default: CASE_seg beside CASE_t2",
    )
    add("--scan", type=Path, default=hidden, help="the one scan, if it has moved")
    add(
        "--evaluation",
        type=Path,
        default=hidden,
        help="the --out of eval.evaluate: the cohort's ROC curve beside the scan's",
    )
    add(
        "--target-fpr",
        type=float,
        default=0.05,
        help="show the threshold with this share of healthy voxels above it, a fraction",
    )
    add(
        "--out",
        type=Path,
        default=hidden,
        help="HTML file; default: report.html in --results, of a cohort index.html",
    )
    add("--force", action="store_true", help="overwrite")
    return arguments


@command
def main(argv=None):
    """Write the report and print where it is."""
    options = parser().parse_args(argv)
    from tf_lesion.report.data import Result, failures, find_results, read_evaluation

    paths, failed = find_results(options.results), failures(options.results)
    cohort = len(paths) > 1 or bool(failed)
    if cohort and (options.truth or options.scan):
        raise InputError(
            f"--truth and --scan are for one scan; {options.results} holds {len(paths)}."
        )
    out = options.out or options.results / ("index.html" if cohort else "report.html")
    refuse_existing(out, force=options.force)
    evaluation = read_evaluation(options.evaluation) if options.evaluation else None
    given = {"scan": options.scan, "truth": options.truth, "target_fpr": options.target_fpr}
    results = [Result.read(path, **given) for path in paths]
    write_report(
        results, out, evaluation=evaluation, failed=failed, cohort=cohort, force=options.force
    )
    print(f"Report: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
