"""AAE-128: an autoencoder whose latents a critic compares with the prior."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_lesion.baselines.autoencoder import presets
from tf_lesion.baselines.blocks import (
    OnePass,
    ResidualDecoder,
    ResidualEncoder,
    SquareLayers,
    leaky_relu,
    squared_error,
)
from tf_lesion.config import NetworkConfig, ObjectiveConfig
from tf_lesion.methods import register
from tf_lesion.networks import weight_type
from tf_lesion.noise import Tensors

CRITIC_UNITS = (200, 400)
PENALTY = 10.0  # weight of the gradient penalty
CRITIC_STEPS = 20  # per training step
FIRST_CRITIC_STEPS, FIRST_STEPS = 100, 25  # so many critic steps in the first training steps
SLOPE_FLOOR = 1e-12  # under the root of the squared slope: its derivative is infinite at 0


class Critic(keras.Model):
    """[B, dim_z] -> [B]: dense 200, 400, 1 with leaky ReLU, in float32.

    Without normalization: the penalty is on the slope at one latent, whatever the batch.
    """

    def __init__(self, network: NetworkConfig):
        super().__init__(name="critic", dtype=weight_type(network.precision))
        make = SquareLayers(dataclasses.replace(network, precision="float32"))
        self.hidden = [make.dense(f"dense{i}", units) for i, units in enumerate(CRITIC_UNITS)]
        self.head = make.dense("head", 1, use_bias=False)  # a distance does not depend on it

    def call(self, z: tf.Tensor) -> tf.Tensor:
        """The score of each latent; high where it looks drawn from the prior."""
        features = z
        for layer in self.hidden:
            features = leaky_relu(layer(features))
        return self.head(features)[:, 0]


def gradient_penalty(
    critic: Callable, real: tf.Tensor, generated: tf.Tensor, mix: tf.Tensor
) -> tf.Tensor:
    """(|slope of the critic between the two| - 1)^2, [B] (Gulrajani et al., NeurIPS 2017).

    Args:
        critic: function [B, D] -> [B].
        real, generated: [B, D].
        mix: [B, 1] in [0, 1], where between them.
    """
    between = generated + mix * (real - generated)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(between)
        scores = critic(between)
    squared = tf.reduce_sum(tf.square(tape.gradient(scores, between)), axis=1)
    return tf.square(tf.sqrt(squared + SLOPE_FLOOR) - 1)


def uniform(noise: tf.Tensor) -> tf.Tensor:
    """Uniform numbers in [0, 1] from standard normal ones: their distribution function."""
    return 0.5 * tf.math.erfc(-noise / math.sqrt(2))


@register("aae-128")
class AAE128(OnePass):
    """Adversarial autoencoder on squares of 128, dense latent of 128.

    Source: Chen and Konukoglu (MIDL 2018) as described: encoder and decoder of
    `tf_lesion.baselines.blocks`; the KL of a VAE replaced by a Wasserstein critic on z with
    gradient penalty 10; Adam at 2e-5 with betas .5, .9; 20 critic steps per step, more at the
    start. The phases are those of Makhzani et al. (2015): reconstruction changes encoder and
    decoder, regularization the encoder. We chose: "more at the start" is 100 in the first 25 steps
    (Arjovsky et al., 2017); both phases use one pass through the encoder, and the critic the
    latents of that pass, each time against new samples of the prior; leaky ReLU in the critic, and
    Adam at the same settings.

    `noise` holds, for each critic step, `prior` [B, 100, dim_z] and `mix` [B, 100, 1]. The
    reconstruction is the restored slice.
    """

    title = "AAE-128"
    settings = presets(
        128,
        training={"learning_rate": 2e-5, "beta_1": 0.5, "beta_2": 0.9},
        practical={"learning_rate": 5e-4},
    )

    def __init__(
        self, network: NetworkConfig, objective_config: ObjectiveConfig, *, name: str = "aae"
    ):
        super().__init__(network, objective_config, name=name)
        self.encoder = ResidualEncoder(network, heads=("z",))
        self.decoder = ResidualDecoder(network)
        self.critic = Critic(network)

    @property
    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the noise of one image and step."""
        return {
            "prior": (FIRST_CRITIC_STEPS, self.network.dim_z),
            "mix": (FIRST_CRITIC_STEPS, 1),
        }

    @property
    def trained(self) -> dict[str, list]:
        """The weights of the three optimizers; the encoder's are changed by two."""
        return {
            "reconstruction": self.encoder.trainable_variables + self.decoder.trainable_variables,
            "regularization": self.encoder.trainable_variables,
            "critic": self.critic.trainable_variables,
        }

    def terms(self, images: tf.Tensor, noise: Tensors, *, training: bool = False) -> Tensors:
        """`squared_error` and `wasserstein`, the critic's distance of z to the prior, each [B]."""
        _, terms = self._latents_and_terms(images, noise, training=training)
        return terms

    def _latents_and_terms(self, images, noise, *, training):
        squares = self.to_square(images)
        z = self.encoder(squares, training=training)["z"]
        error = squared_error(squares, self.decoder(z, training=training))
        distance = self.critic(noise["prior"][:, 0]) - self.critic(z)
        return z, {"squared_error": error, "wasserstein": distance}

    def objectives(self, terms: Tensors, *, kl_weight: Any) -> Tensors:
        """The two phases of the autoencoder; the critic has its own steps."""
        return {
            "reconstruction": tf.reduce_mean(terms["squared_error"]),
            "regularization": kl_weight * tf.reduce_mean(terms["wasserstein"]),
        }

    def update(
        self, images: tf.Tensor, noise: Tensors, *, step: Any, kl_weight: Any, descend: Callable
    ) -> Tensors:
        """One step of encoder and decoder, then the critic's."""
        with tf.GradientTape(persistent=True) as tape:
            z, terms = self._latents_and_terms(images, noise, training=True)
            objectives = self.objectives(terms, kl_weight=kl_weight)
        norms = descend(tape, objectives)
        count = tf.where(step < FIRST_STEPS, FIRST_CRITIC_STEPS, CRITIC_STEPS)
        critic = self.train_critic(tf.stop_gradient(z), noise, count=count, descend=descend)
        return {name: tf.reduce_mean(values) for name, values in terms.items()} | norms | critic

    def train_critic(
        self, z: tf.Tensor, noise: Tensors, *, count: Any, descend: Callable
    ) -> Tensors:
        """`count` steps of the critic on the latents z [B, D]; the last step's loss and penalty."""
        last = {name: tf.zeros([]) for name in ("critic_loss", "gradient_penalty")}
        for number in tf.range(count):
            prior, mix = noise["prior"][:, number], uniform(noise["mix"][:, number])
            with tf.GradientTape() as tape:
                penalty = tf.reduce_mean(gradient_penalty(self.critic, prior, z, mix))
                distance = tf.reduce_mean(self.critic(prior) - self.critic(z))
                loss = PENALTY * penalty - distance
            descend(tape, {"critic": loss})
            last = {"critic_loss": loss, "gradient_penalty": penalty}
        return last

    def reconstructed(self, squares: tf.Tensor) -> tf.Tensor:
        """Decoded latents."""
        return self.decoder(self.encoder(squares)["z"])
