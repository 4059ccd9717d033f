"""AnoGAN: the healthy slice that a generator can make nearest to the observed one."""

import math
from typing import Any, ClassVar

import keras
import tensorflow as tf

from tf_lesion.baselines.blocks import SquareLayers, SquareMethod, flattened, leaky_relu
from tf_lesion.config import NetworkConfig, ObjectiveConfig
from tf_lesion.methods import register
from tf_lesion.networks import full_precision, weight_type
from tf_lesion.noise import Tensors, slice_noise

DIM_Z = 100  # DCGAN
FILTERS = 64  # of the widest maps, DCGAN
KERNEL = 5  # pixels, DCGAN
SMALLEST = 4  # side of the smallest maps, DCGAN
MOST_FILTERS = 8  # times the filters: the narrowest maps of DCGAN's discriminator
FEATURE_WEIGHT = 0.1  # of the feature matching in the search (Schlegl et al.)
SEARCH_STEPS = 500  # Schlegl et al.
SEARCH_RATE = 0.05  # of Adam in the search, our choice
SEARCH_BETAS, SEARCH_EPSILON = (0.9, 0.999), 1e-8
PICTURE_STEPS = 100  # of the search for the pictures of a run
_TRAINING = {"learning_rate": 2e-4, "beta_1": 0.5, "checkpoints_kept": 3}
_BATCH = {"batch_size": 128, "steps": 200_000}  # DCGAN's batch; as many slices as the released code
_NETWORK = {"square": 128, "dim_z": DIM_Z, "num_filters": FILTERS, "initializer": "dcgan"}
_COMMON = {
    "network": _NETWORK,
    "training": _TRAINING | _BATCH,
    "restoration": {"steps": SEARCH_STEPS},
}


