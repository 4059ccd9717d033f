"""HTML of restored scans: a page each, which needs no other file, and a table of a cohort."""

import base64
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tf_lesion.evaluation.results import Missing, Result
from tf_lesion.files import (
    NUMBER,
    InputError,
    file_name,
    read_json,
    readable,
    refuse_existing,
    write_text,
)

MOST_LESIONS = 15  # rows of the table
VERSION_NAMES = ("python", "tensorflow", "numpy", "nibabel", "SimpleITK")
FOLDER = Path(__file__).parent
COLUMNS = {  # of the table of subjects: heading, and how its numbers are shown
    "name": ("subject", "{}"),
    "verdict": ("check", "{}"),
    "volume_ml": ("lesions ml", "{:.1f}"),
    "count": ("lesions", "{:.0f}"),
    "largest_ml": ("largest ml", "{:.1f}"),
    "dice": ("Dice", "{:.3f}"),
    "auc": ("AUC", "{:.3f}"),
    "examined": ("brain examined", "{:.1%}"),
    "warnings": ("warnings", "{}"),
}
# What puts a subject first, after those that failed or are worth a look, if it is known of any:
# the lowest Dice, or the most of the others.
ORDERS = {"dice": "lowest Dice", "volume_ml": "most lesion volume", "warnings": "most warnings"}
POOLED = {
    **dict.fromkeys(("pooled_auc", "pooled_auc_low", "pooled_auc_high"), NUMBER | None),
    "roc": {"fpr": [NUMBER | None], "tpr": [NUMBER | None]},
}
EVALUATION = {"cohort": {"subjects": int}, "scores": {"residual": POOLED, "*": POOLED}}
VERDICTS = ("failed", "look", "pass")  # of the check of a scan, in the order of the table


def number(value: float, digits: int) -> str:
    """A number of so many decimals, a dash if there is none (the rate of an empty truth)."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def known(value: float | None, digits: int) -> str:
    """As `number`; a dash also for what is not known."""
    return "–" if value is None else number(value, digits)


def significant(value: float | None) -> str:
    """Three significant digits: 0.000372, 0.15, 12.3; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    return f"{float(f'{value:.3g}'):.12f}".rstrip("0").rstrip(".")


def whole(values: Sequence[float | None]) -> str:
    """(1.2, -0.3) -> "1, 0"; a dash for what is not known."""
    return "–" if None in values else ", ".join(f"{round(value):d}" for value in values)


def percent(rate: float, digits: int = 0) -> str:
    """0.05 -> "5 %"."""
    return f"{100 * rate:.{digits}f} %"


def point_name(result: Result) -> str:
    """What the pictures are thresholded at, in words; "" without thresholds."""
    if result.point is None:
        return ""
    return f"the {rate_of(result, result.point)} threshold"


def page(
    result: Result, *, evaluation: dict[str, Any] | None = None, index: str = ""
) -> tuple[str, dict[str, Any]]:
    """The HTML of one scan.

    Args:
        result: the scan and its maps.
        evaluation: as of `read_evaluation`, or None.
        index: address of the table of subjects, for a link to it.

    Returns:
        (html, {name: number} of `COLUMNS` for the table of subjects).
    """
    from tf_lesion.report import pictures, viewer

    truth = _measured(result)
    numbers = _numbers(result, truth)
    lesions = {point: _lesions(result, point) for point in result.facts["lesions"]}
    first = lesions[result.point]["rows"][:1] if result.point else []
    shown = viewer.viewer(result, start=first[0][2] if first else None)
    layers = [(layer["kind"], layer["name"], layer["label"]) for layer in shown["layers"]]
    html = _template("page.html").render(
        result=result,
        facts=result.facts,
        numbers=numbers,
        index=index,
        viewer=shown,
        names=lambda kind: [layer[1:] for layer in layers if layer[0] == kind],
        about=viewer.MAPS,
        qc_picture=_qc_picture(result),
        montage=pictures.montage(result),
        colors={"mask": pictures.MASK_COLOR, "truth": pictures.TRUTH_COLOR},
        point_name=point_name(result),
        truth=truth,
        curves=_curves(result, truth, evaluation),
        evaluation=evaluation,
        lesions=lesions,
        if_healthy_ml=lambda at: _if_healthy_ml(result.facts, at),
        most_lesions=MOST_LESIONS,
        version_names=VERSION_NAMES,
    )
    return html, numbers


