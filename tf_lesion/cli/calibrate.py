"""Choose on healthy slices what detection needs: lambda, thresholds, healthy maps, in one file.

    tf-lesion calibrate --model runs/gmvae --cache healthy.h5 --tv-weight auto --grid 0.6:3.1:0.6
    tf-lesion calibrate --model runs/gmvae --cache healthy.h5 --postprocess relative,signed,smooth=4

No lesion label is used. The file, calibration.h5 in the folder of the model, is read by every
command; its restored healthy slices stay beside it, and are used again by a later start.
"""

from pathlib import Path
from typing import Any

from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.detect import DEVICE, SETTINGS, load_prior, restoring
from tf_lesion.cli.options import add, parser_for
from tf_lesion.config import AUTO, RELEASED_GRID, TARGETS
from tf_lesion.files import InputError, refuse_existing

OF_GRID = ("--grid", "--grid-steps", "--grid-slices")


def parser() -> Any:
    """The command line."""
    made = parser_for("tf-lesion calibrate", __doc__)
    add(made, "--model", required=True)
    add(made, "--cache", required=True, help="healthy cache (dataset Test)")
    add(made, "--out", help="file to write; default: calibration.h5 in the folder of --model")
    add(made, "--restored", help="its restored slices, made or reused; default: beside --out")
    add(made, *restoring(), "--grid-steps", "--grid-slices")
    add(made, "--grid", default=RELEASED_GRID, help="for --tv-weight auto, or a,b,c")
    add(made, "--postprocess", default="")
    add(made, "--targets", default=TARGETS)
    add(made, "--method", "--max-slices", "--batch-size", "--precision", "--subjects", "--crop")
    add(made, "--seed", help="of the noise and of the subsets")
    add(made, "--chosen-by", *DEVICE, "--force")
    return made


def place(options: Any) -> Path:
    """Where the calibration goes; beside the shipped prior nothing is written."""
    from tf_lesion.prior import calibration_file, is_shipped

    if options.out is None and is_shipped(options.model):
        raise InputError(
            f"The shipped prior is read-only: give --out, and hand that file to --calibration of "
            f"the other commands, got --model {options.model}."
        )
    return options.out or calibration_file(options.model)


@command
def main(argv: list[str] | None = None) -> int:
    """Make a calibration and print it."""
    options = parser().parse_args(argv)
    needs = dict.fromkeys(OF_GRID, ("--tv-weight auto", options.tv_weight == AUTO))
    chosen = options.tv_weight or options.postprocess
    needs["--chosen-by"] = ("--tv-weight or --postprocess", bool(chosen))
    check_effect(parser(), options, needs)
    out = place(options)
    refuse_existing(out, force=options.force)
    options.calibration = None
    prior = load_prior(options)
    from tf_lesion.caches.slices import read_counts
    from tf_lesion.calibration.make import calibrate
    from tf_lesion.calibration.tv_weight import parse_grid

    names = ("targets", "method", "max_slices", "seed", "batch_size", "crop", "force")
    restored = options.restored or out.with_suffix(".healthy.h5")
    told = "Reused" if restored.exists() and not options.force else "Restored"
    chosen = {"tv_weight": options.tv_weight, "postprocessing": options.postprocess}
    made = calibrate(
        prior,
        options.cache,
        restored=restored,
        grid=parse_grid(options.grid),
        counts=read_counts(options.subjects) if options.subjects else None,
        postprocess=options.postprocess,
        chosen_by={
            what: options.chosen_by for what in chosen if options.chosen_by and chosen[what]
        },
        **{name: getattr(options, name) for name in (*SETTINGS, "grid_steps", "grid_slices")},
        **{name: getattr(options, name) for name in names},
    )
    made.save(out, force=options.force)
    print(f"{told} healthy slices: {restored}")
    print("\n".join(lines(made)))
    print(f"Wrote {out}")
    return 0


def lines(calibration: Any) -> list[str]:
    """The calibration as text."""
    from tf_lesion.calibration.tv_weight import table

    told = table(calibration.curve, calibration.tv_weight) if calibration.curve else []
    told.append(f"{'score':10} {'target':>7} {'threshold':>10} {'FPR':>8}")
    told += [
        f"{score:10} {point.target_fpr:7.2%} {point.threshold:10.6f} {point.fpr:8.5f}"
        for score, points in calibration.points.items()
        for point in points
    ]
    return told
