"""The network of the brain finder: a small 3-D U-Net that reads a whole scan as it lies.

It says of every voxel how far it is from the surface of the brain (in the manner of SynthStrip,
Hoopes et al., NeuroImage 2022) and where in MNI space it lies (registration by regression, Gopinath
et al., 2024; here as a distribution over bins, which learns faster). Written in `keras.ops`, it
runs on any backend.
"""

from typing import Any

import keras
from keras import layers, ops

from tf_lesion.scans.finder.canonical import LOGITS

FILTERS = (24, 48, 96, 128)  # at 6, 12, 24 and 48 mm
CHANNELS, SEEN = 12, 9  # of the input; of those, the ones that are no places
SLOPE = 0.1  # of the rectifier below 0
EPSILON = 1e-3


@keras.saving.register_keras_serializable("tf_lesion")
class Norm(layers.Layer):
    """Mean 0 and variance 1 over space, or root mean square 1 over channels; scale and offset.

    The first layers norm over space (Ulyanov et al. 2016), which makes contrasts alike. Deeper ones
    over the channels of each voxel (after Zhang and Sennrich, NeurIPS 2019): a norm over space
    would take away what is the same everywhere, such as the pose of a head.
    """

    def __init__(self, over: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.over = over

    def build(self, shape: tuple) -> None:
        """Scale [C] and offset [C]."""
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        self.offset = self.add_weight(shape=(shape[-1],), initializer="zeros", name="offset")

    def call(self, x: Any) -> Any:
        """[B, X, Y, Z, C] -> the same shape."""
        if self.over == "space":
            mean, variance = ops.moments(x, axes=(1, 2, 3), keepdims=True)
            factor = self.scale * ops.rsqrt(variance + EPSILON)
            return x * factor + (self.offset - mean * factor)
        square = ops.mean(ops.square(x), axis=-1, keepdims=True)
        return x * ops.rsqrt(square + EPSILON) * self.scale + self.offset


def _conv(x, filters, *, stride=1, over="channels"):
    x = layers.Conv3D(
        filters, 3, strides=stride, padding="same", use_bias=False, kernel_initializer="he_normal"
    )(x)
    return layers.LeakyReLU(SLOPE)(Norm(over)(x))


def _up(x, skip):
    """Twice the size, as many channels as `skip`, and the sum with it."""
    x = layers.Conv3D(skip.shape[-1], 1, use_bias=False)(x)
    return layers.UpSampling3D(2)(x) + skip


def build_network(filters: tuple[int, int, int, int] = FILTERS) -> keras.Model:
    """Where does the brain end, and where in MNI space does each voxel lie?

    Inputs:
        volume: [B, 2x, 2y, 2z, 12] at 6 mm, x, y and z whole multiples of 4: eight intensities at
            3 mm (`grid.to_channels`), the share inside of the scan, and the distance from the
            middle of the grid, 100 mm.

    Outputs:
        coordinates: [B, x, y, z, LOGITS] at 12 mm: logits of `canonical.BINS` along each axis of
            MNI space; `canonical.places_of` makes places of them.
        coarse: the same at 24 mm, for training.
        outside: [B, 2x, 2y, 2z, 8]: signed distance from the brain at 3 mm, 10 mm, negative
            inside; `grid.from_channels` puts it in order.
    """
    volume = keras.Input((None, None, None, CHANNELS), name="volume")
    place = layers.AveragePooling3D(2)(volume[..., SEEN:])  # at 12 mm
    x = _conv(volume[..., :SEEN], filters[0], over="space")
    skip1 = x = _conv(x, filters[0], over="space")
    x = layers.Concatenate()([_conv(x, filters[1], stride=2), place])
    skip2 = x = _conv(x, filters[1])
    skip3 = x = _conv(_conv(x, filters[2], stride=2), filters[2])
    x = _conv(x, filters[3], stride=2)
    x = layers.Concatenate()([x, layers.AveragePooling3D(4)(place)])
    x = _conv(_conv(x, filters[3]), filters[3])
    x = _conv(_up(x, skip3), filters[2])
    outputs = {"coarse": layers.Conv3D(LOGITS, 1, name="coarse")(x)}
    x = _conv(_conv(_up(x, skip2), filters[1]), filters[1])
    seen = layers.Concatenate()([x, place])
    outputs["coordinates"] = layers.Conv3D(LOGITS, 1, name="coordinates")(seen)
    x = _conv(_conv(_up(x, skip1), filters[0]), filters[0])
    outputs["outside"] = layers.Conv3D(8, 1, name="outside")(x)
    return keras.Model(volume, outputs, name="finder")
