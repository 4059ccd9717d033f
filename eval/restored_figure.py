"""One axial slice of a scan that was detected in: scan, restored, residual, detection.

    tf-lesion detect patient_t2.nii.gz maps
    python -m eval.restored_figure --results maps --out restored.png

The slice is the one with most lesion: of the segmentation beside the scan (`CASE_seg` beside
`CASE_t2`), else of the 1 % mask. Scan and restored are in normalized intensity, in one window. The
patient's left is on the right. The picture of the README is made by it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_lesion.cli.command import command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.drawing import plainly
from tf_lesion.files import InputError, refuse_existing, written_whole

MASK = "fpr_0.01"
INCHES, DPI = 2.6, 110  # of a panel
MARGIN_MM = 4.0  # around the brain
BRIGHTEST_PERCENTILE = 99.8  # of the scan's brain, shown as white
LEAST_RESIDUAL = 0.3  # normalized intensity; what is shown brightest is at least this
TRUE, FOUND = "#4dd2ff", "#ff5c5c"
Panels = dict[str, tuple[np.ndarray, str, float]]  # title -> image, color map, brightest


def chosen_slice(lesion: np.ndarray) -> int:
    """The axial slice with the most voxels of `lesion` [X, Y, Z]."""
    return int(lesion.sum(axis=(0, 1)).argmax())


def window_around(brain: np.ndarray, voxel_sizes: Sequence[float]) -> tuple[slice, slice]:
    """The part of a slice [X, Y] around the brain."""
    edges = []
    for axis, size in enumerate(voxel_sizes[:2]):
        there = np.flatnonzero(brain.any(axis=1 - axis))
        margin = round(MARGIN_MM / size)
        edges.append(slice(max(there[0] - margin, 0), there[-1] + margin + 1))
    return edges[0], edges[1]


@plainly()
def figure(panels: Panels, outlines: Sequence[tuple], aspect: float) -> Any:
    """The panels in a row, [X, Y] each, the front of the head on top; outlines on the last."""
    from matplotlib.figure import Figure

    from tf_lesion.evaluation.plots import as_seen

    height = aspect * next(iter(panels.values()))[0].shape[1]
    width = next(iter(panels.values()))[0].shape[0]
    drawn = Figure(
        figsize=(INCHES * len(panels), INCHES * height / width + 0.5),
        dpi=DPI,
        facecolor="black",
        layout="constrained",
    )
    axes = drawn.subplots(1, len(panels))
    for axis, (title, (image, colors, top)) in zip(axes, panels.items(), strict=True):
        axis.imshow(as_seen(image), cmap=colors, vmin=0, vmax=top, aspect=aspect)
        axis.set_title(title, color="white", fontsize=9)
        axis.set_axis_off()
    for mask, color in outlines:
        axes[-1].contour(as_seen(mask), levels=[0.5], colors=[color], linewidths=1.1)
    return drawn


def draw(results: Path) -> Any:
    """The figure of the one scan in a folder of `tf-lesion detect`.

    Raises:
        InputError: if the folder holds no scan, or several, or no mask.
    """
    from tf_lesion.detection.layout import FACTS_PATTERNS
    from tf_lesion.evaluation.results import Result

    found = [path for pattern in FACTS_PATTERNS for path in results.glob(pattern)]
    if len(found) != 1:
        raise InputError(f"Expected the maps of one scan in {results}, got {len(found)}.")
    result = Result.read(found[0])
    if not result.has(MASK):
        raise InputError(f"Expected a mask {MASK} in {found[0]}, it names none.")
    normalized = result.has("normalized")  # unknown to versions before
    mask, truth = result.volume(MASK), result.truth
    volumes = {
        "scan": result.volume("normalized") if normalized else result.scan.data,
        "restored": result.restored,
        "residual": result.residual,
        MASK: mask,
        "truth": mask if truth is None else truth,
    }
    sizes = result.scan.voxel_sizes
    z = chosen_slice(volumes["truth"] > 0)
    brain = volumes["restored"][..., z] > 0
    window = window_around(brain, sizes)
    planes = {name: volume[..., z][window] for name, volume in volumes.items()}
    white = np.percentile(planes["scan"][brain[window]], BRIGHTEST_PERCENTILE)
    gray = white
    if not normalized:
        gray = np.percentile(planes["restored"][brain[window]], BRIGHTEST_PERCENTILE)
    top = max(LEAST_RESIDUAL, float(planes["residual"].max()))
    panels = {
        "scan": (planes["scan"], "gray", white),
        "restored": (planes["restored"], "gray", gray),
        "residual": (planes["residual"], "magma", top),
        "found" if truth is None else "found (red), true (blue)": (planes["scan"], "gray", white),
    }
    outlines = [] if truth is None else [(planes["truth"] > 0, TRUE)]
    outlines += [(planes[MASK] > 0, FOUND)] if planes[MASK].any() else []
    return figure(panels, outlines, sizes[1] / sizes[0])


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture; returns the exit status."""
    parser = parser_for("python -m eval.restored_figure", __doc__)
    add(parser, "--results", required=True, help="folder of the maps of one scan")
    add(parser, "--out", required=True, help="the picture, .png")
    add(parser, "--force")
    options = parser.parse_args(argv)
    refuse_existing(options.out, force=options.force)
    drawn = draw(options.results)
    with plainly(), written_whole(options.out, force=options.force) as temporary:
        drawn.savefig(temporary, format="png", facecolor="black")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
