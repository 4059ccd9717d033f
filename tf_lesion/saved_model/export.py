"""Export a prior as a SavedModel that runs where only TensorFlow is installed.

Its signatures are listed in `signatures`, what travels with it in `exported`; `verify` compares it
with the model in memory.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_lesion.caches.slices import BRAIN_FLOOR, HIGHEST_PERCENTILE, LOWEST_PERCENTILE
from tf_lesion.calibration import Threshold
from tf_lesion.config import RestorationConfig
from tf_lesion.files import InputError, refuse_existing, write_json, written_whole
from tf_lesion.prior import anonymous_calibration
from tf_lesion.provenance import anonymous, stamp
from tf_lesion.saved_model import exported
from tf_lesion.saved_model.signatures import DETECTION_SEED, lesion_output, signatures
from tf_lesion.training.runs import writing


def export(
    prior: Any,
    out: str | Path,
    *,
    restoration: RestorationConfig,
    thresholds: Sequence[Threshold] = (),
    force: bool = False,
) -> None:
    """Write a prior as a SavedModel, whole or not at all, without names of folders and subjects.

    Args:
        prior: `Prior` of a run or a TF1 checkpoint.
        out: the folder to make.
        restoration: the defaults of the exported model; averages are not in the graph.
        thresholds: of the residual, for the lesion maps of `detect`; with them the prior's
            calibration, which they are from, travels along.
        force: replace the SavedModel at `out`.

    Raises:
        FileExistsError, InputError: if `out` exists and `force` is false, or it is something else
            than a SavedModel, or the prior is one already.
    """
    refuse_existing(out, force=force, marker=exported.GRAPH)
    if isinstance(prior.model, exported.ExportedModel):
        raise InputError(f"Expected a run to export, {prior.path} is a SavedModel already.")
    made = signatures_of(prior, restoration, thresholds)
    module = tf.Module(name="tf_lesion")
    module.tensors = [weight.value for weight in prior.model.weights]
    for name, signature in made.items():
        setattr(module, name, signature)
    with (
        tempfile.TemporaryDirectory() as scratch,
        written_whole(out, force=force, marker=exported.GRAPH) as folder,
    ):
        files = Path(scratch)
        write_json(files / exported.SETTINGS, describe(prior, restoration, made, thresholds))
        if prior.reference is not None:
            np.save(files / exported.REFERENCE, np.asarray(prior.reference, np.float32))
        if thresholds:
            anonymous_calibration(prior.calibration).save(files / exported.CALIBRATION)
        module.files = {path.name: tf.saved_model.Asset(str(path)) for path in files.iterdir()}
        with writing(out):
            tf.saved_model.save(module, str(folder), signatures=made)


def signatures_of(
    prior: Any, restoration: RestorationConfig, thresholds: Sequence[Threshold]
) -> dict[str, Any]:
    """`signatures.signatures` of a prior."""
    limits = {point.key: point.threshold for point in thresholds}
    return signatures(prior.model, restoration, reference=prior.reference, thresholds=limits)


def describe(
    prior: Any, restoration: RestorationConfig, made: dict, thresholds: Sequence[Threshold]
) -> dict[str, Any]:
    """The content of model.json."""
    config = prior.config.replace(restoration=restoration)
    return {
        **stamp(),
        "model_identity": prior.identity,
        "model_path": Path(prior.path).name,
        "restoration_settings": sorted(prior.uses),
        "preset": config.preset,
        "tv_weight": restoration.tv_weight,
        "detect": {
            "steps": restoration.steps,
            "tv_weight": restoration.tv_weight,
            "seed": DETECTION_SEED,
            "normalized_between_percentiles": [LOWEST_PERCENTILE, HIGHEST_PERCENTILE],
            "least_intensity_in_brain": BRAIN_FLOOR,
            "matched_to_reference": prior.reference is not None,
            "thresholds": {
                lesion_output(point.key): dataclasses.asdict(point) for point in thresholds
            },
        },
        "signatures": {name: _described(signature) for name, signature in made.items()},
        "config": config.to_dict(),
        "data": anonymous(prior.data),
    }


def _described(signature):
    outputs = signature.get_concrete_function().structured_outputs
    return {
        "inputs": {spec.name: _shape_and_type(spec) for spec in signature.input_signature},
        "outputs": {name: _shape_and_type(spec) for name, spec in sorted(outputs.items())},
    }


def _shape_and_type(spec):
    return {"dtype": spec.dtype.name, "shape": spec.shape.as_list()}
