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

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.config import SOLVERS
from tf_lesion.files import InputError, refuse_existing

PATTERNS = ("", "mask_", "seg_")
AUTO = "auto"


def parse(argv):
    """The command line; --tv-weight and --steps left out are None: the model's preset decides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        default="pretrained",
        help="pretrained, a run, a folder of a TF1 checkpoint, or a SavedModel",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cache", help="HDF5 cache with Test (and Mask)")
    source.add_argument("--merge", action="store_true", help="put the shards of --out together")
    source.add_argument(
        "--input", help="T2 scan (NIfTI, any grid and orientation), or a folder of scans, or BIDS"
    )
    add("--out", required=True, help="HDF5 file (--cache) or folder (--input)")
    add("--bids-out", action="store_true", help="write --out as BIDS derivatives (--input)")
    add("--mask", help="brain mask of the one scan, NIfTI on its grid (--input)")
    add("--pattern", help="glob of the scans in a folder; default: BIDS and BRATS names")
    add("--mask-pattern", help="glob of their brain masks, with {subject} and {folder}")
    add("--seg-pattern", help="the same for true segmentations, for the report only")
    add(
        "--align",
        choices=["rigid", "center", "none"],
        help="to MNI space; default: as in the training cache (--input)",
    )
    add(
        "--tv-weight",
        help="lambda, per unit intensity, or auto: that of eval.select_lambda; "
        "default: the preset's (gmvae, vae)",
    )
    add(
        "--thresholds",
        help="JSON of eval.thresholds: also write binary lesion maps; default: what the model "
        "comes with, if it fits the other options (--input)",
    )
    add(
        "--postprocess",
        metavar="STEPS",
        help="such as seeds=4,signed,median=3, or auto: what the model comes with; writes a score "
        "beside the residual (--input), averages (--cache); see eval/postprocessing.py",
    )
    add("--steps", type=int, help="of the restoration or search; default: the preset's")
    add(
        "--solver",
        choices=list(SOLVERS),
        help="released: 500 steps; multirate: the same with 100 gradients of the ELBO; huber: 50 "
        "long steps without jitter; default: the preset's (gmvae, vae)",
    )
    add("--save-every", type=int, help="keep the images every so many steps (--cache; gmvae, vae)")
    add("--shard", type=shard_of, metavar="I/N", help="only the I-th of N parts (--cache)")
    add("--max-slices", type=int, help="restore a random subset, drawn with --seed (--cache)")
    add(
        "--slice-step",
        type=int,
        default=1,
        help="restore every n-th axial slice, interpolate in between: a quick look (--input)",
    )
    add(
        "--crop",
        type=int,
        nargs=4,
        metavar=("X0", "X1", "Y0", "Y1"),
        help="window, pixels; default: the cache's (--cache)",
    )
    add("--batch-size", type=int, default=16, help="slices at once")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of convolutions")
    add("--seed", type=int, default=0, help="of the noise")
    add("--force", action="store_true", help="overwrite --out")
    return parser.parse_args(argv)


def shard_of(text):
    """(i, n) from "i/n", 1 <= i <= n."""
    number, count = (int(part) for part in text.split("/"))
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text}")
    return number, count


def restoration_config(loaded, options):
    """The model's `RestorationConfig` with the options that were given."""
    from eval.select_lambda import restoration_of

    restoration = restoration_of(
        loaded, tv_weight=options.tv_weight, steps=options.steps, solver=options.solver
    )
    return postprocessing(loaded, options).restoration(restoration)


def postprocessing(loaded, options):
    """The `Postprocessing` of --postprocess; no step without."""
    from tf_lesion.detection.postprocessing import Postprocessing, read_choice

    if options.postprocess == AUTO:
        return read_choice(loaded)
    return Postprocessing.parse(options.postprocess or "")


