"""The restoration: its gradient, its invariants, and independence of batches and interruptions."""

import numpy as np
import pytest
import tensorflow as tf
from conftest import phantom_slices, small_config

from tf_lesion.baselines import make_model
from tf_lesion.files import InputError
from tf_lesion.noise import slice_noise
from tf_lesion.restoration import (
    Restorer,
    elbo_gradient,
    map_gradient,
    map_objective,
    restoration_step,
    restore,
    trajectory_steps,
)

STEP = 3e-6  # of the central differences: at 1e-4 some ReLU of the network always changes sides
GRADIENT_ERROR = 1e-6  # relative to the directional derivative


def _model(kind="gmvae", name="paper", seed=0, precision="float32"):
    model = make_model(small_config(kind, name, network={"precision": precision}))
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(weight.numpy() + rng.normal(0, 0.02, weight.shape))
    return model


@pytest.fixture(scope="module")
def batch():
    images = phantom_slices(7, seed=3)[..., None]
    return images, (images > 0).astype(np.float32)


@pytest.mark.parametrize("kind", ["gmvae", "vae"])
@pytest.mark.parametrize("name", ["paper", "released"])
def test_gradient_of_the_whole_objective_equals_float64_differences(kind, name):
    model = _model(kind, name, precision="float64")
    assert {str(weight.dtype) for weight in model.weights} == {"float64"}
    rng = np.random.default_rng(1)
    observed = tf.constant(phantom_slices(2).astype(np.float64)[..., None])
    # A checkerboard of changes: no difference of neighbors is near the kink of TV at 0.
    signs = np.where(np.indices(observed.shape).sum(axis=0) % 2, 1, -1)
    image = observed + signs * rng.uniform(0.05, 0.2, observed.shape)
    noise = {k: tf.constant(rng.normal(size=(2, *s))) for k, s in model.noise_shapes.items()}
    options = {"observed": observed, "noise": noise, "tv_weight": 1.8}
    _, gradient = elbo_gradient(model, image, noise)
    gradient = map_gradient(image, gradient, observed=observed, tv_weight=1.8)
    assert gradient.dtype == tf.float64
    errors = []
    for _ in range(5):
        direction = rng.normal(size=image.shape)
        direction /= np.linalg.norm(direction)
        ahead = map_objective(model, image + STEP * direction, **options)
        behind = map_objective(model, image - STEP * direction, **options)
        difference = float(tf.reduce_sum(ahead - behind)) / (2 * STEP)
        exact = float(tf.reduce_sum(gradient * direction))
        errors.append(abs(difference - exact) / max(abs(exact), 1.0))
    assert max(errors) < GRADIENT_ERROR


def test_objective_is_the_sum_of_its_parts(batch):
    images, _ = batch
    model = _model()
    noise = slice_noise(
        model.noise_shapes, seed=0, step=0, slices=np.arange(7), stream="restoration"
    )
    observed = images + 0.1 * (images > 0.5)
    terms = model.restoration_terms(images, noise)
    tv = np.abs(np.diff(observed - images, axis=1)).sum((1, 2, 3))
    tv += np.abs(np.diff(observed - images, axis=2)).sum((1, 2, 3))
    expected = (
        terms["log_likelihood"] - terms["kl_z"] - terms["kl_omega"] - terms["kl_c"] - 1.8 * tv
    )
    found = map_objective(model, tf.constant(images), observed=observed, noise=noise, tv_weight=1.8)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gmvae", "vae"])
def test_ascent_raises_the_objective(batch, kind):
    images, mask = batch
    model = _model(kind)
    noise = slice_noise(model.noise_shapes, seed=0, step=0, slices=range(7), stream="test")
    image, values = tf.constant(images), []
    for _ in range(20):
        value, gradient = elbo_gradient(model, image, noise)
        values.append(value.numpy())
        image = restoration_step(image, gradient, mask=mask, step_size=1e-4, gradient_clip=100.0)
    assert (values[-1] > values[0]).all()


def test_nothing_moves_outside_the_mask_and_something_inside(batch):
    images, mask = batch
    mask = mask * (np.arange(42)[:, None] > 20)  # half of the brain
    restored, *_ = restore(
        Restorer(_model(), small_config(restoration={"steps": 5}).restoration),
        images,
        mask,
        range(7),
    )
    np.testing.assert_array_equal(restored[mask == 0], images[mask == 0])
    assert (np.abs(restored - images)[mask > 0] > 0).mean() > 0.99


