"""Encoder, decoder and prior network of the GMVAE (You et al., MIDL 2019, Table 3).

Every size below is that of 158 x 198 slices; the networks take any size of 30 + 4k pixels.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_lesion.config import NetworkConfig
from tf_lesion.noise import Tensors

RELEASED_STDDEV = 0.01  # truncated normal of every released kernel
RELEASED_BIAS = 0.01
DCGAN_STDDEV = 0.02  # normal, of every kernel of DCGAN (Radford et al., ICLR 2016)
LOG_PRECISION_BIAS = 0.1  # of the two log-precision heads, released code
UPSAMPLING = 2
PADDING = 2  # zeros around an upsampled map, so that 158 x 198 comes back as 158 x 198
PHASE_TAPS = (  # [phase of the output, tap on the small map, tap of the 3x3 kernel]
    ((1, 1, 0), (0, 0, 1)),
    ((1, 0, 0), (0, 1, 1)),
)
LATENT_STRIDE = 4
LATENT_MARGIN = 30  # a slice of 30 + 4k pixels has a latent grid of k

INITIALIZERS = {
    "truncated_normal": lambda: keras.initializers.TruncatedNormal(stddev=RELEASED_STDDEV),
    "he_normal": lambda: keras.initializers.HeNormal(),
    "dcgan": lambda: keras.initializers.RandomNormal(stddev=DCGAN_STDDEV),
}
Layer = keras.layers.Layer
# Of layers, by the precision of the convolutions: no global setting of Keras reaches a network.
PRECISIONS = {
    "float32": "float32",
    "tf32": "float32",  # and `devices.start` lets GPUs round factors
    "float64": "float64",
    "bfloat16": "mixed_bfloat16",
}
CHANNELS_LAST = {"data_format": "channels_last"}


def latent_size(pixels: int) -> int:
    """Length of the latent grid for a slice of `pixels` = 30 + 4k pixels: k (158 -> 32)."""
    return (pixels - LATENT_MARGIN) // LATENT_STRIDE


def weight_type(precision: str) -> str:
    """Type of weights, latents and losses: float32, unless the convolutions are in float64."""
    return "float64" if precision == "float64" else "float32"


class Conv2D(keras.layers.Conv2D):
    """The Keras layer, with a bias that learns in bfloat16.

    The gradient of `tf.nn.bias_add`, which Keras takes, sums up in bfloat16 and loses nearly all of
    the sum over a map; that of a plain addition does not.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """[B, H, W, C] -> [B, H', W', filters]."""
        if self.compute_dtype != "bfloat16" or not self.use_bias:
            return super().call(inputs)
        output = self.convolution_op(inputs, self.kernel)
        return self.activation(tf.add(output, tf.cast(self.bias, output.dtype)))


def constant(values: Any) -> Callable:
    """Initializer: one value for all, or the values themselves."""
    values = np.asarray(values, np.float32)
    return lambda shape, dtype=None: keras.ops.convert_to_tensor(
        np.broadcast_to(values, shape), dtype
    )


class Layers:
    """Makes the layers of one network: same initializer and precision, a name for each.

    `defaults` are options of its convolutions, `bias` among them: where it starts, None without.
    """

    def __init__(self, network: NetworkConfig, **defaults: Any):
        self.filters, self._defaults = network.num_filters, defaults
        self._initializer = INITIALIZERS[network.initializer]
        self.dtype = PRECISIONS[network.precision]

    def conv(self, name: str, filters: int, size: int = 3, **options: Any) -> Layer:
        """Convolution."""
        return Conv2D(filters, size, **self._options(name, options))

    def transposed(self, name: str, filters: int, size: int = 3, **options: Any) -> Layer:
        """Transposed convolution."""
        return keras.layers.Conv2DTranspose(filters, size, **self._options(name, options))

    def kernel(self) -> dict[str, Any]:
        """Options of every layer with a kernel."""
        return {"kernel_initializer": self._initializer(), "dtype": self.dtype}

    def _options(self, name, options):
        options = {**self._defaults, **self.kernel(), **CHANNELS_LAST, **options, "name": name}
        bias = options.pop("bias")
        start = constant(0 if bias is None else bias)
        return {**options, "use_bias": bias is not None, "bias_initializer": start}


def _layers(network):
    """As released: no padding, biases that start at 0.01."""
    return Layers(network, padding="valid", bias=RELEASED_BIAS)


def full_precision(head: Layer, features: tf.Tensor) -> tf.Tensor:
    """Output of a head in the precision of its weights: losses and latents stay in float32."""
    return keras.ops.cast(head(features), head.variable_dtype)