def detection_points(loaded, restoration, options):
    """The `Threshold`s in --thresholds, of the residual or of its post-processed score; or none.

    Raises:
        InputError: if they belong to another model, lambda, number of steps or post-processing.
    """
    from eval.thresholds import load_thresholds
    from tf_lesion.choices import THRESHOLD_FILES

    used, steps = dataclasses.asdict(restoration), postprocessing(loaded, options)
    score = "residual"
    if options.input and str(steps):
        score, used["postprocessing"] = "score", str(steps)
    path, own = options.thresholds, loaded.extras / THRESHOLD_FILES[score]
    if path is None and options.input and own.exists():
        try:
            stored = load_thresholds(own, model_id=loaded.identity, restoration=used)
        except InputError as error:
            print(f"No lesion maps: {error}", file=sys.stderr)
            return []
    elif path is None:
        return []
    else:
        stored = load_thresholds(path, model_id=loaded.identity, restoration=used)
    if score not in stored.points:
        raise InputError(
            f"{path} has no thresholds of the post-processed score; make them with "
            f"eval.thresholds --postprocess {steps}."
        )
    return stored.points[score]


def restore_from_cache(loaded, options):
    """Restore `Test` of a cache into an HDF5 file."""
    from tf_lesion.restoration import restore_to_file

    restoration = restoration_config(loaded, options)
    points = detection_points(loaded, restoration, options)
    count = restore_to_file(
        loaded,
        options.cache,
        options.out,
        restoration=restoration,
        seed=options.seed,
        batch_size=options.batch_size,
        max_slices=options.max_slices,
        save_every=options.save_every,
        thresholds={f"fpr_{point.target_fpr:g}": point.threshold for point in points},
        crop=options.crop,
        shard=options.shard,
        force=options.force,
    )
    print(f"Restored {count} slices: {options.out}")


def restore_scans(loaded, options, *, typed):
    """Restore a scan, or those of a folder; returns the exit status."""
    from tf_lesion.detection import files as scan_files
    from tf_lesion.detection.maps import MapSettings, ScanRestorer

    restoration = restoration_config(loaded, options)
    restorer = ScanRestorer(
        loaded,
        restoration,
        points=detection_points(loaded, restoration, options),
        settings=MapSettings(
            options.seed, options.batch_size, options.slice_step, postprocessing(loaded, options)
        ),
        align=options.align,
    )
    written = {"command": typed, "force": options.force}
    source, out, bids = Path(options.input), options.out, options.bids_out
    if source.is_dir():
        patterns = {f"{name}pattern": getattr(options, f"{name}pattern") for name in PATTERNS}
        subjects = scan_files.find_scans(source, out=out, **patterns)
        rows = scan_files.restore_many(restorer, subjects, out, bids=bids, **written)
    else:
        subject = scan_files.one_scan(source, mask=options.mask)
        layout = scan_files.layout_of(subject, out, bids=bids)
        scan_files.tell_warnings(scan_files.restore_one(restorer, subject, layout, **written))
        rows = [{"status": scan_files.DONE}]
    if bids:
        scan_files.write_dataset_description(out, source if source.is_dir() else source.parent)
    statuses = [row["status"] for row in rows]
    counts = [f"{statuses.count(name)} {name}" for name in dict.fromkeys(statuses)]
    print(f"Wrote maps of {source} to {out}: {', '.join(counts)}.")
    return int(scan_files.FAILED in statuses)


def check_options(options):
    """Raise `InputError` for numbers that make no sense."""
    for flag in ("batch_size", "save_every", "max_slices", "slice_step"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            name = "--" + flag.replace("_", "-")
            raise InputError(f"Expected {name} 1 or more, got {value}.")
    of_one, of_many = options.mask, [getattr(options, f"{name}pattern") for name in PATTERNS]
    if options.input and of_one and Path(options.input).is_dir():
        raise InputError("--mask is for one scan; for a folder give --mask-pattern.")
    if any(of_many) and not (options.input and Path(options.input).is_dir()):
        raise InputError("--pattern, --mask-pattern and --seg-pattern need a folder as --input.")


@command
def main(argv=None):
    """Run the command line; returns the exit status."""
    options = parse(argv)
    check_options(options)
    if options.merge:
        from tf_lesion.caches.restored import merge_shards

        print(f"Merged {merge_shards(options.out, force=options.force)} slices: {options.out}")
        return 0
    if options.cache and not options.shard:
        refuse_existing(options.out, force=options.force)
    from tf_lesion.training.runs import load

    loaded = load(options.model, precision=options.precision)
    if options.cache:
        restore_from_cache(loaded, options)
        return 0
    typed = shlex.join(["restore_brats.py", *(sys.argv[1:] if argv is None else argv)])
    return restore_scans(loaded, options, typed=typed)


if __name__ == "__main__":
    sys.exit(main())
