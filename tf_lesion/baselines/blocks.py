"""What the baselines share: squares of the slices, residual encoder and decoder.

Source: the description of the networks of Chen and Konukoglu (Unsupervised detection of lesions in
brain MRI using constrained adversarial auto-encoders, MIDL 2018) and of the same group's VAEs. It
fixes the sizes and channels below, batch normalization and leaky ReLU of slope 0.2 after the first
convolution, and the linear dense latent. Where it is silent we chose: batch normalization and leaky
ReLU in the residual blocks too (none on the shortcut, the ReLU after the sum), transposed
convolutions to go up, He initialization.

Sizes for a square of side s and f filters (16).
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from tf_lesion.config import NetworkConfig
from tf_lesion.methods import Method
from tf_lesion.networks import Layer, Layers, full_precision, weight_type
from tf_lesion.noise import Tensors

LEAK = 0.2  # slope of the leaky ReLU
STAGES = 4  # residual blocks: the square is halved so often
MOMENTUM = 0.9  # of the moving statistics, as DCGAN: they follow short trainings too


def leaky_relu(features: tf.Tensor) -> tf.Tensor:
    """ReLU with slope 0.2 below 0; as a maximum, since TensorFlow fails to optimize its own."""
    return tf.maximum(features, LEAK * features)


class SquareLayers(Layers):
    """Those of the baselines: convolutions that keep the size, or divide it by their stride.

    They have no bias unless asked for: normalization would take it away.
    """

    def __init__(self, network: NetworkConfig):
        super().__init__(network, padding="same", bias=None)

    def dense(self, name: str, units: int, *, use_bias: bool = True) -> Layer:
        """Dense layer, linear."""
        return keras.layers.Dense(units, name=name, use_bias=use_bias, **self.kernel())

    def norm(self, name: str) -> Layer:
        """Batch normalization, by moving statistics outside training."""
        return keras.layers.BatchNormalization(momentum=MOMENTUM, name=name, dtype=self.dtype)


def flattened(features: tf.Tensor) -> tf.Tensor:
    """[B, h, w, C] -> [B, h w C], the second a Python integer: a dense layer asks for it."""
    return tf.reshape(features, [-1, math.prod(features.shape[1:])])


class ConvNorm(keras.layers.Layer):
    """A convolution, batch normalization, leaky ReLU."""

    def __init__(self, make: SquareLayers, conv: Layer, *, name: str):
        super().__init__(name=name, dtype=make.dtype)
        self.conv, self.norm = conv, make.norm("norm")

    def call(self, features: tf.Tensor, training: bool = False) -> tf.Tensor:
        """[B, H, W, C] -> [B, H', W', filters]."""
        return leaky_relu(self.norm(self.conv(features), training=training))


class Residual(keras.layers.Layer):
    """Residual block: conv of `width` with norm and ReLU, conv of `filters` with norm, shortcut.

    The first conv and the shortcut change the size as `resize`, a method of the layers, does; then
    comes the ReLU of the sum.
    """

    def __init__(
        self, make: SquareLayers, resize: Callable, width: int, filters: int, *, name: str
    ):
        super().__init__(name=name, dtype=make.dtype)
        self.first = ConvNorm(make, resize("conv", width, strides=2), name="first")
        self.second = make.conv("second", filters)
        self.shortcut = resize("shortcut", filters, strides=2)
        self.norm = make.norm("norm")

    def call(self, features: tf.Tensor, training: bool = False) -> tf.Tensor:
        """[B, H, W, C] -> [B, H', W', filters]."""
        changed = self.second(self.first(features, training=training))
        changed = self.norm(changed, training=training)
        return leaky_relu(changed + self.shortcut(features))


class ResidualEncoder(keras.Model):
    """[B, s, s, 1] -> {head: [B, dim_z]} through s/16 x s/16 x 16 f features.

    Conv f, then four residual blocks with g = f, 2f, 4f, 8f (conv g of stride 2, conv 2g, shortcut
    conv 2g of stride 2), then one linear dense layer per head.
    """

    def __init__(self, network: NetworkConfig, *, heads: tuple[str, ...]):
        super().__init__(name="encoder", dtype=weight_type(network.precision))
        make, width = SquareLayers(network), network.num_filters
        self.blocks = [ConvNorm(make, make.conv("conv", width), name="start")]
        for stage in range(STAGES):
            self.blocks.append(Residual(make, make.conv, width, 2 * width, name=f"down{stage}"))
            width *= 2
        self.heads = {head: make.dense(head, network.dim_z) for head in heads}

    def call(self, square: tf.Tensor, training: bool = False) -> Tensors:
        """Every head of the squares, float32 [B, dim_z]."""
        features = square
        for block in self.blocks:
            features = block(features, training=training)
        flat = flattened(features)
        return {name: full_precision(head, flat) for name, head in self.heads.items()}


class ResidualDecoder(keras.Model):
    """[B, dim_z] -> [B, s, s, 1]: the encoder's mirror.

    Dense to s/16 x s/16 x 16 f, conv 8f, then residual blocks with g = 8f, 4f, 2f, f (transposed
    conv g of stride 2, conv g, shortcut transposed conv g of stride 2), then a linear conv 1.
    """

    def __init__(self, network: NetworkConfig):
        super().__init__(name="decoder", dtype=weight_type(network.precision))
        make, width = SquareLayers(network), network.num_filters * 2**STAGES
        side = network.square // 2**STAGES
        self._start_shape = (side, side, width)
        self.dense = make.dense("dense", side * side * width)
        width //= 2
        self.blocks = [ConvNorm(make, make.conv("conv", width), name="start")]
        for stage in range(STAGES):
            self.blocks.append(Residual(make, make.transposed, width, width, name=f"up{stage}"))
            width //= 2
        self.head = make.conv("head", 1, bias=0)

    def call(self, z: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The squares of the latents, float32."""
        features = tf.reshape(self.dense(z), [-1, *self._start_shape])
        for block in self.blocks:
            features = block(features, training=training)
        return full_precision(self.head, features)


