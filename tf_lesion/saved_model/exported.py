"""A SavedModel of `tf_lesion.export`: what its assets tell, and how it restores.

    assets/model.json       settings, lambda, steps, thresholds, preprocessing, versions, identity
    assets/reference.npy    brain intensities to which scans are histogram-matched, [Q]
    assets/thresholds.json  the file of eval.thresholds, as it was given to the export
    assets/lambda.json      the choice of eval.select_lambda, as it was in the run

All but the first are there if the run had them. Plain JSON and NumPy: no model is needed to read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from tf_lesion.choices import FILE_NAME as LAMBDA
from tf_lesion.config import Config
from tf_lesion.files import InputError
from tf_lesion.training.runs import LoadedModel

GRAPH = "saved_model.pb"
FOLDER = "assets"
SETTINGS, REFERENCE, THRESHOLDS = "model.json", "reference.npy", "thresholds.json"


def is_exported(path):
    """Whether `path` is a SavedModel, of whoever."""
    return (Path(path) / GRAPH).exists()


def read_assets(path):
    """What travels with a SavedModel.

    Args:
        path: the SavedModel's folder.

    Returns:
        A dict: `model` with the content of model.json, and `reference` ([Q] float32), `thresholds`
        and `lambda` (dicts), each None if it has none.

    Raises:
        FileNotFoundError, InputError: if `path` is no SavedModel of `tf_lesion.export`.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"No SavedModel at {path}; make one with tf_lesion.export.")
    folder = Path(path) / FOLDER
    try:
        reference = folder / REFERENCE
        return {
            "model": json.loads((folder / SETTINGS).read_text()),
            "reference": np.load(reference) if reference.exists() else None,
            "thresholds": _optional(folder / THRESHOLDS),
            "lambda": _optional(folder / LAMBDA),
        }
    except (OSError, ValueError) as error:
        raise InputError(
            f"Expected a SavedModel of tf_lesion.export in {path}, with {FOLDER}/{SETTINGS}: "
            f"{error}."
        ) from error


def _optional(path):
    return json.loads(path.read_text()) if path.exists() else None


class ExportedModel:
    """The model of a SavedModel, as far as `Restorer` needs one.

    Args:
        path: the SavedModel's folder.
        config: its `Config`.
        has_lambda, has_steps: as the method's.

    Raises:
        InputError: if TensorFlow cannot load it.
    """

    def __init__(self, path, config, *, has_lambda, has_steps):
        self.path, self.network = path, config.network
        self.has_lambda, self.has_steps = has_lambda, has_steps
        self._restoration = config.restoration
        try:
            self._saved = tf.saved_model.load(str(path))  # signatures do not keep it alive
        except (OSError, ValueError, tf.errors.OpError) as error:
            raise InputError(f"{path} cannot be loaded as a SavedModel: {error}.") from error

    def compiled_restoration(self, restoration):
        """The loop in the graph, called as that of `restoration.compiled_restoration`.

        Raises:
            InputError: if solver, step sizes or clipping are not those of the graph.
        """
        for name in ("solver", "steps_per_gradient", "step_sizes", "gradient_clip"):
            ours, asked = getattr(self._restoration, name), getattr(restoration, name)
            if ours != asked:
                raise InputError(f"{self.path} was exported with {name} {ours}, not {asked}.")
        ascend = self._saved.signatures["ascend"]

        def stretch(**tensors):
            done = ascend(**tensors)
            return done["image"], done["objective"]

        return stretch


@dataclass(frozen=True)
class LoadedExport(LoadedModel):
    """A `LoadedModel` whose weights stay in the graph; results are told by the run's identity."""

    exported_identity: str

    @property
    def identity(self):
        """That of the run, so that what was chosen for the run holds for the export."""
        return self.exported_identity

    @property
    def extras(self):
        """The folder of the assets."""
        return Path(self.path) / FOLDER


def load(path, *, precision):
    """Load a SavedModel for restoring; see `runs.load`."""
    assets = read_assets(path)
    try:
        settings = assets["model"]
        config = Config.from_dict(settings["config"])
        data, identity = settings["data"], settings["model_identity"]
        kind = {name: settings[name] for name in ("has_lambda", "has_steps")}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}/{FOLDER}/{SETTINGS} is not that of an exported model ({error!r})."
        ) from error
    if precision != config.network.precision:
        raise InputError(
            f"{path} computes in {config.network.precision}, not in {precision}; give --precision "
            f"{config.network.precision}, or export the run with --precision {precision}."
        )
    model = ExportedModel(path, config, **kind)
    return LoadedExport(model, config, data, assets["reference"], str(path), identity)
