"""Drawing: slices as in the paper's Figures 1 and 4-6, curves as in its Figures 2 and 3.

Slices [X, Y] are shown as radiologists look at them: anterior up, the patient's right on the left.
"""

import itertools
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

from tf_lesion.files import written_whole

ROWS = ("observed", "restored", "residual", "detection", "truth")
COLUMN_INCHES, ROW_INCHES = 1.45, 1.7
WINDOW_PERCENTILE = 99.5  # of the brain's values; a few bright voxels must not darken a row
PNG_DPI = 150
LINES_INCHES = (4.5, 3.6)
MOST_MARKERS = 60  # points of a line that still get a mark each
BAND_ALPHA = 0.2
DASHES = [
    {"color": color, "linestyle": dash, "linewidth": 1.4}
    for color, dash in zip(
        ("0.0", "0.45", "0.0", "0.45", "0.0", "0.6"),
        ("-", "-", "--", "--", ":", "-."),
        strict=True,
    )
]
LAMBDA = "λ (per unit intensity)"
CHANGE = "l1 change per healthy subject\n(intensity × voxels)"
MARGIN_INCHES = 1.5
BAR_WIDTH = 0.08  # of a column
BAR_HEIGHT = 0.9  # of its rows
BRAIN_SHADE = 0.3  # of the brain behind a detection, so that one sees where it lies
BAR_LABELS = {"observed": "normalized intensity", "residual": "|observed - restored|"}


def as_seen(image):
    """Slice [X, Y] -> picture [Y, X] for imshow: anterior up, the patient's right on the left."""
    return np.asarray(image)[::-1, ::-1].T


def panel(
    path,
    observed,
    restored,
    residual,
    detection,
    truth,
    titles,
    *,
    threshold_name="",
    gray_window=None,
    residual_window=None,
    pdf=False,
    force=True,
):
    """Write five rows (observed, restored, residual, detection, truth) of n slices, as Figure 1.

    Args:
        path: the PNG to make.
        observed: [n, H, W], normalized intensity, 0 outside the brain.
        restored: [n, H, W]; shown with the gray window of `observed`.
        residual: [n, H, W], same unit.
        detection: [n, H, W] bool.
        truth: [n, H, W] bool.
        titles: n strings, one above each column.
        threshold_name: where the threshold of the detection comes from, for example "DSC5".
        gray_window: (lowest, highest) intensity; by default 0 to the 99.5th percentile.
        residual_window: the same for the residual.
        pdf: also write a PDF beside the PNG.
        force: overwrite.
    """
    gray_window = gray_window or _window(observed)
    residual_window = residual_window or _window(residual)
    brain = BRAIN_SHADE * (np.asarray(observed) > 0)
    shown = {
        "observed": (observed, gray_window),
        "restored": (restored, gray_window),
        "residual": (residual, residual_window),
        "detection": (np.where(detection, 1, brain), (0, 1)),
        "truth": (np.where(truth, 1, brain), (0, 1)),
    }
    figure, axes, bars = _panel_axes(len(titles))
    for row, (name, (images, window)) in zip(axes, shown.items(), strict=True):
        label = f"{name}\n({threshold_name})" if name == "detection" and threshold_name else name
        picture = _draw_row(row, label, images, window)
        if name in bars:
            figure.colorbar(picture, cax=bars[name], label=BAR_LABELS[name])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=7)
    _mark_sides(axes[0, 0])
    save(figure, path, pdf=pdf, force=force)


def _panel_axes(columns):
    """(figure, axes [5, columns], {row name: axes of its colour bar})."""
    size = (MARGIN_INCHES + COLUMN_INCHES * columns, MARGIN_INCHES / 2 + ROW_INCHES * len(ROWS))
    figure = plt.figure(figsize=size)
    grid = figure.add_gridspec(
        len(ROWS),
        columns + 1,
        width_ratios=[1] * columns + [BAR_WIDTH],
        left=MARGIN_INCHES / 2 / size[0],
        right=1 - MARGIN_INCHES / 2 / size[0],
        bottom=0.01,
        top=1 - MARGIN_INCHES / 3 / size[1],
        wspace=0.04,
        hspace=0.04,
    )
    axes = np.array([[figure.add_subplot(cell) for cell in row[:columns]] for row in _cells(grid)])
    bars = {"observed": grid[:2, -1], "residual": grid[2, -1]}
    bars = {name: figure.add_subplot(place) for name, place in bars.items()}
    for bar in bars.values():  # a little shorter: the numbers at their ends must not meet
        x, y, width, height = bar.get_position().bounds
        bar.set_position([x, y + height * (1 - BAR_HEIGHT) / 2, width, height * BAR_HEIGHT])
    return figure, axes, bars


