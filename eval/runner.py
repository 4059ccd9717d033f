"""What `eval.tables` and `eval.figures` share: options, parts to make, a folder of one config."""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from eval.parts import Part, StoppedError, plan, written_by_us
from tf_lesion.cli.options import add, parser_for
from tf_lesion.files import InputError, locked, refuse_existing, write_json
from tf_lesion.provenance import stamp

SIGNALED = 128  # plus the signal's number
OUTPUTS = ("table[12].*", "pairs.csv", "fig[1-6]*.*")


def parser(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """Command line with --config, --out, --dry-run and --force."""
    arguments = parser_for(prog, description, epilog=example)
    add(arguments, "--config", required=True)
    add(arguments, "--out", help="folder in place of the configuration's own")
    add(arguments, "--dry-run", help="list the parts and the work that is left")
    add(arguments, "--device", "--threads")
    add(arguments, "--force", help="overwrite results made from other settings")
    return arguments


@contextlib.contextmanager
def prepared(
    options: argparse.Namespace, parts_of: Callable[[Any], list[Part]]
) -> Iterator[tuple[Any, list[Any]] | None]:
    """Make the parts of an experiment; finished ones are reused. Its folder is ours until the end.

    Args:
        options: of `parser`.
        parts_of: a function: `MethodParts` -> the parts that are needed of it.

    Yields:
        (`Experiment`, [`MethodParts`]), or None after a dry run.
    """
    from tf_lesion import devices

    devices.start(device=options.device, threads=options.threads)
    from eval.experiment import read_experiment

    experiment = read_experiment(options.config, out=options.out)
    methods = _all_parts(experiment)
    wanted = [part for method in methods for part in parts_of(method)]
    if options.dry_run:
        print(plan(wanted, experiment.out / "parts"))
        yield None
        return
    experiment.out.mkdir(parents=True, exist_ok=True)
    with locked(experiment.out):
        _claim(experiment, force=options.force)
        print(plan(wanted, experiment.out / "parts"), flush=True)
        for part in wanted:
            part.ensure()
        yield experiment, methods


def _all_parts(experiment):
    from eval.pipeline import MethodParts, read_config

    for method in experiment.methods:
        if method.run is None:
            continue
        network = read_config(method.run).network
        if network.model != method.method or method.clusters not in (None, network.num_clusters):
            raise InputError(
                f"{method.run} holds a {network.model} with {network.num_clusters} clusters, the "
                f"configuration says {method.title}."
            )
    return [MethodParts(experiment, method) for method in experiment.methods]


def _claim(experiment, *, force):
    """Write `experiment.json`; without force only where no other tables and figures are."""
    path, advice = experiment.out / "experiment.json", "choose another --out, or pass --force"
    settings = json.loads(json.dumps(asdict(experiment), default=str))
    if path.exists() and not force:
        with written_by_us(path, advice):
            same = json.loads(path.read_text(encoding="utf-8"))["settings"] == settings
        if not same:
            raise FileExistsError(
                f"{experiment.out} holds the results of other settings; {advice} to overwrite its "
                f"tables and figures (finished parts that fit are reused)."
            )
    elif not path.exists():
        for pattern in OUTPUTS:
            for output in sorted(experiment.out.glob(pattern)):
                refuse_existing(output, force=force)
    write_json(path, {**stamp(), "settings": settings})


def stoppable(main: Callable) -> Callable:
    """Decorate `main(argv)`: a training that was stopped ends it with one line."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except StoppedError as error:
            print(error, file=sys.stderr)
            return SIGNALED + error.signal

    return wrapped
