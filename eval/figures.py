"""The paper's Figures 1 to 6 for the user's own data, as PNG and PDF.

    fig1, fig4, fig5, fig6   seven cases of one method: observed, restored, residual, detection,
                             truth; detected at DSC5, DSC1, DSC10, DSC_AUC
    fig2a                    pooled AUC of patients against lambda
    fig2b                    change of healthy subjects against lambda; the minimum is chosen
    fig2c                    ROC curves, the baselines beside the methods
    fig3                     pooled AUC against the restoration step

Everything they need is made first, part by part; finished parts are reused, a killed run goes on.
"""

import math

import numpy as np

from eval.runner import parser, prepare, stoppable
from tf_lesion.cli.command import command
from tf_lesion.evaluation import plots
from tf_lesion.evaluation.measurement import YOUDEN

CASES = {"fig1": "dsc5", "fig4": "dsc1", "fig5": "dsc10", "fig6": YOUDEN}
BASELINE = ("equalized", "histogram-equalized intensity")

EXAMPLE = """example:
  python -m eval.figures --config eval/experiment_demo.yaml
"""


def draw_all(experiment, methods):
    """Draw every figure whose parts are there; returns the paths of the PNG files.

    Args:
        experiment: `Experiment`.
        methods: [`MethodParts`], their parts finished.
    """
    shown = next(parts for parts in methods if parts.method == experiment.shown)
    drawn = draw_cases(experiment.out, shown)
    drawn += draw_lambda(experiment.out, methods)
    drawn += draw_roc(experiment.out, methods)
    drawn += draw_steps(experiment.out, methods)
    return drawn


def draw_cases(out, parts):
    """Figures 1 and 4-6: the same cases at four thresholds."""
    points = parts.metrics["scores"]["residual"]["points"]
    with np.load(parts.evaluation.folder / "panel.npz") as stored:
        arrays = dict(stored)
    paths = []
    for name, point in CASES.items():
        threshold = points[point]["threshold"] if point in points else math.inf
        paths.append(out / f"{name}.png")
        plots.panel(
            paths[-1],
            **arrays,
            detection=arrays["residual"] > threshold,
            threshold_name=f"{point.upper()}, > {threshold:.3f}",
            pdf=True,
        )
    return paths


def draw_lambda(out, methods):
    """Figures 2 (a) and (b); the chosen lambda of each method is marked."""
    areas, change = {}, {}
    for parts in methods:
        if parts.sweep:
            curve = parts.result(parts.sweep, "sweep.json")
            areas[parts.method.title] = _columns(curve, "tv_weight", "pooled_auc")
        if parts.choice:
            curve = parts.result(parts.choice, "lambda.json")["curve"]
            change[parts.method.title] = _columns(curve, "tv_weight", "change_per_subject")
    chosen = {parts.method.title: parts.used_lambda for parts in methods if parts.choice}
    paths = []
    for name, series, draw in (
        ("fig2a.png", areas, plots.auc_against_lambda),
        ("fig2b.png", change, plots.change_against_lambda),
    ):
        if series:
            paths.append(out / name)
            draw(paths[-1], series, marked=chosen, pdf=True)
    return paths


def draw_roc(out, methods):
    """Figure 2 (c), with the baseline."""
    series = {parts.method.title: _roc(parts, "residual") for parts in methods}
    score, title = BASELINE
    series[title] = _roc(methods[0], score)
    plots.roc_curves(out / "fig2c.png", series, pdf=True)
    return [out / "fig2c.png"]


def draw_steps(out, methods):
    """Figure 3."""
    series = {
        parts.method.title: _columns(parts.result(parts.steps, "steps.json"), "step", "pooled_auc")
        for parts in methods
        if parts.steps
    }
    if not series:
        return []
    plots.auc_against_step(out / "fig3.png", series, pdf=True)
    return [out / "fig3.png"]


def _roc(parts, score):
    roc = parts.metrics["scores"][score]["roc"]
    return roc["fpr"], roc["tpr"]


def _columns(rows, *names):
    rows = sorted(rows, key=lambda row: row[names[0]])
    return tuple([row[name] for row in rows] for name in names)


@stoppable
@command
def main(argv=None):
    """Make what is missing, then the figures."""
    arguments = parser(
        "python -m eval.figures", "The paper's Figures 1 to 6 for your own data.", EXAMPLE
    )
    prepared = prepare(arguments.parse_args(argv), lambda method: method.for_figures)
    for path in draw_all(*prepared) if prepared else ():
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
