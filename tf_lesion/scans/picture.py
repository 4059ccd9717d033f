"""A picture of a scan in three planes: where the brain was found, and where MNI space would lie."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage

from tf_lesion.files import written_whole
from tf_lesion.scans import alignment
from tf_lesion.scans.prepare import PreparedScan

BRAIN_COLOR, ATLAS_COLOR = "#ffd400", "#00d0ff"
SHOWN_PERCENTILES = (1.0, 99.5)
PLANES = ("sagittal", "coronal", "axial")
INCHES, DPI = 4.0, 100


def planes_figure(prepared: PreparedScan, title: str = "") -> Figure:
    """Figure of three planes through the middle of the brain found, in the scan's own grid.

    Yellow is the edge of the brain mask, blue that of the ICBM152 brain as the scan was aligned.
    """
    data, brain = prepared.scan.data, prepared.scan_mask
    atlas = alignment.atlas_mask_in(prepared.scan_from_grid, data.shape, prepared.scan.affine)
    middle = ndimage.center_of_mass(brain) if brain.any() else np.array(data.shape) / 2
    low, high = np.percentile(data[::2, ::2, ::2], SHOWN_PERCENTILES)
    figure = Figure(figsize=(3 * INCHES, INCHES + 0.4), layout="constrained", facecolor="black")
    for axis, (panel, name) in enumerate(zip(figure.subplots(1, 3), PLANES, strict=True)):
        at = int(np.clip(round(middle[axis]), 0, data.shape[axis] - 1))
        across, up = np.delete(prepared.scan.voxel_sizes, axis)
        panel.imshow(
            data.take(at, axis).T, cmap="gray", vmin=low, vmax=high, origin="lower",
            aspect=up / across,
        )  # fmt: skip
        for mask, color in ((atlas, ATLAS_COLOR), (brain, BRAIN_COLOR)):
            plane = mask.take(at, axis).T
            if plane.any() and not plane.all():
                panel.contour(plane, [0.5], colors=color, linewidths=1)
        panel.set_title(name, color="white", fontsize=9)
        panel.set_axis_off()
    figure.suptitle(title, color="white", fontsize=9)
    return figure


def write_planes(path: str | Path, prepared: PreparedScan, title: str = "") -> None:
    """Write the `planes_figure` as a PNG, over what is there."""
    figure = planes_figure(prepared, title)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=DPI, facecolor=figure.get_facecolor())
