"""A picture of a scan for quality control: where the brain was found, where MNI space lies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage

from tf_lesion.drawing import plainly
from tf_lesion.files import readable, written_whole
from tf_lesion.scans import alignment, intensity
from tf_lesion.scans.prepare import PreparedScan

BRAIN_COLOR, ATLAS_COLOR, MIDLINE_COLOR = "#ffd400", "#00d0ff", "#ff5ad0"
KEY = {"brain found": BRAIN_COLOR, "MNI brain": ATLAS_COLOR, "midline": MIDLINE_COLOR}
SHOWN_PERCENTILES = (1.0, 99.5)
PLANES = ("sagittal", "coronal", "axial")
INCHES, DPI = 3.6, 100
BINS = 80  # of the histograms
WRAPPED = 110  # letters of a line of the title


@plainly()
def quality_figure(prepared: PreparedScan, qc: Mapping[str, Any]) -> Figure:
    """Figure of three planes through the middle of the brain, in the scan's grid, and histograms.

    Yellow is the edge of the brain mask, blue that of the ICBM152 brain as the scan was aligned,
    pink its midline. The histograms are those of the brain before and after matching.

    Args:
        prepared: the scan.
        qc: {verdict, reasons}, for the title.
    """
    figure = Figure(figsize=(4 * INCHES, INCHES + 0.9), layout="constrained", facecolor="black")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.8))
    _draw_planes(panels[:3], prepared)
    _draw_histograms(panels[3], prepared)
    figure.suptitle(_title(prepared, qc), color="white", fontsize=9)
    marks = [_mark(color) for color in KEY.values()]
    figure.legend(
        marks, list(KEY), loc="outside lower left", ncols=len(KEY), fontsize=8,
        labelcolor="white", facecolor="black", edgecolor="black",
    )  # fmt: skip
    return figure


@plainly()
def write_picture(path: str | Path, prepared: PreparedScan, qc: Mapping[str, Any]) -> None:
    """Write the `quality_figure` as a PNG, over what is there."""
    figure = quality_figure(prepared, qc)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=DPI, facecolor=figure.get_facecolor())


def _draw_planes(panels, prepared):
    data, brain = prepared.scan.data, prepared.scan_mask
    where = prepared.scan_from_mni, data.shape, prepared.scan.affine
    atlas, across = alignment.atlas_mask_in(*where), _from_midline(*where)
    middle = ndimage.center_of_mass(brain) if brain.any() else np.array(data.shape) / 2
    low, high = np.percentile(data[::2, ::2, ::2], SHOWN_PERCENTILES)
    for axis, (panel, name) in enumerate(zip(panels, PLANES, strict=True)):
        at = int(np.clip(round(middle[axis]), 0, data.shape[axis] - 1))
        right, up = np.delete(prepared.scan.voxel_sizes, axis)
        panel.imshow(
            data.take(at, axis).T, cmap="gray", vmin=low, vmax=high, origin="lower",
            aspect=up / right,
        )  # fmt: skip
        _edge(panel, atlas.take(at, axis).T, 0.5, ATLAS_COLOR)
        _edge(panel, brain.take(at, axis).T, 0.5, BRAIN_COLOR)
        if name != "sagittal":
            _edge(panel, across.take(at, axis).T, 0.0, MIDLINE_COLOR)
        panel.invert_xaxis()  # as in the report: the patient's right, or the front, on the left
        side = "front" if name == "sagittal" else "right"
        panel.set_title(f"{name} ({side} on the left)", color="white", fontsize=9)
        panel.set_axis_off()


def _from_midline(scan_from_mni, shape, affine):
    """[X, Y, Z] mm, x in MNI space of each voxel of a scan."""
    row = (np.linalg.inv(scan_from_mni) @ affine)[0]
    axes = np.ogrid[tuple(slice(0, size) for size in shape)]
    return sum(part * axis for part, axis in zip(row[:3], axes, strict=True)) + row[3]


def _edge(panel, plane, level, color):
    if plane.min() < level < plane.max():
        panel.contour(plane, [level], colors=color, linewidths=1)


def _draw_histograms(panel, prepared):
    share = np.full(intensity.QUANTILES - 1, 1 / (intensity.QUANTILES - 1))
    after = intensity.brain_quantiles(prepared.image, prepared.mask)
    for values, label, color in ((prepared.quantiles, "before matching", "0.6"),
                                 (after, "after", BRAIN_COLOR)):  # fmt: skip
        panel.hist(
            values[1:], BINS, (0, 1), weights=share, histtype="step", label=label, color=color
        )
    panel.set_facecolor("black")
    panel.tick_params(colors="white", labelsize=7)
    panel.set_yticks([])
    panel.set_xlabel("normalized intensity of the brain", color="white", fontsize=8)
    panel.set_title("histogram", color="white", fontsize=9)
    panel.legend(fontsize=7, labelcolor="white", facecolor="black", edgecolor="black")


def _mark(color):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color)


def _title(prepared, qc):
    import textwrap

    name = prepared.scan.path.name if prepared.scan.path else prepared.scan.name
    reasons = textwrap.wrap(" ".join(qc["reasons"]), WRAPPED)
    return readable("\n".join([f"{name}: {qc['verdict']}", *reasons]))
