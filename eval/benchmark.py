"""Measure speed and memory on this machine; exit status 1 if a promise fails.

  python -m eval.benchmark restore --out restore.json
  python -m eval.benchmark solver --model runs/gmvae --cache patients.h5 --max-slices 40

metrics     counting 5e7 voxels at 401 thresholds, against one threshold after the other
restore     restoration steps: exact, bfloat16 and multirate, against the plain loop
solver      objective and AUC of patients against the steps of every solver
train       training steps: exact and bfloat16, against the plain network
cache       training batches read from a compressed cache
preprocess  scans to a cache, by one process and by several

The ways to do the same take turns in one process; ratios are those of the median times.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from eval.benchmark_metrics import VOXELS
from tf_lesion import __version__
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.files import InputError, written_whole

KINDS = ("metrics", "restore", "solver", "train", "cache", "preprocess")
SHAPE = (158, 198)
BATCH_SIZES = {"restore": 8, "solver": 8, "train": 16, "cache": 16}
ROUNDS = {"restore": 7, "train": 9, "cache": 5, "preprocess": 3}


def parser():
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m eval.benchmark", description=__doc__, formatter_class=HelpFormatter
    )
    add = arguments.add_argument
    add("what", choices=KINDS, help="what to measure")
    add("--rounds", type=int, help="times each way is timed; default: 3 to 9")
    add("--batch-size", type=int, help="slices at once; default: 8, or 16 (train, cache)")
    add("--size", type=int, nargs=2, default=SHAPE, metavar=("H", "W"), help="of slices, pixels")
    add("--model", type=Path, help="run of train_gmvae.py (solver)")
    add("--cache", type=Path, help="patients' cache with labels (solver)")
    add("--max-slices", type=int, help="a random subset (solver); default: all")
    add("--tv-weight", type=float, help="lambda (solver); default: the preset's")
    add("--jobs", type=int, default=os.cpu_count(), help="processes (preprocess)")
    add("--voxels", type=int, default=VOXELS, help="number of voxels (metrics)")
    add("--seed", type=int, default=0, help="of made-up residuals, noise and subset")
    add("--out", type=Path, help="also write the figures as JSON")
    add("--force", action="store_true", help="overwrite --out")
    return arguments


def measure(options):
    """Run one benchmark and print it; a JSON-serialisable dict with `passed`."""
    if options.what == "metrics":
        from eval.benchmark_metrics import benchmark_metrics, print_metrics

        measured = benchmark_metrics(options.voxels, seed=options.seed)
        print_metrics(measured)
        return {**vars(measured), "passed": measured.passed}
    if options.what == "solver":
        found = _solver(options)
        _print(found)
        return found
    rounds = options.rounds or ROUNDS[options.what]
    if options.what == "preprocess":
        from eval.benchmark_data import benchmark_preprocess

        found = benchmark_preprocess(jobs=options.jobs, rounds=rounds)
    else:
        given = {"batch_size": options.batch_size or BATCH_SIZES[options.what], "rounds": rounds}
        found = _slices(options.what, tuple(options.size), given)
    _print(found)
    return found


def _solver(options):
    if options.model is None or options.cache is None:
        raise InputError("Expected --model and --cache with patients to compare solvers on.")
    from eval.benchmark_solver import benchmark_solver

    names = ("max_slices", "tv_weight", "seed")
    given = {name: getattr(options, name) for name in names}
    size = options.batch_size or BATCH_SIZES["solver"]
    return benchmark_solver(options.model, options.cache, batch_size=size, **given)


def _slices(what, shape, given):
    if what == "cache":
        from eval.benchmark_data import benchmark_cache

        return benchmark_cache(**given)
    from eval import benchmark_models

    run = {"restore": benchmark_models.benchmark_restore, "train": benchmark_models.benchmark_train}
    return run[what](shape=shape, **given)


def _print(found):
    from eval.benchmark_timing import table

    print(f"{found['what']}\n{table(found['rows'])}")
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {each:.0f}" for key, each in value.items())
        if name not in ("what", "rows", "passed"):
            print(f"{name}: {value if isinstance(value, str) else f'{value:.4g}'}")


@command
def main(argv=None):
    """Run one benchmark and print its figures."""
    options = parser().parse_args(argv)
    for name in ("rounds", "batch_size", "max_slices", "jobs", "voxels"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"Expected --{name.replace('_', '-')} 1 or more, got {value}.")
    found = measure(options)
    if options.out:
        with written_whole(options.out, force=options.force) as temporary:
            content = {"tf_lesion_version": __version__, **found}
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    if not found["passed"]:
        print(f"failed: eval.benchmark {options.what} promises more than this", file=sys.stderr)
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
