"""Restore patients' slices towards the healthy prior; what changes is the lesion map.

Models that reconstruct a slice, or search the nearest healthy one, put that in its place.

    python restore_brats.py --input patient_t2.nii.gz --out maps
    python restore_brats.py --model runs/gmvae --input patient_t2.nii.gz --out maps
    python restore_brats.py --model runs/gmvae --cache patients.h5 --out restored.h5
    python restore_brats.py --model runs/gmvae --input dataset --out derivatives --bids-out

Of a folder every scan is restored; one that fails does not stop the rest (exit status 1), one that
is done is skipped. python -m eval.report makes a page to look at.

On several machines or devices, each does one part of the cache, and any of them puts them together:

    python restore_brats.py --model runs/gmvae --cache patients.h5 --out restored.h5 --shard 1/3
    python restore_brats.py --out restored.h5 --merge
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tf_lesion.cli import detect
from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.config import AUTO
from tf_lesion.files import InputError, refuse_existing

# Options that mean something to slices, to scans, and to both, but not to --merge.
OF_CACHE = ("--save-every", "--shard", "--max-slices", "--crop")
OF_SCANS = (
    *("--bids-out", "--mask", *detect.patterns(), "--align", "--allow-poor-alignment"),
    *("--slice-step", "--series"),
)
SCREEN = ("--verbose", "--quiet")
OF_BOTH = (
    *("--model", "--calibration", "--postprocess", "--batch-size", "--precision", "--seed"),
    *detect.restoring(),
    *detect.DEVICE,
)


def parser() -> Any:
    """The command line; --tv-weight and --steps left out are None: the model's preset decides."""
    made = parser_for("restore_brats.py", __doc__)
    add(made, "--model", default="pretrained")
    source = made.add_mutually_exclusive_group(required=True)
    add(source, "--cache", help="HDF5 cache with Test (and Mask)")
    add(source, "--merge", "--input")
    add(made, "--out", required=True, help="HDF5 file (--cache) or folder (--input)")
    add(made, *OF_SCANS, "--calibration", *detect.restoring())
    add(made, "--postprocess", default="")
    add(made.add_mutually_exclusive_group(), *SCREEN)
    add(made, *OF_CACHE, "--batch-size", "--precision", "--seed", *detect.DEVICE, "--force")
    return made


def check_options(options: Any) -> None:
    """Raise `InputError` for options that mean nothing to what is restored."""
    from tf_lesion.detection.postprocessing import Postprocessing

    sources = {"--cache": OF_CACHE, "--input": (*OF_SCANS, *SCREEN), "--cache or --input": OF_BOTH}
    there = {"--cache": options.cache, "--input": options.input}
    there["--cache or --input"] = options.cache or options.input
    needs = {name: (source, bool(there[source])) for source in sources for name in sources[source]}
    if options.cache and options.postprocess != AUTO:
        steps = replace(Postprocessing.parse(options.postprocess), seeds=1, flip=False)
        needs["--postprocess"] = ("--input, but for seeds and flip", not str(steps))
    check_effect(parser(), options, needs)


def restore_cache(prior: Any, options: Any) -> None:
    """Restore `Test` of a cache into an HDF5 file."""
    from tf_lesion.caches.restore import restore_to_file
    from tf_lesion.caches.restored import shard_path
    from tf_lesion.detection.settings import postprocessing_of

    restoration = detect.restoration_of(prior, options, calibrated=False)
    restoration = postprocessing_of(prior, options.postprocess).restoration(restoration)
    thresholds = {}
    if options.calibration is not None:
        described = prior.describe(restoration)
        points = prior.calibration.thresholds("residual", restoration=described)
        thresholds = {point.key: point.threshold for point in points}
    names = ("seed", "batch_size", "max_slices", "save_every", "crop", "shard", "force")
    count = restore_to_file(
        prior,
        options.cache,
        options.out,
        restoration=restoration,
        thresholds=thresholds,
        **{name: getattr(options, name) for name in names},
    )
    out = shard_path(options.out, options.shard) if options.shard else options.out
    print(f"Restored {count} slices: {out}")


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    source = Path(options.input) if options.input else None
    check_options(options)
    found = detect.find(source, options) if source else None
    if options.merge:
        from tf_lesion.caches.restored import merge_shards

        print(f"Merged {merge_shards(options.out, force=options.force)} slices: {options.out}")
        return 0
    if options.cache and not options.shard:
        refuse_existing(options.out, force=options.force)
    prior = detect.load_prior(options)
    if options.postprocess == AUTO and prior.calibration is None:
        raise InputError(f"--postprocess auto: {options.model} has no calibration that says it.")
    if options.cache:
        restore_cache(prior, options)
        return 0
    typed = detect.typed_line("restore_brats.py", argv)
    detector = detect.detector_of(prior, options, calibrated=False)
    return detect.detect_scans(detector, found, options, typed=typed)