def _lesions(result, point):
    """Table of the lesions at a threshold: its name, what is known, (row, true share, place)."""
    from tf_lesion.report.viewer import lesion_places

    rows = result.lesions_at(point)
    places = lesion_places(result, point, rows)
    return {
        "name": f"the {rate_of(result, point)} threshold",
        "columns": {name for row in rows for name in row},
        "rows": list(zip(rows, result.true_shares_at(point), places, strict=True)),
    }


def rate_of(result: Result, point: str) -> str:
    """Healthy rate of a threshold: "5 %"."""
    return f"{100 * result.facts['lesions'][point]['target_fpr']:g} %"


def _qc_picture(result):
    """Data URI of the picture of the check; "" if there is none."""
    name = result.facts.get("qc", {}).get("picture")
    if not name:
        return ""
    return "data:image/png;base64," + base64.b64encode(result.named(name).read_bytes()).decode()


def _measured(result):
    """The scan's row of `measure`, of the map that its masks were made from; None without truth."""
    if result.truth is None:
        return None
    from tf_lesion.evaluation.measure import measure

    return measure([result.labeled(every=False)]).scans.iloc[0].to_dict()


def _numbers(result, truth):
    facts = result.facts
    at = facts["lesions"].get(result.point, {})
    return {
        **{name: at.get(name, math.nan) for name in ("volume_ml", "count", "largest_ml")},
        "dice": (truth or {}).get(f"dice_{result.point}", math.nan),
        "auc": truth["auc"] if truth else math.nan,
        "if_healthy_ml": _if_healthy_ml(facts, at),
        "examined": facts["examined_fraction"],
        "warnings": len(facts["warnings"]),
        "verdict": facts.get("qc", {}).get("verdict"),
        "reasons": facts.get("qc", {}).get("reasons", []),
    }


def _if_healthy_ml(facts, at):
    """Milliliters that the threshold would mark in healthy brain as large as what was examined."""
    return at.get("healthy_fpr", math.nan) * facts["brain_ml"] * facts["examined_fraction"]


def _curves(result, truth, evaluation):
    import markupsafe

    from tf_lesion.evaluation.metrics import Curve
    from tf_lesion.report import pictures

    series, shown, curve = {}, [], None
    if truth and not math.isnan(truth["auc"]):
        scores = result.thresholded[result.brain]
        curve = Curve.from_scores(scores, result.truth[result.brain])
        series[f"this scan (AUC {truth['auc']:.3f})"] = curve.fpr[::-1], curve.tpr[::-1]
    if evaluation:
        pooled = of_score(evaluation, result.made_from)
        subjects = evaluation["cohort"]["subjects"]
        label = f"{subjects} subjects, pooled (AUC {known(pooled['pooled_auc'], 3)})"
        series[label] = pooled["roc"]["fpr"][::-1], pooled["roc"]["tpr"][::-1]
    if series:
        caption = "ROC curve: voxels of the brain, at every threshold."
        shown.append({"svg": pictures.roc(series), "caption": caption})
    if curve:
        lesions = result.facts["lesions"].values()
        marked = {percent(at["target_fpr"]): at["threshold"] for at in lesions}
        best = f"{truth['largest_dice']:.3f} at {truth['largest_dice_threshold']:.3f}"
        caption = f"Largest Dice {best}, chosen by the truth. Gray lines: thresholds from healthy "
        svg = pictures.threshold_curves(curve, marked)
        shown.append({"svg": svg, "caption": f"{caption}brains."})
    return [{**curve, "svg": markupsafe.Markup(curve["svg"])} for curve in shown]


def of_score(evaluation: dict[str, Any], score: str) -> dict[str, Any]:
    """What was measured of a score, or of the residual where that one is missing."""
    return evaluation["scores"].get(score) or evaluation["scores"]["residual"]


