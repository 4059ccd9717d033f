"""Compare this port with a run of the released TensorFlow 1 code.

    python -m eval.compare_tf1 --tf1-checkpoint model/ --reference forward.npz

number by number: the reference holds inputs, the noise that was drawn, and what the released graph
made of them; see docs/tutorials/tf1.md for its keys. One row is printed for every quantity in it;
the exit status is 1 if any is off by more than its tolerance. oneDNN is switched off, because
restored images part by rounding otherwise: the sign of a total variation flips.

    python -m eval.compare_tf1 --restored ours.h5 --tf1-restored theirs.hdf5 --cache patients.h5

slice by slice: restored images, and with --cache residuals, AUC and Dice. Two correct runs draw
different noise, so nothing passes or fails here. --tf1-restored is `restored_images.hdf5`, or a
folder of `restored_images{k}.npy`. In its folder, or in --tf1-statistics, `LGsta.npy` or
`HGsta.npy` (counts per subject) and `fprthresholds.npy` (three thresholds) are used when they are
there.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.files import InputError, refuse_existing, write_json
from tf_lesion.provenance import stamp

OF_CACHE = ("--labels", "--subjects", "--crop", "--tf1-statistics")
WAYS = (("--tf1-checkpoint", "--reference"), ("--restored", "--tf1-restored"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line: one of the two `WAYS`."""
    parser = parser_for("python -m eval.compare_tf1", __doc__)
    add(parser, "--tf1-checkpoint")
    add(parser, "--reference", help=".npz of the released graph's numbers")
    add(parser, "--restored", help="ours, of restore_brats.py")
    add(parser, "--tf1-restored")
    add(parser, "--cache", help="the cache of both: also compare residuals, AUC and Dice")
    add(parser, "--labels", "--subjects", "--crop", "--tf1-statistics")
    add(parser, "--out", help="also write the numbers as JSON (--restored)")
    add(parser, "--force")
    options = parser.parse_args(argv)
    given = [[getattr(options, name.strip("-").replace("-", "_")) for name in way] for way in WAYS]
    if sorted(sum(value is not None for value in pair) for pair in given) != [0, 2]:
        ways = " or ".join(" with ".join(way) for way in WAYS)
        raise InputError(f"Expected either {ways}.")
    needs = dict.fromkeys(OF_CACHE, ("--cache", bool(options.cache)))
    needs |= dict.fromkeys(("--cache", "--out"), ("--restored", bool(options.restored)))
    check_effect(parser, options, {**needs, "--force": ("--out", bool(options.out))})
    return options


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse(argv)
    if options.restored is None:
        return compare_numbers(options.tf1_checkpoint, options.reference)
    from eval.compare_restored import QUANTILES, compare

    if options.out:
        refuse_existing(options.out, force=options.force)
    slices, correlation, table = compare(options)
    summary = slices.quantile(list(QUANTILES)).rename(index=QUANTILES).T
    print(f"{len(slices)} slices, absolute difference in intensity", summary.to_string(), sep="\n")
    content = {**stamp(), **slices.to_dict("list")}
    if correlation is not None:
        print(f"Correlation of the residuals: {correlation:.6f}")
        content |= {"residual_correlation": correlation, **table.T.to_dict("list")}
    if not table.empty:
        print(table.assign(difference=table.ours - table.released).to_string())
    if options.out:
        write_json(options.out, content)
    return 0


def compare_numbers(checkpoint: Path, reference_path: Path) -> int:
    """Print a row for every quantity of the reference; returns 1 if one is off."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # before TensorFlow is imported
    import numpy as np

    from tf_lesion import devices

    devices.start()
    from eval.compare_numbers import compare, quantities
    from tf_lesion import tf1

    try:
        reference = dict(np.load(reference_path))
    except (ValueError, OSError) as error:
        raise InputError(f"Expected a .npz of arrays, got {reference_path} ({error}).") from error
    model, config = tf1.load(checkpoint)
    model.decoder.fast = False  # the released operations, so that the rounding is theirs too
    clusters = int(reference.get("num_clusters", config.network.num_clusters))
    if clusters != config.network.num_clusters:
        raise InputError(
            f"{reference_path} was made with {clusters} clusters, {checkpoint} has "
            f"{config.network.num_clusters}."
        )
    table = compare(quantities(model, config, reference), reference)
    if table.empty:
        raise InputError(f"{reference_path} holds no quantity to compare.")
    shown = {
        "quantity": f"{{:{table.quantity.str.len().max()}}}".format,
        "difference": "{:.2e}".format,
        "tolerance": "{:.0e}".format,
        "passed": lambda passed: "yes" if passed else "NO",
    }
    print(table.to_string(index=False, formatters=shown))
    print(f"{table.passed.sum()} of {len(table)} quantities agree ({config.network.model}).")
    return int(not table.passed.all())


if __name__ == "__main__":
    sys.exit(main())
