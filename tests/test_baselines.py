"""The other methods of Table 1: training, detection, and the interface that a seventh would use."""

import re

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run, phantom_slices, small_config

import restore_brats
import train_gmvae
from eval import select_lambda, thresholds
from tf_lesion.baselines.adversarial import gradient_penalty, uniform
from tf_lesion.config import preset
from tf_lesion.methods import METHODS, make_model
from tf_lesion.noise import slice_noise
from tf_lesion.restoration import Restorer, restore
from tf_lesion.restored import RestoredReader
from tf_lesion.runs import Run, load
from tf_lesion.slices import SliceCache
from tf_lesion.training import Trainer

BASELINES = ("vae-256", "vae-128", "aae-128", "anogan")
ADVERSARIAL = ("aae-128", "anogan")
TRAINED = ("vae-128", *ADVERSARIAL)  # vae-256 only differs in its square


def _trainer(model, cache, folder, **training):
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "gradient_norm_limit": None}
    config = small_config(model, "practical", training={**settings, **training})
    config = config.replace(network={"precision": "float32"})
    train, test = SliceCache(cache, "Train"), SliceCache(cache, "Test")
    return Trainer(Run(folder), config, train=train, test=test)


def _state(variables):
    return {variable.path: variable.numpy() for variable in variables}


def _changed(before, variables):
    return {v.path for v in variables if np.abs(before[v.path] - v.numpy()).max() > 0}


def _paths(*networks):
    return {weight.path for network in networks for weight in network.weights}


def _noise(model, rows, step=0):
    return slice_noise(model.noise_shapes, seed=0, step=step, slices=rows, stream="training")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_path):
    """A run of every baseline, of 12 steps."""
    folder = tmp_path_factory.mktemp("baselines")
    return {model: make_run(folder / model, cache_path, model) for model in TRAINED}


def test_all_methods_of_table_1_are_registered_with_their_sizes():
    assert tuple(METHODS)[:2] == ("gmvae", "vae")
    assert set(BASELINES) < set(METHODS)
    assert [preset("paper", model).network.square for model in BASELINES] == [256, 128, 128, 128]
    aae, gan = preset("released", "aae-128").training, preset("released", "anogan")
    assert (aae.learning_rate, aae.beta_1, aae.beta_2) == (2e-5, 0.5, 0.9)
    assert (gan.training.learning_rate, gan.training.beta_1) == (2e-4, 0.5)
    assert gan.restoration.steps == 500


def test_the_networks_have_the_described_sizes():
    config = preset("paper", "vae-128").replace(network={"height": 38, "width": 42})
    model = make_model(config)
    features = tf.zeros([1, 128, 128, 1])
    widths = []
    for block in model.encoder.blocks:
        features = block(features)
        widths.append(tuple(features.shape[1:]))
    assert widths == [(128, 128, 16), (64, 64, 32), (32, 32, 64), (16, 16, 128), (8, 8, 256)]
    assert model.decoder(tf.zeros([1, 128])).shape == (1, 128, 128, 1)
    critic = make_model(small_config("aae-128")).critic
    assert [layer.units for layer in (*critic.hidden, critic.head)] == [200, 400, 1]


@pytest.mark.parametrize("model", BASELINES)
def test_shapes_names_and_that_nothing_changes_outside_the_mask(model):
    method = make_model(small_config(model))
    assert len(_paths(method)) == len(method.weights)
    images = phantom_slices(3)[..., None]
    mask = (images > 0) * (np.arange(42)[:, None] > 20)
    terms = method.terms(images, _noise(method, [0, 1, 2]))
    assert {tuple(term.shape) for term in terms.values()} == {(3,)}
    options = {"slices": [0, 1, 2], "seed": 0, "steps": 2, "tv_weight": 0.0}
    restored = method.restored(images, mask.astype(np.float32), **options).numpy()
    assert restored.shape == images.shape
    np.testing.assert_array_equal(restored[mask == 0], images[mask == 0])
    assert (restored != images)[mask].mean() > 0.99


@pytest.mark.parametrize("model", TRAINED)
def test_one_training_step_changes_every_weight(model, cache_path, tmp_path):
    trainer = _trainer(model, cache_path, tmp_path)
    before = _state(trainer.model.weights)
    rows = np.arange(4)
    trainer._update(trainer.train_cache.read(rows), tf.constant(rows), tf.constant(1.0))
    assert _changed(before, trainer.model.weights) == set(before)


def test_a_critic_step_changes_the_critic_and_nothing_else(cache_path, tmp_path):
    trainer = _trainer("aae-128", cache_path, tmp_path)
    model = trainer.model
    before = _state(model.weights)
    model.train_critic(
        tf.ones([4, 128]), _noise(model, [0, 1, 2, 3]), count=1, descend=trainer._descend
    )
    assert _changed(before, model.weights) == _paths(model.critic)


