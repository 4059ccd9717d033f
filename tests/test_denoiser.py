"""The denoiser: what it learns to undo, its network, and Algorithm 1 along its gradient."""

import shutil

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run, phantom_slices, small_config
from scipy.optimize import minimize

import tf_lesion
from eval import corruptions
from tf_lesion import corruption, restoration
from tf_lesion.baselines import make_model
from tf_lesion.caches.slices import SliceCache
from tf_lesion.config import SOLVERS, Solver, TrainingConfig
from tf_lesion.noise import slice_noise
from tf_lesion.training.runs import Run
from tf_lesion.training.trainer import Trainer

SIZE = (38, 42)
MIDDLE = 0.5  # of a uniform draw
STEPS, STOPPED = 12, 8
SMALL = {"num_filters": 8}  # of the network: one a group


def _noise(rows, *, step=0, stream="training"):
    return slice_noise(corruption.noise_shapes(SIZE), seed=0, step=step, slices=rows, stream=stream)


def _slices(count):
    return tf.constant(phantom_slices(count)[..., None])


def _corrupted(count, **options):
    healthy, shown = corruption.corrupted(_slices(count), _noise(np.arange(count), **options))
    return healthy.numpy(), shown.numpy()


# Corruption -------------------------------------------------------------------------------------


def test_a_corruption_is_a_function_of_seed_step_and_slice():
    for first, second in zip(_corrupted(4), _corrupted(4), strict=True):
        np.testing.assert_array_equal(first, second)
    assert np.abs(_corrupted(4)[1] - _corrupted(4, step=1)[1]).max() > 0.05
    assert np.abs(_corrupted(4)[1] - _corrupted(4, stream="test")[1]).max() > 0.05


def test_only_the_brain_is_corrupted_and_some_slices_are_left_alone():
    healthy, shown = _corrupted(200)
    assert not shown[healthy == 0].any()
    assert (shown[healthy > 0] > 0).all()
    change = np.abs(shown - healthy)
    untouched = (change.reshape(200, -1).max(axis=1) == 0).mean()
    assert untouched == pytest.approx(corruption.CROWDS[0][0], abs=0.07)
    assert 0.03 < (change[healthy > 0] > 0.03).mean() < 0.4


def _neutral(count):
    """Draws that leave a slice as it is."""
    still = corruption.SHARPER / (corruption.SHARPER + corruption.SOFTER)
    draws = dict.fromkeys(("turn", "x", "y", "size", "gamma", "gain"), MIDDLE)
    draws |= {"side": 1.0, "soft": still, "noise": 0.0}
    return {name: tf.fill([count], value) for name, value in draws.items()}


def test_neutral_draws_leave_a_slice_as_it_is_and_others_mirror_and_shift_it():
    images = _slices(3)
    flat = tf.zeros_like(images)
    same = corruption.varied(images, _neutral(3), flat, flat)
    np.testing.assert_allclose(same, images, atol=1e-5)
    mirrored = corruption.varied(images, {**_neutral(3), "side": tf.zeros([3])}, flat, flat)
    np.testing.assert_allclose(mirrored, images[:, ::-1], atol=1e-5)
    pixels = corruption.SHIFT_MM * SIZE[0] / corruption.FIELD_OF_VIEW_MM
    share = MIDDLE + 1 / (2 * pixels)  # one pixel
    shifted = corruption.varied(images, {**_neutral(3), "y": tf.fill([3], share)}, flat, flat)
    np.testing.assert_allclose(shifted[:, :-1], images[:, 1:], atol=1e-4)


def _blob(kind, **draws):
    """Draws of one blob of a kind, [1, 1, 1, 1] each."""
    names = list(corruption.KINDS)
    start = sum(corruption.KINDS[name] for name in names[: names.index(kind)])
    values = dict.fromkeys(("level", "texture", "bright", "shift", "fade", "curve"), 0.0)
    values |= {"kind": start + corruption.KINDS[kind] / 2, **draws}
    return {name: tf.fill([1, 1, 1, 1], value) for name, value in values.items()}