def _cells(grid):
    rows, columns = grid.get_geometry()
    return [[grid[row, column] for column in range(columns)] for row in range(rows)]


def lines(
    path, series, *, xlabel, ylabel, marked=None, limits=None, diagonal=False, pdf=False, force=True
):
    """Write a plot of one or several lines, told apart by their dashes, not by their colors.

    Args:
        path: the PNG to make.
        series: {name: (x, y)} or {name: (x, y, low, high)} with an interval around y.
        xlabel: with the unit.
        ylabel: with the unit.
        marked: {name: x} of a chosen point of a series, for example the chosen lambda.
        limits: (lowest, highest) of both axes.
        diagonal: draw the line of chance.
        pdf: also write a PDF beside the PNG.
        force: overwrite.
    """
    figure, axis = plt.subplots(figsize=LINES_INCHES, layout="constrained")
    for (name, values), style in zip(series.items(), itertools.cycle(DASHES)):
        x, y, *interval = (np.asarray(value, float) for value in values)
        marker = "." if len(x) <= MOST_MARKERS else None
        axis.plot(x, y, label=name, marker=marker, **style)
        if interval:
            axis.fill_between(x, *interval, color=style["color"], alpha=BAND_ALPHA, linewidth=0)
        if marked and name in marked:
            chosen = int(np.argmin(np.abs(x - marked[name])))
            axis.plot(x[chosen], y[chosen], "o", color=style["color"], fillstyle="none", ms=10)
    if diagonal:
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, label="chance")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if limits:
        axis.set(xlim=limits, ylim=limits, aspect="equal")
    axis.grid(color="0.9", linewidth=0.6)
    axis.legend(fontsize=8)
    save(figure, path, pdf=pdf, force=force)


def auc_against_lambda(path, series, **options):
    """Figure 2 (a): {name: (lambdas, pooled AUC)} or with an interval; see `lines`."""
    lines(path, series, xlabel=LAMBDA, ylabel="pooled AUC (fraction)", **options)


def change_against_lambda(path, series, **options):
    """Figure 2 (b): {name: (lambdas, change of healthy subjects)}; `marked` is the minimum."""
    lines(path, series, xlabel=LAMBDA, ylabel=CHANGE, **options)


def roc_curves(path, series, **options):
    """Figure 2 (c): {name: (FPR, TPR)}, all voxels of all subjects pooled."""
    rates = {"xlabel": "false positive rate (fraction)", "ylabel": "true positive rate (fraction)"}
    lines(path, series, limits=(0, 1), diagonal=True, **rates, **options)


def auc_against_step(path, series, **options):
    """Figure 3: {name: (restoration steps, pooled AUC)}."""
    lines(path, series, xlabel="restoration step", ylabel="pooled AUC (fraction)", **options)


def save(figure, path, *, pdf=False, force=True):
    """Write a figure as PNG, and as PDF beside it if asked, and close it."""
    paths = [Path(path)] + ([Path(path).with_suffix(".pdf")] if pdf else [])
    try:
        for target in paths:
            with written_whole(target, force=force) as temporary:
                figure.savefig(temporary, dpi=PNG_DPI)
    finally:
        plt.close(figure)


def _window(images):
    values = np.asarray(images)[np.asarray(images) > 0]
    return (0.0, float(np.percentile(values, WINDOW_PERCENTILE)) if values.size else 1.0)


def _draw_row(row, name, images, window):
    for axis, image in zip(row, images, strict=True):
        picture = axis.imshow(
            as_seen(image), cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest"
        )
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    row[0].set_ylabel(name, fontsize=9)
    return picture


def _mark_sides(axis):
    for x, side in ((0.05, "R"), (0.95, "L")):
        axis.text(
            x,
            0.94,
            side,
            transform=axis.transAxes,
            color="white",
            fontsize=8,
            ha="center",
            va="center",
        )
