"""What the baselines share: squares of the slices, residual encoder and decoder.

Source: the description of the networks of Chen and Konukoglu (Unsupervised detection of lesions in
brain MRI using constrained adversarial auto-encoders, MIDL 2018) and of the same group's VAEs. It
fixes the sizes and channels below, batch normalization and leaky ReLU of slope 0.2 after the first
convolution, and the linear dense latent. Where it is silent we chose: batch normalization and leaky
ReLU in the residual blocks too (none on the shortcut, the ReLU after the sum), transposed
convolutions to go up, He initialization.

Sizes for a square of side s and f filters (16).
"""

from typing import Any

import keras
import tensorflow as tf

from tf_lesion.config import NetworkConfig
from tf_lesion.methods import Method
from tf_lesion.networks import CHANNELS_LAST, INITIALIZERS, PRECISIONS, Conv2D, weight_type
from tf_lesion.noise import Tensors

LEAK = 0.2  # slope of the leaky ReLU
STAGES = 4  # residual blocks: the square is halved so often
STRIDE = 2
MOMENTUM = 0.9  # of the moving statistics, as DCGAN: they follow short trainings too
KERNEL = 3
Layer = keras.layers.Layer


def leaky_relu(features: tf.Tensor) -> tf.Tensor:
    """ReLU with slope 0.2 below 0; as a maximum, since TensorFlow fails to optimize its own."""
    return tf.maximum(features, LEAK * features)


class Layers:
    """Makes the layers of one network: same initializer and precision, a name for each.

    Convolutions have no bias unless asked for: normalization would take it away.
    """

    def __init__(self, network: NetworkConfig):
        self._options = {"dtype": PRECISIONS[network.precision]}
        self._initializer = INITIALIZERS[network.initializer]

    def conv(
        self, name: str, filters: int, *, stride: int = 1, size: int = KERNEL, bias: bool = False
    ) -> Layer:
        """Convolution that keeps the size, or divides it by the stride."""
        return self._convolution(Conv2D, name, filters, stride, size, bias)

    def transposed(
        self, name: str, filters: int, *, size: int = KERNEL, bias: bool = False
    ) -> Layer:
        """Transposed convolution that doubles the size."""
        return self._convolution(keras.layers.Conv2DTranspose, name, filters, STRIDE, size, bias)

    def dense(self, name: str, units: int, *, bias: bool = True) -> Layer:
        """Dense layer, linear."""
        options = {"kernel_initializer": self._initializer(), "name": name, **self._options}
        return keras.layers.Dense(units, use_bias=bias, **options)

    def norm(self, name: str) -> Layer:
        """Batch normalization, by moving statistics outside training."""
        return keras.layers.BatchNormalization(momentum=MOMENTUM, name=name, **self._options)

    def _convolution(self, kind, name, filters, stride, size, bias):
        return kind(
            filters,
            size,
            strides=stride,
            padding="same",
            use_bias=bias,
            kernel_initializer=self._initializer(),
            name=name,
            **CHANNELS_LAST,
            **self._options,
        )


class ConvNorm(keras.layers.Layer):
    """A convolution, batch normalization, leaky ReLU."""

    def __init__(self, conv: Layer, norm: Layer, *, name: str):
        super().__init__(name=name, dtype=conv.dtype_policy)
        self.conv, self.norm = conv, norm

    def call(self, features: tf.Tensor, training: bool = False) -> tf.Tensor:
        """[B, H, W, C] -> [B, H', W', filters]."""
        return leaky_relu(self.norm(self.conv(features), training=training))


class Residual(keras.layers.Layer):
    """Residual block: `first` with norm and ReLU, `second` with norm, `shortcut`; ReLU of the sum.

    `first` and `shortcut` change the size, `second` keeps it.
    """

    def __init__(self, first: Layer, second: Layer, shortcut: Layer, norm: Layer, *, name: str):
        super().__init__(name=name, dtype=second.dtype_policy)
        self.first, self.second, self.shortcut, self.norm = first, second, shortcut, norm

    def call(self, features: tf.Tensor, training: bool = False) -> tf.Tensor:
        """[B, H, W, C] -> [B, H', W', filters of `second`]."""
        changed = self.second(self.first(features, training=training))
        changed = self.norm(changed, training=training)
        return leaky_relu(changed + self.shortcut(features))


