"""Export a prior: as a SavedModel that needs TensorFlow alone, or as a run to be shipped.

    tf-lesion export --model runs/gmvae --out exported --verify
    tf-lesion export --model runs/gmvae --out shipped --as run --align rigid

Lambda, steps and solver of the SavedModel are those of the calibration, whose thresholds then give
lesion maps; without a calibration they are the preset's. --as run writes weights without optimizer,
what was chosen for them, and no local path.
"""

import sys
from typing import Any

from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.detect import DEVICE, load_prior, restoration_of, restoring
from tf_lesion.cli.options import add, parser_for
from tf_lesion.files import InputError

OF_SAVED_MODEL = (*restoring(), "--precision", "--verify")  # a run is as it was calibrated


def parser() -> Any:
    """The command line."""
    made = parser_for("tf-lesion export", __doc__)
    add(made, "--model", required=True, help="a run, or a folder of a TF1 checkpoint")
    add(made, "--out", required=True, help="folder to make")
    add(made, "--as", dest="kind")
    add(made, "--calibration", *restoring())
    add(made, "--precision", choices=("float32", "bfloat16"))
    add(made, "--verify", *DEVICE)
    add(made, "--align", help="of the scans that the run will restore (--as run)")
    add(made, "--force", help="replace the SavedModel or run at --out")
    return made


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    as_run = options.kind == "run"
    needs = dict.fromkeys(OF_SAVED_MODEL, ("--as savedmodel", not as_run))
    check_effect(parser(), options, {**needs, "--align": ("--as run", as_run)})
    prior = load_prior(options)
    if as_run:
        size = prior.save(options.out, align=options.align, force=options.force)
        print(f"Wrote {options.model} ({prior.identity}), {size / 1e6:.1f} MB: {options.out}")
        return 0
    return _saved_model(prior, options)


def _saved_model(prior, options):
    from tf_lesion.saved_model.export import export

    # Averages over seeds and mirrored slices are not in the graph.
    restoration = restoration_of(prior, options, calibrated=True).changed(seeds=1, flip=False)
    content = {
        "restoration": restoration,
        "thresholds": _thresholds(prior, restoration, given=options.calibration is not None),
    }
    export(prior, options.out, **content, force=options.force)
    print(f"Exported {options.model} ({prior.identity}): {options.out}")
    if not options.verify:
        return 0
    from tf_lesion.saved_model.verify import verify

    differences = verify(prior, options.out, **content)
    for name, value in differences.items():
        print(f"{name:32} {value:.1e}")
    largest = max(differences.values(), key=lambda value: float("inf") if value != value else value)
    print(f"largest difference, fresh interpreter to memory: {largest:.1e}")
    return int(largest != 0)


def _thresholds(prior, restoration, *, given):
    """Thresholds of the residual that hold for the restoration; those given must."""
    if prior.calibration is None:
        return ()
    used = prior.describe(restoration)
    try:
        found = prior.calibration.thresholds("residual", restoration=used)
    except InputError as error:
        if given:
            raise
        print(f"No lesion maps: {error}", file=sys.stderr)
        return ()
    made = prior.calibration.restoration.get("precision", used["precision"])
    if made != used["precision"]:
        print(
            f"warning: the calibration was made in {made}, the SavedModel computes in "
            f"{used['precision']}.",
            file=sys.stderr,
        )
    return found
