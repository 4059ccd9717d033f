"""A denoiser: an image-to-image network that undoes local corruption of healthy slices.

Trained to undo blobs of any kind (`tf_lesion.corruption`), it takes out what healthy slices do not
show. Its restoration is Algorithm 1: a denoiser f gives the gradient of the log of a smoothed
prior, (f(x) - x) / sigma^2 (Alain and Bengio, JMLR 2014; Romano et al., RED, SIAM J. Imaging
Sciences 2017), in the place of that of the ELBO. One step of size 1 with lambda 0 is plain
denoising.
"""

from typing import Any, ClassVar

import keras
import tensorflow as tf
from keras import ops

from tf_lesion.config import PRESET_NAMES, SOLVERS, NetworkConfig, ObjectiveConfig
from tf_lesion.methods import AscentMethod, register
from tf_lesion.networks import Layer, Layers, full_precision, weight_type
from tf_lesion.noise import Tensors

WIDTHS = (1, 2, 4, 6, 6)  # filters of each level, in `num_filters`; each has half the pixels
GROUPS = 8  # of the normalization
MATTE_BIAS = -2.0  # where the logit of what is replaced starts: most of a slice is healthy
CHANGED = 0.03  # intensity; a pixel that the corruption moved further is to be replaced
# Of the matte's logit in a restoration: nearly every slice is corrupted in training, a patient's
# are not.
DOUBT, SHARPNESS = 1.5, 3.0
SSIM_WEIGHT, MATTE_WEIGHT, CONTENT_WEIGHT = 0.1, 0.05, 0.3  # beside the absolute error of 1
SSIM_WINDOW = 5  # pixels
_COMMON = {
    "network": {"num_filters": 24, "initializer": "he_normal", "precision": "float32"},
    "training": {
        "steps": 5_000,
        "batch_size": 12,
        "learning_rate": 1e-3,
        "learning_rate_cosine": True,
        "gradient_norm_limit": 1.0,
        "corruption": True,
        "checkpoint_every": 500,
        "picture_every": 1_000,
        "checkpoints_kept": 3,
    },
    "restoration": {"solver": SOLVERS["denoiser"], "tv_weight": 0.0},
}