@pytest.mark.parametrize(
    ("model", "objective", "networks"),
    [
        ("aae-128", "reconstruction", ("encoder", "decoder")),
        ("aae-128", "regularization", ("encoder",)),
        ("anogan", "generator", ("generator",)),
        ("anogan", "discriminator", ("discriminator",)),
    ],
)
def test_an_objective_changes_the_weights_of_its_own_networks_only(
    model, objective, networks, cache_path, tmp_path
):
    trainer = _trainer(model, cache_path, tmp_path)
    method, rows = trainer.model, np.arange(4)
    images, noise = trainer.train_cache.read(rows), _noise(trainer.model, rows)
    with tf.GradientTape() as tape:
        terms = method.terms(images, noise, training=True)
        wanted = {objective: method.objectives(terms, kl_weight=1.0)[objective]}
    before = _state(method.weights)
    trainer._descend(tape, wanted)
    own = {w.path for name in networks for w in getattr(method, name).trainable_variables}
    assert _changed(before, method.weights) == own


def test_the_critic_takes_100_steps_at_first_and_20_later(cache_path, tmp_path):
    trainer = _trainer("aae-128", cache_path, tmp_path)
    counts = []
    for step in (24, 25):
        trainer.step.assign(step)
        before = int(trainer.optimizers["critic"].iterations.numpy())
        rows = np.arange(4)
        trainer._update(trainer.train_cache.read(rows), tf.constant(rows), tf.constant(1.0))
        counts.append(int(trainer.optimizers["critic"].iterations.numpy()) - before)
    assert counts == [100, 20]


def test_the_gradient_penalty_of_a_linear_critic_is_known():
    slope = np.array([3.0, -4.0, 12.0], np.float32)  # of length 13
    real, generated = tf.constant(np.random.default_rng(0).normal(size=(2, 5, 3)), tf.float32)
    mix = np.full((5, 1), 0.3, np.float32)
    penalty = gradient_penalty(lambda z: tf.linalg.matvec(z, slope), real, generated, mix)
    np.testing.assert_allclose(penalty, np.full(5, (13 - 1) ** 2), rtol=1e-6)
    squares = gradient_penalty(lambda z: tf.reduce_sum(z**2, axis=1), real, generated, mix)
    between = 0.3 * real + 0.7 * generated
    expected = (2 * np.linalg.norm(between, axis=1) - 1) ** 2
    np.testing.assert_allclose(squares, expected, rtol=1e-5)


def test_the_mix_of_the_penalty_is_uniform():
    values = np.sort(uniform(np.random.default_rng(0).normal(size=100_000)).numpy())
    np.testing.assert_allclose(values, np.linspace(0, 1, 100_000), atol=0.006)


@pytest.mark.parametrize("model", TRAINED)
def test_a_run_is_loaded_with_its_moving_statistics(model, runs):
    first, second = load(runs[model]), load(runs[model])
    assert first.identity == second.identity
    statistics = [w for w in first.model.weights if "moving_mean" in w.path]
    assert statistics
    assert all(np.abs(weight.numpy()).max() > 0 for weight in statistics)
    fresh = make_model(first.config)
    for loaded, again in zip(first.model.weights, fresh.weights, strict=True):
        assert np.abs(loaded.numpy() - again.numpy()).max() > 0, loaded.path


@pytest.mark.parametrize("model", ADVERSARIAL)
def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(model, cache_path, tmp_path):
    whole = _trainer(model, cache_path, tmp_path / "whole")
    whole.fit()
    half = _trainer(model, cache_path, tmp_path / "half")
    half._stopped_by = 15
    half.fit()
    assert int(half.step.numpy()) == 1
    rest = Trainer(half.run, half.config, train=half.train_cache, test=half.test_cache, resume=True)
    rest.fit()
    optimizers = [v for each in whole.optimizers.values() for v in each.variables]
    again = [v for each in rest.optimizers.values() for v in each.variables]
    for one, other in zip(
        [*whole.model.weights, *optimizers], [*rest.model.weights, *again], strict=True
    ):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)


@pytest.mark.parametrize("model", TRAINED)
def test_a_trained_model_finds_a_planted_lesion(model, cache_path, tmp_path):
    trainer = _trainer(model, cache_path, tmp_path, steps=150, batch_size=8, beta_1=0.5)
    trainer.fit()
    with SliceCache(cache_path, "Test") as test:
        observed, mask = test.read(range(7)), test.mask(range(7))
        label = test.label(range(7))
    config = trainer.config.replace(restoration={"steps": 100})
    restored, _ = restore(Restorer(trainer.model, config.restoration), observed, mask, range(7))
    residual = np.abs(observed - restored)
    lesion, healthy = residual[label > 0], residual[(label == 0) & (mask > 0)]
    print(model, lesion.mean(), healthy.mean())
    assert lesion.mean() > 2 * healthy.mean()


