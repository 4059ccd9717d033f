"""Pictures of a report, as pieces of HTML that need no other file: montage, curves."""

import base64
import io
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage

from tf_lesion.drawing import plainly
from tf_lesion.evaluation.metrics import Curve
from tf_lesion.evaluation.plots import BAR_LABELS, WINDOW_PERCENTILE, as_seen, curves, save
from tf_lesion.evaluation.results import Result

MONTAGE_SLICES = 7
MONTAGE_SHARE = (0.12, 0.88)  # of the brain's height; the ends show little
MONTAGE_MARGIN_MM = 6.0  # around the brain
MONTAGE_INCHES = 1.7  # width of a slice
MONTAGE_DPI = 140
MASK_COLOR, TRUTH_COLOR = "#ffd400", "#00d0ff"
RESIDUAL_MAP = "inferno"
MOST_CURVE_POINTS = 400
SVG_HEADER = re.compile(r"^.*?(?=<svg)", re.DOTALL)


@plainly()
def montage(result: Result) -> str:
    """PNG data URI of `montage_figure`."""
    figure = montage_figure(result, montage_slices(result.brain, result.mask))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=MONTAGE_DPI)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@plainly()
def montage_figure(result: Result, chosen: np.ndarray) -> Figure:
    """Figure of axial slices: scan, restored, residual, score if there; contours on the scan.

    Args:
        result: the scan and its maps.
        chosen: [n] ascending axial indices.
    """
    window = _window_around(result.brain, result.scan.voxel_sizes)
    rows = {"scan": result.scan.data, "restored": result.restored, "residual": result.residual}
    if result.made_from == "score":
        rows["score"] = result.thresholded
    sizes = result.scan.voxel_sizes
    width_mm, height_mm = result.brain[window][..., 0].shape * sizes[:2]
    height = MONTAGE_INCHES * height_mm / width_mm
    size = (MONTAGE_INCHES * len(chosen) + 0.9, height * len(rows) + 0.3)
    figure = Figure(size, layout="constrained")
    near = {"wspace": 0.02, "hspace": 0.02}
    axes = figure.subplots(len(rows), len(chosen), squeeze=False, gridspec_kw=near)
    for row, (name, volume) in zip(axes, rows.items(), strict=True):
        limits = dict(zip(("vmin", "vmax"), _limits(volume[result.brain]), strict=True))
        cmap = "gray" if name in ("scan", "restored") else RESIDUAL_MAP
        for axis, z in zip(row, chosen, strict=True):
            image, aspect = as_seen(volume[(*window, z)]), sizes[1] / sizes[0]
            picture = axis.imshow(image, cmap=cmap, aspect=aspect, **limits)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
        if cmap == RESIDUAL_MAP:
            bar = figure.colorbar(picture, ax=row, fraction=0.03, pad=0.01)
            bar.set_label(BAR_LABELS.get(name, name), fontsize=7)
            bar.ax.tick_params(labelsize=7)
            bar.outline.set_visible(False)
    for axis, z in zip(axes[0], chosen, strict=True):
        _outline(axis, result.mask[(*window, z)], MASK_COLOR, "-")
        if result.truth is not None:
            _outline(axis, result.truth[(*window, z)], TRUTH_COLOR, "--")
        axis.set_title(f"z = {_height_mm(result, z):.0f} mm", fontsize=8)
    return figure


@plainly()
def scan_picture(
    path: Path, result: Result, title: str, *, count: int, pdf: bool = False, force: bool = True
) -> None:
    """Write the `montage_figure` of the `count` slices with most lesion."""
    area = np.count_nonzero(result.truth & result.brain, axis=(0, 1))
    chosen = np.sort(np.argsort(-area, kind="stable")[:count])
    chosen = chosen[area[chosen] > 0]
    if not chosen.size:
        chosen = montage_slices(result.brain, result.mask, count=count)
    figure = montage_figure(result, chosen)
    figure.suptitle(title, fontsize=9)
    key = f"truth: blue, dashed{f'; {result.point}: yellow' if result.point else ''}"
    figure.supxlabel(key, fontsize=8)
    save(figure, path, pdf=pdf, force=force)


