"""Noise on the training slices: so that a prior learns to take out what does not belong.

`image_noise` is on what the networks see and on what they are to reproduce: no scan is as smooth as
its tissues. `coarse_noise` is on what the encoder sees alone, the denoising criterion of Im et al.
(AAAI 2017): blobs the size of lesions, brighter or darker (Kascenas et al., MIDL 2022), which a
prior that knows what tissue looks like removes. No lesion is seen or imitated.
"""

import math

import tensorflow as tf

from tf_lesion import corruption
from tf_lesion.caches.slices import BRAIN_FLOOR
from tf_lesion.config import TrainingConfig
from tf_lesion.noise import Tensors

BRIGHTEST = 1.2  # highest intensity of a slice with noise; that of the brain is 1
_DRAWS = 4  # per slice: width of the blobs, their strength, where the field begins along x and y


def noise_shapes(training: TrainingConfig, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the noise that one slice of `size` pixels needs, as of a `Method`."""
    shapes = {}
    if training.image_noise:
        shapes["image"] = (*size, 1)
    if training.coarse_noise:
        narrowest = training.coarse_noise_width[0]
        shapes["coarse"] = (*(math.ceil(length / narrowest) + 2 for length in size), 1)
        shapes["coarse_draws"] = (_DRAWS,)
    if training.corruption:
        shapes |= corruption.noise_shapes(size)
    return shapes


def augment(
    images: tf.Tensor, noise: Tensors, training: TrainingConfig
) -> tuple[tf.Tensor, tf.Tensor, Tensors]:
    """Take the noise of `noise_shapes` out of `noise` and put it on the brain.

    Args:
        images: [B, H, W, 1], 0 outside the brain.
        noise: {name: [B, ...]} standard normal; also for others.

    Returns:
        (images to reproduce [B, H, W, 1], what the encoder sees [B, H, W, 1], the other noise).
    """
    noise = dict(noise)
    if training.corruption:
        names = corruption.noise_shapes(images.shape[1:3])
        images, shown = corruption.corrupted(images, {name: noise.pop(name) for name in names})
        return images, shown, noise
    if training.image_noise:
        images = _on_brain(images, training.image_noise * noise.pop("image"))
    shown = images
    if training.coarse_noise:
        field = _blobs(noise.pop("coarse"), noise.pop("coarse_draws"), training, images.shape[1:3])
        shown = _on_brain(images, field)
    return images, shown, noise


def _on_brain(images, change):
    return tf.where(images > 0, tf.clip_by_value(images + change, BRAIN_FLOOR, BRIGHTEST), images)


def _blobs(grid, draws, training, size):
    """A smooth random field per slice, [B, H, W, 1].

    Its grid of normal values is `coarse_noise_width` pixels wide (drawn evenly on a logarithmic
    scale) and begins anywhere; its strength is drawn evenly up to `coarse_noise`.
    """
    width, strength, *starts = tf.unstack(0.5 * tf.math.erfc(-draws / math.sqrt(2.0)), axis=1)
    narrowest, widest = training.coarse_noise_width
    width = narrowest * tf.pow(widest / narrowest, width)
    lengths = zip(size, grid.shape[1:3], strict=True)
    spans = [(pixels - 1) / width / (cells - 1) for pixels, cells in lengths]
    lows = [start * (1.0 - span) for start, span in zip(starts, spans, strict=True)]
    highs = [low + span for low, span in zip(lows, spans, strict=True)]
    boxes = tf.stack([*lows, *highs], axis=1)
    fields = tf.image.crop_and_resize(grid, boxes, tf.range(tf.shape(grid)[0]), size)
    return training.coarse_noise * strength[:, None, None, None] * fields
