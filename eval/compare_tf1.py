"""Compare this port with a run of the released TensorFlow 1 code, number by number.

    python -m eval.compare_tf1 --tf1-checkpoint model/ --reference forward.npz

The reference file holds inputs, the noise that was drawn, and what the released graph made of them;
see README.md for its keys. One row is printed for every quantity in it; the exit status is 1 if any
is off by more than its tolerance. oneDNN is switched off, because restored images part by rounding
otherwise: the sign of a total variation flips.

    python -m eval.compare_tf1 --restored ours.h5 --tf1-restored theirs.hdf5 [--cache patients.h5]

compares restored slices instead; --restored --help lists its options.
"""

import argparse
import os
import re
import sys

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # before TensorFlow is imported

import keras
import numpy as np
import tensorflow as tf

from tf_lesion import objective, tf1
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.files import InputError
from tf_lesion.models import elbo
from tf_lesion.restoration import elbo_gradient, map_gradient, restoration_step

VALUE_TOLERANCE = 1e-5  # of the tensor's largest magnitude
GRADIENT_TOLERANCE = 1e-4
IMAGE_TOLERANCE = 1e-4

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


def noise_at(reference, step=None):
    """The noise of a forward pass, or of one step."""
    keys = {"omega": "eps_w", "z": "eps_z"}
    return {
        latent: tf.constant(reference[key] if step is None else reference[key][step])
        for latent, key in keys.items()
        if key in reference
    }


def losses(terms):
    """Batch means under the released names, from the terms of the ELBO."""
    means = {name: float(tf.reduce_mean(values)) for name, values in terms.items()}
    named = {key: means[name] for key, name in LOSSES.items() if name in means}
    total = float(tf.reduce_mean(-elbo(terms)))
    return {**named, "loss_recon": -means["log_likelihood"], "loss_total": total}


def forward_quantities(model, reference):
    """Every output of one forward pass, by the released key."""
    image, noise = tf.constant(reference["x"]), noise_at(reference)
    outputs = model(image, noise)
    found = {key: outputs[name] for key, name in OUTPUTS.items() if name in outputs}
    found |= losses(model.elbo_terms(image, noise))
    found["l2"] = -objective.fixed_sigma_log_likelihood(image, y_mean=outputs["y_mean"])
    if "observed" in reference:
        found |= _restoration_quantities(model, image, noise, reference)
    if "prior_mean" in outputs:
        logits = objective.released_logits(
            outputs["z"][..., None], outputs["prior_mean"], outputs["prior_log_precision"]
        )
        found["pc_logit"] = tf.reduce_sum(logits, axis=-2)
    return found


def _restoration_quantities(model, image, noise, reference):
    observed = tf.constant(reference["observed"])
    _, gradient = elbo_gradient(model, image, noise)
    gradient = map_gradient(image, gradient, observed=observed, tv_weight=reference["tv_weight"])
    ascent = restoration_step(
        tf.zeros_like(gradient),
        gradient,
        mask=reference["mask"].astype(np.float32),
        step_size=1.0,
        gradient_clip=_clip(model, reference),
    )
    return {
        "tv": objective.total_variation(observed - image),
        "restore_gradient": gradient,
        "restore_gradient_clipped_masked": ascent,
    }


def _clip(model, reference):
    """Gradient clip of the file, or the released one of the model."""
    from tf_lesion.config import preset

    released = preset("released", model.network.model).restoration.gradient_clip
    return float(reference.get("clip", released))


def restored_quantities(model, reference):
    """Images after the steps that the file holds, from its own noise."""
    wanted = {int(key.split("_")[1]) for key in reference if re.fullmatch(r"restored_\d+", key)}
    if max(wanted) > len(reference["eps_z"]):
        raise InputError(
            f"Expected noise for {max(wanted)} steps (eps_z [steps, B, h, w, 1]), got "
            f"{len(reference['eps_z'])}."
        )
    observed = tf.constant(reference["observed"])
    mask = reference["mask"].astype(np.float32)
    image, found = observed, {}
    for step in range(max(wanted)):
        _, gradient = elbo_gradient(model, image, noise_at(reference, step))
        gradient = map_gradient(
            image, gradient, observed=observed, tv_weight=reference["tv_weight"]
        )
        image = restoration_step(
            image,
            gradient,
            mask=mask,
            step_size=reference["step_size"],
            gradient_clip=_clip(model, reference),
        )
        if step + 1 in wanted:
            found[f"restored_{step + 1}"] = image
    return found


