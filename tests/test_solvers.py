"""The fast solvers: the released schedule with fewer gradients of the ELBO, and long steps."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run
from scipy.optimize import minimize

import restore_brats
import tf_lesion
from tf_lesion import restoration
from tf_lesion.baselines import METHODS
from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import SliceCache
from tf_lesion.cli import calibrate
from tf_lesion.config import PRESET_NAMES, SOLVERS, Config, RestorationConfig
from tf_lesion.files import InputError
from tf_lesion.noise import slice_noise
from tf_lesion.presets import preset
from tf_lesion.prior import PACKAGE, PRETRAINED
from tf_lesion.restoration import (
    Restorer,
    elbo_gradient,
    map_gradient,
    map_objective,
    restore,
    smoothed_residual,
)

SAME_LENGTH = [name for name, solver in SOLVERS.items() if solver.schedule == "released"]
BELOW = 0.02


def _rounded_tv(image):
    """Sum of the rounded absolute differences of [H, W]."""
    differences = [np.abs(np.diff(image, axis=axis)) for axis in (0, 1)]
    values = [np.where(d < BELOW, d**2 / (2 * BELOW), d - BELOW / 2) for d in differences]
    return sum(value.sum() for value in values)


@pytest.mark.slow
def test_a_converged_step_minimizes_what_it_says(monkeypatch):
    monkeypatch.setattr(restoration, "DUAL_ITERATIONS", 2000)
    rng = np.random.default_rng(0)
    residual, weight = rng.normal(0, 0.1, (7, 9)), 0.05
    mask = np.ones((7, 9))
    mask[:2, :4] = 0

    def energy(u):
        u = u.reshape(7, 9) * mask
        return 0.5 * np.sum((u - residual * mask) ** 2) + weight * _rounded_tv(u)

    best = minimize(energy, np.zeros(63), method="L-BFGS-B", options={"maxfun": 200_000})
    tensors = [tf.constant(a[None, ..., None], tf.float32) for a in (residual, mask)]
    found = smoothed_residual(tensors[0], mask=tensors[1], weight=weight, below=BELOW)
    found = found.numpy()[0, ..., 0]
    assert energy(found) <= energy(best.x) + 1e-5
    np.testing.assert_allclose(found, best.x.reshape(7, 9) * mask, atol=2e-3)
    assert (found[mask == 0] == 0).all()


def test_a_constant_residual_stays_and_the_default_iterations_come_near():
    rng = np.random.default_rng(1)
    flat = tf.fill([1, 30, 34, 1], 0.3)
    ones = tf.ones_like(flat)
    options = {"mask": ones, "weight": 0.05, "below": BELOW}
    np.testing.assert_allclose(smoothed_residual(flat, **options), flat, atol=1e-6)
    noisy = tf.constant(rng.normal(0.2, 0.02, (1, 30, 34, 1)), tf.float32)
    smooth = smoothed_residual(noisy, **options)
    assert np.std(smooth) < 0.5 * np.std(noisy)
    np.testing.assert_allclose(np.mean(smooth), np.mean(noisy), atol=1e-5)


def _objective(model, image, observed, draws=8):
    values = [
        map_objective(
            model,
            tf.constant(image),
            observed=tf.constant(observed),
            noise=slice_noise(
                model.noise_shapes, seed=9, step=draw, slices=range(len(image)), stream="test"
            ),
            tv_weight=1.8,
        )
        for draw in range(draws)
    ]
    return np.mean(values, axis=0)


@pytest.fixture(scope="module")
def setting(cache_path, tmp_path_factory):
    """(images, mask, a model of some training, the released schedule)."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run", cache_path, steps=150)
    with SliceCache(cache_path, "Test") as cache:
        images, mask = cache.read(range(4)), cache.mask(range(4)).astype(np.float32)
    return images, mask, tf_lesion.load(run).model, RestorationConfig()


@pytest.fixture(scope="module")
def restored(setting):
    """The images of every solver."""
    images, mask, model, released = setting
    restorers = {name: Restorer(model, released.with_solver(name)) for name in SAME_LENGTH}
    return {name: restore(each, images, mask, range(4))[0] for name, each in restorers.items()}


@pytest.mark.slow
def test_the_fast_solvers_beat_the_objective_of_the_released_schedule(setting, restored):
    images, mask, model, _ = setting
    values = {name: _objective(model, image, images) for name, image in restored.items()}
    assert (values["multirate"] > values["released"]).all()
    assert (values["huber"] > values["released"]).all()
    removed = [(image - images)[mask > 0] for image in restored.values()]
    assert np.corrcoef(removed).min() > 0.95