class ResidualEncoder(keras.Model):
    """[B, s, s, 1] -> {head: [B, dim_z]} through s/16 x s/16 x 16 f features.

    Conv f, then four residual blocks with g = f, 2f, 4f, 8f (conv g of stride 2, conv 2g, shortcut
    conv 2g of stride 2), then one linear dense layer per head.
    """

    def __init__(self, network: NetworkConfig, *, heads: tuple[str, ...], name: str = "encoder"):
        super().__init__(name=name, dtype=weight_type(network.precision))
        make, filters = Layers(network), network.num_filters
        self.blocks = [ConvNorm(make.conv("conv", filters), make.norm("norm"), name="start")]
        for stage in range(STAGES):
            width = filters * 2**stage
            halved = make.conv("conv", width, stride=STRIDE)
            self.blocks.append(
                Residual(
                    ConvNorm(halved, make.norm("norm"), name="first"),
                    make.conv("second", 2 * width),
                    make.conv("shortcut", 2 * width, stride=STRIDE),
                    make.norm("norm"),
                    name=f"down{stage}",
                )
            )
        self.heads = {head: make.dense(head, network.dim_z) for head in heads}

    def call(self, square: tf.Tensor, training: bool = False) -> Tensors:
        """Every head of the squares, float32 [B, dim_z]."""
        features = square
        for block in self.blocks:
            features = block(features, training=training)
        flat = tf.reshape(features, [-1, features.shape[1] * features.shape[2] * features.shape[3]])
        return {name: tf.cast(head(flat), head.variable_dtype) for name, head in self.heads.items()}


class ResidualDecoder(keras.Model):
    """[B, dim_z] -> [B, s, s, 1]: the encoder's mirror.

    Dense to s/16 x s/16 x 16 f, conv 8f, then residual blocks with g = 8f, 4f, 2f, f (transposed
    conv g of stride 2, conv g, shortcut transposed conv g of stride 2), then a linear conv 1.
    """

    def __init__(self, network: NetworkConfig, *, name: str = "decoder"):
        super().__init__(name=name, dtype=weight_type(network.precision))
        make, widest = Layers(network), network.num_filters * 2**STAGES
        side = network.square // 2**STAGES
        self._start_shape = (side, side, widest)
        self.dense = make.dense("dense", side * side * widest)
        conv = make.conv("conv", widest // 2)
        self.blocks = [ConvNorm(conv, make.norm("norm"), name="start")]
        for stage in range(STAGES):
            width = widest // 2 ** (stage + 1)
            doubled = make.transposed("conv", width)
            self.blocks.append(
                Residual(
                    ConvNorm(doubled, make.norm("norm"), name="first"),
                    make.conv("second", width),
                    make.transposed("shortcut", width),
                    make.norm("norm"),
                    name=f"up{stage}",
                )
            )
        self.head = make.conv("head", 1, bias=True)

    def call(self, z: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The squares of the latents, float32."""
        features = tf.reshape(self.dense(z), [-1, *self._start_shape])
        for block in self.blocks:
            features = block(features, training=training)
        return tf.cast(self.head(features), self.head.variable_dtype)


class SquareMethod(Method):
    """A method that sees slices resampled to a square, and whose images are resampled back.

    The residual of a slice holds what the resampling blurs, as in the paper's comparison.
    """

    def to_square(self, images: tf.Tensor) -> tf.Tensor:
        """[B, H, W, 1] -> [B, s, s, 1]: bilinear, smoothed before it is made smaller."""
        return _resized(images, (self.network.square, self.network.square))

    def from_square(self, squares: tf.Tensor) -> tf.Tensor:
        """[B, s, s, 1] -> [B, H, W, 1]."""
        return _resized(squares, (self.network.height, self.network.width))

    def replaced(self, observed: tf.Tensor, squares: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """The squares at the size of the slices inside the mask, the observed slices outside."""
        inside = mask > 0
        return tf.where(inside, self.from_square(squares), observed)


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