def training_quantities(model, config, reference):
    """Losses before each Adam step, gradient norms of the first, weight norms after the last."""
    image, training = tf.constant(reference["x"]), config.training
    optimizer = keras.optimizers.Adam(
        float(reference["learning_rate"]), training.beta_1, training.beta_2, training.epsilon
    )
    variables, found, rows = tf1.variable_names(model), {}, []
    for step in range(len(reference["losses"])):
        with tf.GradientTape() as tape:
            terms = model.elbo_terms(image, noise_at(reference, step))
            loss = -tf.reduce_mean(elbo(terms))
        gradients = tape.gradient(loss, list(variables.values()))
        if step == 0:
            norms = zip(variables, map(tf.norm, gradients), strict=True)
            found |= {f"grad/{name}": norm for name, norm in norms}
        optimizer.apply_gradients(zip(gradients, variables.values(), strict=True))
        named = losses(terms)
        rows.append([named[f"loss_{key}"] for key in TRAINING_LOSSES[config.network.model]])
    found["losses"] = np.array(rows)
    return found | {f"weight/{name}": tf.norm(value) for name, value in variables.items()}


def quantities(model, config, reference):
    """Everything the reference file holds, computed here; {key: array}."""
    found = {}
    if "x" in reference and "learning_rate" not in reference:
        found |= forward_quantities(model, reference)
    if any(key.startswith("restored_") for key in reference):
        found |= restored_quantities(model, reference)
    if "learning_rate" in reference:
        found |= training_quantities(model, config, reference)
    return found


def tolerance(key):
    """(tolerance, whether it is relative to the largest magnitude) for a key."""
    if key.startswith("restored_"):
        return IMAGE_TOLERANCE, False
    if key.startswith(("grad/", "restore_gradient")):
        return GRADIENT_TOLERANCE, True
    return VALUE_TOLERANCE, True


def compare(found, reference):
    """Rows (key, difference, tolerance, passed), one for each quantity of the reference."""
    rows = []
    for key in sorted(set(reference) - INPUTS):
        allowed, relative = tolerance(key)
        expected = np.asarray(reference[key], dtype=np.float64)
        difference = np.inf
        if key in found and np.shape(found[key]) == expected.shape:
            difference = np.max(np.abs(np.asarray(found[key], np.float64) - expected))
            if relative:
                difference /= max(np.max(np.abs(expected)), np.finfo(np.float32).tiny)
        rows.append((key, float(difference), allowed, bool(difference <= allowed)))
    return rows


def read_reference(path):
    """The arrays of an `.npz` by name."""
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (ValueError, OSError) as error:
        raise InputError(f"Expected a .npz file of arrays, got {path} ({error}).") from error


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare_tf1", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--tf1-checkpoint", required=True, help="folder of model.ckpt-STEP.*")
    parser.add_argument("--reference", required=True, help=".npz of the released graph's numbers")
    return parser.parse_args(argv)


@command
def main(argv=None):
    """Run the command line; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    if any(argument.startswith(("--restored", "--tf1-restored")) for argument in given):
        from eval import compare_restored

        return compare_restored.main(argv)
    options = parse(argv)
    reference = read_reference(options.reference)
    model, config = tf1.load(options.tf1_checkpoint)
    model.decoder.fast = False  # the released operations, so that the rounding is theirs too
    if (
        "num_clusters" in reference
        and int(reference["num_clusters"]) != config.network.num_clusters
    ):
        raise InputError(
            f"{options.reference} was made with {int(reference['num_clusters'])} clusters, "
            f"{options.tf1_checkpoint} has {config.network.num_clusters}."
        )
    rows = compare(quantities(model, config, reference), reference)
    if not rows:
        raise InputError(f"{options.reference} holds no quantity to compare.")
    width = max(len(key) for key, *_ in rows)
    print(f"{'quantity':{width}}  difference  tolerance  pass")
    for key, difference, allowed, passed in rows:
        print(f"{key:{width}}  {difference:10.2e}  {allowed:9.0e}  {'yes' if passed else 'NO'}")
    failed = sum(not passed for *_, passed in rows)
    print(f"{len(rows) - failed} of {len(rows)} quantities agree ({config.network.model}).")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
