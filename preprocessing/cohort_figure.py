"""Are synthetic slices like real ones? Histograms by tissue and edges of caches, side by side.

Every cache is a line of each plot: intensities in white matter, gray matter, and the CSF of
ventricles and of sulci (by the ICBM152 tissue maps that come with nilearn), the gradient's
magnitude, and the power spectrum. Lesions and a margin around them are left out. Below, slices of
the same heights. Give caches whose intensities are matched to the same reference.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nilearn import datasets
from scipy import ndimage
from tqdm import tqdm

from preprocessing.alignment import to_grid
from preprocessing.volumes import MniGrid
from tf_lesion.files import HelpFormatter, InputError, command, refuse_existing, written_whole
from tf_lesion.slices import SliceCache

SURE_WHITE, SURE_GRAY, SURE_CSF = 0.95, 0.85, 0.7  # shares of the ICBM152 maps
VENTRICLE_BOX_MM = ((-35.0, 35.0), (-50.0, 35.0), (-5.0, 35.0))
LESION_MARGIN = 4  # pixels around lesions that are left out
HEIGHTS_MM = (-30.0, -10.0, 5.0, 20.0, 45.0)  # of the slices shown
HISTOGRAM_BINS, GRADIENT_BINS, SPECTRUM_BINS = 80, 60, 40
LARGEST_GRADIENT = 0.4  # per pixel
MOST_SLICES = 300  # of a cache, evenly spread
REGIONS = ("white matter", "gray matter", "ventricles", "sulci and cisterns")
COLUMN_INCHES, ROW_INCHES, PNG_DPI = 2.6, 2.6, 110
EXAMPLE = """example:
  python -m preprocessing.cohort_figure --caches healthy.h5 ms.h5 --datasets Train Test \\
      --out figure.png"""


@dataclass(frozen=True)
class SliceStatistics:
    """What the figure shows of one cache.

    Attributes:
        name: of the cache.
        histograms: {region: [HISTOGRAM_BINS] density of intensity}.
        medians: {region: (10th, 50th, 90th percentile)}.
        gradient: [GRADIENT_BINS] density of the in-plane gradient's magnitude inside the brain.
        spectrum: [SPECTRUM_BINS] mean power by frequency, relative to the sum.
        examples: slices [H, W] nearest to HEIGHTS_MM.
    """

    name: str
    histograms: dict
    medians: dict
    gradient: np.ndarray
    spectrum: np.ndarray
    examples: list


def region_maps(grid):
    """{region: [X, Y, Z] bool} of ICBM152 on a `MniGrid`."""
    loaders = (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    gray, white = (
        to_grid(load(resolution=1).get_fdata(dtype=np.float32), MniGrid().affine, np.eye(4), grid)
        for load in loaders
    )
    brain = to_grid(
        datasets.load_mni152_brain_mask(resolution=1).get_fdata(dtype=np.float32),
        MniGrid().affine,
        np.eye(4),
        grid,
    )
    csf = (brain > 0.5) & (1 - gray - white > SURE_CSF)
    inside = np.ones(grid.shape, bool)
    for axis, (low, high) in enumerate(VENTRICLE_BOX_MM):
        place = grid.affine[axis, axis] * np.arange(grid.shape[axis]) + grid.affine[axis, 3]
        shape = [-1 if k == axis else 1 for k in range(3)]
        inside &= ((place >= low) & (place <= high)).reshape(shape)
    maps = (white > SURE_WHITE, gray > SURE_GRAY, csf & inside, csf & ~inside)
    return dict(zip(REGIONS, maps, strict=True))


def measure(path, dataset, *, most=MOST_SLICES):
    """`SliceStatistics` of one dataset of a cache.

    Raises:
        FileNotFoundError, InputError: if the cache cannot be used, or does not say where in MNI
            space its slices lie.
    """
    with SliceCache(path, dataset) as cache:
        affine, heights = cache.grid_affine, cache.index.slice_index
        if affine is None or (heights < 0).any():
            raise InputError(f"{path}: expected slices with a place in MNI space, found none.")
        grid = MniGrid(float(affine[0, 0]))
        rows = np.unique(np.linspace(0, len(cache) - 1, most).astype(int))
        images, masks = cache.read(rows)[..., 0], cache.mask(rows)[..., 0]
        examples = [
            cache.read([_nearest(heights, (mm - affine[2, 3]) / affine[2, 2])])[0, ..., 0]
            for mm in HEIGHTS_MM
        ]
        lesions = cache.label(rows)[..., 0] if cache.has_label else np.zeros(masks.shape, bool)
        window = (slice(*cache.crop[:2]), slice(*cache.crop[2:]))
    healthy = masks & ~ndimage.binary_dilation(lesions, _disk(), LESION_MARGIN)
    values = {
        name: images[healthy & np.moveaxis(region[window][:, :, heights[rows]], 2, 0)]
        for name, region in region_maps(grid).items()
    }
    return SliceStatistics(
        name=f"{Path(path).stem} ({dataset})",
        histograms={name: _density(v, HISTOGRAM_BINS, 1.0) for name, v in values.items()},
        medians={name: np.percentile(v, (10, 50, 90)) for name, v in values.items()},
        gradient=_density(_gradients(images, healthy), GRADIENT_BINS, LARGEST_GRADIENT),
        spectrum=_spectrum(images),
        examples=examples,
    )


def _nearest(heights, wanted):
    return int(np.abs(heights - wanted).argmin())


def _disk():
    """Neighbors within a slice [1, 3, 3]."""
    return ndimage.generate_binary_structure(2, 1)[None]


def _density(values, bins, largest):
    counts, _ = np.histogram(values, bins, (0, largest))
    return counts * bins / largest / max(len(values), 1)


def _gradients(images, healthy):
    """Magnitudes where a pixel and its neighbors are healthy brain."""
    along = [np.gradient(images, axis=axis) for axis in (1, 2)]
    return np.hypot(*along)[ndimage.binary_erosion(healthy, _disk())]


def _spectrum(images):
    """Mean power of slices by radial frequency, 0 to 0.5 per pixel, relative to its sum."""
    window = np.outer(*(np.hanning(n) for n in images.shape[1:]))
    centered = images - images.mean(axis=(1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(centered * window)) ** 2).mean(axis=0)
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in power.shape), indexing="ij"))
    edges = np.linspace(0, 0.5, SPECTRUM_BINS + 1)
    total, _ = np.histogram(frequency, edges, weights=power)
    count, _ = np.histogram(frequency, edges)
    mean = total / np.maximum(count, 1)
    return mean / mean.sum()


def draw(path, measured, *, force=False):
    """Write the figure of several `SliceStatistics` as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = len(REGIONS) + 2
    size = (columns * COLUMN_INCHES, (1.2 + len(measured)) * ROW_INCHES)
    figure, axes = plt.subplots(1 + len(measured), columns, figsize=size, squeeze=False)
    for one in measured:
        for panel, name in zip(axes[0], REGIONS, strict=False):
            panel.plot(_centers(HISTOGRAM_BINS, 1.0), one.histograms[name], linewidth=1)
            panel.set(title=name, xlabel="normalized intensity", yticks=[])
        gradient, spectrum = axes[0, -2:]
        gradient.semilogy(_centers(GRADIENT_BINS, LARGEST_GRADIENT), one.gradient, linewidth=1)
        gradient.set(title="gradient", xlabel="intensity per pixel")
        spectrum.semilogy(_centers(SPECTRUM_BINS, 0.5), one.spectrum, label=one.name, linewidth=1)
        spectrum.set(title="power spectrum", xlabel="frequency, per pixel")
    axes[0, -1].legend(fontsize="xx-small")
    for row, one in zip(axes[1:], measured, strict=True):
        for panel in row:
            panel.axis("off")
        row[0].set_title(one.name, fontsize="small", loc="left")
        for panel, image in zip(row, one.examples, strict=False):
            panel.imshow(image[::-1, ::-1].T, cmap="gray", vmin=0, vmax=1)
    figure.tight_layout()
    with written_whole(path, force=force) as temporary:
        figure.savefig(temporary, dpi=PNG_DPI)
    plt.close(figure)


def _centers(bins, largest):
    return (np.arange(bins) + 0.5) * largest / bins


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m preprocessing.cohort_figure",
        description="Compare slices of several caches: histograms by tissue, edges, pictures.",
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
    """Draw the figure and print the percentiles; returns the exit status."""
    args = _parser().parse_args(argv)
    if len(args.datasets) not in (1, len(args.caches)):
        raise InputError(
            f"Expected one of --datasets, or one for each of {len(args.caches)} caches, got "
            f"{len(args.datasets)}."
        )
    refuse_existing(args.out, force=args.force)
    names = args.datasets * (len(args.caches) if len(args.datasets) == 1 else 1)
    pairs = tqdm(list(zip(args.caches, names, strict=True)), unit="cache", desc="measuring")
    measured = [measure(path, dataset) for path, dataset in pairs]
    draw(args.out, measured, force=args.force)
    for one in measured:
        told = [
            f"{region} {low:.2f} {middle:.2f} {high:.2f}"
            for region, (low, middle, high) in one.medians.items()
        ]
        print(f"{one.name}: 10th, 50th, 90th percentile: " + "; ".join(told))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