class Pair(keras.layers.Layer):
    """Two convolutions, each with group normalization (Wu and He, ECCV 2018) and SiLU."""

    def __init__(self, make: Layers, filters: int, *, name: str):
        super().__init__(name=name, dtype=make.dtype)
        self.convs = [make.conv(f"conv{number}", filters) for number in range(2)]
        self.norms = [
            keras.layers.GroupNormalization(GROUPS, name=f"norm{number}", dtype=make.dtype)
            for number in range(2)
        ]

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """[B, h, w, C] -> [B, h, w, filters]."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features = ops.silu(norm(conv(features)))
        return features


class DenoiserEncoder(keras.Model):
    """[B, H, W, 1] -> features of every level, the finest first: [B, H / 2^k, W / 2^k, filters]."""

    def __init__(self, network: NetworkConfig, make: Layers):
        super().__init__(name="encoder", dtype=weight_type(network.precision))
        self.pairs = [
            Pair(make, width * make.filters, name=f"level{level}")
            for level, width in enumerate(WIDTHS)
        ]

    def call(self, image: tf.Tensor) -> list[tf.Tensor]:
        """The features; between levels, means over 2 x 2 pixels."""
        features, levels = image, []
        for number, pair in enumerate(self.pairs):
            features = ops.average_pool(features, 2, 2) if number else features
            features = pair(features)
            levels.append(features)
        return levels


class DenoiserDecoder(keras.Model):
    """Features of every level -> `change` and `matte_logit` [B, H, W, 1]."""

    def __init__(self, network: NetworkConfig, make: Layers):
        super().__init__(name="decoder", dtype=weight_type(network.precision))
        self.pairs = [
            Pair(make, width * make.filters, name=f"level{level}")
            for level, width in enumerate(WIDTHS[:-1])
        ]
        self.change_head: Layer = make.conv("change", 1, size=1)
        self.matte_head: Layer = make.conv("matte", 1, size=1, bias=MATTE_BIAS)

    def call(self, levels: list[tf.Tensor]) -> Tensors:
        """`change` of the image, and the logit of the share that is replaced."""
        features = levels[-1]
        for skip, pair in zip(levels[-2::-1], self.pairs[::-1], strict=True):
            features = ops.image.resize(features, skip.shape[1:3], "nearest")
            features = pair(ops.concatenate([features, skip], axis=-1))
        return {
            "change": full_precision(self.change_head, features),
            "matte_logit": full_precision(self.matte_head, features),
        }


@register("denoiser")
class Denoiser(AscentMethod):
    """A U-Net (Ronneberger et al., MICCAI 2015) that says what to replace, and by what.

    f(x) = x + matte * (content - x): healthy tissue, where the matte is near 0, stays as it is,
    noise and texture included. Objective: absolute error of f(x), of the content where the slice
    was changed, cross entropy of the matte, means over the brain; 1 - SSIM of the slice.
    """

    title = "Denoiser"
    settings: ClassVar[dict] = dict.fromkeys(PRESET_NAMES, _COMMON)
    noise_shapes: ClassVar[dict] = {}

    def __init__(
        self, network: NetworkConfig, objective_config: ObjectiveConfig, *, name: str = "denoiser"
    ):
        super().__init__(network, objective_config, name=name)
        make = Layers(network, padding="same", bias=0)
        self.encoder, self.decoder = DenoiserEncoder(network, make), DenoiserDecoder(network, make)

    def parts(self, image: tf.Tensor) -> Tensors:
        """`content`, `matte` (0 to 1), `matte_logit` and `denoised`, each [B, H, W, 1]."""
        step = 2 ** (len(WIDTHS) - 1)
        pads = [-size % step for size in image.shape[1:3]]
        padded = ops.pad(image, [[0, 0], *[[pad // 2, pad - pad // 2] for pad in pads], [0, 0]])
        found = self.decoder(self.encoder(padded))
        top, left = (pad // 2 for pad in pads)
        found = {
            name: value[:, top : top + image.shape[1], left : left + image.shape[2]]
            for name, value in found.items()
        }
        matte, change = ops.sigmoid(found["matte_logit"]), found["change"]
        return {
            "content": image + change,
            "matte": matte,
            "matte_logit": found["matte_logit"],
            "denoised": image + matte * change,
        }

    def terms(
        self,
        images: tf.Tensor,
        noise: Tensors,
        *,
        training: bool = False,
        shown: tf.Tensor | None = None,
    ) -> Tensors:
        """`loss` and its parts, each [B].

        Args:
            images: [B, H, W, 1] healthy slices.
            shown: what the network sees, corrupted; the images by default.
        """
        del noise, training
        shown = images if shown is None else shown
        parts, brain = self.parts(shown), ops.cast(images > 0, images.dtype)
        changed = brain * ops.cast(ops.abs(shown - images) > CHANGED, images.dtype)
        missed = ops.binary_crossentropy(changed, parts["matte_logit"], from_logits=True)
        restored = images + brain * (parts["denoised"] - images)
        area = ops.sum(brain, axis=(1, 2, 3)) + 1.0

        def mean(values):
            return ops.sum(values, axis=(1, 2, 3)) / area

        terms = {
            "error": mean(brain * ops.abs(parts["denoised"] - images)),
            "content": mean(changed * ops.abs(parts["content"] - images)),
            "matte": mean(brain * missed),
            "dissimilarity": 1 - similarity(restored, images),
        }
        weights = (1.0, CONTENT_WEIGHT, MATTE_WEIGHT, SSIM_WEIGHT)
        loss = sum(w * part for w, part in zip(weights, terms.values(), strict=True))
        return {"loss": loss, **terms}

    def objectives(self, terms: Tensors, *, kl_weight: Any) -> Tensors:
        """The mean loss."""
        del kl_weight
        return {"adam": ops.mean(terms["loss"])}

    def reconstruct(self, images: tf.Tensor, noise: Tensors) -> tf.Tensor:
        """f(x) of slices [B, H, W, 1], with another matte than in training.

        `DOUBT` is taken off its logit, and what is then positive is multiplied by `SHARPNESS`: less
        is replaced where the network is in doubt, and all of what it is sure of.
        """
        del noise
        parts = self.parts(images)
        logit = parts["matte_logit"] - DOUBT
        matte = ops.sigmoid(logit + (SHARPNESS - 1) * ops.relu(logit))
        return images + matte * (parts["content"] - images)

    def log_prior_gradient(self, image: tf.Tensor, noise: Tensors) -> tuple[tf.Tensor, tf.Tensor]:
        """(-|f(x) - x|^2 / 2 [B], f(x) - x [B, H, W, 1]), for a sigma of 1."""
        gradient = self.reconstruct(image, noise) - image
        return -0.5 * ops.sum(gradient**2, axis=(1, 2, 3)), gradient


def similarity(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """SSIM (Wang et al., IEEE TIP 2004) of images from 0 to 1, means over square windows, [B]."""

    def mean(values):
        return ops.average_pool(values, SSIM_WINDOW, 1)

    a, b = mean(first), mean(second)
    variances = mean(first**2) + mean(second**2) - a**2 - b**2
    covariance = mean(first * second) - a * b
    steady = 0.01**2, 0.03**2
    values = (2 * a * b + steady[0]) * (2 * covariance + steady[1])
    values /= (a**2 + b**2 + steady[0]) * (variances + steady[1])
    return ops.mean(values, axis=(1, 2, 3))
