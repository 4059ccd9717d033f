"""Are synthetic scans like real ones? Intensities, noise and edges of caches, side by side.

All intensities are relative to the white matter of their subject (ICBM152's), so caches need not be
matched to each other; matching would hide what differs. Lesions and a margin around them are left
out. The table (medians over subjects, with their range):
    noise             of neighboring pixels in deep white matter
    spread            of deep white matter, noise, bias and texture together
    gradient 50, 90   percentiles of the in-plane gradient, per pixel
    intensity 1, 90   percentiles of the brain
    fluid             share of the brain brighter than twice white matter
    ventricles        the same in a box around the ventricles
Noise and spread are robust standard deviations. The figure has histograms by tissue, the gradient,
the power spectrum, and slices of the first subject of each cache.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from tf_lesion.caches.slices import SliceCache
from tf_lesion.cli.command import command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.drawing import plainly
from tf_lesion.files import InputError, readable, refuse_existing, written_whole

if TYPE_CHECKING:  # --help can do without what these bring
    from tf_lesion.scans.volumes import MniGrid

SURE_WHITE, SURE_GRAY, SURE_CSF = 0.95, 0.85, 0.7  # shares of the ICBM152 maps
DEEP_MM = 2.0  # from the edge of sure white matter to deep white matter
VENTRICLE_BOX_MM = ((-25.0, 25.0), (-45.0, 35.0), (-5.0, 35.0))
MARGIN_MM = 4.0  # around lesions and inside the edge of the brain, left out
FLUID = 2.0  # relative to white matter: gray matter is darker, pure CSF brighter
HEIGHTS_MM = (-35.0, -15.0, 5.0, 15.0, 25.0, 45.0)  # of the slices shown
BINS = 80
MOST_SLICES = 60  # of a subject, evenly spread
COLUMN_INCHES, PLOT_INCHES, SLICE_INCHES = 2.4, 2.6, 3.0
REGIONS = ("white matter", "gray matter", "ventricles", "sulci and cisterns")
GRADIENT, SPECTRUM = "gradient", "power spectrum"
BRIGHTEST, STEEPEST, HIGHEST_FREQUENCY = 5.0, 1.6, 0.5  # ends of the axes
AXES = {  # {curve: (end of its axis, its label)}
    **dict.fromkeys(REGIONS, (BRIGHTEST, "intensity / white matter")),
    GRADIENT: (STEEPEST, "intensity / white, per pixel"),
    SPECTRUM: (HIGHEST_FREQUENCY, "frequency, per pixel"),
}
EXAMPLE = """example:
  python -m preprocessing.cohort_figure --caches healthy.h5 ms.h5 --datasets Train Test \\
      --out figure.png"""


@dataclass(frozen=True)
class SubjectStatistics:
    """What is measured of one subject, relative to white matter."""

    figures: dict[str, float]  # the row of the table
    # By the names of AXES: densities [BINS] of intensity by region and of the magnitude of the
    # in-plane gradient, and the mean power by frequency, relative to the sum.
    curves: dict[str, np.ndarray]
    examples: list[np.ndarray]  # slices [H, W] nearest to HEIGHTS_MM


Measured = Sequence[tuple[str, Sequence[SubjectStatistics]]]  # by names of caches


def regions_on(grid: "MniGrid") -> dict[str, np.ndarray]:
    """ICBM152 on the grid of a cache, [X, Y, Z] bool: REGIONS, "deep white", and "center"."""
    from nilearn import datasets
    from scipy import ndimage

    from preprocessing.phantom.anatomy import grid_mm
    from tf_lesion.scans.alignment import atlas_mask_on, to_grid

    loaders = (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    maps = [load(resolution=1) for load in loaders]
    gray, white = (
        to_grid(share.get_fdata(dtype=np.float32), share.affine, np.eye(4), grid) for share in maps
    )
    csf = atlas_mask_on(grid) & (1 - gray - white > SURE_CSF)
    places = zip(grid_mm(grid.affine, grid.shape), VENTRICLE_BOX_MM, strict=True)
    x, y, z = ((low <= place) & (place <= high) for place, (low, high) in places)
    center = x & y & z
    named = (white > SURE_WHITE, gray > SURE_GRAY, csf & center, csf & ~center)
    steps = max(1, round(DEEP_MM / grid.voxel_size))
    deep = ndimage.binary_erosion(white > SURE_WHITE, iterations=steps)
    return {**dict(zip(REGIONS, named, strict=True)), "deep white": deep, "center": center}


def measure(path: str | Path, dataset: str) -> list[SubjectStatistics]:
    """`SubjectStatistics` of each subject of one dataset of a cache.

    Raises:
        FileNotFoundError, InputError: if the cache cannot be used, does not say where in MNI space
            its slices lie, or has a subject without white matter in its slices.
    """
    from tf_lesion.scans.volumes import MniGrid

    with SliceCache(path, dataset) as cache:
        index, affine = cache.index, cache.grid_affine
        grid = None if affine is None else MniGrid(float(affine[0, 0]))
        if grid is None or grid.slice_shape != cache.slice_shape or (index.slice_index < 0).any():
            raise InputError(
                f"{path}: expected slices of the MNI grid that say their height, as "
                f"preprocessing.camcan and preprocessing.brats write; got {cache.slice_shape} "
                "pixels."
            )
        regions = regions_on(grid)
        names = tqdm(index.subject_ids, desc=Path(path).stem, unit="subject", leave=False)
        return [_subject(cache, number, grid, regions) for number, _ in enumerate(names)]


def _subject(cache, number, grid, regions):
    from scipy import ndimage
    from scipy.stats import median_abs_deviation

    own = np.flatnonzero(cache.index.subject == number)
    rows = own[np.unique(np.linspace(0, len(own) - 1, MOST_SLICES).astype(int))]
    heights = cache.index.slice_index[rows]
    images, brain = cache.read(rows)[..., 0], cache.mask(rows)[..., 0]
    steps = max(1, round(MARGIN_MM / grid.voxel_size))
    disk = ndimage.generate_binary_structure(2, 1)[None]  # neighbors within a slice
    inner = ndimage.binary_erosion(brain, disk, steps)
    if cache.has_label:
        inner &= ~ndimage.binary_dilation(cache.label(rows)[..., 0], disk, steps)
    x0, x1, y0, y1 = cache.crop
    on_slices = {
        name: inner & np.moveaxis(region[x0:x1, y0:y1, heights], 2, 0)
        for name, region in regions.items()
    }
    white = images[on_slices[REGIONS[0]]]
    if not white.size:
        raise InputError(
            f"{cache.path}: {cache.index.subject_ids[number]} has no white matter where ICBM152 "
            "has it; is it aligned?"
        )
    images = images / np.median(white)
    deep = on_slices["deep white"]
    neighbors = np.diff(images, axis=1)[deep[:, 1:] & deep[:, :-1]]  # sqrt(2) times the noise
    gradients = np.hypot(*np.gradient(images, axis=(1, 2)))[inner]
    wanted = (np.array(HEIGHTS_MM) - grid.affine[2, 3]) / grid.voxel_size
    return SubjectStatistics(
        figures={
            "noise": median_abs_deviation(neighbors, scale="normal") / np.sqrt(2),
            "spread": median_abs_deviation(images[deep], scale="normal"),
            "gradient 50": np.percentile(gradients, 50),
            "gradient 90": np.percentile(gradients, 90),
            "intensity 1": np.percentile(images[inner], 1),
            "intensity 90": np.percentile(images[inner], 90),
            "fluid": np.mean(images[inner] > FLUID),
            "ventricles": np.mean(images[on_slices["center"]] > FLUID),
        },
        curves={
            **{name: _density(images[on_slices[name]], BRIGHTEST) for name in REGIONS},
            GRADIENT: _density(gradients, STEEPEST),
            SPECTRUM: _spectrum(images),
        },
        examples=[images[np.abs(heights - height).argmin()] for height in wanted],
    )


def _density(values, largest):
    counts, _ = np.histogram(values, BINS, (0, largest))
    return counts * BINS / largest / max(len(values), 1)


def _spectrum(images):
    """Mean power of slices by radial frequency, relative to its sum."""
    window = np.outer(*(np.hanning(n) for n in images.shape[1:]))
    centered = images - images.mean(axis=(1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(centered * window)) ** 2).mean(axis=0)
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in power.shape), indexing="ij"))
    bins = {"bins": BINS // 2, "range": (0, HIGHEST_FREQUENCY)}  # finer ones would be empty
    total, _ = np.histogram(frequency, weights=power, **bins)
    mean = total / np.maximum(np.histogram(frequency, **bins)[0], 1)
    return mean / mean.sum()


@plainly()
def draw(path: str | Path, measured: Measured) -> None:
    """Write the figure as PNG."""
    from matplotlib.figure import Figure

    heights = [PLOT_INCHES, *[SLICE_INCHES] * len(measured)]
    figure = Figure((len(HEIGHTS_MM) * COLUMN_INCHES, sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), len(HEIGHTS_MM), height_ratios=heights)
    for panel, (curve, (end, label)) in zip(axes[0], AXES.items(), strict=True):
        for name, subjects in measured:
            mean = np.mean([one.curves[curve] for one in subjects], axis=0)
            panel.plot((np.arange(len(mean)) + 0.5) * end / len(mean), mean, lw=1, label=name)
        panel.set(title=curve, xlabel=label)
        panel.set(yticks=[]) if curve in REGIONS else panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")  # by itself it writes formulas
    axes[0, 0].legend(fontsize="x-small")
    for row, (name, subjects) in zip(axes[1:], measured, strict=True):
        for panel, image, height in zip(row, subjects[0].examples, HEIGHTS_MM, strict=True):
            panel.imshow(image.T, cmap="gray", vmin=0, vmax=3.5, origin="lower")
            panel.set_title(f"z = {height:g} mm", fontsize="small")
            panel.axis("off")
        row[0].set_title(f"{name}, z = {HEIGHTS_MM[0]:g} mm", fontsize="small")
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")


def table(measured: Measured) -> str:
    """A column per figure, a row per cache: "median (least-most)" of its subjects."""
    import pandas as pd

    def summary(column):
        return f"{column.median():.3f} ({column.min():.3f}-{column.max():.3f})"

    rows = [pd.DataFrame([one.figures for one in cache]).apply(summary) for _, cache in measured]
    return pd.DataFrame(rows, index=[name for name, _ in measured]).to_string()


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure and print the table; returns the exit status."""
    parser = parser_for(
        "python -m preprocessing.cohort_figure",
        "Compare scans in several caches: noise, edges, histograms by tissue.",
        epilog=EXAMPLE,
    )
    add(parser, "--caches", required=True)
    add(parser, "--datasets")
    add(parser, "--out", required=True, help="the figure, .png")
    add(parser, "--force")
    args = parser.parse_args(argv)
    if len(args.datasets) not in (1, len(args.caches)):
        raise InputError(
            f"Expected one of --datasets, or one for each of {len(args.caches)} caches, got "
            f"{len(args.datasets)}."
        )
    refuse_existing(args.out, force=args.force)
    measured = [
        (f"{readable(path.stem)} {dataset}", measure(path, dataset))
        for path, dataset in zip(args.caches, itertools.cycle(args.datasets), strict=False)
    ]
    draw(args.out, measured)
    print(table(measured))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
