"""A SavedModel, loaded in a fresh interpreter, against the model in memory."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tf_lesion.calibration import Threshold
from tf_lesion.config import RestorationConfig
from tf_lesion.files import InputError
from tf_lesion.restoration import Restorer, detect, restore
from tf_lesion.saved_model.export import signatures_of
from tf_lesion.saved_model.intensity import prepared
from tf_lesion.saved_model.signatures import DETECTION_SEED, lesion_output

STEPS = 20  # of `restore`
SLICES = 3
SEED = 7
VERIFIER = """
import sys
import numpy as np
import tensorflow as tf

tf.config.experimental.enable_tensor_float_32_execution(False)
folder, given, found = sys.argv[1:]
saved = tf.saved_model.load(folder)
inputs, outputs = np.load(given), {}
for name, signature in saved.signatures.items():
    tensors = {key.split("/")[1]: inputs[key] for key in inputs if key.startswith(name + "/")}
    for output, values in signature(**tensors).items():
        outputs[f"{name}/{output}"] = values.numpy()
alone = {"tf_lesion", "tensorflow_probability"}.isdisjoint(sys.modules)
np.savez(found, alone=alone, **outputs)
"""


def verify(
    prior: Any,
    out: str | Path,
    *,
    restoration: RestorationConfig,
    thresholds: Sequence[Threshold] = (),
) -> dict[str, float]:
    """Compare every output of a SavedModel, loaded in a fresh interpreter, with the model's.

    `restore` (20 steps) and `detect` are compared with `Restorer`, the rest with the functions
    that were exported. Arguments as of `export.export`.

    Returns:
        {"signature/output": largest absolute difference; NaN where one of the two is missing}.

    Raises:
        InputError: if the fresh interpreter cannot run it.
    """
    inputs = _example_inputs(prior, restoration)
    expected = _expected_outputs(prior, inputs, restoration, thresholds)
    outputs = _fresh_outputs(Path(out), inputs)
    if not outputs.pop("alone"):
        raise InputError(f"{out} loaded tf_lesion or tensorflow_probability; it should not.")
    return {
        name: _difference(expected.get(name), outputs.get(name))
        for name in sorted({*expected, *outputs})
    }


def _fresh_outputs(out, inputs):
    """{"signature/output": array} of the SavedModel, on the device that this process uses."""
    hidden = {} if tf.config.get_visible_devices("GPU") else {"CUDA_VISIBLE_DEVICES": "-1"}
    with tempfile.TemporaryDirectory() as scratch:
        given, found = (str(Path(scratch) / name) for name in ("given.npz", "found.npz"))
        flat = {f"{name}/{key}": v for name, group in inputs.items() for key, v in group.items()}
        np.savez(given, **flat)
        done = subprocess.run(
            [sys.executable, "-I", "-c", VERIFIER, str(out.resolve()), given, found],
            capture_output=True,
            text=True,
            env={**os.environ, "TF_FORCE_GPU_ALLOW_GROWTH": "true", **hidden},
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"{out} does not run in a fresh interpreter: {last}")
        with np.load(found) as stored:
            return dict(stored)


def _difference(ours, theirs):
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return float("nan")
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())


def _example_inputs(prior, restoration):
    """{signature: {input: array}}: noisy ellipses of different brightness."""
    network = prior.config.network
    shape = (network.height, network.width)
    radius = np.hypot(*np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    rng = np.random.default_rng(SEED)
    noise = rng.uniform(0.3, 0.7, (SLICES, *shape)) + rng.uniform(0, 0.3, (SLICES, 1, 1))
    brain = (radius < rng.uniform(0.7, 0.95, (SLICES, 1, 1)))[..., None].astype(np.float32)
    observed = (noise[..., None] * brain).astype(np.float32)
    slices, seed = np.arange(SLICES, dtype=np.int64) * 11, np.int64(SEED)
    weight = np.float32(restoration.tv_weight)
    # A mask is brain wherever it is above 0.
    common = {"observed": observed, "mask": brain / 2, "slices": slices, "tv_weight": weight}
    ascent = {"image": observed, "start": np.int32(0), "stop": np.int32(STEPS), "seed": seed}
    return {
        "restore": {**common, "steps": np.int32(STEPS), "seed": seed},
        "ascend": {**common, **ascent},
        "detect": {"raw": observed * np.float32(1000), "mask": brain / 2},
        "reconstruct": {"image": observed},
        "elbo": {"image": observed, "slices": slices, "seed": seed},
    }


def _expected_outputs(prior, inputs, restoration, thresholds):
    """{"signature/output": array} of the model in memory."""
    made = signatures_of(prior, restoration, thresholds)
    outputs = {
        f"{name}/{key}": values.numpy()
        for name in set(made) - {"restore", "detect"}
        for key, values in made[name](**inputs[name]).items()
    }
    given = inputs["restore"]
    mask = given["mask"] > 0

    def restored(name, observed, slices, settings, seed):
        images, *_ = restore(Restorer(prior.model, settings, seed=seed), observed, mask, slices)
        outputs[f"{name}/restored"] = images
        outputs[f"{name}/residual"] = np.abs(observed - images) * mask
        return images

    few = restoration.changed(steps=STEPS)
    restored("restore", given["observed"], given["slices"], few, SEED)
    observed = prepared(inputs["detect"]["raw"], mask, prior.reference).numpy()
    outputs["detect/observed"] = observed
    images = restored("detect", observed, range(len(mask)), restoration, DETECTION_SEED)
    for point in thresholds:
        found = detect(observed, images, mask, point.threshold)
        outputs[f"detect/{lesion_output(point.key)}"] = found
    return outputs
