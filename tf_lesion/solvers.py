"""Two solvers with long steps: the objective of the released schedule in a fraction of its steps.

The released schedule takes small steps along a subgradient of TV(observed - x). Where neighboring
residuals are alike, the sign of their difference flips at every step, so a jitter remains, which
costs objective and forbids longer steps. A pixel moves by up to 4 * tv_weight * step_size in a
step, the difference of two by twice that. On average over the flips, the sign acts as a slope: the
ascent behaves as if |d| were rounded off below that size.

Here the ELBO takes a step of gradient ascent, and the rounded total variation a proximal step,
which is stable for any length (forward-backward splitting, Combettes and Wajs 2005; dual projected
gradient, Chambolle 2004, Beck and Teboulle 2009; rounded as by Huber 1964).

`proximal` rounds where the jitter of the released schedule does, and takes 100 steps. `huber` takes
50 and rounds below a fixed `HUBER_BELOW`, whatever lambda is: above 1.25 that is closer to the
total variation that was meant. (An exact one holds residuals at 0 that the others let move.)
"""

import tensorflow as tf

from tf_lesion.config import RELEASED_STEP

HUBER_BELOW = 0.02  # intensity: |d| is d^2 / (2 * HUBER_BELOW) + const below it
JITTER = 8.0  # of the difference of two pixels in a step, in tv_weight * step_size
DUAL_ITERATIONS = 10
DIFFERENCE_NORM = 8.0  # upper bound of the squared norm of the differences of an image


def rounded_below(solver, tv_weight):
    """The size of differences below which the total variation of a solver is rounded off.

    Args:
        solver: "proximal" or "huber".
        tv_weight: lambda, above 0; a number or a tensor.
    """
    return JITTER * tv_weight * RELEASED_STEP if solver == "proximal" else HUBER_BELOW


def smoothed_residual(residual, *, mask, weight, below):
    """Proximal step of weight * (rounded total variation), kept at 0 outside the mask.

    Minimises |u - residual|^2 / 2 + weight * sum h(differences of u) with h the rounded absolute
    value, by projected gradient ascent on the dual, started at the dual of `residual` itself.

    Args:
        residual: [B, H, W, 1], observed - image.
        mask: [B, H, W, 1], 1 inside the brain.
        weight: tv_weight * step_size, intensity, above 0.
        below: intensity; |d| is d^2 / (2 * below) + const below it.

    Returns:
        u, [B, H, W, 1].
    """
    residual, mask = residual[..., 0], mask[..., 0]
    step = 1.0 / (DIFFERENCE_NORM * weight)
    duals = [tf.clip_by_value(d / below, -1.0, 1.0) for d in _differences(residual)]
    for _ in range(DUAL_ITERATIONS):
        ascended = _differences(mask * (residual - weight * _adjoint(*duals)))
        duals = [
            tf.clip_by_value((dual + step * d) / (1.0 + step * below), -1.0, 1.0)
            for dual, d in zip(duals, ascended, strict=True)
        ]
    return (mask * (residual - weight * _adjoint(*duals)))[..., None]


def _differences(image):
    """Differences of neighbors along x [B, H - 1, W] and along y [B, H, W - 1]."""
    return image[:, 1:] - image[:, :-1], image[:, :, 1:] - image[:, :, :-1]


def _adjoint(along_x, along_y):
    """Adjoint of `_differences`, [B, H, W]."""
    x = tf.pad(along_x, [[0, 0], [1, 1], [0, 0]])
    y = tf.pad(along_y, [[0, 0], [0, 0], [1, 1]])
    return x[:, :-1] - x[:, 1:] + y[:, :, :-1] - y[:, :, 1:]
