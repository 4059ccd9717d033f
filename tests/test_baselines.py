"""The other methods of Table 1: training, detection, and the interface that a seventh would use."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import phantom_slices, small_config

import restore_brats
import tf_lesion
import train_gmvae
from tf_lesion.baselines import METHODS, make_model
from tf_lesion.baselines.adversarial import gradient_penalty, uniform
from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import SliceCache
from tf_lesion.cli import calibrate
from tf_lesion.noise import slice_noise
from tf_lesion.presets import preset
from tf_lesion.prior import Prior
from tf_lesion.restoration import Restorer, restore
from tf_lesion.training.runs import Run
from tf_lesion.training.trainer import Trainer

BASELINES = ("vae-256", "vae-128", "aae-128", "anogan")
ADVERSARIAL = ("aae-128", "anogan")
STEPS = 60  # of the runs below
TRAINED = ("vae-128", *ADVERSARIAL)  # vae-256 only differs in its square


def _trainer(model, cache, folder):
    settings = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "beta_1": 0.5}
    settings["checkpoint_every"] = STEPS - 2
    config = small_config(model, "practical", training=settings)
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


@dataclass
class Trained:
    """A run of `STEPS` steps, and which weights its first two steps changed."""

    folder: Path
    trainer: Trainer
    first_changed: set


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_path):
    """A run of each method of `TRAINED`."""
    made = {}
    for model in TRAINED:
        folder = tmp_path_factory.mktemp(model)
        trainer = _trainer(model, cache_path, folder)
        trainer.run.write(trainer.config, trainer.train_cache)
        before, rows = _state(trainer.model.weights), np.arange(8)
        for _ in range(2):  # the first steps of two Adams may cancel, each has the same length
            trainer.update(trainer.train_cache.read(rows), tf.constant(rows))
        made[model] = Trained(folder, trainer, _changed(before, trainer.model.weights))
        trainer.fit()
    return made


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
def test_two_training_steps_change_every_weight(model, trained):
    assert trained[model].first_changed == _paths(trained[model].trainer.model)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, cache_path):
    """An untrained trainer of each adversarial method."""
    folder = tmp_path_factory.mktemp("fresh")
    return {model: _trainer(model, cache_path, folder / model) for model in ADVERSARIAL}


def test_a_critic_step_changes_the_critic_and_nothing_else(fresh):
    trainer = fresh["aae-128"]
    model, before = trainer.model, _state(trainer.model.weights)
    noise = _noise(model, range(4))
    model.train_critic(tf.ones([4, 128]), noise, count=1, descend=trainer.update.descend)
    assert _changed(before, model.weights) == _paths(model.critic)


@pytest.mark.parametrize(
    ("model", "networks_of"),
    [
        ("aae-128", {"reconstruction": ("encoder", "decoder"), "regularization": ("encoder",)}),
        ("anogan", {"generator": ("generator",), "discriminator": ("discriminator",)}),
    ],
)
def test_an_objective_changes_the_weights_of_its_own_networks_only(model, networks_of, fresh):
    trainer = fresh[model]
    method, rows = trainer.model, np.arange(4)
    with tf.GradientTape(persistent=True) as tape:
        images = trainer.train_cache.read(rows)
        terms = method.terms(images, _noise(method, rows), training=True)
        objectives = method.objectives(terms, kl_weight=1.0)
    assert set(objectives) == set(networks_of)
    for name, networks in networks_of.items():
        before = _state(method.weights)
        trainer.update.descend(tape, {name: objectives[name]})
        own = {w.path for each in networks for w in getattr(method, each).trainable_variables}
        assert _changed(before, method.weights) == own


def test_the_critic_takes_100_steps_at_first_and_20_later(trained):
    optimizers = trained["aae-128"].trainer.update.optimizers
    assert int(optimizers["regularization"].iterations.numpy()) == STEPS
    assert int(optimizers["critic"].iterations.numpy()) == 25 * 100 + (STEPS - 25) * 20


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
def test_a_run_is_loaded_with_its_moving_statistics(model, trained):
    first = tf_lesion.load(trained[model].folder)
    assert first.identity == Prior(trained[model].trainer.model, *[None] * 5).identity
    statistics = [w for w in first.model.weights if "moving_mean" in w.path]
    assert statistics
    assert all(np.abs(weight.numpy()).max() > 0 for weight in statistics)


@pytest.mark.slow
@pytest.mark.parametrize("model", ADVERSARIAL)
def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(model, trained, tmp_path):
    whole = trained[model].trainer
    copy = shutil.copytree(trained[model].folder, tmp_path / "run")
    for path in (copy / "checkpoints").glob(f"ckpt-{STEPS}.*"):
        path.unlink()
    state = (copy / "checkpoints" / "checkpoint").read_text()
    (copy / "checkpoints" / "checkpoint").write_text(
        state.replace(f"ckpt-{STEPS}", f"ckpt-{STEPS - 2}")
    )
    caches = {"train": whole.train_cache, "test": whole.test_cache}
    rest = Trainer(Run(copy), whole.config, **caches, resume=True)
    assert int(rest.step.numpy()) == STEPS - 2
    rest.fit()
    assert int(rest.step.numpy()) == STEPS
    found, expected = (
        [*each.model.weights, *(v for o in each.update.optimizers.values() for v in o.variables)]
        for each in (rest, whole)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)


@pytest.mark.parametrize("model", TRAINED)
def test_a_trained_model_finds_a_planted_lesion(model, trained):
    trainer, rows = trained[model].trainer, np.arange(7)
    observed, mask = trainer.test_cache.read(rows), trainer.test_cache.mask(rows)
    label = trainer.test_cache.label(rows)
    settings = trainer.config.replace(restoration={"steps": 100}).restoration
    restored, *_ = restore(Restorer(trainer.model, settings), observed, mask, rows)
    residual = np.abs(observed - restored)
    lesion, healthy = residual[label > 0], residual[(label == 0) & (mask > 0)]
    assert lesion.mean() > 2 * healthy.mean()


@pytest.fixture(scope="module")
def gan(trained):
    """The trained AnoGAN."""
    return trained["anogan"].trainer.model


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
def test_a_slice_gets_the_same_map_alone_and_in_a_batch(model, trained):
    method = trained[model].trainer.model
    restorer = Restorer(method, small_config(model, restoration={"steps": 30}).restoration, seed=5)
    images = phantom_slices(18, seed=3)[..., None]
    mask, rows = images > 0, np.arange(18) * 3
    together, *_ = restore(restorer, images, mask, rows)
    for position in (0, 6, 17):
        one = slice(position, position + 1)
        alone, *_ = restore(restorer, images[one], mask[one], rows[one])
        np.testing.assert_array_equal(alone, together[one])


def test_the_seed_and_the_slice_choose_where_the_search_starts(gan):
    images = np.repeat(phantom_slices(1)[..., None], 2, axis=0)
    options = {"slices": [0, 1], "steps": 2, "tv_weight": 0.0}
    first, second = gan.restored(images, images > 0, seed=0, **options).numpy()
    other, _ = gan.restored(images, images > 0, seed=1, **options).numpy()
    assert np.abs(first - second).max() > 0
    assert np.abs(first - other).max() > 0


class _Saved(tf.Module):
    """`restored` of a method with its settings as inputs."""

    def __init__(self, method):
        super().__init__()
        self.weights = [weight.value for weight in method.weights]
        self._method = [method.restored]  # in a list: nothing of it but the weights is saved

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 38, 42, 1]),
            tf.TensorSpec([None, 38, 42, 1]),
            *[tf.TensorSpec([], tf.int32)] * 2,
        ]
    )
    def restored(self, observed, mask, seed, steps):
        options = {"slices": tf.range(tf.shape(observed)[0]), "seed": seed, "steps": steps}
        return self._method[0](observed, mask, tv_weight=tf.constant(0.0), **options)


@pytest.mark.parametrize("model", ["vae-128", "anogan"])
def test_a_saved_model_restores_as_the_method_does(model, trained, tmp_path):
    method = trained[model].trainer.model
    tf.saved_model.save(_Saved(method), str(tmp_path / "saved"))
    images = phantom_slices(2)[..., None]
    mask = (images > 0).astype(np.float32)
    saved = tf.saved_model.load(str(tmp_path / "saved"))
    found = saved.restored(images, mask, 3, 4)
    options = {"slices": [0, 1], "seed": 3, "steps": 4, "tv_weight": 0.0}
    np.testing.assert_allclose(found, method.restored(images, mask, **options), atol=1e-4)


# Through the commands ------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vae-128", "anogan"])
def test_a_cache_is_restored_with_thresholds_of_the_same_model(
    model, trained, cache_path, tmp_path, capsys
):
    found, out = tmp_path / "calibration.h5", tmp_path / "restored.h5"
    common = ["--model", str(trained[model].folder), "--cache", str(cache_path)]
    common += ["--steps", "4"] if model == "anogan" else []
    assert calibrate.main([*common, "--out", str(found)]) == 0
    argv = [*common, "--out", str(out), "--calibration", str(found)]
    assert restore_brats.main(argv) == 0
    with RestoredReader(out) as reader:
        assert reader.settings["model"] == model
        assert "tv_weight" not in reader.settings


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("vae-128", ("--tv-weight", "1"), "Expected no tv_weight, .* leave it out"),
        ("vae-128", ("--steps", "5"), "Expected no steps, .* leave it out"),
        ("vae-128", ("--solver", "huber"), "Expected no solver, .* leave it out"),
        ("anogan", ("--save-every", "5"), "Expected no save_every, .* leave it out"),
    ],
)
def test_options_that_mean_nothing_to_a_method_are_refused(
    model, options, message, trained, cache_path, tmp_path, capsys
):
    argv = ["--model", str(trained[model].folder), "--cache", str(cache_path)]
    assert restore_brats.main([*argv, "--out", str(tmp_path / "r.h5"), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "r.h5").exists()


def test_choosing_a_lambda_for_a_method_without_is_refused(trained, cache_path, capsys):
    argv = ["--model", str(trained["vae-128"].folder), "--cache", str(cache_path)]
    assert calibrate.main([*argv, "--tv-weight", "auto"]) == 2
    assert "Expected no tv_weight, which means nothing to" in capsys.readouterr().err


def test_an_unknown_method_is_refused_with_the_known_ones(cache_path, tmp_path, capsys):
    argv = ["--cache", str(cache_path), "--out", str(tmp_path / "run"), "--model", "aae-64"]
    assert train_gmvae.main(argv) == 2
    assert "Expected --model as one of gmvae, vae, " in capsys.readouterr().err


def test_the_method_in_the_docs_is_trained_and_detects_by_its_name_alone(cache_path, tmp_path):
    page = Path(__file__).parent.parent / "docs" / "tutorials" / "adding-a-method.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (source,) = (block for block in blocks if "@register" in block)
    known = set(METHODS)
    try:
        exec(compile(source, page.name, "exec"), {"__name__": "docs"})
        run, out = tmp_path / "run", tmp_path / "restored.h5"
        argv = ["--cache", str(cache_path), "--out", str(run), "--model", "linear"]
        argv += ["--preset", "practical", "--steps", "60", "--learning-rate", "0.01"]
        assert train_gmvae.main(argv) == 0
        argv = ["--model", str(run), "--cache", str(cache_path), "--out", str(out)]
        assert restore_brats.main(argv) == 0
    finally:
        for name in set(METHODS) - known:
            del METHODS[name]
    with SliceCache(cache_path, "Test") as cache, RestoredReader(out) as reader:
        observed, label = cache.read(range(7))[..., 0], cache.label(range(7))[..., 0]
        residual = np.abs(observed - reader.read(range(7))[..., 0])
    assert residual[label > 0].mean() > residual[(label == 0) & (observed > 0)].mean()
