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

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nilearn import datasets
from scipy import ndimage
from tqdm import tqdm

from tf_lesion.caches.slices import SliceCache
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.files import InputError, refuse_existing, written_whole
from tf_lesion.scans.alignment import atlas_mask_on, to_grid
from tf_lesion.scans.volumes import MniGrid

SURE_WHITE, SURE_GRAY, SURE_CSF = 0.95, 0.85, 0.7  # shares of the ICBM152 maps
DEEP_MM = 2.0  # from the edge of sure white matter to deep white matter
VENTRICLE_BOX_MM = ((-25.0, 25.0), (-45.0, 35.0), (-5.0, 35.0))
MARGIN_MM = 4.0  # around lesions and inside the edge of the brain, left out
FLUID = 2.0  # relative to white matter: gray matter is darker, pure CSF brighter
NORMAL_MAD = 0.6745  # median absolute deviation of a normal distribution, in standard deviations
HEIGHTS_MM = (-35.0, -15.0, 5.0, 15.0, 25.0, 45.0)  # of the slices shown
BRIGHTEST, STEEPEST, HIGHEST_FREQUENCY = 5.0, 1.6, 0.5  # ends of the axes
BINS = 80
MOST_SLICES = 60  # of a subject, evenly spread
REGIONS = ("white matter", "gray matter", "ventricles", "sulci and cisterns")
COLUMN_INCHES, PLOT_INCHES, SLICE_INCHES, PNG_DPI = 2.4, 2.6, 3.0, 90
WHITE_SHOWN = 3.5  # brightest gray of the slices shown, relative to white matter
EXAMPLE = """example:
  python -m preprocessing.cohort_figure --caches healthy.h5 ms.h5 --datasets Train Test \\
      --out figure.png"""


@dataclass(frozen=True)
class SubjectStatistics:
    """What is measured of one subject, relative to white matter.

    Attributes:
        figures: {name: number}, the row of the table.
        histograms: {region: [BINS] density of intensity}.
        gradient: [BINS] density of the magnitude of the in-plane gradient.
        spectrum: [BINS] mean power by frequency, relative to the sum.
        examples: slices [H, W] nearest to HEIGHTS_MM.
    """

    figures: dict
    histograms: dict
    gradient: np.ndarray
    spectrum: np.ndarray
    examples: list


