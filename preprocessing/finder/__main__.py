"""Train the brain finder on painted heads, stage by stage.

    paint   OUT/heads/                heads painted from label maps, as examples
    train   OUT/finder.weights.h5     the network
    pack    OUT/finder.npz            its weights, as in tf_lesion/scans/finder/finder.npz

Stopped and called again, it goes on where it was.
"""

from collections.abc import Sequence

from tqdm import tqdm

from preprocessing.finder import STAGES
from tf_lesion import __version__
from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import add, parser_for

STEPS, BATCH_SIZE, HEADS = 6000, 1, 1000
EXAMPLE = """example:
  python -m preprocessing.finder --label-maps MAPS --held-out 4 --out work --jobs 2"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Paint, train and pack; returns the exit status."""
    parser = parser_for(
        "python -m preprocessing.finder",
        "Train the brain finder, which finds the brain in any head scan, on painted heads.",
        epilog=EXAMPLE,
    )
    add(parser, "--out", required=True, help="working folder")
    add(parser, "--label-maps", required=True, help="folder of label maps of whole heads")
    add(parser, "--held-out", help="label maps, the last by name, never to paint")
    add(parser, "--heads", default=HEADS)
    add(parser, "--steps", default=STEPS, help="of the training")
    add(parser, "--batch-size", default=BATCH_SIZE, help="heads of a step")
    add(parser, "--seed", help="same seed, same heads")
    add(parser, "--jobs", help="processes that paint")
    add(parser, "--stages", choices=STAGES, default=list(STAGES))
    options = parser.parse_args(argv)
    needs = dict.fromkeys(("--held-out", "--jobs"), ("--stages paint", "paint" in options.stages))
    needs["--batch-size"] = ("--stages train", "train" in options.stages)
    check_effect(parser, options, needs)
    from preprocessing.finder import training  # TensorFlow

    options.out.mkdir(parents=True, exist_ok=True)
    if "paint" in options.stages:
        painted = training.paint(
            options.label_maps,
            options.out,
            held_out=options.held_out,
            seed=options.seed,
            heads=options.heads,
            jobs=options.jobs,
        )
        with tqdm(desc="paint", unit="head", total=options.heads) as bar:
            for count in painted:
                bar.update(count)
    if "train" in options.stages:
        training.train(
            options.out, steps=options.steps, batch_size=options.batch_size, seed=options.seed
        )
    if "pack" in options.stages:
        facts = {"version": __version__, "heads": options.heads, "steps": options.steps}
        training.pack_weights(options.out, options.out / "finder.npz", **facts)
        print(options.out / "finder.npz")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
