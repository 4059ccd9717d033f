"""ELBO terms against SciPy, TFP, and Monte Carlo; the released quirks against hand formulas."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from scipy import stats

from tf_lesion import objective
from tf_lesion.config import RELEASED_PRECISION_OFFSET

tfd = tfp.distributions
DRAWS = 200_000


@pytest.fixture
def latents():
    """Random moments: B = 3, a 4 x 5 grid, 2 channels, 3 clusters; float64."""
    rng = np.random.default_rng(7)
    grid = (3, 4, 5, 2)
    return {
        "z": rng.normal(size=grid),
        "z_mean": rng.normal(size=grid),
        "z_logvar": rng.normal(-1, 0.5, size=grid),
        "prior_mean": rng.normal(size=(*grid, 3)),
        "prior_log_precision": rng.normal(0.5, 0.8, size=(*grid, 3)),
    }


def _prior(latents):
    return {name: latents[name] for name in ("prior_mean", "prior_log_precision")}


def test_log_likelihood_is_the_gaussian_log_density():
    rng = np.random.default_rng(0)
    image, mean = rng.normal(size=(2, 2, 6, 7, 1))
    log_precision = rng.uniform(0, 8, size=image.shape)
    expected = stats.norm.logpdf(image, mean, np.exp(-log_precision / 2)).sum(axis=(1, 2, 3))
    found = objective.log_likelihood(image, y_mean=mean, y_log_precision=log_precision)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_sigma_of_the_likelihood_stays_between_1e_8_and_1():
    image = np.full((1, 1, 1, 1), 0.5)
    for log_precision, sigma in ((-3.0, 1.0), (50.0, 1e-8)):
        found = objective.log_likelihood(
            image, y_mean=image, y_log_precision=np.full((1, 1, 1, 1), log_precision)
        )
        np.testing.assert_allclose(found, stats.norm.logpdf(0, 0, sigma), rtol=1e-9)


def test_fixed_sigma_log_likelihood_is_that_of_sigma_one_over_root_two():
    rng = np.random.default_rng(1)
    image, mean = rng.normal(size=(2, 2, 6, 7, 1))
    densities = stats.norm.logpdf(image, mean, np.sqrt(0.5)) - stats.norm.logpdf(0, 0, np.sqrt(0.5))
    found = objective.fixed_sigma_log_likelihood(image, y_mean=mean)
    np.testing.assert_allclose(found, densities.sum(axis=(1, 2, 3)), rtol=1e-12)


def test_bayes_responsibilities_are_those_of_a_tfp_mixture(latents):
    found = objective.cluster_probs(latents["z"], **_prior(latents), responsibilities="bayes")
    components = tfd.MultivariateNormalDiag(
        np.swapaxes(latents["prior_mean"], -1, -2),
        np.exp(-0.5 * np.swapaxes(latents["prior_log_precision"], -1, -2)),
    )
    mixture = tfd.MixtureSameFamily(tfd.Categorical(logits=np.zeros(3)), components)
    expected = mixture.posterior_marginal(latents["z"]).probs_parameter()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_released_responsibilities_count_the_log_precision_with_minus_one(latents):
    found = objective.cluster_probs(latents["z"], **_prior(latents), responsibilities="released")
    squared = (latents["z"][..., None] - latents["prior_mean"]) ** 2
    log_precision = latents["prior_log_precision"]
    logits = (-0.5 * squared * np.exp(log_precision) - log_precision).sum(axis=-2)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    bayes = objective.cluster_probs(latents["z"], **_prior(latents), responsibilities="bayes")
    assert np.abs(found - bayes).max() > 0.1


def test_unknown_responsibilities_are_refused(latents):
    with pytest.raises(ValueError, match="'bayes' or 'released', got softmax"):
        objective.cluster_probs(latents["z"], **_prior(latents), responsibilities="softmax")


def _kl_z(latents, probs, **options):
    names = ("z_mean", "z_logvar", "prior_mean", "prior_log_precision")
    moments = {name: latents[name] for name in names}
    return objective.kl_z(**moments, cluster_probs=probs, **options)


def test_kl_z_is_the_expected_kl_of_tfp_and_of_monte_carlo(latents):
    probs = np.random.default_rng(2).dirichlet(np.ones(3), size=(3, 4, 5))
    posterior = tfd.Normal(latents["z_mean"][..., None], np.exp(latents["z_logvar"] / 2)[..., None])
    prior = tfd.Normal(latents["prior_mean"], np.exp(-latents["prior_log_precision"] / 2))
    per_cluster = tf.reduce_sum(tfd.kl_divergence(posterior, prior), axis=-2)
    expected = tf.reduce_sum(probs * per_cluster, axis=[1, 2, 3])
    np.testing.assert_allclose(_kl_z(latents, probs), expected, rtol=1e-10)

    draws = posterior.sample(2_000, seed=3)
    estimate = tf.reduce_mean(posterior.log_prob(draws) - prior.log_prob(draws), axis=0)
    estimate = tf.reduce_sum(probs * tf.reduce_sum(estimate, axis=-2), axis=[1, 2, 3])
    np.testing.assert_allclose(estimate, expected, rtol=0.02)


def test_the_released_precision_offset_adds_its_share(latents):
    probs = np.full((3, 4, 5, 3), 1 / 3)
    offset = RELEASED_PRECISION_OFFSET
    squared = (
        np.exp(latents["z_logvar"])[..., None]
        + (latents["z_mean"][..., None] - latents["prior_mean"]) ** 2
    )
    share = 0.5 * offset * (squared / 3).sum(axis=(1, 2, 3, 4))
    difference = _kl_z(latents, probs, precision_offset=offset) - _kl_z(latents, probs)
    np.testing.assert_allclose(difference, share, rtol=1e-4)


def test_kl_to_the_standard_normal_agrees_with_tfp_and_monte_carlo(latents):
    mean, logvar = latents["z_mean"], latents["z_logvar"]
    posterior = tfd.Normal(mean, np.exp(logvar / 2))
    standard = tfd.Normal(np.float64(0), np.float64(1))
    expected = tf.reduce_sum(tfd.kl_divergence(posterior, standard), axis=[1, 2, 3])
    found = objective.kl_standard_normal(mean, logvar)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    draws = posterior.sample(2_000, seed=4)
    estimate = tf.reduce_mean(posterior.log_prob(draws) - standard.log_prob(draws), axis=0)
    np.testing.assert_allclose(tf.reduce_sum(estimate, [1, 2, 3]), expected, rtol=0.02)


def test_kl_c_is_the_divergence_from_uniform_and_at_least_the_floor():
    probs = np.random.default_rng(5).dirichlet(np.ones(4), size=(2, 3, 3))
    per_position = (probs * np.log(probs * 4)).sum(axis=-1)
    assert (per_position < 0.5).any()
    assert (per_position > 0.5).any()
    expected = per_position.sum(axis=(1, 2))
    np.testing.assert_allclose(objective.kl_c(probs), expected, rtol=1e-6)
    floored = np.maximum(per_position, 0.5).sum(axis=(1, 2))
    np.testing.assert_allclose(objective.kl_c(probs, floor=0.5), floored, rtol=1e-6)


def test_kl_c_of_a_certain_cluster_is_log_k():
    probs = np.array([[[[1.0, 0.0, 0.0, 0.0, 0.0]]]])
    np.testing.assert_allclose(objective.kl_c(probs), [np.log(5)], rtol=1e-6)


def test_total_variation_is_anisotropic():
    image = np.random.default_rng(6).normal(size=(2, 5, 6, 1))
    expected = np.abs(np.diff(image, axis=1)).sum((1, 2, 3))
    expected += np.abs(np.diff(image, axis=2)).sum((1, 2, 3))
    np.testing.assert_allclose(objective.total_variation(tf.constant(image)), expected)


def test_total_variation_has_the_subgradient_of_the_plain_one():
    image = np.random.default_rng(7).integers(0, 3, size=(2, 7, 6, 1)).astype(np.float64)
    image, weights = tf.constant(image), tf.constant([1.0, 0.3], tf.float64)
    found = []
    for variation in (objective.total_variation, tf.image.total_variation):
        with tf.GradientTape() as tape:
            tape.watch(image)
            loss = tf.reduce_sum(weights * variation(image))
        found.append(tape.gradient(loss, image))
    np.testing.assert_allclose(*found)


def test_the_elbo_is_a_lower_bound_on_the_evidence_of_a_solvable_model():
    """One latent, p(x | z) = N(z, s^2), p(z) = N(0, 1): log p(x) is known, and reached."""
    x, s = 0.7, 0.5
    variance = 1 / (1 + 1 / s**2)
    mean = variance * x / s**2  # the exact posterior
    z = mean + np.sqrt(variance) * np.random.default_rng(0).normal(size=DRAWS)
    likelihood = objective.log_likelihood(
        np.full((DRAWS, 1), x),
        y_mean=z[:, None],
        y_log_precision=np.full((DRAWS, 1), -2 * np.log(s)),
    )
    divergence = objective.kl_standard_normal(np.array([[mean]]), np.array([[np.log(variance)]]))
    evidence = stats.norm.logpdf(x, 0, np.sqrt(1 + s**2))
    assert float(np.mean(likelihood) - divergence[0]) == pytest.approx(evidence, abs=5e-3)
    shifted = objective.kl_standard_normal(np.array([[mean + 0.5]]), np.array([[np.log(variance)]]))
    worse = objective.log_likelihood(
        np.full((DRAWS, 1), x),
        y_mean=z[:, None] + 0.5,
        y_log_precision=np.full((DRAWS, 1), -2 * np.log(s)),
    )
    assert float(np.mean(worse) - shifted[0]) < evidence - 0.05