def _value(kind, shown, opacity, **draws):
    fields = {"texture": tf.ones_like(shown)}
    donor = tf.where(tf.range(SIZE[1])[None, None, :, None] < 20, 0.7, 0.0) * tf.ones_like(shown)
    return corruption.blob_values(shown, opacity, _blob(kind, **draws), fields, donor=donor).numpy()


def test_each_kind_of_blob_shows_what_it_says():
    shown, opacity = _slices(1), tf.ones([1, *SIZE, 1])
    inside, image = shown.numpy() > 0, shown.numpy()
    low, high = corruption.LEVEL
    level = _value("level", shown, opacity, level=0.5, texture=1.0)
    np.testing.assert_allclose(level, (low + high) / 2 + corruption.TEXTURE, rtol=1e-6)
    patch = _value("patch", shown, opacity, level=1.0)
    np.testing.assert_allclose(patch[0, 5, [3, 30], 0], [0.7, high], rtol=1e-6)
    for bright, shift in ((0.0, corruption.BRIGHTER_SHIFT[1]), (1.0, -corruption.DARKER_SHIFT[1])):
        diffuse = _value("diffuse", shown, opacity, bright=bright, shift=1.0, fade=0.0)
        faded = image.mean() + corruption.FADED[0] * (image - image.mean())
        np.testing.assert_allclose(diffuse, faded + shift, rtol=1e-4)
    curved = _value("curved", shown, opacity, curve=1.0)
    np.testing.assert_allclose(curved[inside], image[inside] ** np.e, rtol=1e-5)
    even = tf.where(shown > 0, 0.4, 0.0)
    np.testing.assert_allclose(_value("blurred", even, opacity)[inside], 0.4, rtol=1e-5)


def test_blobs_are_round_about_a_place_in_the_brain_with_the_edge_that_was_drawn():
    images = _slices(1)
    names = ("place", "radius", "length", "angle", "edge", "opacity")
    blobs = {name: tf.fill([1, corruption.BLOBS], MIDDLE) for name in names}
    flat = dict.fromkeys(("outline_small", "outline_large"), tf.zeros([1, *SIZE, 1]))
    draws = {"crowd": tf.constant([0.5]), "number": tf.constant([0.0])}
    for edge in (0.0, 1.0):
        blobs["edge"] = tf.fill([1, corruption.BLOBS], edge)
        found = corruption.opacities(images, blobs, draws, flat).numpy()[0]
        assert not found[1:].any()
        y, x = (center.numpy()[0, 0] for center in corruption._centers(images, blobs["place"]))
        assert images[0, int(y), int(x), 0] > 0
        _, smallest, largest = corruption._crowd(draws)
        radius = np.sqrt(smallest * largest).item() * SIZE[0] / corruption.FIELD_OF_VIEW_MM
        distance = np.hypot(np.arange(SIZE[0])[:, None] - y, np.arange(SIZE[1]) - x) / radius
        width = max(edge**2, 1 / radius)
        expected = np.mean(corruption.OPACITY) * np.clip(0.5 + (1 - distance) / width, 0, 1)
        np.testing.assert_allclose(found[0], expected, atol=1e-5)
    none = {**draws, "crowd": tf.constant([0.0])}
    assert not corruption.opacities(images, blobs, none, flat).numpy().any()


# The network ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """An untrained denoiser."""
    return make_model(small_config("denoiser", "practical", network=SMALL))


def test_the_denoised_slice_is_the_content_where_the_matte_is_1_and_the_slice_where_it_is_0(model):
    images = _slices(2)
    parts = model.parts(images)
    np.testing.assert_allclose(
        parts["denoised"],
        images + parts["matte"] * (parts["content"] - images),
        atol=1e-6,
    )
    assert parts["matte"].shape == images.shape


