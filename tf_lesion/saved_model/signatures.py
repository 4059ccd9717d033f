"""What an exported model computes, as TensorFlow functions with named inputs and outputs.

    restore      observed, mask, slices, tv_weight, steps, seed -> restored, residual
    detect       raw, mask -> observed, restored, residual, lesions_fpr_0_05 and so on
    reconstruct  image -> y_mean
    elbo         image, slices, seed -> elbo, log_likelihood, kl_z and so on
    ascend       image, observed, mask, slices, start, stop, tv_weight, seed -> image, objective

Images and masks are [B, H, W, 1] float32 for any B; a mask is brain where it is above 0; `slices`
[B] int64 identify the slices and seed their noise. The rest are scalars. How slices are put into
batches changes nothing, but for `detect`, whose brightness comes from all slices of the call.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tf_lesion.config import RestorationConfig
from tf_lesion.noise import slice_noise
from tf_lesion.objective import elbo
from tf_lesion.restoration import padded
from tf_lesion.saved_model.intensity import prepared

DIVERGED = "the restoration diverged: train the model for more steps, or clip the gradient."
DETECTION_SEED = 0


def lesion_output(name: str) -> str:
    """Output of `detect` for the threshold `name`: fpr_0.05 -> lesions_fpr_0_05."""
    return f"lesions_{name}".replace(".", "_")


def signatures(
    model: Any,
    restoration: RestorationConfig,
    *,
    reference: np.ndarray | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Every signature that the model can give.

    Args:
        model: a `methods.Method`; one without ELBO has neither `reconstruct` nor `elbo`.
        restoration: its solver is in the graph; `detect` takes its steps and its lambda.
        reference: [Q] brain intensities that `detect` matches to, or None.
        thresholds: {name: residual} of the lesion maps of `detect`.

    Returns:
        {name: `tf.function` with an input signature, which returns a dict}.
    """
    stretch = model.compiled_restoration(restoration.solver)
    made = {
        "restore": _restore(model, stretch),
        "detect": _detect(model, stretch, restoration, reference, thresholds or {}),
        "ascend": _ascend(model, stretch),
    }
    if hasattr(model, "elbo_terms"):
        made |= {"reconstruct": _reconstruct(model), "elbo": _elbo(model)}
    return made


def _images(model, name):
    shape = [None, model.network.height, model.network.width, 1]
    return tf.TensorSpec(shape, tf.float32, name)


def _scalar(kind, name):
    return tf.TensorSpec([], kind, name)


_SLICES = tf.TensorSpec([None], tf.int64, "slices")
_SEED = _scalar(tf.int64, "seed")
_TV_WEIGHT = _scalar(tf.float32, "tv_weight")


def _finished(observed, restored, brain):
    """`restored` and `residual`; an error if the ascent left the finite numbers."""
    restored = tf.debugging.check_numerics(restored, DIVERGED)
    residual = tf.abs(observed - restored) * tf.cast(brain, observed.dtype)
    return {"restored": restored, "residual": residual}


def _restore(model, stretch):
    images = [_images(model, "observed"), _images(model, "mask")]
    scalars = [_TV_WEIGHT, _scalar(tf.int32, "steps"), _SEED]

    @tf.function(input_signature=[*images, _SLICES, *scalars])
    def restore(observed, mask, slices, tv_weight, steps, seed):
        start = tf.zeros_like(steps)
        restored, _ = stretch(observed, observed, mask, slices, start, steps, tv_weight, seed)
        return _finished(observed, restored, mask > 0)

    return restore


def _detect(model, stretch, restoration, reference, thresholds):
    """From the scanner's units to lesion maps; slices are numbered 0 to B - 1."""

    @tf.function(input_signature=[_images(model, "raw"), _images(model, "mask")])
    def detect(raw, mask):
        brain = mask > 0
        observed = prepared(raw, brain, reference)
        restored, _ = stretch(
            observed,
            observed,
            tf.cast(brain, tf.float32),
            tf.range(tf.shape(raw, out_type=tf.int64)[0]),
            tf.constant(0, tf.int32),
            tf.constant(restoration.steps, tf.int32),
            tf.constant(restoration.tv_weight, tf.float32),
            tf.constant(DETECTION_SEED, tf.int64),
        )
        found = _finished(observed, restored, brain)
        exact = tf.cast(found["residual"], tf.float64)  # thresholds are not rounded to float32
        lesions = {lesion_output(name): exact > value for name, value in thresholds.items()}
        return {"observed": observed, **found, **lesions}

    return detect


def _reconstruct(model):
    """The mean of p(x | z) at the mean of q(z | x): no noise."""

    @tf.function(input_signature=[_images(model, "image")])
    def reconstruct(image):
        (filled,) = padded([image], model.grid)
        y_mean = model.decoder.mean(model.encoder(filled)["z_mean"])
        return {"y_mean": y_mean[: tf.shape(image)[0]]}

    return reconstruct


def _elbo(model):
    """The terms in nats for one draw of the noise, that of the test losses in training."""

    @tf.function(input_signature=[_images(model, "image"), _SLICES, _SEED])
    def terms_of(image, slices, seed):
        filled, numbers = padded([image, slices], model.grid)
        noise = slice_noise(model.noise_shapes, seed=seed, step=0, slices=numbers, stream="test")
        terms = model.elbo_terms(filled, noise)
        count = tf.shape(image)[0]
        return {name: value[:count] for name, value in {"elbo": elbo(terms), **terms}.items()}

    return terms_of


def _ascend(model, stretch):
    """Any stretch of the restoration, for progress bars, trajectories and resuming."""
    images = [_images(model, name) for name in ("image", "observed", "mask")]
    steps = [_scalar(tf.int32, name) for name in ("start", "stop")]

    @tf.function(input_signature=[*images, _SLICES, *steps, _TV_WEIGHT, _SEED])
    def ascend(image, observed, mask, slices, start, stop, tv_weight, seed):
        image, objective = stretch(image, observed, mask, slices, start, stop, tv_weight, seed)
        return {"image": image, "objective": objective}

    return ascend
