"""Restore patients' slices towards the healthy prior; what changes is the lesion map.

python restore_brats.py --model runs/gmvae --cache patients.h5 --out restored.h5
python restore_brats.py --model runs/gmvae --input patient_t2.nii.gz --out maps/
"""

import argparse
import sys

from tf_lesion.files import HelpFormatter, InputError, command, refuse_existing


def parse(argv):
    """The command line; --tv-weight and --steps left out are None: the model's preset decides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="run of train_gmvae.py, or folder of a TF1 checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cache", help="HDF5 cache with Test (and Mask)")
    source.add_argument("--input", help="one T2 scan, NIfTI, any grid and orientation")
    add("--out", required=True, help="HDF5 file (--cache) or folder (--input)")
    add("--mask", help="brain mask of the scan, NIfTI on its grid (--input)")
    add("--align", choices=["rigid", "center", "none"], help="as in preprocessing (--input)")
    add("--tv-weight", type=float, help="lambda, per unit intensity; default: the preset's")
    add("--steps", type=int, help="of gradient ascent; default: the preset's")
    add("--save-every", type=int, help="keep the images every so many steps (--cache)")
    add("--max-slices", type=int, help="restore a random subset, drawn with --seed (--cache)")
    add("--crop", type=int, nargs=4, metavar=("X0", "X1", "Y0", "Y1"), help="pixels (--cache)")
    add("--batch-size", type=int, default=16, help="slices at once")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of convolutions")
    add("--seed", type=int, default=0, help="of the noise")
    add("--force", action="store_true", help="overwrite --out")
    return parser.parse_args(argv)


def restoration_config(loaded, options):
    """The model's `RestorationConfig` with the options that were given."""
    from tf_lesion.config import check

    given = {"tv_weight": options.tv_weight, "steps": options.steps}
    config = loaded.config.replace(
        restoration={name: value for name, value in given.items() if value is not None}
    )
    return check(config).restoration


def restore_from_cache(loaded, options):
    """Restore `Test` of a cache into an HDF5 file."""
    from tf_lesion.restoration import restore_to_file

    count = restore_to_file(
        loaded,
        options.cache,
        options.out,
        restoration=restoration_config(loaded, options),
        seed=options.seed,
        batch_size=options.batch_size,
        max_slices=options.max_slices,
        save_every=options.save_every,
        crop=options.crop,
        force=options.force,
    )
    print(f"Restored {count} slices: {options.out}")


def check_options(options):
    """Raise `InputError` for numbers that make no sense."""
    for flag in ("batch_size", "save_every", "max_slices"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            name = "--" + flag.replace("_", "-")
            raise InputError(f"Expected {name} 1 or more, got {value}.")


@command
def main(argv=None):
    """Run the command line; returns the exit status."""
    options = parse(argv)
    check_options(options)
    refuse_existing(options.out, force=options.force)
    from tf_lesion.runs import load

    loaded = load(options.model, precision=options.precision)
    if options.cache:
        restore_from_cache(loaded, options)
    else:
        restore_scan(loaded, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
