"""A prior: loaded, restoring any number of slices, saved."""

import dataclasses

import numpy as np
import pytest
from conftest import make_run, phantom_slices, write_cache

import tf_lesion
from tf_lesion.caches.slices import SliceCache
from tf_lesion.calibration import Calibration, Threshold
from tf_lesion.calibration.file import FILE_NAME
from tf_lesion.detection.postprocessing import Postprocessing
from tf_lesion.files import InputError
from tf_lesion.presets import preset
from tf_lesion.prior import PRETRAINED
from tf_lesion.restoration import Restorer, restore

LAMBDA = 0.7


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_path):
    """A run with a calibration of its own."""
    folder = make_run(tmp_path_factory.mktemp("run") / "run", cache_path)
    prior = tf_lesion.load(folder)
    chosen = prior.restoration(tv_weight=LAMBDA, steps=4).changed(flip=True)
    Calibration(
        prior.identity,
        prior.describe(chosen),
        {"residual": (Threshold(0.01, 0.1, 0.009),)},
        tv_weight=LAMBDA,
        postprocessing="flip,signed",
        cohort={"cache": str(cache_path), "subjects": 2},
    ).save(folder / FILE_NAME)
    return folder


@pytest.fixture(scope="module")
def prior(run):
    return tf_lesion.load(run)


# Restoring ---------------------------------------------------------------------------------------


def test_slices_are_restored_as_calibrated_whatever_the_batch_and_the_kind_of_mask(prior):
    observed = phantom_slices(5, seed=3)
    brain = (observed > 0) & (np.arange(42) > 8)
    found = prior.restore(observed, brain)
    calibrated = prior.calibrated()
    assert (calibrated.tv_weight, calibrated.steps, calibrated.flip) == (LAMBDA, 4, True)
    restorer = Restorer(prior.model, calibrated)
    expected, *_ = restore(restorer, observed[..., None], brain[..., None], range(5))
    np.testing.assert_array_equal(found, expected[..., 0])
    assert found.dtype == np.float32
    assert np.abs(found - observed)[brain].min() >= 0 < np.abs(found - observed)[brain].max()
    np.testing.assert_array_equal(found[~brain], observed[~brain])
    for size, mask in ((1, brain * 255), (2, brain * 0.5), (4, brain.astype(np.uint8))):
        again = prior.restore(observed, mask, batch_size=size)
        np.testing.assert_array_equal(again, found)
    one = prior.restore(observed[3:4].astype(np.float64), brain[3:4], slices=[3])
    np.testing.assert_array_equal(one, found[3:4])
    assert prior.restore(observed[:0], brain[:0]).shape == (0, 38, 42)


def test_settings_given_change_the_images(prior):
    observed = phantom_slices(1, seed=3)
    plain = prior.restore(observed, observed > 0)
    longer = prior.restoration(tv_weight=LAMBDA, steps=5)
    assert np.abs(prior.restore(observed, observed > 0, seed=1) - plain).max() > 0
    assert np.abs(prior.restore(observed, observed > 0, restoration=longer) - plain).max() > 0