def montage_slices(
    brain: np.ndarray, mask: np.ndarray, *, count: int = MONTAGE_SLICES
) -> np.ndarray:
    """[n] ascending axial indices: evenly through the brain, one moved to the largest detection."""
    height = np.flatnonzero(brain.any(axis=(0, 1)))
    low, high = (height[0] + share * (height[-1] - height[0]) for share in MONTAGE_SHARE)
    chosen = np.unique(np.rint(np.linspace(low, high, count)).astype(int))
    area = mask.sum(axis=(0, 1))
    if area.any():
        worst = int(area.argmax())
        chosen[np.abs(chosen - worst).argmin()] = worst
    return np.unique(chosen)


def _window_around(brain, voxel_sizes):
    """Pair of slices (x, y) that hold the brain and a margin."""
    window = []
    for part, size in zip(
        ndimage.find_objects(brain.astype(np.uint8))[0], voxel_sizes, strict=True
    ):
        margin = round(MONTAGE_MARGIN_MM / size)
        window.append(slice(max(part.start - margin, 0), part.stop + margin))
    return tuple(window[:2])


def _limits(values):
    return 0.0, max(float(np.percentile(values, WINDOW_PERCENTILE)), np.finfo(np.float32).tiny)


def _height_mm(result, z):
    center = (np.array(result.scan.data.shape) - 1) / 2
    return (result.scan.affine @ [*center[:2], z, 1.0])[2]


def _outline(axis, mask, color, style):
    if mask.any():
        axis.contour(as_seen(mask), levels=[0.5], colors=color, linewidths=0.8, linestyles=style)


def roc(series: dict[str, tuple]) -> str:
    """SVG of ROC curves, {name: (fpr, tpr)}."""
    thinned = {}
    for name, rates in series.items():
        rows = _thinned(np.arange(len(rates[0])))
        thinned[name] = [np.asarray(rate, float)[rows] for rate in rates]
    labels = {"xlabel": "false positive rate", "ylabel": "true positive rate"}
    return _svg(curves(thinned, rates=True, markers=False, **labels)[0])


@plainly()
def threshold_curves(curve: Curve, marked: dict[str, float]) -> str:
    """SVG of Dice, true and false positive rate against the threshold.

    Args:
        curve: of one scan.
        marked: {label: threshold} drawn as vertical lines.
    """
    inside = np.flatnonzero((curve.threshold >= 0) & (curve.tp + curve.fp > 0))
    rows = inside[_thinned(curve.threshold[inside])]
    x, tp, fp = curve.threshold[rows], curve.tp[rows], curve.fp[rows]
    lines = {
        "Dice": (x, 2 * tp / (tp + fp + curve.positives)),
        "true positive rate": (x, curve.tpr[rows]),
        "false positive rate": (x, curve.fpr[rows]),
    }
    figure, axis = curves(lines, xlabel="threshold", ylabel="fraction", markers=False)
    for label, threshold in marked.items():
        axis.axvline(threshold, color="0.8", linewidth=0.8, zorder=0)
        axis.text(threshold, 1.01, label, fontsize=7, ha="center", color="0.3")
    axis.set(ylim=(0, 1))
    axis.set_xlim(left=0)
    return _svg(figure)


def _thinned(values):
    """Indices of at most `MOST_CURVE_POINTS` of ascending values, equally far apart in them."""
    if len(values) <= MOST_CURVE_POINTS:
        return np.arange(len(values))
    wanted = np.linspace(values[0], values[-1], MOST_CURVE_POINTS)
    return np.unique(np.searchsorted(values, wanted).clip(0, len(values) - 1))


@plainly()
def _svg(figure):
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return SVG_HEADER.sub("", buffer.getvalue())
