"""Every quantity of the released graph, computed by this port from the same inputs and noise."""

import re
from collections.abc import Mapping

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from tf_lesion import objective, tf1
from tf_lesion.config import Config
from tf_lesion.files import InputError
from tf_lesion.objective import elbo
from tf_lesion.presets import preset
from tf_lesion.restoration import elbo_gradient, map_gradient, restoration_step

# Values and gradients relative to the tensor's largest magnitude, images as they are.
TOLERANCES = {"value": 1e-5, "gradient": 1e-4, "image": 1e-4}
GRADIENTS = ("grad/", "restore_gradient")
# The released code clips where the likelihood is made, ours may be looked at before or after that.
CLIPPED = {"y_logvarinv": objective.LOG_PRECISION_RANGE}

INPUTS = {
    *("x", "observed", "mask", "eps_w", "eps_z", "tv_weight", "num_clusters", "c_lambda"),
    *("step_size", "clip", "learning_rate"),
}
OUTPUTS = {  # key of the released code -> name in the model's outputs
    "w_sampled": "omega",
    "w_mean": "omega_mean",
    "w_logvar": "omega_logvar",
    "z_sampled": "z",
    "z_mean": "z_mean",
    "z_logvar": "z_logvar",
    "z_wc_mean": "prior_mean",
    "z_wc_logvarinv": "prior_log_precision",
    "y_mean": "y_mean",
    "y_logvarinv": "y_log_precision",
    "pc": "cluster_probs",
}
LOSSES = {"loss_con": "kl_z", "loss_z": "kl_z", "loss_w": "kl_omega", "loss_c": "kl_c"}
TRAINING_LOSSES = {  # columns of `losses`
    "gmvae": ("total", "recon", "con", "w", "c"),
    "vae": ("total", "recon", "z"),
}


def quantities(model: keras.Model, config: Config, reference: Mapping) -> dict:
    """Everything the reference file holds, computed here: {key: array}, and maybe more.

    Args:
        model, config: as `tf1.load` gives them.
        reference: {key of the released code: array}, inputs and noise among them.

    Raises:
        InputError: if there is less noise than steps.
    """
    found = {}
    if "learning_rate" in reference:
        found |= _training(model, config, reference)
    elif "x" in reference:
        found |= _forward(model, reference)
    if any(key.startswith("restored_") for key in reference):
        found |= _restored(model, reference)
    return found


def compare(found: Mapping, reference: Mapping) -> pd.DataFrame:
    """Rows (quantity, difference, tolerance, passed), one for each quantity of the reference."""
    rows = []
    for key in sorted(set(reference) - INPUTS):
        in_steps, of_gradient = key.startswith("restored_"), key.startswith(GRADIENTS)
        allowed = TOLERANCES["image" if in_steps else "gradient" if of_gradient else "value"]
        expected, difference = np.asarray(reference[key], np.float64), np.inf
        if key in found and np.shape(found[key]) == expected.shape:
            ours = np.asarray(found[key], np.float64)
            if key in CLIPPED:
                ours, expected = (np.clip(values, *CLIPPED[key]) for values in (ours, expected))
            difference = np.max(np.abs(ours - expected))
            if not in_steps:
                difference /= max(np.max(np.abs(expected)), np.finfo(np.float32).tiny)
        rows.append((key, float(difference), allowed, bool(difference <= allowed)))
    return pd.DataFrame(rows, columns=["quantity", "difference", "tolerance", "passed"])


def _noise(reference, step=None):
    """The noise of a forward pass, or of one step."""
    keys = {"omega": "eps_w", "z": "eps_z"}
    return {
        latent: tf.constant(reference[key] if step is None else reference[key][step])
        for latent, key in keys.items()
        if key in reference
    }


def _losses(terms):
    """Batch means under the released names, from the terms of the ELBO."""
    means = {name: float(tf.reduce_mean(values)) for name, values in terms.items()}
    named = {key: means[name] for key, name in LOSSES.items() if name in means}
    total = float(tf.reduce_mean(-elbo(terms)))
    return {**named, "loss_recon": -means["log_likelihood"], "loss_total": total}


def _forward(model, reference):
    """Every output of one forward pass, by the released key."""
    image, noise = tf.constant(reference["x"]), _noise(reference)
    outputs = model(image, noise)
    found = {key: outputs[name] for key, name in OUTPUTS.items() if name in outputs}
    found |= _losses(model.elbo_terms(image, noise))
    found["l2"] = -objective.fixed_sigma_log_likelihood(image, y_mean=outputs["y_mean"])
    if "observed" in reference:
        gradient = _gradient(model, image, noise, reference)
        found["tv"] = objective.total_variation(tf.constant(reference["observed"]) - image)
        found["restore_gradient"] = gradient
        found["restore_gradient_clipped_masked"] = _stepped(
            tf.zeros_like(gradient), gradient, model, reference, step_size=1.0
        )
    if "prior_mean" in outputs:
        logits = objective.released_logits(
            outputs["z"][..., None], outputs["prior_mean"], outputs["prior_log_precision"]
        )
        found["pc_logit"] = tf.reduce_sum(logits, axis=-2)
    return found


def _gradient(model, image, noise, reference):
    """Gradient of the MAP objective."""
    _, gradient = elbo_gradient(model, image, noise)
    observed = tf.constant(reference["observed"])
    return map_gradient(image, gradient, observed=observed, tv_weight=reference["tv_weight"])


def _stepped(image, gradient, model, reference, *, step_size):
    """The image after a step; clipped as the file says, or else as the released code does."""
    released = preset("released", model.network.model).restoration.solver.gradient_clip
    return restoration_step(
        image,
        gradient,
        mask=reference["mask"].astype(np.float32),
        step_size=step_size,
        gradient_clip=float(reference.get("clip", released)),
    )


def _restored(model, reference):
    """Images after the steps that the file holds, from its own noise."""
    wanted = {int(key.split("_")[1]) for key in reference if re.fullmatch(r"restored_\d+", key)}
    if max(wanted) > len(reference["eps_z"]):
        raise InputError(
            f"Expected noise for {max(wanted)} steps (eps_z [steps, B, h, w, 1]), got "
            f"{len(reference['eps_z'])}."
        )
    image, found = tf.constant(reference["observed"]), {}
    for step in range(max(wanted)):
        gradient = _gradient(model, image, _noise(reference, step), reference)
        image = _stepped(image, gradient, model, reference, step_size=reference["step_size"])
        if step + 1 in wanted:
            found[f"restored_{step + 1}"] = image
    return found


def _training(model, config, reference):
    """Losses before each Adam step, gradient norms of the first, weight norms after the last."""
    image, training = tf.constant(reference["x"]), config.training
    optimizer = keras.optimizers.Adam(
        float(reference["learning_rate"]), training.beta_1, training.beta_2, training.epsilon
    )
    variables, found, rows = tf1.variable_names(model), {}, []
    for step in range(len(reference["losses"])):
        with tf.GradientTape() as tape:
            terms = model.elbo_terms(image, _noise(reference, step))
            loss = -tf.reduce_mean(elbo(terms))
        gradients = tape.gradient(loss, list(variables.values()))
        if step == 0:
            norms = zip(variables, map(tf.norm, gradients), strict=True)
            found |= {f"grad/{name}": norm for name, norm in norms}
        optimizer.apply_gradients(zip(gradients, variables.values(), strict=True))
        named = _losses(terms)
        rows.append([named[f"loss_{key}"] for key in TRAINING_LOSSES[config.network.model]])
    found["losses"] = np.array(rows)
    return found | {f"weight/{name}": tf.norm(value) for name, value in variables.items()}