@pytest.mark.slow
def test_fewer_gradients_change_the_released_images_less_than_long_steps_do(setting, restored):
    images, mask, model, released = setting
    other, *_ = restore(Restorer(model, released, seed=1), images, mask, range(4))
    inside = mask > 0
    distance = {
        name: np.sqrt(np.mean((image - restored["released"])[inside] ** 2))
        for name, image in {**restored, "seed": other}.items()
    }
    assert distance["multirate"] < 1.1 * distance["seed"]
    assert distance["multirate"] < distance["huber"]


def test_one_gradient_serves_for_several_steps_of_the_total_variation(setting):
    images, mask, model, _ = setting
    walk = {"steps": 1, "steps_per_gradient": 3, "step_sizes": ((0, 5e-3), (2, 1e-3))}
    settings = RestorationConfig().changed(**walk)
    found, *_ = restore(Restorer(model, settings), images, mask, range(4))
    noise = slice_noise(model.noise_shapes, seed=0, step=0, slices=range(4), stream="restoration")
    _, gradient = elbo_gradient(model, tf.constant(images), noise)
    image = images
    for step_size in (5e-3, 5e-3, 1e-3):
        whole = map_gradient(image, gradient, observed=images, tv_weight=1.8)
        image = image + step_size * np.clip(whole, -100, 100) * mask
    np.testing.assert_allclose(found, image, atol=1e-5)


@pytest.mark.parametrize("solver", ["multirate", "huber"])
def test_without_total_variation_only_the_prior_pulls(setting, solver):
    images, mask, model, released = setting
    settings = released.with_solver(solver).changed(tv_weight=0.0, steps=1)
    alone, *_ = restore(Restorer(model, settings), images, mask, range(4))
    clip = restoration.HUBER_CLIP if solver == "huber" else 100.0
    ascent = dataclasses.replace(settings.solver, step="ascent", gradient_clip=clip)
    plain = settings.changed(solver=ascent)
    expected, *_ = restore(Restorer(model, plain), images, mask, range(4))
    np.testing.assert_allclose(alone, expected, atol=1e-4)


def test_a_long_step_does_not_overshoot_where_the_gradient_is_steep(setting, monkeypatch):
    images, mask, model, released = setting
    monkeypatch.setattr(restoration, "HUBER_CLIP", 1e-3)
    settings = released.with_solver("huber").changed(tv_weight=0.0, steps=1)
    found, *_ = restore(Restorer(model, settings), images, mask, range(4))
    moved = np.abs(found - images)[mask > 0]
    assert moved.max() <= 1.01 * settings.solver.step_size(0) * 1e-3
    assert np.median(moved) > 0.9 * settings.solver.step_size(0) * 1e-3


@pytest.mark.parametrize("solver", ["multirate", "huber"])
def test_long_steps_keep_the_invariants_of_the_restoration(setting, solver):
    images, mask, model, released = setting
    restorer = Restorer(model, released.with_solver(solver))
    whole, _, trajectory = restore(restorer, images, mask, range(4), save_every=20)
    assert sorted(trajectory)[:2] == [20, 40]
    np.testing.assert_array_equal(whole[mask == 0], images[mask == 0])
    alone, *_ = restore(restorer, images[2:3], mask[2:3], [2])
    np.testing.assert_array_equal(alone, whole[2:3])
    half, _ = restorer(images, observed=images, mask=mask, slices=range(4), stop=17)
    rest, _ = restorer(half, observed=images, mask=mask, slices=range(4), start=17)
    np.testing.assert_array_equal(rest, whole)


def test_schedules_of_the_solvers_add_up_to_the_length_of_the_one_they_stand_for():
    lengths = {
        name: sum(
            solver.step_size(step) for step in range(solver.steps * solver.steps_per_gradient)
        )
        for name, solver in SOLVERS.items()
    }
    assert lengths == pytest.approx(
        {
            "released": 1.3,
            "paper": 0.5,
            "multirate": 1.3 - 1e-3,
            "huber": 1.3,
            "denoiser": 1.0,
            "red": 2.0,
        }
    )


