"""The two networks of the brain finder: one that finds the pose, one that finds the surface.

Both are small 3-D U-Nets (Ronneberger et al., MICCAI 2015) that are told where their voxels lie.
They are written in `keras.ops`, and run on any backend.
"""

from typing import Any

import keras
from keras import layers, ops

POSE_FILTERS = (24, 64, 96)  # at 12, 24 and 48 mm
SURFACE_FILTERS = (16, 40, 64)  # at 6, 12 and 24 mm
POSE_SIDE, POINTS = 20, 26  # voxels of 12 mm; places whose positions are found
SQUEEZED, HIDDEN = 24, 128  # channels at 48 mm; numbers that the positions are read from
PRIOR = 0.4  # factor on the average brain and places, beside features of about 1
CALM = 0.1  # factor on wide sums: else steps of Adam move the output by more than it spreads
SLOPE = 0.1  # of the rectifier below 0
EPSILON = 1e-3
LEAST_LOG_SCALE, LARGEST_LOG_SCALE = -3.0, 4.0  # of a distance in mm


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


def build_pose_network(filters: tuple[int, int, int] = POSE_FILTERS) -> keras.Model:
    """Where does each of POINTS places of the brain lie?

    Inputs:
        volume: [B, 20, 20, 20, 12] at 12 mm: eight intensities at 6 mm (`grid.to_channels`), the
            share inside of the scan, and the distance from the middle of the grid, 100 mm.

    Outputs:
        [B, POINTS, 3]: from where `canonical.brain_points` lie in an average head in the middle of
        the grid to where they lie in this one, 100 mm.
    """
    volume = keras.Input((POSE_SIDE, POSE_SIDE, POSE_SIDE, 12), name="volume")
    x = _conv(volume[..., :9], filters[0], over="space")
    x = _conv(x, filters[0], over="space")
    place = layers.AveragePooling3D(2)(volume[..., 9:])
    x = layers.Concatenate()([_conv(x, filters[1], stride=2), place])
    x = _conv(x, filters[1])
    x = _conv(_conv(_conv(x, filters[2], stride=2), filters[2]), filters[2])
    x = CALM * layers.Flatten()(_conv(x, SQUEEZED))
    x = layers.LeakyReLU(SLOPE)(layers.Dense(HIDDEN, kernel_initializer="he_normal")(x))
    x = CALM * layers.Dense(3 * POINTS)(x)
    return keras.Model(volume, layers.Reshape((POINTS, 3))(x), name="pose")


def build_surface_network(filters: tuple[int, int, int] = SURFACE_FILTERS) -> keras.Model:
    """Where does the brain end, and how far is the head still from its place in MNI space?

    Inputs:
        volume: [B, 2x, 2y, 2z, 13] at 6 mm, about in MNI space: eight intensities at 3 mm, the
            share inside of the scan, the distance of the average brain, 10 mm, and the place in
            MNI space, 100 mm.

    Outputs:
        coordinates: [B, x, y, z, 4] at 12 mm: from the place on the grid to that in MNI space,
            10 mm; log of its error, mm.
        outside: [B, 2x, 2y, 2z, 8]: signed distance from the brain at 3 mm, 10 mm, negative
            inside; `grid.from_channels` puts it in order.
    """
    volume = keras.Input((None, None, None, 13), name="volume")
    x = _conv(volume[..., :9], filters[0], over="space")
    x = _conv(x, filters[0], over="space")
    skip1 = x = layers.Concatenate()([x, PRIOR * volume[..., 9:]])
    skip2 = x = _conv(_conv(x, filters[1], stride=2), filters[1])
    x = _conv(_conv(x, filters[2], stride=2), filters[2])
    x = _conv(_conv(_up(x, skip2), filters[1]), filters[1])
    coordinates = layers.Conv3D(4, 1, name="coordinates")(x)
    x = _conv(_conv(_up(x, skip1), filters[0]), filters[0])
    outputs = {"coordinates": coordinates, "outside": layers.Conv3D(8, 1, name="outside")(x)}
    return keras.Model(volume, outputs, name="surface")