class Encoder(keras.Model):
    """q(z | x) and, for the GMVAE, q(omega | x): one shared trunk, two or four linear 1x1 heads.

    Source: You et al., MIDL 2019, Table 3.

    Shapes (x -> 158 x 198):
        image: [B, 158, 198, 1], normalised intensity
        z_mean, z_logvar: [B, 32, 42, dim_z]
        omega_mean, omega_logvar: [B, 32, 42, dim_omega]
    """

    STRIDES = (2, 1, 1, 2, 1, 1)

    def __init__(self, network: NetworkConfig, *, latents: tuple[str, ...] = ("omega", "z")):
        super().__init__(name="encoder", dtype=weight_type(network.precision))
        make = _layers(network)
        self.trunk = [
            make.conv(f"conv{position}", make.filters, strides=stride, activation="relu")
            for position, stride in enumerate(self.STRIDES)
        ]
        channels = {"omega": network.dim_omega, "z": network.dim_z}
        self.heads = {
            f"{latent}_{moment}": make.conv(f"{latent}_{moment}", channels[latent], size=1)
            for latent in latents
            for moment in ("mean", "logvar")
        }

    def call(self, image: tf.Tensor) -> Tensors:
        """Moments of the latents as a dict, keys as under Shapes."""
        features = image
        for layer in self.trunk:
            features = layer(features)
        return {name: full_precision(head, features) for name, head in self.heads.items()}


class Decoder(keras.Model):
    """p(x | z): mean and log-precision of every pixel.

    Source: You et al., MIDL 2019, Table 3; the zero padding of 2 around the two upsampled maps is
    the released code's.

    Attributes:
        fast: compute the convolutions of upsampled maps on the small maps, and transposed
            convolutions as convolutions; False is the definition, with `tf.image.resize`. It may be
            changed between calls.

    Shapes (heights; widths go 42, 46, 92, 96, 94, 98, 196, 200, 198):
        z: [B, 32, 42, dim_z]
        y_mean, y_log_precision: [B, 158, 198, 1]; log(1/sigma^2), not clipped
    """

    def __init__(self, network: NetworkConfig):
        super().__init__(name="decoder", dtype=weight_type(network.precision))
        self.fast = True
        make = _layers(network)
        wide = {"filters": make.filters, "activation": "relu"}
        self.input_layer = make.conv("conv0", size=1, **wide)
        self.low = [make.transposed(name, **wide) for name in ("transposed1", "transposed2")]
        self.middle = make.conv("conv3", **wide)
        self.high = [make.transposed(name, **wide) for name in ("transposed4", "transposed5")]
        self.mean_head = make.conv("y_mean", 1)
        self.log_precision_head = make.conv("y_log_precision", 1, bias=LOG_PRECISION_BIAS)

    def features(self, z: tf.Tensor) -> tf.Tensor:
        """Last feature map before it is upsampled for the heads, [B, 78, 98, 64]."""
        features = self.input_layer(z)  # 32
        for layer in self.low:
            features = self._transposed(layer, features)  # 34, 36
        features = self._upsampled(self.middle, features)  # 72, 76, 74
        for layer in self.high:
            features = self._transposed(layer, features)  # 76, 78
        return features

    def mean(self, z: tf.Tensor) -> tf.Tensor:
        """Mean of p(x | z) alone, [B, 158, 198, 1]: all that the restoration needs."""
        return self._head(self.mean_head, self.features(z))

    def call(self, z: tf.Tensor) -> Tensors:
        """Moments of the pixels as a dict, keys as under Shapes."""
        features = self.features(z)
        return {
            "y_mean": self._head(self.mean_head, features),
            "y_log_precision": self._head(self.log_precision_head, features),
        }

    def _head(self, head, features):
        return tf.cast(self._upsampled(head, features), head.variable_dtype)

    def _upsampled(self, layer, features):
        if self.fast:
            return conv_by_phases(layer, features)
        return layer(upsample_and_pad(features))

    def _transposed(self, layer, features):
        return transposed_as_conv(layer, features) if self.fast else layer(features)


def upsample_and_pad(features: tf.Tensor) -> tf.Tensor:
    """Nearest-neighbour x 2, then two rows and columns of zeros all around."""
    height, width = tf.shape(features)[1], tf.shape(features)[2]
    resized = tf.image.resize(features, [UPSAMPLING * height, UPSAMPLING * width], method="nearest")
    return tf.pad(resized, [[0, 0], [PADDING, PADDING], [PADDING, PADDING], [0, 0]])


