"""What the denoiser learns to undo: a picture of healthy slices and the same corrupted.

    python -m eval.corruptions --cache healthy_2mm.h5 --out corruptions.png

Slices come evenly out of the part Train of a cache; each pair is a slice as augmented, above, and
what `tf_lesion.corruption` makes of it, below.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tf_lesion.cli.command import command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.drawing import plainly
from tf_lesion.files import refuse_existing, written_whole

PAIRS, COLUMNS, WIDTH = 50, 10, 1.3  # of slices, in a row; inches of a slice
BRIGHTEST = 1.1  # intensity shown as white


def corruption_pairs(cache: str | Path, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(healthy, corrupted), each [count, H, W], of slices evenly spread over a cache.

    Raises:
        InputError: if it is no cache.
    """
    import tensorflow as tf

    from tf_lesion import corruption
    from tf_lesion.caches.slices import SliceCache
    from tf_lesion.noise import slice_noise

    with SliceCache(cache, "Train") as slices:
        rows = np.unique(np.linspace(0, len(slices) - 1, count).astype(int))
        images = tf.constant(slices.read(rows))
    shapes = corruption.noise_shapes(images.shape[1:3])
    noise = slice_noise(shapes, seed=seed, step=0, slices=rows, stream="training")
    healthy, shown = corruption.corrupted(images, noise)
    return healthy.numpy()[..., 0], shown.numpy()[..., 0]


@plainly()
def draw_pairs(path: str | Path, healthy: np.ndarray, shown: np.ndarray) -> None:
    """Write a PNG of pairs of slices [n, H, W], seen from above with the front on top."""
    from matplotlib.figure import Figure

    rows = -(-len(healthy) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * WIDTH, 2 * rows * WIDTH * 1.25), facecolor="black")
    axes = figure.subplots(2 * rows, COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, pair in enumerate(zip(healthy, shown, strict=True)):
        row, column = divmod(number, COLUMNS)
        for part, image in enumerate(pair):
            axis = axes[2 * row + part, column]
            axis.imshow(image.T, cmap="gray", vmin=0, vmax=BRIGHTEST, origin="lower")
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.02, hspace=0.02)
    figure.savefig(path, format="png", dpi=80)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw; returns the exit status."""
    parser = parser_for("python -m eval.corruptions", __doc__)
    add(parser, "--cache", "--out", required=True)
    add(parser, "--seed", "--force")
    options = parser.parse_args(argv)
    refuse_existing(options.out, force=options.force)
    healthy, shown = corruption_pairs(options.cache, PAIRS, seed=options.seed)
    with written_whole(options.out, force=options.force) as temporary:
        draw_pairs(temporary, healthy, shown)
    print(f"Wrote {len(healthy)} pairs: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
