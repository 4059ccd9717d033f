"""Choose lambda, the weight of the total variation, without a lesion label.

Healthy subjects need no change. So the held-out healthy slices are restored at every lambda of a
grid, and the lambda that changes them least is chosen:

    eps(lambda) = 1/M * sum over M subjects of |observed - restored|_1

Source: You et al., MIDL 2019, section 2.3. The paper finds 1.8 for the GMVAE on 52 subjects of
Cam-CAN.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.sweep import Kept, check_size, parse_grid, restored_batches
from tf_lesion import __version__
from tf_lesion.caches.slices import SliceCache
from tf_lesion.choices import FILE_NAME, restoration_of
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.evaluation.scores import read_counts
from tf_lesion.files import InputError, refuse_existing, write_json
from tf_lesion.provenance import commit

RELEASED_GRID = "0:4:0.2"  # 0, 0.2 ... 3.8
HINT = "give the same options to go on, or --force to start over"

EXAMPLE = """example:
  python -m eval.select_lambda --model runs/gmvae --cache healthy.h5
  python restore_brats.py --model runs/gmvae --cache patients.h5 --out restored.h5 --tv-weight auto
"""


def select(
    loaded,
    cache_path,
    grid,
    *,
    partial,
    steps=None,
    max_slices=None,
    seed=0,
    batch_size=16,
    counts=None,
    crop=None,
    progress=True,
):
    """Measure eps(lambda) on `Test` of a healthy cache and choose its minimum.

    Args:
        loaded: `runs.LoadedModel`.
        cache_path: the healthy cache.
        grid: [lambda], per unit intensity.
        partial: file that keeps each finished lambda, deleted at the end.
        steps: of the restoration; the model's own by default.
        max_slices: use a random subset of so many slices.
        seed: of the noise, and of the subset.
        batch_size: slices at once.
        counts: slices per subject, when the cache does not say.
        crop: (x0, x1, y0, y1) in place of the cache's own.
        progress: show a progress bar.

    Returns:
        The content of `lambda.json`: `tv_weight` is the choice (the smallest lambda of those with
        the least change per subject), `curve` has a row per lambda.

    Raises:
        InputError: if the cache does not fit the model, or `partial` belongs to other settings.
    """
    from tf_lesion.restoration import Restorer, chosen_rows, describe

    # With long steps the change only lessens as lambda grows: there is no minimum to find.
    restoration = restoration_of(loaded, tv_weight=grid[0], steps=steps, solver="released")
    settings = describe(loaded, restoration, seed=seed)
    del settings["tv_weight"]
    with SliceCache(cache_path, "Test", counts=counts, crop=crop) as cache:
        check_size(loaded, cache)
        rows = chosen_rows(len(cache), max_slices, seed=seed)
        cohort = {
            "cache": str(cache_path),
            "subjects": len(np.unique(cache.index.subject[rows])),
            "slices": len(rows),
            "of_slices": len(cache),
        }
        kept = Kept(partial, {**settings, "cohort": cohort, "grid": list(grid)}, hint=HINT)
        missing = [weight for weight in grid if f"{weight:g}" not in kept.results]
        restorer = Restorer(loaded.model, restoration, seed=seed)
        total = len(missing) * len(rows) * restoration.steps
        with tqdm(total=total, desc="lambda", unit="slice-step", disable=not progress) as bar:
            for weight in missing:
                batches = restored_batches(
                    restorer,
                    cache,
                    rows,
                    tv_weight=weight,
                    batch_size=batch_size,
                    on_progress=bar.update,
                )
                kept.add(f"{weight:g}", measure_change(batches, cache.index.subject))
    curve = [{"tv_weight": weight, **kept.results[f"{weight:g}"]} for weight in grid]
    return {
        "tf_lesion_version": __version__,
        "commit": commit(),
        **chosen(curve),
        **settings,
        "cohort": cohort,
        "curve": curve,
    }


def measure_change(batches, subject_of_row):
    """The l1 change of restored slices, over subjects and over voxels.

    Args:
        batches: as yielded by `sweep.restored_batches`.
        subject_of_row: [N] subject of every row of the cache.

    Returns:
        `change_per_subject` (eps: mean over subjects of the sum over their brain voxels, intensity
        times voxels), `std_per_subject` (ddof 0) and `change_per_voxel` (mean over all brain
        voxels, intensity).
    """
    change, voxels = {}, 0
    for rows, observed, restored, mask in batches:
        sums = (np.abs(observed - restored) * mask).sum(axis=(1, 2), dtype=np.float64)
        voxels += int(mask.sum())
        for subject, value in zip(subject_of_row[rows], sums, strict=True):
            change[subject] = change.get(subject, 0.0) + value
    if not voxels:
        raise InputError("Expected healthy brain voxels, but the brain mask is empty.")
    values = np.array(list(change.values()))
    return {
        "change_per_subject": float(values.mean()),
        "std_per_subject": float(values.std()),
        "change_per_voxel": float(values.sum() / voxels),
    }


def chosen(curve):
    """The lambda of the smallest change per subject, and whether it is an end of the grid."""
    curve = sorted(curve, key=lambda row: row["tv_weight"])
    best = int(np.argmin([row["change_per_subject"] for row in curve]))
    return {
        "tv_weight": curve[best]["tv_weight"],
        "at_end_of_grid": len(curve) > 1 and best in (0, len(curve) - 1),
    }


# The command -----------------------------------------------------------------------------------


def parser():
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m eval.select_lambda",
        description="Choose lambda by the change of healthy slices; no lesion label is used.",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    add = arguments.add_argument
    add("--model", required=True, help="run of train_gmvae.py, or folder of a TF1 checkpoint")
    add("--cache", required=True, type=Path, help="healthy cache (dataset Test)")
    add("--out", type=Path, help=f"JSON file to write; default: {FILE_NAME} in the --model folder")
    add("--grid", default=RELEASED_GRID, help="start:stop:step without the stop, or a,b,c")
    add("--steps", type=int, help="of the restoration; default: the preset's")
    add("--max-slices", type=int, help="use a random subset, drawn with --seed")
    add("--batch-size", type=int, default=16, help="slices at once")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of convolutions")
    add("--seed", type=int, default=0, help="of the noise and of the subset")
    add("--subjects", type=Path, help="slices per subject (.npy), for a released cache")
    add(
        "--crop",
        type=int,
        nargs=4,
        metavar=("X0", "X1", "Y0", "Y1"),
        help="window, pixels; default: the cache's",
    )
    add("--force", action="store_true", help="overwrite --out, and start over")
    return arguments


def check_counts(**numbers):
    """Raise `InputError` unless the options named are left out or at least 1."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"Expected {flag} 1 or more, got {value}.")


