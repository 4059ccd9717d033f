"""The proximal solver: the restoration's objective in a tenth of the steps.

The released schedule takes small steps along a subgradient of TV(observed - x). Where neighboring
residuals are alike, the sign of their difference flips at every step, so a jitter of about
4 * tv_weight * step_size remains, which costs objective and forbids longer steps. On average over
the flips, the sign acts as a slope: the ascent behaves as if |d| were rounded off below that size.

Here the ELBO takes a step of gradient ascent, and the rounded total variation a proximal step,
which is stable for any length (forward-backward splitting, Combettes and Wajs 2005; dual projected
gradient, Chambolle 2004, Beck and Teboulle 2009; rounded as by Huber 1964). An exact total
variation, not rounded, has a better objective still, but it holds residuals at 0 that the released
schedule lets move, and finds fewer lesions.
"""

import tensorflow as tf

ROUNDED_BELOW = 0.02  # intensity: |d| is d^2 / (2 * ROUNDED_BELOW) + const below it
DUAL_ITERATIONS = 10
DIFFERENCE_NORM = 8.0  # upper bound of the squared norm of the differences of an image


def smoothed_residual(residual, *, mask, weight):
    """Proximal step of weight * (rounded total variation), kept at 0 outside the mask.

    Minimises |u - residual|^2 / 2 + weight * sum h(differences of u) with h the rounded absolute
    value, by projected gradient ascent on the dual, started at the dual of `residual` itself.

    Args:
        residual: [B, H, W, 1], observed - image.
        mask: [B, H, W, 1], 1 inside the brain.
        weight: tv_weight * step_size, intensity.

    Returns:
        u, [B, H, W, 1].
    """
    step = 1.0 / (DIFFERENCE_NORM * weight)
    duals = [tf.clip_by_value(d / ROUNDED_BELOW, -1.0, 1.0) for d in _differences(residual)]
    for _ in range(DUAL_ITERATIONS):
        ascended = _differences(mask * (residual - weight * _adjoint(*duals)))
        duals = [
            tf.clip_by_value((dual + step * d) / (1.0 + step * ROUNDED_BELOW), -1.0, 1.0)
            for dual, d in zip(duals, ascended, strict=True)
        ]
    return mask * (residual - weight * _adjoint(*duals))


def _differences(image):
    """Differences of neighbors along x [B, H - 1, W, 1] and along y [B, H, W - 1, 1]."""
    return image[:, 1:] - image[:, :-1], image[:, :, 1:] - image[:, :, :-1]


def _adjoint(along_x, along_y):
    """Adjoint of `_differences`, [B, H, W, 1]."""
    x = tf.pad(along_x, [[0, 0], [1, 0], [0, 0], [0, 0]])
    x -= tf.pad(along_x, [[0, 0], [0, 1], [0, 0], [0, 0]])
    y = tf.pad(along_y, [[0, 0], [0, 0], [1, 0], [0, 0]])
    y -= tf.pad(along_y, [[0, 0], [0, 0], [0, 1], [0, 0]])
    return x + y
