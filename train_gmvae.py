"""Train a GMVAE, or another method of Table 1, on the healthy slices of a cache.

    python train_gmvae.py --cache healthy.h5 --out runs/gmvae --preset practical

The folder it makes is the --model of restore_brats.py.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.files import InputError, refuse_existing


def parse(argv):
    """The command line; options left out are None and keep the preset's value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--cache", required=True, help="HDF5 cache with Train and Test")
    add("--out", required=True, help="folder of the run")
    add(
        "--model",
        help="gmvae, vae, vae-256, vae-128, aae-128 or anogan (default: gmvae)",
        default=argparse.SUPPRESS,
    )
    add(
        "--preset",
        choices=["released", "paper", "practical", "denoising"],
        help="settings of the released code, of the paper, for minutes to hours, or of the "
        "shipped prior (default: released)",
        default=argparse.SUPPRESS,
    )
    for flag, kind, text in (
        ("--steps", int, "training steps"),
        ("--batch-size", int, "slices per step"),
        ("--learning-rate", float, "of Adam"),
        ("--clusters", int, "K, clusters of the mixture"),
        ("--seed", int, "of weights, batches and noise"),
        ("--checkpoint-every", int, "steps between checkpoints"),
    ):
        add(flag, type=kind, help=f"{text} (default: the preset's)", default=argparse.SUPPRESS)
    add(
        "--precision",
        choices=["float32", "bfloat16"],
        help="of the convolutions (default: the preset's)",
        default=argparse.SUPPRESS,
    )
    add(
        "--distribute",
        choices=["none", "mirrored", "multi-worker"],
        default="none",
        help="mirrored: all GPUs of this machine; multi-worker: this is one of several processes "
        "that TF_CONFIG or SLURM names; the batch size is that of all together",
    )
    add(
        "--crop",
        type=int,
        nargs=4,
        metavar=("X0", "X1", "Y0", "Y1"),
        help="window, pixels; default: the cache's",
    )
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--force", action="store_true", help="replace an existing run")
    add("--dry-run", action="store_true", help="print the resolved configuration and leave")
    return parser.parse_args(argv)


_FIELDS = {  # option -> (section of the config, field)
    "model": ("network", "model"),
    "clusters": ("network", "num_clusters"),
    "precision": ("network", "precision"),
    "steps": ("training", "steps"),
    "batch_size": ("training", "batch_size"),
    "learning_rate": ("training", "learning_rate"),
    "checkpoint_every": ("training", "checkpoint_every"),
    "seed": (None, "seed"),
}
_MAY_CHANGE = ("steps", "checkpoint_every")  # on --resume


def resolve(options, shape):
    """`Config` from the preset, the options that were given and the size of the slices."""
    from tf_lesion import presets as configuration
    from tf_lesion.baselines import METHODS

    given = vars(options)
    model = given.get("model", "gmvae")
    if model not in METHODS:
        raise InputError(f"Expected --model as one of {', '.join(METHODS)}, got {model}.")
    config = configuration.preset(given.get("preset", "released"), model)
    config = config.replace(network={"height": shape[0], "width": shape[1]})
    return configuration.check(_with_options(config, given))


def _with_options(config, given, only=tuple(_FIELDS)):
    for option in set(only) & set(given):
        section, field = _FIELDS[option]
        value = given[option]
        config = config.replace(**({section: {field: value}} if section else {field: value}))
    return config


def resumed(options, run, cache):
    """`Config` of an existing run; an option or a cache that contradicts it is an `InputError`."""
    from tf_lesion import presets as configuration

    config, data = run.read()
    identity = data.get("cache_identity", cache.identity)
    if identity != cache.identity:
        raise InputError(
            f"{run.folder} was trained on {data['cache']} of the identity {identity}, "
            f"{cache.path} has {cache.identity}; give the cache it was trained on, or choose "
            f"another --out."
        )
    given = vars(options)
    for option in (*_FIELDS, "preset"):
        section, field = _FIELDS.get(option, (None, "preset"))
        stored = getattr(getattr(config, section) if section else config, field)
        if option in given and option not in _MAY_CHANGE and given[option] != stored:
            flag = "--" + option.replace("_", "-")
            raise InputError(
                f"{run.folder} was trained with {flag} {stored}, got {given[option]}; leave {flag} "
                f"out to go on, or choose another --out."
            )
    return configuration.check(_with_options(config, given, only=_MAY_CHANGE))


@command
def main(argv=None):
    """Run the command line; returns the exit status."""
    options = parse(argv)
    from tf_lesion.caches.slices import SliceCache
    from tf_lesion.training.distribution import make_placement
    from tf_lesion.training.runs import Run
    from tf_lesion.training.trainer import NonFiniteLossError, Trainer, WorkerLostError

    placement = make_placement(options.distribute)
    run = Run(Path(options.out))
    resume = options.resume and run.config_path.exists()
    if options.resume and not resume:
        raise InputError(f"Nothing to resume: {run.folder} has no config.json.")
    with (
        SliceCache(options.cache, "Train", crop=options.crop) as train,
        SliceCache(options.cache, "Test", crop=options.crop) as test,
    ):
        config = resumed(options, run, train) if resume else resolve(options, train.shape)
        if train.shape != (config.network.height, config.network.width):
            raise InputError(
                f"{run.folder} was trained on {config.network.height} x {config.network.width} "
                f"slices, {options.cache} has {train.shape[0]} x {train.shape[1]}; see --crop."
            )
        if options.dry_run:
            print(json.dumps(config.to_dict(), indent=2))
            return 0
        if placement.chief:
            if not resume:
                _fresh(run.folder, force=options.force)
            run.write(config, train)
        trainer = Trainer(run, config, train=train, test=test, resume=resume, placement=placement)
        try:
            stopped_by = trainer.fit()
        except NonFiniteLossError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except WorkerLostError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # TensorFlow waits at its own exit for the worker that is gone
    step = int(trainer.step.numpy())
    if stopped_by:
        print(f"Stopped and saved at step {step}; go on with --resume.")
        return 128 + stopped_by
    print(f"Trained {config.network.model} to step {step}: {run.folder}")
    return 0


def _fresh(folder, *, force):
    """An empty place for the run: an existing one is an error without --force."""
    import shutil

    if not folder.exists() or not any(folder.iterdir()):
        return
    refuse_existing(folder, force=force)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is not a run; --force replaces runs only.")
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
