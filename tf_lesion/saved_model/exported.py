"""A SavedModel of `tf-lesion export`: what its assets tell, and how it restores.

    assets/model.json       settings, lambda, steps, thresholds, preprocessing, versions, identity
    assets/reference.npy    brain intensities to which scans are histogram-matched, [Q]
    assets/calibration.h5   what was chosen for it, see tf_lesion.calibration

All but the first are there if the run had them. Plain JSON and NumPy: no model is needed to read.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from tf_lesion.config import Config, Solver
from tf_lesion.files import InputError, read_array
from tf_lesion.restoration import stops
from tf_lesion.training.runs import intact_checkpoint

GRAPH = "saved_model.pb"
FOLDER = "assets"
SETTINGS, REFERENCE, CALIBRATION = "model.json", "reference.npy", "calibration.h5"


def is_exported(path: str | Path) -> bool:
    """Whether `path` is a SavedModel, of whoever."""
    return (Path(path) / GRAPH).exists()


def read_assets(path: str | Path) -> dict:
    """What travels with a SavedModel.

    Args:
        path: the SavedModel's folder.

    Returns:
        A dict: `model` with the content of model.json, `reference` ([Q] float32) and `calibration`
        (its path), each None if it has none.

    Raises:
        FileNotFoundError, InputError: if `path` is no SavedModel of `tf-lesion export`.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"No SavedModel at {path}; make one with tf-lesion export.")
    folder = Path(path) / FOLDER
    try:
        reference = folder / REFERENCE
        return {
            "model": json.loads((folder / SETTINGS).read_text(encoding="utf-8")),
            "reference": read_array(reference, what="a reference") if reference.exists() else None,
            "calibration": folder / CALIBRATION if (folder / CALIBRATION).exists() else None,
        }
    except (OSError, ValueError) as error:
        raise InputError(
            f"Expected a SavedModel of tf-lesion export in {path}, with {FOLDER}/{SETTINGS}: "
            f"{error}."
        ) from error


class ExportedModel:
    """The model of a SavedModel, as far as `Restorer` needs one.

    Args:
        path: the SavedModel's folder.
        config: its `Config`.
        restoration_settings: as the method's.
        identity: of the run, so that what was chosen for the run holds for the export.

    Raises:
        InputError: if TensorFlow cannot load it.
    """

    def __init__(
        self, path: Path, config: Config, *, restoration_settings: frozenset, identity: str
    ):
        self.path, self.network = path, config.network
        self.restoration_settings, self.exported_identity = restoration_settings, identity
        self._solver = config.restoration.solver
        with intact_checkpoint(path, "a SavedModel"):
            self._saved = tf.saved_model.load(str(path))  # signatures do not keep it alive

    def stops(self, steps: int, every: int | None = None) -> list[int]:
        """As those of the method."""
        return stops(steps, every) if "solver" in self.restoration_settings else [steps]

    def compiled_restoration(self, solver: Solver) -> Callable:
        """The loop in the graph, called as that of `restoration.compiled`.

        Raises:
            InputError: if the solver is not that of the graph.
        """
        if dataclasses.replace(solver, steps=self._solver.steps) != self._solver:
            raise InputError(f"{self.path} was exported with {self._solver}, not {solver}.")
        ascend = self._saved.signatures["ascend"]

        def stretch(**tensors):
            done = ascend(**tensors)
            return done["image"], done["objective"]

        return stretch


def load(path: Path, *, precision: str) -> tuple:
    """(model, `Config`, data, reference) of a SavedModel; see `prior.load`."""
    assets = read_assets(path)
    try:
        settings = assets["model"]
        config = Config.from_dict(settings["config"])
        data, identity = settings["data"], settings["model_identity"]
        uses = frozenset(settings["restoration_settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}/{FOLDER}/{SETTINGS} is not that of an exported model of this version "
            f"({error!r}); export the run again."
        ) from error
    if precision != config.network.precision:
        raise InputError(
            f"{path} computes in {config.network.precision}, not in {precision}; load it with that "
            f"precision, or export the run with precision {precision}."
        )
    model = ExportedModel(path, config, restoration_settings=uses, identity=identity)
    return model, config, data, assets["reference"]
