"""Min-max normalization and histogram matching as TensorFlow graphs, for the exported model.

The same numbers as `normalize` and `match_to_reference` of `scans.intensity`, which work in NumPy:
float64 throughout, rounded to float32 at the end of each. All brain pixels of one call take part
together, so a call should hold the slices of one subject.
"""

import numpy as np
import tensorflow as tf

from tf_lesion.caches.slices import BRAIN_FLOOR, HIGHEST_PERCENTILE, LOWEST_PERCENTILE

PERCENT = 100


def prepared(images: tf.Tensor, mask: tf.Tensor, reference: np.ndarray | None) -> tf.Tensor:
    """Normalized and, if there is a reference, matched to it; see `normalize`."""
    images = normalize(images, mask)
    return images if reference is None else match_to_reference(images, mask, reference)


def normalize(images: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Min-max inside the brain, between the 0.1th and the 99.9th percentile of the brain.

    Args:
        images: [B, H, W, 1] float32, any unit.
        mask: [B, H, W, 1] bool, brain.

    Returns:
        [B, H, W, 1] float32: 1e-3 to 1 in the brain, exactly 0 outside.

    Raises:
        tf.errors.InvalidArgumentError: if the brain is empty, constant or not finite.
    """
    values = tf.boolean_mask(images, mask)
    with tf.control_dependencies(
        [
            tf.debugging.assert_positive(tf.size(values), "the brain mask holds no pixel."),
            tf.debugging.assert_all_finite(values, "the brain holds NaN or infinite values."),
        ]
    ):
        ordered = tf.sort(values)
    low = _percentile(ordered, LOWEST_PERCENTILE)
    high = _percentile(ordered, HIGHEST_PERCENTILE)
    with tf.control_dependencies(
        [tf.debugging.assert_greater(high, low, "the brain is constant.")]
    ):
        scaled = (tf.cast(values, tf.float64) - low) / (high - low)
    return _inside(tf.clip_by_value(scaled, BRAIN_FLOOR, 1.0), mask)


def _percentile(ordered, percent):
    """Percentile of ascending values; `numpy.percentile` to the last bit, as TFP's is not."""
    last = tf.size(ordered) - 1
    place = tf.constant(percent / PERCENT, tf.float64) * tf.cast(last, tf.float64)
    below = tf.cast(tf.floor(place), tf.int32)
    low, high = ordered[below], ordered[tf.minimum(below + 1, last)]
    share = place - tf.cast(below, tf.float64)
    low, high, step = (tf.cast(value, tf.float64) for value in (low, high, high - low))
    # NumPy measures from the nearer of the two, so that the end points come back exactly.
    nearer_low = share < 0.5
    return tf.where(nearer_low, low + step * share, high - step * (1 - share))


def match_to_reference(images: tf.Tensor, mask: tf.Tensor, reference: np.ndarray) -> tf.Tensor:
    """Match the histogram of the brain to that of the reference subject.

    Args:
        images: [B, H, W, 1] float32, normalized.
        mask: [B, H, W, 1] bool, brain.
        reference: [Q] quantiles of the reference's brain, NumPy.

    Returns:
        [B, H, W, 1] float32, above 0 in the brain, exactly 0 outside.
    """
    reference = np.asarray(reference, np.float64).ravel()
    levels, counts = np.unique(reference, return_counts=True)
    ranks = np.cumsum(counts) / reference.size
    values = tf.boolean_mask(images, mask)
    below = tf.searchsorted(tf.sort(values), values, side="right", out_type=tf.int64)
    rank = tf.cast(below, tf.float64) / tf.cast(tf.size(values), tf.float64)
    low = max(levels[0], BRAIN_FLOOR)
    matched = _interpolated(rank, ranks, levels)
    return _inside(tf.clip_by_value(matched, low, max(levels[-1], low)), mask)


def _interpolated(x, places, values):
    """`numpy.interp(x, places, values)` for x up to the last place."""
    slopes = np.append(np.diff(values) / np.diff(places), 0.0)
    segment = tf.searchsorted(tf.constant(places), x, side="right") - 1
    inside = tf.maximum(segment, 0)
    places, values, slopes = (
        tf.gather(tf.constant(table), inside) for table in (places, values, slopes)
    )
    return tf.where(segment < 0, values, values + slopes * (x - places))


def _inside(values, mask):
    rounded = tf.cast(values, tf.float32)
    return tf.scatter_nd(tf.where(mask), rounded, tf.shape(mask, out_type=tf.int64))
