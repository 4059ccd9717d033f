"""Restore patients' slices towards the healthy prior; what changes is the lesion map.

Models that reconstruct a slice, or search the nearest healthy one, put that in its place.

python restore_brats.py --model runs/gmvae --cache patients.h5 --out restored.h5
python restore_brats.py --model runs/gmvae --input patient_t2.nii.gz --out maps/

On several machines or devices, each does one part of the cache, and any of them puts them together:

python restore_brats.py --model runs/gmvae --cache patients.h5 --out restored.h5 --shard 1/3
python restore_brats.py --out restored.h5 --merge
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from tf_lesion.files import HelpFormatter, InputError, command, refuse_existing


def parse(argv):
    """The command line; --tv-weight and --steps left out are None: the model's preset decides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model", help="run, folder of a TF1 checkpoint, or SavedModel")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cache", help="HDF5 cache with Test (and Mask)")
    source.add_argument("--merge", action="store_true", help="put the shards of --out together")
    source.add_argument("--input", help="one T2 scan, NIfTI, any grid and orientation")
    add("--out", required=True, help="HDF5 file (--cache) or folder (--input)")
    add("--mask", help="brain mask of the scan, NIfTI on its grid (--input)")
    add("--align", choices=["rigid", "center", "none"], help="as in preprocessing (--input)")
    add(
        "--tv-weight",
        help="lambda, per unit intensity, or auto: that of eval.select_lambda; "
        "default: the preset's (gmvae, vae)",
    )
    add("--thresholds", help="JSON of eval.thresholds: also write binary lesion maps")
    add("--steps", type=int, help="of the restoration or search; default: the preset's")
    add(
        "--solver",
        choices=["released", "proximal"],
        help="released: 500 small steps; proximal: 50 longer ones; default: the preset's "
        "(gmvae, vae)",
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
    add("--crop", type=int, nargs=4, metavar=("X0", "X1", "Y0", "Y1"), help="pixels (--cache)")
    add("--batch-size", type=int, default=16, help="slices at once")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of convolutions")
    add("--seed", type=int, default=0, help="of the noise")
    add("--force", action="store_true", help="overwrite --out")
    options = parser.parse_args(argv)
    if options.model is None and not options.merge:
        parser.error("the following arguments are required: --model")
    return options


def shard_of(text):
    """(i, n) from "i/n", 1 <= i <= n."""
    number, count = (int(part) for part in text.split("/"))
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text}")
    return number, count


def restoration_config(loaded, options):
    """The model's `RestorationConfig` with the options that were given."""
    from eval.select_lambda import restoration_of

    return restoration_of(
        loaded, tv_weight=options.tv_weight, steps=options.steps, solver=options.solver
    )


def detection_thresholds(loaded, restoration, options):
    """{name: residual} of --thresholds, for example fpr_0.05; {} without.

    Raises:
        InputError: if they belong to another model, lambda or number of steps.
    """
    if options.thresholds is None:
        return {}
    from eval.thresholds import load_thresholds

    used = dataclasses.asdict(restoration)
    stored = load_thresholds(options.thresholds, model_id=loaded.identity, restoration=used)
    return {f"fpr_{point.target_fpr:g}": point.threshold for point in stored.points["residual"]}


def restore_from_cache(loaded, options):
    """Restore `Test` of a cache into an HDF5 file."""
    from tf_lesion.restoration import restore_to_file

    restoration = restoration_config(loaded, options)
    count = restore_to_file(
        loaded,
        options.cache,
        options.out,
        restoration=restoration,
        seed=options.seed,
        batch_size=options.batch_size,
        max_slices=options.max_slices,
        save_every=options.save_every,
        thresholds=detection_thresholds(loaded, restoration, options),
        crop=options.crop,
        shard=options.shard,
        force=options.force,
    )
    print(f"Restored {count} slices: {options.out}")


def scan_settings(loaded, options):
    """`ScanSettings` of the training cache; those of the released code where the run has none."""
    from preprocessing.scan import ScanSettings

    stored = dict(loaded.data.get("preprocessing", {}).get("scan", {}))
    stored["align"] = options.align or stored.get("align", "rigid")
    return ScanSettings(**stored)


def _crop_of(loaded, grid):
    """The window (x, y) of the grid's slices that the model was trained on."""
    network = loaded.config.network
    x0, x1, y0, y1 = loaded.data.get("crop", grid.crop)
    if (x1 - x0, y1 - y0) != (network.height, network.width):
        raise InputError(
            f"{loaded.path} restores {network.height} x {network.width} slices, the grid of "
            f"{grid.voxel_size:g} mm is cropped to {x1 - x0} x {y1 - y0}."
        )
    return slice(x0, x1), slice(y0, y1)


