"""Choose on healthy slices what detection needs: lambda, thresholds, healthy maps, in one file.

    tf-lesion calibrate --model runs/gmvae --cache healthy.h5 --tv-weight auto --grid 0.6:3.1:0.6
    tf-lesion calibrate --model runs/gmvae --cache healthy.h5 --postprocess relative,signed,smooth=4
    tf-lesion calibrate --model pretrained-denoiser --healthy my_scanner --out my_scanner.h5

No lesion label is used. The file, calibration.h5 in the folder of the model, is read by every
command; its restored healthy slices stay beside it, and are used again by a later start.

The third form is for your own scanner: 5 to 50 healthy T2 scans, found and prepared as tf-lesion
detect does with patients', give thresholds for a model as it is (lambda and post-processing are
those of its calibration), for --calibration of tf-lesion detect.

Each subject is left out in turn: its rate above the thresholds of the others is what a healthy
brain that nobody has seen will show. The mean and the range of these rates are told and stored.
With n subjects the next one lies in the range with a chance of about (n - 1) / (n + 1). For one
subject only its own rate is known: in sample.
"""

from pathlib import Path
from typing import Any

from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.detect import DEVICE, SETTINGS, load_prior, restoring
from tf_lesion.cli.options import add, parser_for
from tf_lesion.config import AUTO, RELEASED_GRID, TARGETS
from tf_lesion.files import InputError, refuse_existing

OF_GRID = ("--grid", "--grid-steps", "--grid-slices")
OF_CACHE = ("--restored", "--subjects", "--crop", "--max-slices")
OF_SCANS = ("--pattern", "--mask-pattern", "--align")
POSTPROCESS = "such as seeds=4,signed,median=3; default: none, with --healthy the model's"
COMMON = ("targets", "method", "seed", "batch_size", "force")


def parser() -> Any:
    """The command line."""
    made = parser_for("tf-lesion calibrate", __doc__)
    add(made, "--model", required=True)
    healthy = made.add_mutually_exclusive_group(required=True)
    add(healthy, "--cache", help="healthy cache (dataset Test)")
    add(healthy, "--healthy", type=Path, help="folder of healthy scans (NIfTI, or BIDS)")
    add(made, *OF_SCANS)
    add(made, "--out", help="file to write; default: calibration.h5 in the folder of --model")
    add(made, "--restored", help="its restored slices, made or reused; default: beside --out")
    add(made, *restoring(), "--grid-steps", "--grid-slices")
    add(made, "--grid", default=RELEASED_GRID, help="for --tv-weight auto, or a,b,c")
    add(made, "--postprocess", default="", help=POSTPROCESS)
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
    """Make a calibration and print it; 1 if some of the healthy scans could not be used."""
    options = parser().parse_args(argv)
    needs = dict.fromkeys(OF_GRID, ("--tv-weight auto", options.tv_weight == AUTO))
    chosen = options.tv_weight or options.postprocess
    needs |= dict.fromkeys(OF_CACHE, ("--cache", options.cache))
    needs |= dict.fromkeys(OF_SCANS, ("--healthy", options.healthy))
    needs["--chosen-by"] = ("--tv-weight or --postprocess", bool(chosen))
    check_effect(parser(), options, needs)
    out = place(options)
    refuse_existing(out, force=options.force)
    options.calibration = None
    chosen = {"tv_weight": options.tv_weight, "postprocessing": options.postprocess}
    told = {what: options.chosen_by for what in chosen if options.chosen_by and chosen[what]}
    given = {
        "postprocess": options.postprocess,
        "chosen_by": told,
        **{name: getattr(options, name) for name in (*SETTINGS, *COMMON)},
    }
    made = (_of_scans if options.healthy else _of_cache)(options, out, given)
    made.save(out, force=options.force)
    print("\n".join(lines(made)))
    failed = made.cohort.get("scans_failed", 0)
    print(f"Wrote {out}" + (f", without {failed} scans that failed, see above." if failed else ""))
    return int(failed > 0)


def _of_scans(options, _, given):
    prior = load_prior(options)
    from tf_lesion.calibration.scans import calibrate_scans
    from tf_lesion.detection.files import find_scans

    patterns = {"pattern": options.pattern, "mask_pattern": options.mask_pattern}
    subjects = find_scans(options.healthy, **patterns)
    return calibrate_scans(prior, subjects, align=options.align, **given)


def _of_cache(options, out, given):
    prior = load_prior(options)
    from tf_lesion.caches.slices import read_counts
    from tf_lesion.calibration.make import calibrate
    from tf_lesion.calibration.tv_weight import parse_grid

    restored = options.restored or out.with_suffix(".healthy.h5")
    told = "Reused" if restored.exists() and not options.force else "Restored"
    made = calibrate(
        prior,
        options.cache,
        restored=restored,
        grid=parse_grid(options.grid),
        counts=read_counts(options.subjects) if options.subjects else None,
        **{name: getattr(options, name) for name in ("grid_steps", "grid_slices")},
        **{name: getattr(options, name) for name in ("max_slices", "crop")},
        **given,
    )
    print(f"{told} healthy slices: {restored}")
    return made


def lines(calibration: Any) -> list[str]:
    """The calibration as text."""
    from tf_lesion.calibration.tv_weight import table

    told = table(calibration.curve, calibration.tv_weight) if calibration.curve else []
    told.append(f"{'score':10} {'target':>7} {'threshold':>10} {'FPR':>8} {'left out':>9}  range")
    points = [(score, point) for score, points in calibration.points.items() for point in points]
    told += [
        f"{score:10} {point.target_fpr:7.2%} {point.threshold:10.6f} {point.fpr:8.5f} "
        f"{_left_out(point)}"
        for score, point in points
    ]
    if any(point.left_out() for _, point in points):
        number = calibration.cohort["subjects"]
        told.append(
            f"left out: mean and range of the rates of {number} subjects, each above the threshold "
            f"of the others;\nabout {(number - 1) / (number + 1):.0%} of further subjects will lie "
            f"in the range"
        )
    return told


def _left_out(point):
    if not point.left_out():
        return f"{'in sample':>9}"
    ends = f"{point.left_out_smallest:.5f} to {point.left_out_largest:.5f}"
    return f"{point.left_out_fpr:9.5f}  {ends}"
