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
import importlib
import json
import os
import sys
from collections.abc import Sequence

from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.files import InputError, write_json
from tf_lesion.provenance import stamp

SOLVER = ("model", "cache", "max_slices", "batch_size", "tv_weight", "seed")
KINDS = {  # module of `benchmark_KIND`, and the options that it takes
    "metrics": ("eval.benchmark_data", ("voxels", "seed")),
    "restore": ("eval.benchmark_models", ("size", "batch_size", "rounds")),
    "solver": ("eval.benchmark_models", SOLVER),
    "train": ("eval.benchmark_models", ("size", "batch_size", "rounds")),
    "cache": ("eval.benchmark_data", ("batch_size", "rounds")),
    "preprocess": ("eval.benchmark_data", ("jobs", "rounds")),
}
BATCH_SIZES = {"restore": 8, "solver": 8, "train": 16, "cache": 16}
ROUNDS = {"restore": 7, "train": 9, "cache": 5, "preprocess": 3}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_for("python -m eval.benchmark", __doc__)
    made.add_argument("what", choices=KINDS, help="what to measure")
    add(made, "--rounds")
    add(made, "--batch-size", default=None, help="slices at once; default: 8, or 16 (train, cache)")
    add(made, "--size", default=(158, 198))
    add(made, "--model", help="run of train_gmvae.py (solver)")
    add(made, "--cache", help="patients' cache with labels (solver)")
    add(made, "--max-slices", help="a random subset (solver); default: all")
    add(made, "--tv-weight", type=float, help="lambda (solver); default: the preset's")
    add(made, "--jobs", default=os.cpu_count(), help="processes (preprocess)")
    add(made, "--voxels", default=50_000_000)
    add(made, "--seed", help="of made-up residuals, noise and subset")
    add(made, "--device", "--threads")
    add(made, "--out", help="also write the figures as JSON")
    add(made, "--force")
    return made


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and print its figures."""
    options = parser().parse_args(argv)
    what, needs = options.what, {"--force": ("--out", bool(options.out))}
    for name in sorted({name for _, names in KINDS.values() for name in names}):
        kinds = [kind for kind, (_, names) in KINDS.items() if name in names]
        needs[f"--{name.replace('_', '-')}"] = (" or ".join(kinds), what in kinds)
    check_effect(parser(), options, needs)
    if what == "solver" and None in (options.model, options.cache):
        raise InputError("Expected --model and --cache with patients to compare solvers on.")
    options.rounds = options.rounds or ROUNDS.get(what)
    options.batch_size = options.batch_size or BATCH_SIZES.get(what)
    from tf_lesion import devices

    devices.start(device=options.device, threads=options.threads)
    module, names = KINDS[what]
    run = getattr(importlib.import_module(module), f"benchmark_{what}")
    table, facts = run(**{name: getattr(options, name) for name in names})
    print(facts["what"])
    print(table.reset_index().to_string(index=False, float_format="{:.4g}".format, na_rep=""))
    for name, value in facts.items():
        if name not in ("what", "passed"):
            print(f"{name}: {value if isinstance(value, bool) else f'{value:.4g}'}")
    if options.out:
        rows = json.loads(table.reset_index().to_json(orient="records"))
        content = {**stamp(), **facts, "rows": rows}
        write_json(options.out, content, force=options.force)
    if not facts["passed"]:
        print(f"failed: eval.benchmark {what} promises more than this", file=sys.stderr)
    return int(not facts["passed"])


if __name__ == "__main__":
    raise SystemExit(main())