@dataclass(frozen=True)
class Regions:
    """ICBM152 on the grid of a cache, [X, Y, Z] bool each: REGIONS by name, and two more."""

    named: dict
    deep_white: np.ndarray
    center: np.ndarray  # the box around the ventricles

    @classmethod
    def on(cls, grid):
        """The regions on a `MniGrid`."""
        loaders = (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
        gray, white = (
            to_grid(
                load(resolution=1).get_fdata(dtype=np.float32), MniGrid().affine, np.eye(4), grid
            )
            for load in loaders
        )
        csf = atlas_mask_on(grid) & (1 - gray - white > SURE_CSF)
        center = np.ones(grid.shape, bool)
        for axis, (low, high) in enumerate(VENTRICLE_BOX_MM):
            place = grid.affine[axis, axis] * np.arange(grid.shape[axis]) + grid.affine[axis, 3]
            shape = [-1 if k == axis else 1 for k in range(3)]
            center &= ((place >= low) & (place <= high)).reshape(shape)
        maps = (white > SURE_WHITE, gray > SURE_GRAY, csf & center, csf & ~center)
        steps = max(1, round(DEEP_MM / grid.voxel_size))
        return cls(
            named=dict(zip(REGIONS, maps, strict=True)),
            deep_white=ndimage.binary_erosion(white > SURE_WHITE, iterations=steps),
            center=center,
        )


def measure(path, dataset):
    """`SubjectStatistics` of each subject of one dataset of a cache.

    Raises:
        FileNotFoundError, InputError: if the cache cannot be used, does not say where in MNI space
            its slices lie, or has a subject without white matter in its slices.
    """
    with SliceCache(path, dataset) as cache:
        grid = _grid(cache)
        regions = Regions.on(grid)
        names = tqdm(cache.index.subject_ids, desc=Path(path).stem, unit="subject", leave=False)
        return [_subject(cache, number, grid, regions) for number, _ in enumerate(names)]


def _grid(cache):
    """The `MniGrid` that the slices of a cache are on."""
    affine = cache.grid_affine
    grid = None if affine is None else MniGrid(float(affine[0, 0]))
    if grid is None or grid.slice_shape != cache.slice_shape or (cache.index.slice_index < 0).any():
        raise InputError(
            f"{cache.path}: expected slices of the MNI grid that say their height, as "
            f"preprocessing.camcan and preprocessing.brats write; got {cache.slice_shape} pixels."
        )
    return grid


def _subject(cache, number, grid, regions):
    own = np.flatnonzero(cache.index.subject == number)
    rows = own[np.unique(np.linspace(0, len(own) - 1, MOST_SLICES).astype(int))]
    heights = cache.index.slice_index[rows]
    images, brain = cache.read(rows)[..., 0], cache.mask(rows)[..., 0]
    steps = max(1, round(MARGIN_MM / grid.voxel_size))
    inner = ndimage.binary_erosion(brain, _disk(), steps)
    if cache.has_label:
        inner &= ~ndimage.binary_dilation(cache.label(rows)[..., 0], _disk(), steps)

    def on_slices(region):
        x0, x1, y0, y1 = cache.crop
        return inner & np.moveaxis(region[x0:x1, y0:y1, heights], 2, 0)

    white = images[on_slices(regions.named[REGIONS[0]])]
    if not white.size:
        raise InputError(
            f"{cache.path}: {cache.index.subject_ids[number]} has no white matter where ICBM152 "
            "has it; is it aligned?"
        )
    images = images / np.median(white)
    named = {name: images[on_slices(region)] for name, region in regions.named.items()}
    gradients = np.hypot(*np.gradient(images, axis=(1, 2)))[inner]
    wanted = (np.array(HEIGHTS_MM) - grid.affine[2, 3]) / grid.voxel_size
    return SubjectStatistics(
        figures={
            **_noise(images, on_slices(regions.deep_white)),
            "gradient 50": np.percentile(gradients, 50),
            "gradient 90": np.percentile(gradients, 90),
            "intensity 1": np.percentile(images[inner], 1),
            "intensity 90": np.percentile(images[inner], 90),
            "fluid": np.mean(images[inner] > FLUID),
            "ventricles": np.mean(images[on_slices(regions.center)] > FLUID),
        },
        histograms={name: _density(values, BRIGHTEST) for name, values in named.items()},
        gradient=_density(gradients, STEEPEST),
        spectrum=_spectrum(images),
        examples=[images[np.abs(heights - height).argmin()] for height in wanted],
    )


def _noise(images, deep):
    """Figures of deep white matter; differences of neighbors have sqrt(2) times the noise."""
    steps = np.diff(images, axis=1)[deep[:, 1:] & deep[:, :-1]]
    return {"noise": _robust_spread(steps) / np.sqrt(2), "spread": _robust_spread(images[deep])}


def _robust_spread(values):
    """Standard deviation of the bulk of values; NaN if there are none."""
    if not values.size:
        return np.nan
    return np.median(np.abs(values - np.median(values))) / NORMAL_MAD


def _disk():
    """Neighbors within a slice [1, 3, 3]."""
    return ndimage.generate_binary_structure(2, 1)[None]


def _density(values, largest):
    counts, _ = np.histogram(values, BINS, (0, largest))
    return counts * BINS / largest / max(len(values), 1)


def _spectrum(images):
    """Mean power of slices by radial frequency, relative to its sum."""
    window = np.outer(*(np.hanning(n) for n in images.shape[1:]))
    centered = images - images.mean(axis=(1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(centered * window)) ** 2).mean(axis=0)
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in power.shape), indexing="ij"))
    edges = np.linspace(0, HIGHEST_FREQUENCY, BINS // 2 + 1)  # fewer would be empty
    total, _ = np.histogram(frequency, edges, weights=power)
    count, _ = np.histogram(frequency, edges)
    mean = total / np.maximum(count, 1)
    return mean / mean.sum()


def draw(path, measured, *, force=False):
    """Write the figure of [(name, list of `SubjectStatistics`)] as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    heights = [PLOT_INCHES, *[SLICE_INCHES] * len(measured)]
    figure, axes = plt.subplots(
        len(heights),
        len(HEIGHTS_MM),
        figsize=(len(HEIGHTS_MM) * COLUMN_INCHES, sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    _draw_plots(axes[0], measured)
    for row, (name, subjects) in zip(axes[1:], measured, strict=True):
        for panel, image, height in zip(row, subjects[0].examples, HEIGHTS_MM, strict=True):
            panel.imshow(image.T, cmap="gray", vmin=0, vmax=WHITE_SHOWN, origin="lower")
            panel.set_title(f"z = {height:g} mm", fontsize="small")
            panel.axis("off")
        row[0].set_title(f"{name}, z = {HEIGHTS_MM[0]:g} mm", fontsize="small")
    with written_whole(path, force=force) as temporary:
        figure.savefig(temporary, dpi=PNG_DPI, format="png")
    plt.close(figure)


def _draw_plots(panels, measured):
    """One line per cache, the mean of its subjects, in each panel."""
    for name, subjects in measured:
        for panel, region in zip(panels, REGIONS, strict=False):
            mean = np.mean([one.histograms[region] for one in subjects], axis=0)
            panel.plot(_centers(mean, BRIGHTEST), mean, linewidth=1, label=name)
            panel.set(title=region, xlabel="intensity / white matter", yticks=[])
        ends = (STEEPEST, HIGHEST_FREQUENCY)
        for panel, kind, end in zip(panels[-2:], ("gradient", "spectrum"), ends, strict=True):
            mean = np.mean([getattr(one, kind) for one in subjects], axis=0)
            panel.semilogy(_centers(mean, end), mean, linewidth=1)
    panels[-2].set(title="gradient", xlabel="intensity / white, per pixel")
    panels[-1].set(title="power spectrum", xlabel="frequency, per pixel")
    panels[0].legend(fontsize="x-small")


def _centers(values, largest):
    return (np.arange(len(values)) + 0.5) * largest / len(values)


def table(measured):
    """Lines of text: a column per figure, a row per cache, "median (least-most)" of subjects."""
    titles = list(measured[0][1][0].figures)
    rows = [["", *titles]]
    for name, subjects in measured:
        cells = []
        for title in titles:
            values = np.array([one.figures[title] for one in subjects])
            low, middle, high = np.nanmin(values), np.nanmedian(values), np.nanmax(values)
            cells.append(f"{middle:.3f} ({low:.3f}-{high:.3f})")
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pad = [zip(row, widths, strict=True) for row in rows]
    return ["  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in pad]


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.cohort_figure",
        description="Compare scans in several caches: noise, edges, histograms by tissue.",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--caches", type=Path, nargs="+", required=True, help="caches to compare, .h5")
    add(
        "--datasets",
        choices=("Train", "Test"),
        nargs="+",
        default=["Test"],
        help="dataset of each cache, or one for all",
    )
    add("--out", type=Path, required=True, help="the figure, .png")
    add("--force", action="store_true", help="overwrite the output")
    return parser


@command
def main(argv=None):
    """Draw the figure and print the table; returns the exit status."""
    args = _parser().parse_args(argv)
    if len(args.datasets) not in (1, len(args.caches)):
        raise InputError(
            f"Expected one of --datasets, or one for each of {len(args.caches)} caches, got "
            f"{len(args.datasets)}."
        )
    refuse_existing(args.out, force=args.force)
    names = args.datasets * (len(args.caches) if len(args.datasets) == 1 else 1)
    measured = [
        (f"{path.stem} {dataset}", measure(path, dataset))
        for path, dataset in zip(args.caches, names, strict=True)
    ]
    draw(args.out, measured, force=args.force)
    print("\n".join(table(measured)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