def index_page(
    rows: Sequence[dict[str, Any]], *, failed: Sequence[Missing] = (), shown_at: str = ""
) -> str:
    """The HTML of the table of subjects, the worst first; see `VERDICTS` and `ORDERS`.

    Args:
        rows: [{name, page, and the numbers of `page`}].
        failed: scans without results.
        shown_at: what the numbers are measured at.
    """
    import pandas as pd

    table = pd.DataFrame(rows).dropna(axis="columns", how="all")
    key = next(name for name in ORDERS if name in table)
    table = table.sort_values(key, ascending=key == "dice", kind="stable", na_position="last")
    ranks = {verdict: rank for rank, verdict in enumerate(VERDICTS)}
    if "verdict" in table:
        first = table["verdict"].map(ranks).fillna(ranks["pass"])
        table = table.loc[first.sort_values(kind="stable").index]
    return _template("index.html").render(
        rows=table.to_dict("records"),
        columns={name: column for name, column in COLUMNS.items() if name in table},
        sorted_by=key,
        ranks=ranks,
        checked="verdict" in table and bool(table["verdict"].isin(VERDICTS[:-1]).any()),
        orders=ORDERS,
        failed=failed,
        point_name=shown_at,
    )


def _template(name):
    import jinja2
    import markupsafe

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = (number, known, significant, whole, percent)
    environment.filters |= {each.__name__: each for each in filters}
    environment.globals |= {
        "isnan": lambda value: value != value,
        "of_score": of_score,
        "inline": lambda file: markupsafe.Markup((FOLDER / file).read_text(encoding="utf-8")),
    }
    return environment.get_template(name)


def write_report(
    results: Sequence[Result],
    out: Path,
    *,
    evaluation: dict[str, Any] | None = None,
    failed: Sequence[Missing] = (),
    cohort: bool = False,
    force: bool = False,
) -> list[Missing]:
    """Write the page of one scan to `out`; or the table of a cohort, with the pages beside it.

    Returns:
        The scans of a cohort that are damaged: they have no page, but the table names them.

    Args:
        results: the scans.
        out: HTML file.
        evaluation: as of `read_evaluation`, or None.
        failed: scans without results.
        cohort: write the table.
        force: overwrite.

    Raises:
        FileNotFoundError, InputError: if the only scan is damaged, or all are.
    """
    from tqdm import tqdm

    out = Path(out)
    if not cohort:
        write_text(out, page(results[0], evaluation=evaluation)[0], force=force)
        return []
    names = [result.facts["name"].replace("/", "_") for result in results]
    pages = [out.with_name(file_name(f"{name}.html")) for name in names]
    pages = [out.with_stem(f"{out.stem}_scan") if path == out else path for path in pages]
    if len(set(pages)) < len(pages):
        raise InputError(f"Expected different names of the scans in the cohort, got {names}.")
    for path in (out, *pages):
        refuse_existing(path, force=force)
    out.unlink(missing_ok=True)  # the table is of the pages that were there
    rows, damaged = [], []
    for result, path in zip(tqdm(results, "pages", unit="scan"), pages, strict=True):
        result = replace(result)  # a copy forgets the volumes it has read when it goes
        name = result.facts["name"]
        try:
            html, numbers = page(result, evaluation=evaluation, index=readable(out.name))
        except (InputError, OSError) as problem:
            if not rows and path == pages[-1]:
                raise
            damaged.append(Missing(name, str(problem), damaged=True))
            continue
        write_text(path, html, force=force)
        rows.append({"name": name, "page": readable(path.name), **numbers})
    failed = [*failed, *damaged]
    write_text(out, index_page(rows, failed=failed, shown_at=point_name(results[0])), force=force)
    return damaged


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What `tf-lesion evaluate` measured: `metrics.json` of its folder.

    Raises:
        FileNotFoundError, InputError: if it is not there, or is something else.
    """
    path = Path(folder) / "metrics.json"
    if not path.exists():
        raise FileNotFoundError(f"No {path}; make it with tf-lesion evaluate.")
    content = read_json(path, EVALUATION, writer="tf-lesion evaluate")
    for score in content["scores"].values():
        if len(score["roc"]["fpr"]) != len(score["roc"]["tpr"]):
            raise InputError(f"{path}: expected ROC curves of as many fpr as tpr; make it again.")
    return content