def test_a_restoration_replaces_less_in_doubt_and_more_where_the_matte_is_sure(model, monkeypatch):
    images = _slices(1)
    columns = images.shape[2] // 4
    logit = np.repeat([-3.0, 0.0, 1.5, 2.5], [columns] * 3 + [images.shape[2] - 3 * columns])
    parts = {"content": images + 1, "matte_logit": tf.constant(logit[:, None], images.dtype)}
    monkeypatch.setattr(model, "parts", lambda _: parts)
    change = np.unique(np.round(model.reconstruct(images, {}) - images, 4))
    odds = np.exp([-4.5, -1.5, 0, 3 * 1.0])
    np.testing.assert_allclose(change, odds / (1 + odds), atol=1e-4)


def test_a_perfect_answer_leaves_the_matte_s_cross_entropy_alone(model, monkeypatch):
    images, shown = _slices(2), _slices(2) * 0.5
    logit = tf.where(tf.abs(shown - images) > 0.03, 20.0, -20.0)
    perfect = {"content": images, "matte_logit": logit, "denoised": images}
    monkeypatch.setattr(model, "parts", lambda _: perfect)
    terms = model.terms(images, {}, shown=shown)
    for values in terms.values():
        np.testing.assert_allclose(values, 0, atol=1e-5)
    perfect["denoised"] = images + 0.1
    np.testing.assert_allclose(model.terms(images, {}, shown=shown)["error"], 0.1, rtol=1e-2)


def test_a_slice_is_restored_alike_alone_and_in_a_batch(model):
    restorer = restoration.Restorer(model, small_config("denoiser", "practical").restoration)
    observed = phantom_slices(5)[..., None]
    options = {"slices": np.arange(5), "mask": (observed > 0).astype(np.float32)}
    whole, _ = restorer(observed, observed=observed, **options)
    for number in range(5):
        part = {name: value[number : number + 1] for name, value in options.items()}
        one = observed[number : number + 1]
        alone, _ = restorer(one, observed=one, **part)
        np.testing.assert_array_equal(alone[0], whole[number])


def test_the_learning_rate_falls_along_half_a_cosine():
    training = TrainingConfig(steps=100, learning_rate=2.0, learning_rate_cosine=True)
    assert [training.learning_rate_at(step) for step in (0, 50, 100)] == pytest.approx([2, 1, 0])


# Restoration ------------------------------------------------------------------------------------


class _Linear:
    """f(x) = a x + b, in the place of a denoiser."""

    noise_shapes, grid = {}, (1, 1)

    def __init__(self, a, b):
        self.a, self.b = a, b

    def log_prior_gradient(self, image, noise):
        gradient = self.a * image + self.b - image
        return -0.5 * tf.reduce_sum(gradient**2, axis=(1, 2, 3)), gradient


def _ascend(linear, solver, observed, mask, tv_weight):
    scalars = {"start": 0, "stop": solver.steps, "seed": 0}
    image, values = restoration.ascend(
        linear,
        solver,
        tf.constant(observed),
        observed=tf.constant(observed),
        mask=tf.constant(mask),
        slices=tf.range(len(observed), dtype=tf.int64),
        tv_weight=tf.constant(tv_weight),
        **{name: tf.constant(value) for name, value in scalars.items()},
    )
    return image.numpy(), values.numpy()


def test_one_step_without_lambda_is_plain_denoising_inside_the_mask():
    observed = phantom_slices(2)[..., None]
    mask = (observed > 0.2).astype(np.float32)
    image, values = _ascend(_Linear(0.5, 0.1), SOLVERS["denoiser"], observed, mask, 0.0)
    np.testing.assert_allclose(image, np.where(mask, 0.5 * observed + 0.1, observed), atol=1e-6)
    expected = -0.5 * ((0.1 - 0.5 * observed) ** 2).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_steps_of_a_linear_denoiser_end_at_its_fixed_point():
    observed = phantom_slices(1)[..., None]
    mask = np.ones_like(observed)
    solver = Solver("many", steps=40, step_sizes=((0, 0.5),), gradient_clip=None)
    image, _ = _ascend(_Linear(0.5, 0.2), solver, observed, mask, 0.0)
    np.testing.assert_allclose(image, 0.4, atol=1e-4)  # x = x / 2 + 1/5


