"""A solver with long steps, closer to the total variation that was meant than the released one.

The released schedule takes small steps along a subgradient of TV(observed - x). Where neighboring
residuals are alike, the sign of their difference flips at every step, so a jitter remains, which
costs objective and forbids longer steps.

`huber` gives the ELBO a step of gradient ascent, and the total variation, rounded off below a fixed
`HUBER_BELOW`, a proximal step, which is stable for any length (forward-backward splitting,
Combettes and Wajs 2005; dual projected gradient, Chambolle 2004, Beck and Teboulle 2009; rounded as
by Huber 1964). An exact one holds residuals at 0 that the released jitter lets move.
"""

import tensorflow as tf

from tf_lesion.objective import differences, differences_adjoint

HUBER_BELOW = 0.02  # intensity: |d| is d^2 / (2 * HUBER_BELOW) + const below it
LEAST_WEIGHT = 1e-4  # lambda of a proximal step: less has no effect, and 0 no inverse
# Most a pixel's gradient may be, nats per unit intensity: few pass 1. Where the encoder is steep, a
# long step overshoots, and the overshoot grows until the clipping at 100 holds it.
HUBER_CLIP = 2.0
DUAL_ITERATIONS = 10
DIFFERENCE_NORM = 8.0  # upper bound of the squared norm of the differences of an image


def smoothed_residual(residual, *, mask, weight, below=HUBER_BELOW):
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
    step = 1.0 / (DIFFERENCE_NORM * weight)
    duals = [tf.clip_by_value(d / below, -1.0, 1.0) for d in differences(residual)]
    for _ in range(DUAL_ITERATIONS):
        ascended = differences(mask * (residual - weight * differences_adjoint(*duals)))
        duals = [
            tf.clip_by_value((dual + step * d) / (1.0 + step * below), -1.0, 1.0)
            for dual, d in zip(duals, ascended, strict=True)
        ]
    return mask * (residual - weight * differences_adjoint(*duals))