@pytest.fixture(scope="module")
def gan(runs):
    """AnoGAN after 12 steps."""
    return load(runs["anogan"]).model


def test_the_search_lowers_its_loss_at_nearly_every_step(gan):
    squares = gan.to_square(phantom_slices(8)[..., None])
    best, trace = gan.search(squares, _noise(gan, range(8))["z"], steps=40)
    mean = trace.numpy().mean(axis=1)
    assert (np.diff(mean) < 0).mean() > 0.9
    assert mean[-1] < 0.95 * mean[0]
    features, _ = gan.discriminator(squares)
    lowest = gan.search_loss(best, squares, features)
    np.testing.assert_allclose(lowest, trace.numpy().min(axis=0), rtol=1e-5)


def test_the_loss_of_the_search_is_the_weighted_sum_of_both_distances(gan):
    squares = gan.to_square(phantom_slices(2)[..., None])
    z = _noise(gan, range(2))["z"]
    made = gan.generator(z)
    (observed, _), (found, _) = gan.discriminator(squares), gan.discriminator(made)
    apart = np.abs(squares - made).sum(axis=(1, 2, 3))
    unlike = np.abs(observed - found).sum(axis=1)
    loss = gan.search_loss(z, squares, observed)
    np.testing.assert_allclose(loss, 0.9 * apart + 0.1 * unlike, rtol=1e-5)


@pytest.mark.parametrize("model", ["vae-128", "anogan"])
def test_a_slice_gets_the_same_map_alone_and_in_a_batch(model, runs):
    method = load(runs[model]).model
    restorer = Restorer(method, small_config(model, restoration={"steps": 30}).restoration, seed=5)
    images = phantom_slices(18, seed=3)[..., None]
    mask, rows = images > 0, np.arange(18) * 3
    together, _ = restore(restorer, images, mask, rows)
    for position in (0, 6, 17):
        one = slice(position, position + 1)
        alone, _ = restore(restorer, images[one], mask[one], rows[one])
        np.testing.assert_array_equal(alone, together[one])


def test_the_seed_and_the_slice_choose_where_the_search_starts(gan):
    images = np.repeat(phantom_slices(1)[..., None], 2, axis=0)
    options = {"slices": [0, 1], "steps": 2, "tv_weight": 0.0}
    first, second = gan.restored(images, images > 0, seed=0, **options).numpy()
    other, _ = gan.restored(images, images > 0, seed=1, **options).numpy()
    assert np.abs(first - second).max() > 0
    assert np.abs(first - other).max() > 0


# Through the commands ------------------------------------------------------------------------


@pytest.mark.parametrize("model", TRAINED)
def test_a_cache_is_restored_with_thresholds_of_the_same_model(
    model, runs, cache_path, tmp_path, capsys
):
    found, out = tmp_path / "thresholds.json", tmp_path / "restored.h5"
    common = ["--model", str(runs[model]), "--cache", str(cache_path)]
    common += ["--steps", "4"] if model == "anogan" else []
    assert thresholds.main([*common, "--out", str(found)]) == 0
    argv = [*common, "--out", str(out), "--thresholds", str(found)]
    assert restore_brats.main(argv) == 0
    with RestoredReader(out) as reader:
        assert reader.settings["model"] == model
        assert "tv_weight" not in reader.settings


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("vae-128", ("--tv-weight", "1"), "Expected no lambda .* leave it out"),
        ("anogan", ("--tv-weight", "auto"), "Expected no lambda .* leave it out"),
        ("aae-128", ("--steps", "5"), "Expected no --steps, .* in one pass"),
        ("anogan", ("--save-every", "5"), "Expected no --save-every, .* leave it out"),
    ],
)
def test_options_that_mean_nothing_to_a_method_are_refused(
    model, options, message, runs, cache_path, tmp_path, capsys
):
    argv = ["--model", str(runs[model]), "--cache", str(cache_path)]
    assert restore_brats.main([*argv, "--out", str(tmp_path / "r.h5"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "r.h5").exists()


def test_choosing_a_lambda_for_a_method_without_is_refused(runs, cache_path, capsys):
    argv = ["--model", str(runs["vae-128"]), "--cache", str(cache_path)]
    assert select_lambda.main(argv) == 2
    assert "leave eval.select_lambda out" in capsys.readouterr().err


def test_an_unknown_method_is_refused_with_the_known_ones(cache_path, tmp_path, capsys):
    argv = ["--cache", str(cache_path), "--out", str(tmp_path / "run"), "--model", "aae-64"]
    assert train_gmvae.main(argv) == 2
    assert "Expected --model as one of gmvae, vae, " in capsys.readouterr().err