def conv_by_phases(layer: Layer, features: tf.Tensor) -> tf.Tensor:
    """`layer(upsample_and_pad(features))` for a VALID 3x3 `layer`, with 2.25 x fewer products.

    Two of the three taps in a row of the kernel always meet the same pixel of the small map: which
    two depends on whether the output is even or odd. So each of the four phases of the output is a
    2x2 convolution of the small map, and `depth_to_space` puts them together. Equal up to rounding.
    """
    if not layer.built:
        layer.build(features.shape)
    merge = tf.constant(PHASE_TAPS, layer.kernel.dtype)
    kernel = tf.einsum("pat,qbs,tsio->abipqo", merge, merge, layer.kernel)
    kernel = tf.reshape(kernel, [2, 2, layer.kernel.shape[2], 4 * layer.kernel.shape[3]])
    edge = PADDING // UPSAMPLING
    padded = tf.pad(features, [[0, 0], [edge, edge], [edge, edge], [0, 0]])
    dtype = layer.compute_dtype
    phases = tf.nn.conv2d(tf.cast(padded, dtype), tf.cast(kernel, dtype), 1, "VALID")
    bias = tf.tile(tf.cast(layer.bias, dtype), [UPSAMPLING**2])
    phases = layer.activation(phases + bias)  # fused with the convolution
    return tf.nn.depth_to_space(phases, UPSAMPLING)


def transposed_as_conv(layer: Layer, features: tf.Tensor) -> tf.Tensor:
    """`layer(features)` for a VALID `Conv2DTranspose` with ReLU, fused into one operation.

    It is the convolution of the padded map with the turned kernel. TensorFlow fuses bias and ReLU
    into a convolution, but not into a transposed one.
    """
    if not layer.built:
        layer.build(features.shape)
    arguments = (tf.cast(x, layer.compute_dtype) for x in (features, layer.kernel, layer.bias))
    return _transposed_conv_relu(*arguments)


@tf.custom_gradient
def _transposed_conv_relu(features, kernel, bias):
    edges = [[size - 1, size - 1] for size in kernel.shape[:2]]
    padded = tf.pad(features, [[0, 0], *edges, [0, 0]])
    turned = tf.transpose(kernel[::-1, ::-1], [0, 1, 3, 2])
    output = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(padded, turned, 1, "VALID"), bias))

    def gradient(upstream):  # through the unpadded map, where there is less to compute
        upstream = tf.raw_ops.ReluGrad(gradients=upstream, features=output)
        options = {"strides": [1, 1, 1, 1], "padding": "VALID"}
        of_kernel = tf.raw_ops.Conv2DBackpropFilter(
            input=upstream, filter_sizes=tf.shape(kernel), out_backprop=features, **options
        )
        of_features = tf.nn.conv2d(upstream, kernel, **options)
        return of_features, of_kernel, tf.reduce_sum(upstream, [0, 1, 2])

    return output, gradient


class PriorNetwork(keras.Model):
    """Conditional prior p(z | omega, c): one diagonal Gaussian over z per cluster c.

    A 1x1 convolution shared by all clusters, then one linear 1x1 head for the means and one for the
    log-precisions. Nothing is shared across space but weights.

    Source: You et al., MIDL 2019, Table 3.

    Shapes (h x w latent grid, 32 x 42 for 158 x 198 slices; K clusters):
        omega:                [B, h, w, dim_omega]
        prior_mean:           [B, h, w, dim_z, K], unit of z
        prior_log_precision:  [B, h, w, dim_z, K], log(1/sigma^2), not clipped

    Raises:
        ValueError: if `num_clusters` is below 1.
    """

    def __init__(self, network: NetworkConfig):
        super().__init__(name="prior_network", dtype=weight_type(network.precision))
        self.dim_z, self.num_clusters = network.dim_z, network.num_clusters
        if self.num_clusters < 1:
            raise ValueError(f"Expected num_clusters of 1 or more, got {self.num_clusters}.")
        make, channels = _layers(network), self.dim_z * self.num_clusters
        self.hidden = make.conv("conv0", make.filters, size=1, activation="relu")
        mean, log_precision = RELEASED_BIAS, LOG_PRECISION_BIAS
        if network.cluster_start is not None:
            spread, deviation = network.cluster_start
            mean = np.tile(np.linspace(-spread, spread, self.num_clusters), self.dim_z)
            log_precision = -2 * np.log(deviation)
        self.mean_head = make.conv("prior_mean", channels, size=1, bias=mean)
        self.log_precision_head = make.conv(
            "prior_log_precision", channels, size=1, bias=log_precision
        )

    def call(self, omega: tf.Tensor) -> Tensors:
        """Moments of every cluster as a dict, keys as under Shapes."""
        features = self.hidden(omega)
        shape = tf.concat([tf.shape(features)[:3], [self.dim_z, self.num_clusters]], axis=0)
        heads = {"prior_mean": self.mean_head, "prior_log_precision": self.log_precision_head}
        return {
            name: tf.reshape(full_precision(head, features), shape) for name, head in heads.items()
        }
