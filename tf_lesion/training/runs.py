"""A training run on disk, and how a model is loaded from one.

RUN/config.json         resolved settings, version, commit, the cache it was trained on
RUN/reference.npy       brain intensities to which scans are histogram-matched, [Q]
RUN/checkpoints/        weights and optimizer, TensorFlow checkpoints `ckpt-STEP`
RUN/losses.csv, RUN/test_losses.csv, RUN/tensorboard/, RUN/pictures/
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import tensorflow as tf

from tf_lesion.caches.slices import SliceCache
from tf_lesion.config import Config
from tf_lesion.files import InputError, remove_abandoned, write_json, written_whole
from tf_lesion.provenance import stamp

# What TensorFlow raises on reading a checkpoint or SavedModel, by where the damage is.
DAMAGED = (tf.errors.OpError, RuntimeError, ValueError, LookupError, AssertionError, TypeError)
UNFINISHED = ("*_temp", "*.tempstate*", "checkpoint.tmp*")  # as TensorFlow names checkpoints


class Run:
    """The folder of a training run, and the files of it that others read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_path = folder / "config.json"
        self.checkpoints = folder / "checkpoints"
        self.reference_path = folder / "reference.npy"

    def write(self, config: Config, cache: SliceCache) -> None:
        """Save the settings and what later steps must know of the training cache."""
        affine = cache.grid_affine
        data = {
            "cache": str(cache.path),
            "cache_identity": cache.identity,
            "slice_shape": list(cache.slice_shape),
            "crop": list(cache.crop),
            "grid_affine": None if affine is None else affine.tolist(),
            "preprocessing": cache.settings,
        }
        self.write_content({**config.to_dict(), **stamp(), "data": data}, cache.reference)

    def write_content(self, content: dict[str, Any], reference: np.ndarray | None) -> None:
        """Save the content of config.json, and the reference [Q] if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.config_path, content)
        if reference is not None:
            with written_whole(self.reference_path) as temporary:
                np.save(temporary, reference)

    def read(self) -> tuple[Config, dict[str, Any]]:
        """(`Config`, what the run knows of its data) as written.

        Raises:
            InputError: if the folder is not that of a run.
        """
        if not self.config_path.exists():
            raise InputError(
                f"Expected a run of tf-lesion train (with config.json), a folder with a TF1 "
                f"checkpoint (model.ckpt-STEP.index) or a SavedModel of tf-lesion export, got "
                f"{self.folder}."
            )
        try:
            values = json.loads(self.config_path.read_text(encoding="utf-8"))
            return Config.from_dict(values), values.get("data", {})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.config_path} is not a run's configuration: {error}."
            ) from error

    def remove_unfinished(self) -> None:
        """Remove what killed processes left half-written; only where no other is at work."""
        if self.folder.exists():
            remove_abandoned(self.folder)
        for pattern in UNFINISHED:
            for path in self.checkpoints.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._remove_unfinished_index()

    def _remove_unfinished_index(self):
        """That of a checkpoint that nothing names, since the process was killed as it wrote it."""
        try:
            state = tf.train.get_checkpoint_state(str(self.checkpoints))
        except DAMAGED:  # nobody knows what it named
            return
        named = {Path(path).name for path in state.all_model_checkpoint_paths} if state else set()
        for index in self.checkpoints.glob("*.index"):
            if index.stem not in named and not _readable(str(index.with_suffix(""))):
                index.unlink()

    def latest_checkpoint(self) -> str | None:
        """Prefix of the newest checkpoint, or None."""
        return newest_checkpoint(self.checkpoints)

    def step(self) -> int:
        """Training step of the newest checkpoint, -1 without one."""
        return _step(self.latest_checkpoint() or "")


def newest_checkpoint(folder: Path) -> str | None:
    """Prefix of the newest checkpoint in a folder, or None.

    The newest is that which the file `checkpoint` names, wherever the folder was when it was
    written; without it, that of the highest step. The time of a file says nothing: copies lose it.
    """
    prefixes = {path.with_suffix("").name for path in folder.glob("*.index")}
    if not prefixes:
        return None
    with intact_checkpoint(folder / "checkpoint"):
        state = tf.train.get_checkpoint_state(str(folder))
    named = PureWindowsPath(state.model_checkpoint_path).name if state else None
    return str(folder / (named if named in prefixes else max(prefixes, key=_step)))


def _readable(prefix):
    try:
        tf.train.load_checkpoint(prefix)
    except DAMAGED:
        return False
    return True


def _step(name):
    """Step of a checkpoint called NAME-STEP; -1 if its name says none."""
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


@contextlib.contextmanager
def intact_checkpoint(prefix: str | Path, what: str = "a checkpoint") -> Iterator[None]:
    """Whatever TensorFlow raises on reading a damaged file of its own becomes an `InputError`."""
    try:
        yield
    except DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{prefix} cannot be read as {what}: {reason}; is it damaged, or of another model or "
            f"num_clusters?"
        ) from error


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What TensorFlow raises when it cannot write becomes an `OSError`, as of other writers."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(f"cannot write {path}: {error.message.splitlines()[0]}") from error


def named_variables(variables: Iterable) -> dict[str, tf.Variable]:
    """{path: tf.Variable} of Keras variables, for checkpoints.

    A checkpoint of a Keras 3 model leaves out, silently, the layers that it keeps in lists.
    """
    return {variable.path: variable.value for variable in variables}


def restore_weights(model: Any, run: Run) -> None:
    """Read the weights of the run's newest checkpoint into the model.

    Raises:
        InputError: if there is none, or it is that of another model.
    """
    prefix = run.latest_checkpoint()
    if prefix is None:
        raise InputError(f"{run.folder} has no checkpoint yet; train it with tf-lesion train.")
    with intact_checkpoint(prefix, f"the checkpoint of {run.config_path}"):
        status = tf.train.Checkpoint(model=named_variables(model.weights)).restore(prefix)
        status.expect_partial().assert_existing_objects_matched()


def save_weights(model: Any, run: Run, *, step: int) -> None:
    """Write a checkpoint of the weights alone."""
    weights = tf.train.Checkpoint(model=named_variables(model.weights))
    manager = tf.train.CheckpointManager(weights, str(run.checkpoints), 1)
    with writing(run.checkpoints):
        manager.save(checkpoint_number=step)
