"""Noise that belongs to a slice: a pure function of (seed, step, slice).

Each image of a batch draws from its own stateless generator, so that results depend neither on the
size of the batch, nor on its order, nor on where an interrupted run went on.
"""

import math
from typing import Any

import tensorflow as tf

Tensors = dict[str, tf.Tensor]  # by name
STREAMS = {"training": 0, "test": 1, "restoration": 2}
_STEP_BITS = 32  # the slice fills the lower 32 bits of the counter, the step the upper ones


def slice_noise(
    shapes: dict[str, tuple[int, ...]], *, seed: Any, step: Any, slices: Any, stream: str
) -> Tensors:
    """Standard normal noise for every slice of a batch.

    Args:
        shapes: {latent: (h, w, channels)}; the latents draw in this order from one generator.
        slices: [B] integers, the identity of each slice (its row in the cache).
        stream: "training", "test" or "restoration"; each has noise of its own.

    Returns:
        {latent: [B, h, w, channels]} float32.
    """
    if not shapes:
        return {}
    sizes = [math.prod(shape) for shape in shapes.values()]
    seed, step, slices = (tf.cast(number, tf.int64) for number in (seed, step, slices))
    key = seed * len(STREAMS) + STREAMS[stream]
    counters = tf.bitwise.left_shift(step, _STEP_BITS) + slices

    def draw(counter):
        return tf.random.stateless_normal([sum(sizes)], seed=tf.stack([key, counter]))

    flat = tf.map_fn(draw, counters, fn_output_signature=tf.TensorSpec([sum(sizes)], tf.float32))
    parts = tf.split(flat, sizes, axis=1)
    named = zip(shapes.items(), parts, strict=True)
    return {latent: tf.reshape(part, [-1, *shape]) for (latent, shape), part in named}