def test_a_restoration_that_diverges_is_an_error_not_an_image(batch):
    images, mask = batch
    settings = {"steps": 5, "step_sizes": ((0, 1e30),), "gradient_clip": None}
    restorer = Restorer(_model(), small_config(restoration=settings).restoration)
    with pytest.raises(InputError, match="slices 0 to 6 diverged"):
        restore(restorer, images, mask, range(7))


def test_zero_steps_is_the_identity(batch):
    images, mask = batch
    config = small_config(restoration={"steps": 0})
    restored, _, trajectory = restore(
        Restorer(_model(), config.restoration), images, mask, range(7)
    )
    np.testing.assert_array_equal(restored, images)
    assert trajectory == {}


@pytest.mark.parametrize("kind", ["gmvae", "vae"])
def test_a_slice_is_restored_alike_alone_in_a_batch_and_in_another_order(batch, kind):
    images, mask = batch
    config = small_config(kind, restoration={"steps": 30})
    restorer = Restorer(_model(kind), config.restoration, seed=5)
    rows = np.array([3, 11, 4, 0, 8, 2, 100])
    together, *_ = restore(restorer, images, mask, rows)
    order = [4, 2, 6, 0, 1, 5, 3]
    permuted, *_ = restore(restorer, images[order], mask[order], rows[order])
    np.testing.assert_array_equal(permuted, together[order])
    for position in (0, 6):
        one = slice(position, position + 1)
        alone, *_ = restore(restorer, images[one], mask[one], rows[one])
        np.testing.assert_array_equal(alone, together[one])


def test_going_on_from_the_middle_gives_the_uninterrupted_image(batch):
    images, mask = batch
    restorer = Restorer(_model(), small_config(restoration={"steps": 30}).restoration)
    options = {"observed": images, "mask": mask, "slices": range(7)}
    whole, _ = restorer(images, **options)
    half, _ = restorer(images, stop=13, **options)
    rest, _ = restorer(half, start=13, **options)
    np.testing.assert_array_equal(rest, whole)


def test_seed_slice_and_step_each_change_the_noise():
    shapes = {"omega": (3, 4, 1), "z": (3, 4, 2)}
    base = {"seed": 1, "step": 2, "slices": [5, 6], "stream": "restoration"}
    noise = slice_noise(shapes, **base)
    again = slice_noise(shapes, **base)
    np.testing.assert_array_equal(noise["z"], again["z"])
    assert np.abs(noise["z"][0] - noise["z"][1]).min() > 0
    changes = ({"seed": 2}, {"step": 3}, {"slices": [7, 8]}, {"stream": "training"})
    for change in changes:
        other = slice_noise(shapes, **{**base, **change})
        assert np.abs(noise["omega"] - other["omega"]).min() > 0, change


def test_noise_is_standard_normal():
    noise = slice_noise({"z": (32, 42, 1)}, seed=0, step=9, slices=range(200), stream="training")[
        "z"
    ].numpy()
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1] == pytest.approx(0, abs=0.1)


def test_trajectory_holds_the_images_at_every_k_steps(batch):
    images, mask = batch
    restorer = Restorer(_model(), small_config(restoration={"steps": 60}).restoration)
    restored, _, trajectory = restore(restorer, images, mask, range(7), save_every=20)
    assert list(trajectory) == trajectory_steps(60, 20) == [20, 40, 60]
    np.testing.assert_array_equal(trajectory[60], restored)
    early, _ = restorer(images, observed=images, mask=mask, slices=np.arange(7), stop=20)
    np.testing.assert_array_equal(trajectory[20], early)


def test_presets_have_the_step_sizes_of_their_source():
    released, paper = small_config(name="released").restoration, small_config().restoration
    sizes = [released.solver.step_size(step) for step in (0, 99, 100, 499)]
    assert sizes == [5e-3, 5e-3, 2e-3, 2e-3]
    assert [paper.solver.step_size(step) for step in (0, 499)] == [1e-3, 1e-3]
    assert (released.solver.gradient_clip, paper.solver.gradient_clip) == (100.0, None)
    assert (released.steps, paper.steps) == (500, 500)