@pytest.mark.slow
def test_with_total_variation_the_steps_end_at_the_maximum_of_the_map_objective(monkeypatch):
    """f(x) = c: the log-prior is -|x - c|^2 / 2, the maximum a total variation denoised y - c."""
    monkeypatch.setattr(restoration, "DUAL_ITERATIONS", 60)
    rng = np.random.default_rng(0)
    observed = rng.uniform(0.2, 0.6, (1, 4, 5, 1)).astype(np.float32)
    target, weight, below = 0.3, 0.05, restoration.HUBER_BELOW
    solver = Solver("many", steps=30, step_sizes=((0, 0.5),), step="proximal")
    image, _ = _ascend(_Linear(0.0, target), solver, observed, np.ones_like(observed), weight)

    def energy(image):
        image = image.reshape(4, 5)
        d = [np.abs(np.diff(observed[0, ..., 0] - image, axis=axis)) for axis in (0, 1)]
        rounded = sum(np.where(x < below, x**2 / (2 * below), x - below / 2).sum() for x in d)
        return 0.5 * ((image - target) ** 2).sum() + weight * rounded

    best = minimize(energy, observed.ravel(), method="L-BFGS-B")
    assert energy(image[0, ..., 0].astype(float)) <= best.fun + 1e-4


# Runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, cache_path):
    """A short training."""
    folder = tmp_path_factory.mktemp("denoiser")
    config = small_config(
        "denoiser",
        "practical",
        network=SMALL,
        training={"steps": STEPS, "batch_size": 4, "checkpoint_every": STOPPED},
    )
    with SliceCache(cache_path, "Train") as train, SliceCache(cache_path, "Test") as test:
        run = Run(folder)
        run.write(config, train)
        made = Trainer(run, config, train=train, test=test)
        made.fit()
        yield made


@pytest.mark.slow
def test_a_resumed_training_equals_the_uninterrupted_one_bitwise(trainer, tmp_path):
    copy = shutil.copytree(trainer.run.folder, tmp_path / "run")
    for path in (copy / "checkpoints").glob(f"ckpt-{STEPS}.*"):
        path.unlink()
    state = (copy / "checkpoints" / "checkpoint").read_text()
    (copy / "checkpoints" / "checkpoint").write_text(
        state.replace(f"ckpt-{STEPS}", f"ckpt-{STOPPED}")
    )
    caches = {"train": trainer.train_cache, "test": trainer.test_cache}
    rest = Trainer(Run(copy), trainer.config, **caches, resume=True)
    assert int(rest.step.numpy()) == STOPPED
    rest.fit()
    for one, other in zip(rest.model.weights, trainer.model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.path)


@pytest.mark.slow
def test_a_run_is_loaded_calibrated_and_restores_in_one_step(tmp_path, cache_path):
    run = make_run(
        tmp_path / "run", cache_path, "denoiser", "practical", restoration_steps=1, network=SMALL
    )
    prior = tf_lesion.load(run)
    observed = phantom_slices(3)
    restored = prior.restore(observed, observed > 0)
    assert prior.config.restoration.solver == SOLVERS["denoiser"]
    assert not restored[observed == 0].any()
    assert np.abs(restored - observed).max() > 0


def test_pairs_of_corruption_are_drawn(cache_path, tmp_path):
    out = tmp_path / "pairs.png"
    assert corruptions.main(["--cache", str(cache_path), "--out", str(out)]) == 0
    healthy, shown = corruptions.corruption_pairs(cache_path, 3, seed=0)
    assert len(healthy) == len(shown) == 3
    assert np.array_equal(healthy > 0, shown > 0)
    assert not np.array_equal(healthy, shown)
    assert out.stat().st_size > 1_000
