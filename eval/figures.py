"""The paper's Figures 1 to 6 for the user's own data, as PNG and PDF.

    fig1, fig4, fig5, fig6   seven cases of one method: observed, restored, residual, detection,
                             truth; detected at DSC5, DSC1, DSC10, DSC_AUC
    fig2a                    pooled AUC of patients against lambda
    fig2b                    change of healthy subjects against lambda; the minimum is chosen
    fig2c                    ROC curves, the baselines beside the methods
    fig3                     pooled AUC against the restoration step

Everything they need is made first, part by part; finished parts are reused, a killed run goes on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.runner import parser, prepared, stoppable
from tf_lesion.cli.command import command

CASES = {"fig1": "dsc5", "fig4": "dsc1", "fig5": "dsc10", "fig6": "dsc_auc"}
BASELINE = ("equalized", "histogram-equalized intensity")
LAMBDA, AUC = "λ (per unit intensity)", "pooled AUC (fraction)"
LABELS = {  # figure: of x and y
    "fig2a": (LAMBDA, AUC),
    "fig2b": (LAMBDA, "l1 change per healthy subject\n(intensity × voxels)"),
    "fig2c": ("false positive rate (fraction)", "true positive rate (fraction)"),
    "fig3": ("restoration step", AUC),
}

EXAMPLE = """example:
  python -m eval.figures --config eval/experiment_demo.yaml
"""


def draw_all(experiment: Any, methods: Sequence[Any]) -> list[Path]:
    """Draw every figure whose parts are there; returns the paths of the PNG files.

    Args:
        experiment: `Experiment`.
        methods: [`MethodParts`], their parts finished.
    """
    shown = next(parts for parts in methods if parts.method == experiment.shown)
    return draw_cases(experiment.out, shown) + draw_lines(experiment.out, methods)


def draw_cases(out: Path, parts: Any) -> list[Path]:
    """Figures 1 and 4-6: the same cases at four thresholds."""
    from tf_lesion.evaluation import plots

    measured = parts.metrics["scores"]["residual"]
    with np.load(parts.evaluation.folder / "panel.npz") as stored:
        arrays = dict(stored)
    for name, point in CASES.items():
        threshold = {point: measured.get(f"threshold_{point}")}
        plots.cases(out / f"{name}.png", arrays, threshold, pdf=True)
    return [out / f"{name}.png" for name in CASES]


def draw_lines(out: Path, methods: Sequence[Any]) -> list[Path]:
    """Figures 2 and 3; in 2 (a) and (b) the chosen lambda of each method is marked."""
    from tf_lesion.evaluation import plots

    series: dict[str, dict[str, tuple]] = {name: {} for name in LABELS}
    chosen = {}
    for parts in methods:
        title = parts.method.title
        if parts.sweep:
            curve = parts.result(parts.sweep, "sweep.json")
            series["fig2a"][title] = _columns(curve, "tv_weight", "pooled_auc")
        if parts.method.chooses:
            curve = parts.calibrated.curve
            series["fig2b"][title] = _columns(curve, "tv_weight", "change_per_subject")
            chosen[title] = parts.used_lambda
        series["fig2c"][title] = _roc(parts, "residual")
        if parts.steps:
            curve = parts.result(parts.steps, "steps.json")
            series["fig3"][title] = _columns(curve, "step", "pooled_auc")
    score, title = BASELINE
    series["fig2c"][title] = _roc(methods[0], score)
    drawn = {name: lines for name, lines in series.items() if lines}
    for name, lines in drawn.items():
        xlabel, ylabel = LABELS[name]
        options = {"fig2c": {"rates": True}, "fig3": {}}.get(name, {"marked": chosen})
        path = out / f"{name}.png"
        plots.lines(path, lines, xlabel=xlabel, ylabel=ylabel, pdf=True, **options)
    return [out / f"{name}.png" for name in drawn]


def _roc(parts, score):
    roc = parts.metrics["scores"][score]["roc"]
    return roc["fpr"], roc["tpr"]


def _columns(rows, *names):
    rows = sorted(rows, key=lambda row: row[names[0]])
    return tuple([row[name] for row in rows] for name in names)


@stoppable
@command
def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, then the figures."""
    arguments = parser("python -m eval.figures", __doc__, EXAMPLE)
    with prepared(arguments.parse_args(argv), lambda method: method.for_figures) as made:
        for path in draw_all(*made) if made else ():
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
