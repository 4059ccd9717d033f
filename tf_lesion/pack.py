r"""Pack a run to be shipped: weights without optimizer, what was chosen for it, no local paths.

    python -m tf_lesion.pack --model runs/gmvae --out tf_lesion/pretrained/gmvae --solver huber

The packed folder is used like a run. Its own settings become the lambda of eval.select_lambda and
the given solver, so that restore_brats.py needs no option.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from tf_lesion import choices
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.config import SOLVERS
from tf_lesion.files import InputError, write_json, written_whole
from tf_lesion.provenance import commit

POSTPROCESSING = "postprocessing.json"
CHOSEN = (choices.FILE_NAME, *choices.THRESHOLD_FILES.values(), POSTPROCESSING)
MAPS = ("healthy_residual.npz",)


def pack(model_path, out, *, solver=None, align=None, postprocess=None, force=False):
    """Copy what restoring needs of a run into the folder `out`; returns its size in bytes.

    Args:
        model_path: the run.
        out: the folder to make.
        solver: one of `config.SOLVERS`; the preset's by default.
        align: how scans are brought to MNI space; as the training scans by default.
        postprocess: steps of `eval.postprocessing` for `restore_brats.py --postprocess auto`.
        force: overwrite.

    Raises:
        InputError: if the run has no lambda.
        FileExistsError: if `out` exists.
    """
    import tensorflow as tf

    from tf_lesion.training.runs import Run, load, named_variables

    loaded, source = load(model_path), Run(Path(model_path))
    if not source.config_path.exists():
        raise InputError(f"Expected a run of train_gmvae.py, got {model_path}.")
    restoration = choices.restoration_of(loaded, tv_weight=choices.AUTO, solver=solver)
    stored = json.loads(source.config_path.read_text())
    precision = stored["network"]["precision"]
    config = loaded.config.replace(network={"precision": precision}, restoration=restoration)
    with written_whole(out, force=force) as folder:
        folder.mkdir(parents=True)
        target = Run(folder)
        content = {**config.to_dict(), "commit": stored.get("commit", commit())}
        data = _without_paths(loaded.data)
        if align is not None:
            data["preprocessing"]["scan"]["align"] = align
        write_json(target.config_path, content | {"data": data})
        if loaded.reference is not None:
            np.save(target.reference_path, loaded.reference)
        weights = tf.train.Checkpoint(model=named_variables(loaded.model.weights))
        manager = tf.train.CheckpointManager(weights, str(target.checkpoints), 1)
        step = int(source.latest_checkpoint().rsplit("-", 1)[1])
        manager.save(checkpoint_number=step)
        for name in CHOSEN:
            if (source.folder / name).exists():
                chosen = json.loads((source.folder / name).read_text())
                write_json(folder / name, _without_paths(chosen))
        if postprocess is not None:
            chosen = {"model_identity": loaded.identity, "steps": postprocess}
            write_json(folder / POSTPROCESSING, chosen)
        for name in MAPS:
            if (source.folder / name).exists():
                shutil.copy(source.folder / name, folder / name)
    return sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())


def _without_paths(value):
    """The same with every absolute path replaced by its last part."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def parser():
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m tf_lesion.pack", description=__doc__, formatter_class=HelpFormatter
    )
    add = arguments.add_argument
    add("--model", required=True, help="run of train_gmvae.py, with lambda.json")
    add("--out", required=True, help="folder to make")
    add("--solver", choices=list(SOLVERS), help="default: the preset's")
    add(
        "--align",
        choices=["rigid", "center", "none"],
        help="of scans to MNI space; default: as the training scans",
    )
    add("--postprocess", help="steps for restore_brats.py --postprocess auto; default: the run's")
    add("--force", action="store_true", help="overwrite --out")
    return arguments


@command
def main(argv=None):
    """Pack a run."""
    options = parser().parse_args(argv)
    size = pack(
        options.model,
        options.out,
        solver=options.solver,
        align=options.align,
        postprocess=options.postprocess,
        force=options.force,
    )
    print(f"Packed {options.model}: {options.out}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
