"""The terms of the evidence lower bound, each per image [B], in nats.

Source: You et al., MIDL 2019, Equation 2, and the code released with it. Where the two part, both
are here: `responsibilities`, `kl_c(floor=...)` and `kl_z(precision_offset=...)`.

Axes: h x w is the latent grid, D the channels of z, K the clusters; `z_*` are [B, h, w, D],
`prior_*` [B, h, w, D, K].
"""

import math
from typing import Any

import tensorflow as tf
import tensorflow_probability as tfp

from tf_lesion.noise import Tensors

tfd = tfp.distributions

SIGMA_RANGE = (1e-8, 1.0)  # released code: sigma of p(x | z) is kept between these
LOG_PRECISION_RANGE = (-2 * math.log(SIGMA_RANGE[1]), -2 * math.log(SIGMA_RANGE[0]))
LOG_EPSILON = 1e-8  # released code: inside the logarithm of KL(c)


def _per_image(terms):
    return tf.reduce_sum(terms, axis=list(range(1, terms.shape.rank)))


def _normal(mean, log_precision):
    return tfd.Normal(mean, tf.exp(-0.5 * log_precision))


def log_likelihood(image: tf.Tensor, *, y_mean: tf.Tensor, y_log_precision: tf.Tensor) -> tf.Tensor:
    """log N(image; y_mean, sigma^2), sigma clipped to [1e-8, 1] through its log-precision; [B]."""
    clipped = tf.clip_by_value(y_log_precision, *LOG_PRECISION_RANGE)
    return _per_image(_normal(y_mean, clipped).log_prob(image))


def fixed_sigma_log_likelihood(image: tf.Tensor, *, y_mean: tf.Tensor) -> tf.Tensor:
    """-sum (image - y_mean)^2: the log-likelihood at sigma = 1/sqrt(2), its constant left out; [B].

    The restoration uses it in place of `log_likelihood` (paper, section 2.2), because a large
    sigma where the reconstruction fails would shield the lesion.
    """
    return -_per_image(tf.square(image - y_mean))


def cluster_probs(
    z: tf.Tensor, *, prior_mean: tf.Tensor, prior_log_precision: tf.Tensor, responsibilities: str
) -> tf.Tensor:
    """Responsibilities p(c | z, omega) [B, h, w, K] of z [B, h, w, D], for equally likely clusters.

    `responsibilities` is "bayes" for Bayes' rule with the Gaussian density (paper), or "released"
    for the released code's logits, in which the log-precision counts -1 instead of +1/2: they favor
    broad clusters.
    """
    z = z[..., None]
    if responsibilities == "bayes":
        logits = _normal(prior_mean, prior_log_precision).log_prob(z)
    elif responsibilities == "released":
        logits = released_logits(z, prior_mean, prior_log_precision)
    else:
        raise ValueError(
            f"Expected responsibilities 'bayes' or 'released', got {responsibilities}."
        )
    return tf.nn.softmax(tf.reduce_sum(logits, axis=-2), axis=-1)


def released_logits(
    z: tf.Tensor, prior_mean: tf.Tensor, prior_log_precision: tf.Tensor
) -> tf.Tensor:
    """The released code's -(z - m)^2 exp(l) / 2 - l + log pi, elementwise; not a log-density."""
    squared = tf.square(z - prior_mean) * tf.exp(prior_log_precision)
    return -0.5 * squared - prior_log_precision + math.log(math.pi)


def kl_z(
    *,
    z_mean: tf.Tensor,
    z_logvar: tf.Tensor,
    prior_mean: tf.Tensor,
    prior_log_precision: tf.Tensor,
    cluster_probs: tf.Tensor,
    precision_offset: float = 0.0,
) -> tf.Tensor:
    """E_c KL[q(z | x) || p(z | omega, c)], clusters weighted by `cluster_probs` [B, h, w, K]; [B].

    `precision_offset` is added to the prior's precision: 1e-6 in the released code, 0 is exact.
    """
    z_mean, z_logvar = z_mean[..., None], z_logvar[..., None]
    squared = tf.exp(z_logvar) + tf.square(z_mean - prior_mean)
    precision = tf.exp(prior_log_precision) + precision_offset
    per_cluster = 0.5 * (squared * precision - prior_log_precision - z_logvar - 1.0)
    return _per_image(cluster_probs[..., None, :] * per_cluster)


def kl_standard_normal(mean: tf.Tensor, logvar: tf.Tensor) -> tf.Tensor:
    """KL[N(mean, exp(logvar)) || N(0, 1)], summed over positions and channels; [B].

    It is KL(omega) of the GMVAE and KL(z) of the VAE. Written out and summed in this order because
    the terms cancel near the prior: in float32 other orders, `tfd.kl_divergence` among them, part
    from the released code by up to 4e-4 of the sum.
    """
    return _per_image(0.5 * (tf.square(mean) + tf.exp(logvar) - (logvar + 1.0)))


def kl_c(cluster_probs: tf.Tensor, *, floor: float = 0.0) -> tf.Tensor:
    """KL[p(c | z, omega) || uniform], at least `floor` nats at every latent position; [B]."""
    clusters = tf.cast(tf.shape(cluster_probs)[-1], cluster_probs.dtype)
    terms = cluster_probs * tf.math.log(cluster_probs * clusters + LOG_EPSILON)
    return _per_image(tf.maximum(tf.reduce_sum(terms, axis=-1), floor))


def elbo(terms: Tensors, *, kl_weight: Any = 1.0) -> tf.Tensor:
    """ELBO [B] from named terms: log_likelihood - kl_weight * (sum of the KL terms)."""
    divergence = tf.add_n([term for name, term in terms.items() if name.startswith("kl_")])
    return terms["log_likelihood"] - kl_weight * divergence


def differences(image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Differences of neighbors, [B, H - 1, W, 1] along H and [B, H, W - 1, 1] along W."""
    return image[:, 1:] - image[:, :-1], image[:, :, 1:] - image[:, :, :-1]


def differences_adjoint(along_x: tf.Tensor, along_y: tf.Tensor) -> tf.Tensor:
    """Adjoint of `differences`, [B, H, W, 1]."""
    x = tf.pad(along_x, [[0, 0], [1, 1], [0, 0], [0, 0]])
    y = tf.pad(along_y, [[0, 0], [0, 0], [1, 1], [0, 0]])
    return x[:, :-1] - x[:, 1:] + y[:, :, :-1] - y[:, :, 1:]


def total_variation(images: tf.Tensor) -> tf.Tensor:
    """Anisotropic total variation [B] of [B, H, W, 1]: the sum of all absolute differences."""
    return tf.add_n([_per_image(tf.abs(along)) for along in differences(images)])


def total_variation_gradient(images: tf.Tensor) -> tf.Tensor:
    """Subgradient of `total_variation`, [B, H, W, 1]: 0 where neighbors are equal.

    The one that automatic differentiation finds, in a sixth of the time.
    """
    return differences_adjoint(*map(tf.sign, differences(images)))
