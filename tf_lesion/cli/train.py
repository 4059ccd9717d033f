"""Train a GMVAE, or another method of Table 1, on the healthy slices of a cache.

    tf-lesion train --cache healthy.h5 --out runs/gmvae --preset practical

The folder it makes is the --model of the other commands. python train_gmvae.py is the same.
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import METHOD_NAMES, add, parser_for
from tf_lesion.files import (
    InputError,
    locked,
    put_back,
    refuse_existing,
    set_aside,
)

_FIELDS = {  # option -> (section of the config, field)
    "preset": (None, "preset"),
    "model": ("network", "model"),
    "clusters": ("network", "num_clusters"),
    "precision": ("network", "precision"),
    "steps": ("training", "steps"),
    "batch_size": ("training", "batch_size"),
    "learning_rate": ("training", "learning_rate"),
    "checkpoint_every": ("training", "checkpoint_every"),
    "seed": (None, "seed"),
}
SLOW_BFLOAT16 = (
    "this processor has no bfloat16 products and computes them slowly; --precision float32 is "
    "faster here."
)
_MAY_CHANGE = {"steps", "checkpoint_every"}  # on --resume
MIXTURE = "gmvae"  # the method whose prior has clusters


def parser() -> argparse.ArgumentParser:
    """The command line; options left out are None and keep the preset's value."""
    made = parser_for("tf-lesion train", __doc__)
    add(made, "--cache", required=True, help="HDF5 cache with Train and Test")
    add(made, "--out", required=True, help="folder of the run")
    add(made, "--model", help=f"{METHOD_NAMES} (default: gmvae)")
    add(made, "--preset")
    add(made, "--steps", help="training steps; default: the preset's")
    add(made, "--batch-size", default=None, type=int, help="slices a step; default: the preset's")
    add(made, "--learning-rate", "--clusters", "--checkpoint-every")
    add(made, "--seed", default=None, help="of weights, batches and noise; default: the preset's")
    add(made, "--precision", default=None, help="of convolutions; default: the preset's")
    add(made, "--device", "--threads", "--distribute", "--crop", "--resume")
    add(made, "--force", help="replace an existing run")
    add(made, "--dry-run", help="print the resolved configuration and leave")
    return made


def _new(given, shape):
    """`Config` from the preset, the options that were given and the size of the slices."""
    from tf_lesion import presets
    from tf_lesion.baselines import METHODS

    model = given.get("model", "gmvae")
    if model not in METHODS:
        raise InputError(f"Expected --model as one of {', '.join(METHODS)}, got {model}.")
    config = presets.preset(given.get("preset", "released"), model)
    config = config.replace(network={"height": shape[0], "width": shape[1]})
    return presets.check(_changed(config, given))


def _changed(config, given):
    for option in _FIELDS.keys() & given:
        section, field = _FIELDS[option]
        change = {field: given[option]}
        config = config.replace(**({section: change} if section else change))
    return config


def _resumed(given, run, cache):
    """`Config` of an existing run; an option or a cache that contradicts it is an `InputError`."""
    from tf_lesion import presets

    config, data = run.read()
    identity = data.get("cache_identity", cache.identity)
    if identity != cache.identity:
        raise InputError(
            f"{run.folder} was trained on {data['cache']} of the identity {identity}, "
            f"{cache.path} has {cache.identity}; give the cache it was trained on, or choose "
            f"another --out."
        )
    for option in _FIELDS.keys() & given.keys() - _MAY_CHANGE:
        section, field = _FIELDS[option]
        stored = getattr(getattr(config, section) if section else config, field)
        if given[option] != stored:
            flag = "--" + option.replace("_", "-")
            raise InputError(
                f"{run.folder} was trained with {flag} {stored}, got {given[option]}; leave {flag} "
                f"out to go on, or choose another --out."
            )
    changed = _changed(config, {k: v for k, v in given.items() if k in _MAY_CHANGE})
    if changed.training.steps < run.step():
        raise InputError(
            f"Expected --steps of {run.step()} or more, which {run.folder} has taken, got "
            f"{changed.training.steps}."
        )
    return presets.check(changed.replace(training={"planned_steps": config.training.length}))


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    needs = {
        "--force": ("a new run", not options.resume),
        "--clusters": (f"--model {MIXTURE}", options.model in (None, MIXTURE)),
    }
    check_effect(parser(), options, needs)
    from tf_lesion import devices

    # Processes that work together must find each other before TensorFlow computes anything.
    started = {"device": options.device, "try_out": options.distribute != "multi-worker"}
    devices.start(threads=options.threads, **started)
    from tf_lesion.caches.slices import SliceCache
    from tf_lesion.training.distribution import make_placement
    from tf_lesion.training.runs import Run
    from tf_lesion.training.trainer import NonFiniteLossError, Trainer, WorkerLostError

    placement = make_placement(options.distribute)
    run = Run(Path(options.out))
    if placement.chief and not options.dry_run:
        _clear(run)
    if options.resume and not run.config_path.exists():
        raise InputError(f"Nothing to resume: {run.folder} has no config.json.")
    given = {name: value for name, value in vars(options).items() if value is not None}
    with (
        SliceCache(options.cache, "Train", crop=options.crop) as train,
        SliceCache(options.cache, "Test", crop=options.crop) as test,
    ):
        config = _resumed(given, run, train) if options.resume else _new(given, train.shape)
        size = (config.network.height, config.network.width)
        if train.shape != size:
            raise InputError(
                f"{run.folder} was trained on {size[0]} x {size[1]} slices, {options.cache} has "
                f"{train.shape[0]} x {train.shape[1]}; see --crop."
            )
        if options.dry_run:
            print(json.dumps(config.to_dict(), indent=2))
            return 0
        devices.start(tf32=config.network.precision == "tf32", **started)
        if config.network.precision == "bfloat16" and devices.slow_in_bfloat16():
            print(f"warning: {SLOW_BFLOAT16}", file=sys.stderr)
        writes_new = placement.chief and not options.resume
        if writes_new:
            _check_place(run, force=options.force)
        how = {"resume": options.resume, "placement": placement}
        # The run that is replaced goes when the new one has taken a step.
        with ExitStack() as held:
            started = held.enter_context(set_aside(run.folder)) if writes_new else None
            if placement.chief:
                run.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(run.folder))
                run.write(config, train)
            trainer = Trainer(run, config, train=train, test=test, **how)
            try:
                stopped_by = trainer.fit(started=started)
            except (NonFiniteLossError, WorkerLostError) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                if isinstance(error, WorkerLostError):
                    os._exit(1)  # TensorFlow waits at its own exit for the worker that is gone
                return 1
    step = int(trainer.step.numpy())
    if stopped_by:
        print(f"Stopped and saved at step {step}; go on with --resume.")
        return 128 + stopped_by
    print(f"Trained {config.network.model} to step {step}: {run.folder}")
    return 0


def _clear(run):
    """Take away what a killed training left, unless another one is at work there."""
    with locked(run.folder):
        trained = any(run.checkpoints.glob("*.index"))
        if not trained and put_back(run.folder):
            print(f"{run.folder} is as it was before a training that was killed.", file=sys.stderr)
        run.remove_unfinished()


def _check_place(run, *, force):
    """An existing run is an error without --force, and any other folder with it too."""
    if run.folder.exists() and any(run.folder.iterdir()):
        refuse_existing(run.folder, force=force, marker=run.config_path.name)