class SquareMethod(Method):
    """A method that sees slices resampled to a square, and whose images are resampled back.

    The residual of a slice holds what the resampling blurs, as in the paper's comparison.
    """

    @property
    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """{latent: shape} of the noise of one image, where a method draws no more."""
        return {"z": (self.network.dim_z,)}

    def to_square(self, images: tf.Tensor) -> tf.Tensor:
        """[B, H, W, 1] -> [B, s, s, 1]: bilinear, smoothed before it is made smaller."""
        return _resized(images, (self.network.square, self.network.square))

    def from_square(self, squares: tf.Tensor) -> tf.Tensor:
        """[B, s, s, 1] -> [B, H, W, 1]."""
        return _resized(squares, (self.network.height, self.network.width))

    def replaced(self, observed: tf.Tensor, squares: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """The squares at the size of the slices inside the mask, the observed slices outside."""
        return tf.where(mask > 0, self.from_square(squares), observed)


class OnePass(SquareMethod):
    """A method that detects by its reconstruction: a subclass gives `reconstructed`."""

    def reconstructed(self, squares: tf.Tensor) -> tf.Tensor:
        """Reconstructions [B, s, s, 1] of squares, without noise and as outside training."""
        raise NotImplementedError

    def reconstruct(self, images: tf.Tensor, noise: Tensors) -> tf.Tensor:
        """Reconstructions; the noise is not used."""
        del noise
        return self.from_square(self.reconstructed(self.to_square(images)))

    def restored(self, observed: tf.Tensor, mask: tf.Tensor, **unused: Any) -> tf.Tensor:
        """The reconstruction inside the mask."""
        del unused
        return self.replaced(observed, self.reconstructed(self.to_square(observed)), mask)


def _resized(images, size):
    return tf.cast(tf.image.resize(images, size, antialias=True), images.dtype)


def squared_error(images: tf.Tensor, reconstructions: tf.Tensor) -> tf.Tensor:
    """Sum over the pixels, [B]: -log N(image; reconstruction, 1/2) in nats, less its constant."""
    return tf.reduce_sum(tf.square(images - reconstructions), axis=[1, 2, 3])
