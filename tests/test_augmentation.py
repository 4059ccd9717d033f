"""Noise on training slices: where it goes, how strong and how wide it is."""

import numpy as np
import pytest
import tensorflow as tf

from tf_lesion.augmentation import augment, noise_shapes
from tf_lesion.config import TrainingConfig
from tf_lesion.noise import slice_noise
from tf_lesion.presets import preset
from tf_lesion.training.update import Updater

SIZE = (158, 198)
SLICES = 12


@pytest.fixture
def images():
    """[12, 158, 198, 1]: a brain of intensity 0.5 in a background of 0."""
    stack = np.zeros((SLICES, *SIZE, 1), np.float32)
    stack[:, 20:140, 20:180] = 0.5
    return tf.constant(stack)


def _augmented(images, training, *, step=0, rows=tuple(range(SLICES))):
    shapes = noise_shapes(training, SIZE)
    noise = slice_noise(shapes, seed=0, step=step, slices=tf.constant(rows), stream="training")
    return augment(tf.gather(images, rows), {"z": tf.zeros([1]), **noise}, training)


def test_without_noise_nothing_changes(images):
    target, shown, noise = _augmented(images, TrainingConfig())
    assert noise.keys() == {"z"}
    np.testing.assert_array_equal(target, images)
    np.testing.assert_array_equal(shown, images)


def test_image_noise_is_on_both_and_coarse_noise_on_what_the_encoder_sees(images):
    training = TrainingConfig(image_noise=0.03, coarse_noise=0.3)
    target, shown, noise = _augmented(images, training)
    assert noise.keys() == {"z"}
    brain = images > 0
    for changed in (target, shown):
        assert tf.reduce_all(changed[~brain] == 0)
    assert np.std(target[brain]) == pytest.approx(0.03, rel=0.02)
    strength = np.std(np.reshape((shown - target)[:, 20:140, 20:180], [SLICES, -1]), axis=1)
    assert strength.max() < 0.3
    assert strength.max() > 2 * strength.min()  # some slices get little


def test_blobs_are_as_wide_as_asked_for(images):
    def width(low, high):
        training = TrainingConfig(coarse_noise=0.1, coarse_noise_width=(low, high))
        field = (_augmented(images, training)[1] - images)[:, 20:140, 20:180, 0].numpy()
        change = np.diff(field, axis=1).std() / field.std()
        return 1 / change

    assert width(16.0, 16.0) == pytest.approx(2 * width(8.0, 8.0), rel=0.25)


def test_noise_belongs_to_the_slice_and_the_step(images):
    training = TrainingConfig(image_noise=0.03, coarse_noise=0.3)
    together = _augmented(images, training)[1]
    alone = _augmented(images, training, rows=(5,))[1]
    np.testing.assert_allclose(alone[0], together[5], atol=1e-6)
    assert not np.allclose(_augmented(images, training, step=1)[1], together)


def test_the_denoising_preset_asks_the_decoder_for_what_the_encoder_was_not_shown(images):
    config = preset("denoising").replace(
        network={"height": 46, "width": 50, "num_filters": 4, "precision": "float32"},
        training={"image_noise": 0.0},
    )
    update = Updater(config, _one_device())
    small = images[:4, 60:106, 60:110]
    noise = update.noise(tf.range(4), 0, "training")
    seen = {}
    terms = update.model.terms

    def spy(target, noise, *, training=False, shown=None):
        seen.update(target=target, shown=shown, names=set(noise))
        return terms(target, noise, training=training, shown=shown)

    update.model.terms = spy
    update._everywhere(small, tf.range(4, dtype=tf.int64), tf.constant(1.0), tf.constant(0.0))
    np.testing.assert_array_equal(seen["target"], small)
    assert np.std(seen["shown"] - small) > 0.01
    assert seen["names"] == set(noise)
    clean = update.model.elbo_terms(small, noise)
    shown = update.model.elbo_terms(small, noise, shown=seen["shown"])
    assert np.all(shown["log_likelihood"] < clean["log_likelihood"])


def test_clusters_start_apart():
    model = Updater(
        preset("denoising").replace(network={"height": 46, "width": 50}), _one_device()
    ).model
    prior = model.prior_network(tf.zeros([1, 4, 5, 1]))
    np.testing.assert_allclose(prior["prior_mean"][0, 0, 0, 0], np.linspace(-3, 3, 9), atol=0.3)
    deviation = np.exp(-0.5 * prior["prior_log_precision"])
    np.testing.assert_allclose(deviation, 0.3, rtol=0.1)


def _one_device():
    from tf_lesion.training.distribution import make_placement

    return make_placement()