@pytest.mark.parametrize(
    ("observed", "mask", "options", "message"),
    [
        ((38, 42), (38, 42), {}, r"\[n, 38, 42\], got \(38, 42\) and \(38, 42\)"),
        ((2, 38, 42, 1), (2, 38, 42, 1), {}, r"\[n, 38, 42\]"),
        ((2, 42, 38), (2, 42, 38), {}, r"\[n, 38, 42\]"),
        ((2, 38, 42), (1, 38, 42), {}, r"got \(2, 38, 42\) and \(1, 38, 42\)"),
        ((2, 38, 42), (2, 38, 42), {"batch_size": 0}, "batch_size of 1 or more, got 2 and 0"),
        ((2, 38, 42), (2, 38, 42), {"slices": [1]}, "Expected 2 slices"),
    ],
)
def test_slices_that_do_not_fit_are_refused(prior, observed, mask, options, message):
    with pytest.raises(InputError, match=message):
        prior.restore(np.zeros(observed), np.ones(mask), **options)


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tv_weight": "automatic"}, "tv_weight as a number or auto, got 'automatic'"),
        ({"tv_weight": "-1"}, "tv_weight of 0 or more, got -1"),
        ({"tv_weight": "nan"}, "tv_weight of 0 or more, got nan"),
        ({"steps": -1}, "steps of 0 or more, got -1"),
        ({"solver": "multirate"}, "the paper schedule, got multirate"),
        (
            {"solver": "fast"},
            "a solver of released, paper, multirate, huber, denoiser, red, got 'fast'",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(prior, given, message):
    with pytest.raises(InputError, match=message):
        prior.restoration(**given)


def test_without_a_calibration_auto_is_refused_and_the_preset_restores(prior):
    alone = dataclasses.replace(prior, calibration=None)
    assert alone.calibrated() == alone.config.restoration
    with pytest.raises(InputError, match="no calibration that says tv_weight"):
        alone.restoration(tv_weight="auto")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No model at nowhere"):
        tf_lesion.load("nowhere")
    with pytest.raises(InputError, match="Expected a run of"):
        tf_lesion.load(tmp_path)


# Saved -------------------------------------------------------------------------------------------


def test_a_saved_prior_keeps_its_averages_and_the_alignment_asked_for(prior, tmp_path):
    prior.save(tmp_path / "p", align="rigid")
    saved = tf_lesion.load(tmp_path / "p")
    assert saved.config.restoration == saved.calibrated() == prior.calibrated()
    assert saved.calibration.steps() == Postprocessing(flip=True, signed=True)
    assert saved.data["preprocessing"]["scan"]["align"] == "rigid"
    with pytest.raises(FileExistsError, match="pass --force"):
        prior.save(tmp_path / "p")


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_shipped_priors_load_with_their_calibration(name):
    prior = tf_lesion.load(name)
    denoiser = name == "pretrained-denoiser"
    size = (78, 98) if denoiser else (158, 198)
    assert (prior.config.network.height, prior.config.network.width) == size
    restoration = prior.calibrated()
    assert restoration == prior.config.restoration
    used = prior.describe(restoration)
    for score in ("residual", "score"):
        steps = prior.calibration.postprocessing if score == "score" else ""
        points = prior.calibration.thresholds(score, restoration=used, postprocessing=steps)
        assert [point.key for point in points] == ["fpr_0.01", "fpr_0.05", "fpr_0.1"]
        assert all(point.fpr <= point.target_fpr for point in points)
    assert prior.calibration.healthy is not None
    assert prior.reference is not None
    assert prior.data["preprocessing"]["scan"]["align"] == "rigid"  # patients lie anywhere
    assert prior.config.objective == preset("practical").objective
    solver = ("denoiser", "denoiser") if denoiser else ("huber", "released")
    assert (restoration.solver.name, restoration.solver.schedule) == solver
    if name == "pretrained-vae":
        assert restoration.solver.gradient_clip == 50.0


def test_the_size_of_a_cache_is_checked(prior, cache_path):
    with SliceCache(cache_path, "Test") as cache:
        prior.check_size(cache)
    with (
        SliceCache(cache_path, "Test", crop=(0, 34, 0, 42)) as cache,
        pytest.raises(InputError, match=r"restores 38 x 42 slices.*has 34 x 42"),
    ):
        prior.check_size(cache)


def test_a_cache_with_its_axes_exchanged_and_slices_in_scanner_units_are_told_apart(
    prior, tmp_path
):
    path = write_cache(tmp_path / "turned.h5", shape=(42, 38), train=0)
    with SliceCache(path) as cache, pytest.raises(InputError, match="its axes are exchanged"):
        prior.check_size(cache)
    observed = 1000 * phantom_slices(1)
    with pytest.raises(InputError, match="observed: expected normalized intensities"):
        prior.restore(observed, observed > 0)
