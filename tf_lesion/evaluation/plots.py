"""Drawing: slices as in the paper's Figures 1 and 4-6, curves as in its Figures 2 and 3.

Slices [X, Y] are shown as radiologists look at them: anterior up, the patient's right on the left.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tf_lesion.drawing import plainly
from tf_lesion.files import written_whole

COLUMN_INCHES, ROW_INCHES, MARGIN_INCHES = 1.45, 1.7, 1.5
WINDOW_PERCENTILE = 99.5  # of the brain's values; a few bright voxels must not darken a row
PNG_DPI = 150
LINES_INCHES = (4.5, 3.6)
MOST_MARKERS = 60  # points of a line that still get a mark each
BAND_ALPHA = 0.2
STYLES = (("0.0", "-"), ("0.45", "-"), ("0.0", "--"), ("0.45", "--"), ("0.0", ":"), ("0.6", "-."))
DASHES = [{"color": color, "linestyle": dash, "linewidth": 1.4} for color, dash in STYLES]
BRAIN_SHADE = 0.3  # of the brain behind a detection, so that one sees where it lies
BAR_LABELS = {"observed": "normalized intensity", "residual": "|observed - restored|"}


def as_seen(image: np.ndarray) -> np.ndarray:
    """Slice [X, Y] -> picture [Y, X] for imshow: anterior up, the patient's right on the left."""
    return np.asarray(image)[::-1, ::-1].T


@plainly()
def cases(
    path: Path,
    arrays: dict[str, np.ndarray],
    thresholds: dict[str, float | None],
    *,
    pdf: bool = False,
    force: bool = True,
) -> None:
    """Write five rows (observed, restored, residual, detection, truth) of n slices, as Figure 1.

    Args:
        path: the PNG to make.
        arrays: of `scans.largest_lesions`; restored is shown with the gray window of observed.
        thresholds: {name: of the residual}; the first that is a number makes the detection.
        pdf: also write a PDF beside the PNG.
        force: overwrite.
    """
    known = [(name, at) for name, at in thresholds.items() if at is not None and not math.isnan(at)]
    name, threshold = known[0] if known else ("", math.inf)
    said = f"{name.upper()}, > {threshold:.3f}" if name else "no threshold"
    brain = BRAIN_SHADE * (arrays["observed"] > 0)
    gray, titles = _window(arrays["observed"]), arrays["titles"]
    rows = {
        "observed": (arrays["observed"], gray),
        "restored": (arrays["restored"], gray),
        "residual": (arrays["residual"], _window(arrays["residual"])),
        f"detection\n({said})": (np.where(arrays["residual"] > threshold, 1, brain), (0, 1)),
        "truth": (np.where(arrays["truth"], 1, brain), (0, 1)),
    }
    size = (MARGIN_INCHES + COLUMN_INCHES * len(titles), ROW_INCHES * len(rows))
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, (name, (images, (low, high))) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            picture = axis.imshow(
                as_seen(image), cmap="gray", vmin=low, vmax=high, interpolation="nearest"
            )
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(name, fontsize=9)
        if name in BAR_LABELS:
            figure.colorbar(picture, ax=list(row), label=BAR_LABELS[name])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=7)
    for x, side in ((0.05, "R"), (0.95, "L")):
        place = {"transform": axes[0, 0].transAxes, "ha": "center", "va": "center"}
        axes[0, 0].text(x, 0.94, side, color="white", fontsize=8, **place)
    save(figure, path, pdf=pdf, force=force)


def _window(images):
    values = images[images > 0]
    return (0.0, float(np.percentile(values, WINDOW_PERCENTILE)) if values.size else 1.0)


@plainly()
def lines(
    path: Path,
    series: dict[str, tuple],
    *,
    marked: dict[str, float] | None = None,
    pdf: bool = False,
    **options: Any,
) -> None:
    """Write a plot of `curves`, with the options of that.

    Args:
        path: the PNG to make.
        series: {name: (x, y)} or {name: (x, y, low, high)} with an interval around y.
        marked: {name: x} of a chosen point of a series, for example the chosen lambda.
        pdf: also write a PDF beside the PNG.
        options: `xlabel`, `ylabel` and the others of `curves`.
    """
    figure, axis = curves({name: values[:2] for name, values in series.items()}, **options)
    for (name, values), style in zip(series.items(), itertools.cycle(DASHES)):
        x, y, *interval = (np.asarray(value, float) for value in values)
        if interval:
            axis.fill_between(x, *interval, color=style["color"], alpha=BAND_ALPHA, linewidth=0)
        if marked and name in marked:
            chosen = int(np.argmin(np.abs(x - marked[name])))
            axis.plot(x[chosen], y[chosen], "o", color=style["color"], fillstyle="none", ms=10)
    save(figure, path, pdf=pdf)


@plainly()
def curves(
    series: dict[str, tuple],
    *,
    xlabel: str,
    ylabel: str,
    rates: bool = False,
    markers: bool = True,
) -> tuple[Figure, Axes]:
    """(figure, axis) of lines {name: (x, y)}, told apart by their dashes, not by their colors.

    Args:
        series: the lines.
        xlabel: with the unit.
        ylabel: with the unit.
        rates: both axes are rates, from 0 to 1; the line of chance is drawn too.
        markers: mark the points of a line that has few.
    """
    figure = Figure(LINES_INCHES, layout="constrained")
    axis = figure.subplots()
    for (name, (x, y)), style in zip(series.items(), itertools.cycle(DASHES)):
        marker = "." if markers and len(x) <= MOST_MARKERS else None
        axis.plot(x, y, label=name, marker=marker, **style)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if rates:
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, label="chance")
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.grid(color="0.9", linewidth=0.6)
    axis.legend(fontsize=8)
    return figure, axis


@plainly()
def save(figure: Figure, path: Path, *, pdf: bool = False, force: bool = True) -> None:
    """Write a figure as PNG, and as PDF beside it if asked."""
    for target in [Path(path), *([Path(path).with_suffix(".pdf")] if pdf else [])]:
        with written_whole(target, force=force) as temporary:
            figure.savefig(temporary, dpi=PNG_DPI)