def restore_volume(loaded, prepared, restoration, options):
    """Restore every axial slice with brain of a prepared scan.

    Args:
        loaded: `runs.LoadedModel`.
        prepared: `preprocessing.scan.PreparedScan`.
        restoration: `RestorationConfig`.
        options: the command line (batch size, seed).

    Returns:
        The restored volume [X, Y, Z] on the grid. With --slice-step the change of the slices in
        between is interpolated from their neighbors; outside the crop it is the observed volume.
    """
    import numpy as np
    from tqdm import tqdm

    from tf_lesion.restoration import Restorer, restore

    window = _crop_of(loaded, prepared.grid)
    observed = np.moveaxis(prepared.image[window], 2, 0)[..., None]
    mask = np.moveaxis(prepared.mask[window], 2, 0)[..., None]
    slices = np.flatnonzero(mask.any(axis=(1, 2, 3)))[:: options.slice_step]
    restorer = Restorer(loaded.model, restoration, seed=options.seed)
    change = np.zeros((len(slices), *observed.shape[1:3]), np.float32)
    total = len(slices) * restoration.steps
    with tqdm(total=total, desc="restoring", unit="slice-step") as progress:
        for start in range(0, len(slices), options.batch_size):
            part = slice(start, start + options.batch_size)
            chosen = slices[part]
            restored, _ = restore(
                restorer, observed[chosen], mask[chosen], chosen, on_progress=progress.update
            )
            change[part] = (restored - observed[chosen])[..., 0]
    volume = prepared.image.copy()
    volume[window] += _between(change, slices, len(mask)) * prepared.mask[window]
    return volume


def _between(change, slices, count):
    """Changes [n, H, W] of some axial slices -> [H, W, count], linear in between."""
    import numpy as np
    from scipy.interpolate import interp1d

    if len(slices) == 1:
        return np.repeat(change[0][..., None], count, axis=2)
    ends = (change[0], change[-1])
    line = interp1d(slices, change, axis=0, bounds_error=False, fill_value=ends)
    return np.moveaxis(line(np.arange(count)).astype(np.float32), 0, 2)


def restore_scan(loaded, options):
    """Restore one scan; write restored image, residual and lesion maps on the scan's own grid."""
    import numpy as np

    from preprocessing.scan import prepare_scan, save_like, to_scan_grid
    from tf_lesion import __version__
    from tf_lesion.config import write_json
    from tf_lesion.restoration import describe

    restoration = restoration_config(loaded, options)
    thresholds = detection_thresholds(loaded, restoration, options)
    stem = Path(options.out) / Path(options.input).name.removesuffix(".gz").removesuffix(".nii")
    names = ["restored", "residual", *(f"lesions_{name}" for name in thresholds)]
    paths = {name: stem.with_name(f"{stem.name}_{name}.nii.gz") for name in names}
    for path in paths.values():
        refuse_existing(path, force=options.force)
    prepared = prepare_scan(
        options.input,
        settings=scan_settings(loaded, options),
        mask_path=options.mask,
        reference=loaded.reference,
    )
    warnings = list(prepared.warnings)
    if loaded.reference is None:
        warnings.append("no reference histogram comes with this model: intensities not matched.")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    restored = restore_volume(loaded, prepared, restoration, options)
    residual = np.abs(prepared.image - restored) * prepared.mask
    maps = {"restored": restored, "residual": residual}
    maps |= {f"lesions_{name}": residual > limit for name, limit in thresholds.items()}
    for name, volume in maps.items():
        order = 0 if volume.dtype == bool else 1
        save_like(prepared.scan, to_scan_grid(volume, prepared, order=order), paths[name])
    write_json(
        stem.with_name(f"{stem.name}_restoration.json"),
        {
            "tf_lesion_version": __version__,
            "input": str(options.input),
            **describe(loaded, restoration, seed=options.seed),
            "scan_from_grid": prepared.scan_from_grid.tolist(),
            "thresholds": thresholds,
            "warnings": warnings,
        },
    )
    print(f"Wrote {', '.join(names)} of {options.input} to {options.out}")


def check_options(options):
    """Raise `InputError` for numbers that make no sense."""
    for flag in ("batch_size", "save_every", "max_slices", "slice_step"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            name = "--" + flag.replace("_", "-")
            raise InputError(f"Expected {name} 1 or more, got {value}.")


@command
def main(argv=None):
    """Run the command line; returns the exit status."""
    options = parse(argv)
    check_options(options)
    if options.merge:
        from tf_lesion.restored import merge_shards

        print(f"Merged {merge_shards(options.out, force=options.force)} slices: {options.out}")
        return 0
    if options.cache and not options.shard:
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