@command
def main(argv=None):
    """Choose lambda and write it as JSON."""
    options = parser().parse_args(argv)
    out = options.out or Path(options.model) / FILE_NAME
    refuse_existing(out, force=options.force)
    check_counts(batch_size=options.batch_size, max_slices=options.max_slices)
    grid = parse_grid(options.grid)
    counts = read_counts(options.subjects) if options.subjects else None
    from tf_lesion.training.runs import load

    loaded = load(options.model, precision=options.precision)
    partial = out.with_name(out.stem + ".partial.json")
    if options.force:
        partial.unlink(missing_ok=True)
    result = select(
        loaded,
        options.cache,
        grid,
        partial=partial,
        counts=counts,
        **{name: getattr(options, name) for name in ("steps", "max_slices", "seed", "batch_size")},
        crop=options.crop,
    )
    write_json(out, result)
    partial.unlink(missing_ok=True)
    print(table(result))
    return 0


def table(result):
    """The curve as text, the choice marked."""
    lines = [f"{'lambda':>7}  {'change per subject':>18}  {'change per voxel':>16}"]
    for row in result["curve"]:
        mark = "  <- smallest" if row["tv_weight"] == result["tv_weight"] else ""
        lines.append(
            f"{row['tv_weight']:7.2f}  {row['change_per_subject']:18.2f}  "
            f"{row['change_per_voxel']:16.5f}{mark}"
        )
    if result["at_end_of_grid"]:
        lines.append("The smallest change is at an end of the grid; try a wider --grid.")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