def _widths(network):
    """Filters of the maps from the widest to the smallest; each has half the side."""
    stages = int(math.log2(network.square // SMALLEST))
    return [network.num_filters * min(2**stage, MOST_FILTERS) for stage in range(stages)]


class Generator(keras.Model):
    """[B, dim_z] -> [B, s, s, 1] in [0, 1]: dense, then transposed convolutions of stride 2."""

    def __init__(self, network: NetworkConfig):
        super().__init__(name="generator", dtype=weight_type(network.precision))
        make, widths = SquareLayers(network), _widths(network)[::-1]
        self._start_shape = (SMALLEST, SMALLEST, widths[0])
        self.dense = make.dense("dense", SMALLEST * SMALLEST * widths[0], use_bias=False)
        self.norms = [make.norm(f"norm{stage}") for stage in range(len(widths))]
        doubling = {"size": KERNEL, "strides": 2}
        self.convs = [
            make.transposed(f"conv{stage}", width, **doubling)
            for stage, width in enumerate(widths[1:])
        ]
        self.convs.append(make.transposed("head", 1, bias=0, **doubling))

    def call(self, z: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Squares of the latents, float32."""
        features = tf.reshape(self.dense(z), [-1, *self._start_shape])
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features = conv(tf.nn.relu(norm(features, training=training)))
        return tf.sigmoid(tf.cast(features, self.dense.variable_dtype))


class Discriminator(keras.Model):
    """[B, s, s, 1] -> its last maps [B, F] and the logit [B] of being a real slice."""

    def __init__(self, network: NetworkConfig):
        super().__init__(name="discriminator", dtype=weight_type(network.precision))
        make, widths = SquareLayers(network), _widths(network)
        self.convs = [
            make.conv(f"conv{stage}", width, KERNEL, strides=2, bias=None if stage else 0)
            for stage, width in enumerate(widths)
        ]
        self.norms = [make.norm(f"norm{stage}") for stage in range(1, len(widths))]
        self.head = make.dense("head", 1)

    def call(self, squares: tf.Tensor, training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """(features, logits), float32."""
        features = leaky_relu(self.convs[0](squares))  # DCGAN: no norm on the input
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            features = leaky_relu(norm(conv(features), training=training))
        flat = flattened(features)
        logits = full_precision(self.head, flat)[:, 0]
        return tf.cast(flat, logits.dtype), logits


@register("anogan")
class AnoGAN(SquareMethod):
    """DCGAN on squares of 128; detection searches the latent that makes the observed slice.

    Source: Schlegl et al., IPMI 2017: DCGAN (Radford et al., 2016: Adam at 2e-4 with beta_1 .5,
    kernels from N(0, 0.02), latent of 100, batches of 128), 500 steps of descent in z on
    (1 - 0.1) * |x - G(z)|_1 + 0.1 * |f(x) - f(G(z))|_1, with f the discriminator's last maps. We
    chose: five levels for a side of 128, from 4 x 4 x 512; a sigmoid, because intensities are in
    [0, 1]; both networks step at once from one pass; Adam at 0.05 for the search, one draw of z
    per slice to start from, and of all latents visited the one of the smallest loss.

    `noise` holds `z` [B, dim_z]. Every slice follows its own loss, so batches do not matter.
    """

    title = "AnoGAN"
    restoration_settings = frozenset({"steps"})
    settings: ClassVar[dict] = {
        "released": _COMMON,
        "paper": _COMMON,
        "practical": {
            **_COMMON,
            "network": {**_NETWORK, "num_filters": 16},
            "training": {**_TRAINING, "steps": 2_000, "batch_size": 16},
        },
    }

    def __init__(
        self, network: NetworkConfig, objective_config: ObjectiveConfig, *, name: str = "anogan"
    ):
        super().__init__(network, objective_config, name=name)
        self.generator = Generator(network)
        self.discriminator = Discriminator(network)

    @property
    def trained(self) -> dict[str, list]:
        """The weights of the two players."""
        return {
            network.name: network.trainable_variables
            for network in (self.generator, self.discriminator)
        }

    def terms(self, images: tf.Tensor, noise: Tensors, *, training: bool = False) -> Tensors:
        """`generator` and `discriminator`, the cross entropy that each minimizes, [B], nats."""
        made = self.generator(noise["z"], training=training)
        _, real = self.discriminator(self.to_square(images), training=training)
        _, fake = self.discriminator(made, training=training)
        return {
            "generator": tf.nn.softplus(-fake),
            "discriminator": tf.nn.softplus(-real) + tf.nn.softplus(fake),
        }

    def objectives(self, terms: Tensors, *, kl_weight: Any) -> Tensors:
        """Each player's own loss."""
        del kl_weight
        return {name: tf.reduce_mean(values) for name, values in terms.items()}

    def search_loss(self, z: tf.Tensor, squares: tf.Tensor, features: tf.Tensor) -> tf.Tensor:
        """The loss of the search, [B], for latents z of squares with these features."""
        made = self.generator(z)
        found, _ = self.discriminator(made)
        apart = tf.reduce_sum(tf.abs(squares - made), axis=[1, 2, 3])
        unlike = tf.reduce_sum(tf.abs(features - found), axis=1)
        return (1 - FEATURE_WEIGHT) * apart + FEATURE_WEIGHT * unlike

    def search(self, squares: tf.Tensor, z: tf.Tensor, *, steps: Any) -> tuple:
        """Descend from z with Adam.

        Args:
            squares: [B, s, s, 1], what is to be made.
            z: [B, dim_z], where to start.
            steps: scalar.

        Returns:
            (the latents of the smallest loss [B, dim_z], the loss before every step [steps, B]).
        """
        features, _ = self.discriminator(squares)
        best, lowest = z, tf.fill(tf.shape(z)[:1], tf.constant(math.inf, z.dtype))
        mean, square = tf.zeros_like(z), tf.zeros_like(z)
        trace = tf.TensorArray(z.dtype, size=steps)
        for step in tf.range(steps):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(z)
                losses = self.search_loss(z, squares, features)
            trace = trace.write(step, losses)
            best = tf.where((losses < lowest)[:, None], z, best)
            lowest = tf.minimum(losses, lowest)
            change, mean, square = _adam(tape.gradient(losses, z), mean, square, step)
            z -= change
        return best, trace.stack()

    def reconstruct(self, images: tf.Tensor, noise: Tensors) -> tf.Tensor:
        """The nearest slices after a short search from the noise."""
        z, _ = self.search(self.to_square(images), noise["z"], steps=PICTURE_STEPS)
        return self.from_square(self.generator(z))

    def restored(
        self,
        observed: tf.Tensor,
        mask: tf.Tensor,
        *,
        slices: Any,
        seed: Any,
        steps: Any,
        tv_weight: Any,
    ) -> tf.Tensor:
        """The nearest slices that the generator makes, inside the mask."""
        del tv_weight
        draw = {"seed": seed, "step": 0, "slices": slices, "stream": "restoration"}
        start = slice_noise(self.noise_shapes, **draw)["z"]
        z, _ = self.search(self.to_square(observed), start, steps=steps)
        return self.replaced(observed, self.generator(z), mask)


def _adam(gradient, mean, square, step):
    """Adam's change and its next moments (Kingma and Ba, 2015); `step` is 0-based."""
    first, second = SEARCH_BETAS
    mean = first * mean + (1 - first) * gradient
    square = second * square + (1 - second) * gradient**2
    done = tf.cast(step + 1, gradient.dtype)
    scaled = tf.sqrt(square / (1 - second**done)) + SEARCH_EPSILON
    return SEARCH_RATE * (mean / (1 - first**done)) / scaled, mean, square