def test_another_solver_keeps_lambda_and_clipping():
    settings = RestorationConfig(tv_weight=2.0).changed(gradient_clip=50.0, seeds=3)
    for name in ("multirate", "huber", "released"):
        settings = settings.with_solver(name)
        assert settings.solver == dataclasses.replace(SOLVERS[name], gradient_clip=50.0)
        assert (settings.tv_weight, settings.seeds) == (2.0, 3)
    shorter = settings.changed(steps=7)
    assert shorter.with_solver("released") == shorter  # its own: as it is


@pytest.mark.parametrize("name", ["multirate", "huber", "released"])
def test_the_papers_schedule_is_walked_by_no_other_solver(name):
    paper = preset("paper").restoration
    message = f"Expected a solver of the paper schedule, got {name}"
    with pytest.raises(InputError, match=message):
        paper.with_solver(name)
    with pytest.raises(InputError, match="Expected a solver of the released schedule, got paper"):
        RestorationConfig().with_solver("paper")
    assert paper.with_solver("paper") == paper


# Configurations ----------------------------------------------------------------------------------


PRESETS = [
    (name, model)
    for name in PRESET_NAMES
    for model in ("gmvae", "vae", "vae-128", "anogan")
    if name != "denoising" or "coarse_noise" in METHODS[model].training_settings
]


@pytest.mark.parametrize(("name", "model"), PRESETS)
def test_configurations_go_through_json_unchanged(name, model):
    config = preset(name, model)
    for restoration_ in (config.restoration, config.restoration.changed(steps=3, seeds=2)):
        config = config.replace(restoration=restoration_)
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for other in SAME_LENGTH[1:] if name != "paper" else ():
        changed = config.replace(restoration=config.restoration.with_solver(other))
        assert Config.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


def test_a_run_of_the_papers_preset_made_before_solvers_had_names_walks_the_papers_schedule():
    stored = {
        "steps": 500,
        "step_sizes": [[0, 1e-3]],
        "gradient_clip": None,
        "tv_weight": 1.8,
    }
    assert RestorationConfig.from_dict(stored) == preset("paper").restoration
    named = {**stored, "steps_per_gradient": 1, "solver": "released", "seeds": 1, "flip": False}
    assert RestorationConfig.from_dict(named) == preset("paper").restoration


def test_the_vae_keeps_its_lambda_and_clipping():
    for name, clip in (("released", 50.0), ("paper", None), ("practical", 50.0)):
        settings = preset(name, "vae").restoration
        assert (settings.tv_weight, settings.solver.gradient_clip) == (2.2, clip)


@pytest.mark.parametrize("folder", PRETRAINED.values())
def test_the_shipped_configurations_are_read_with_their_solver(folder):
    stored = json.loads((PACKAGE / folder / "config.json").read_text())
    restored = Config.from_dict(stored).restoration
    clip = 50.0 if folder == "vae" else 100.0
    solver = dataclasses.replace(SOLVERS["huber"], gradient_clip=clip)
    assert restored.solver == (SOLVERS["denoiser"] if folder == "denoiser" else solver)
    assert restored.to_dict() == stored["restoration"]


# The commands ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_restores_with_it_and_thresholds_of_the_other_are_refused(
    cache_path, tmp_path, capsys
):
    run = make_run(tmp_path / "run", cache_path, name="released")
    out = tmp_path / "restored.h5"
    common = ["--model", str(run), "--cache", str(cache_path)]
    assert calibrate.main([*common, "--solver", "multirate"]) == 0
    argv = [*common, "--out", str(out), "--calibration", str(run / "calibration.h5")]
    assert restore_brats.main(argv) == 2
    assert "was made with steps 100, not 6" in capsys.readouterr().err
    assert restore_brats.main([*argv, "--solver", "multirate"]) == 0
    with RestoredReader(out) as restored:
        assert restored.settings["solver"] == "multirate"
        assert restored.settings["steps"] == 100


@pytest.mark.slow
def test_the_command_line_refuses_a_solver_for_a_run_of_the_papers_preset(
    cache_path, tmp_path, capsys
):
    run, out = make_run(tmp_path / "run", cache_path, steps=1), tmp_path / "restored.h5"
    argv = ["--model", str(run), "--cache", str(cache_path), "--out", str(out)]
    for solver in ("multirate", "huber"):
        assert restore_brats.main([*argv, "--solver", solver]) == 2
        assert f"the paper schedule, got {solver}" in capsys.readouterr().err
    assert not out.exists()
