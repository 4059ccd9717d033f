"""A packed run restores as the run did, without options, and names no folder of this machine."""

import json

import numpy as np
import pytest
from conftest import make_run

from tf_lesion import choices, pack
from tf_lesion.caches.slices import SliceCache
from tf_lesion.detection.postprocessing import Postprocessing, read_choice
from tf_lesion.presets import preset
from tf_lesion.restoration import Restorer, restore
from tf_lesion.training.runs import PRETRAINED, load

LAMBDA = 0.7


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_path):
    """A run with a lambda and thresholds of its own."""
    folder = make_run(tmp_path_factory.mktemp("run") / "run", cache_path)
    chosen = {
        "model_identity": load(folder).identity,
        "tv_weight": LAMBDA,
        "model_path": str(folder),
    }
    (folder / choices.FILE_NAME).write_text(json.dumps(chosen))
    name = choices.THRESHOLD_FILES["residual"]
    (folder / name).write_text(json.dumps({"cohort": {"cache": str(cache_path)}}))
    return folder


def test_a_packed_run_restores_as_the_run_with_its_own_lambda(run, tmp_path, cache_path):
    assert (
        pack.main(["--model", str(run), "--out", str(tmp_path / "p"), "--solver", "multirate"]) == 0
    )
    first, second = load(run), load(tmp_path / "p")
    wanted = choices.restoration_of(first, tv_weight="auto", solver="multirate")
    assert second.config.restoration == wanted
    assert wanted.tv_weight == LAMBDA
    assert second.identity == first.identity
    with SliceCache(cache_path) as cache:
        rows = np.arange(3)
        batch = cache.read(rows), cache.mask(rows), rows
    images = [restore(Restorer(loaded.model, wanted), *batch)[0] for loaded in (first, second)]
    np.testing.assert_array_equal(*images)
    np.testing.assert_array_equal(first.reference, second.reference)


def test_the_chosen_steps_travel_with_the_prior(run, tmp_path):
    out = tmp_path / "p"
    assert pack.main(["--model", str(run), "--out", str(out), "--postprocess", "signed"]) == 0
    assert read_choice(load(out)) == Postprocessing(signed=True)


def test_a_packed_run_has_no_optimizer_and_no_local_path(run, tmp_path):
    out = tmp_path / "p"
    size = pack.pack(run, out)
    assert size == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    weights = sum(weight.numpy().nbytes for weight in load(run).model.weights)
    assert (
        weights
        < (out / "checkpoints" / "ckpt-12.data-00000-of-00001").stat().st_size
        < 1.5 * weights
    )
    for path in out.rglob("*"):
        if path.suffix in {".json", ""} and path.is_file():
            assert str(run.parent) not in path.read_text(), path
    stored = json.loads((out / choices.THRESHOLD_FILES["residual"]).read_text())
    assert stored["cohort"]["cache"] == "healthy.h5"


def test_a_run_without_lambda_is_not_packed(tmp_path, cache_path, capsys):
    run = make_run(tmp_path / "run", cache_path, steps=1)
    assert pack.main(["--model", str(run), "--out", str(tmp_path / "p")]) == 2
    assert "lambda.json" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_shipped_priors_load_with_their_choices(name):
    loaded = load(name)
    restoration = loaded.config.restoration
    assert (loaded.config.network.height, loaded.config.network.width) == (158, 198)
    assert choices.read_lambda(loaded) == restoration.tv_weight
    points, settings = choices.read_thresholds(
        loaded, loaded.extras / choices.THRESHOLD_FILES["residual"]
    )
    assert set(points) == {"fpr_0.01", "fpr_0.05", "fpr_0.1"}
    assert (settings["steps"], settings["solver"]) == (restoration.steps, restoration.solver)
    assert loaded.reference is not None
    assert loaded.data["preprocessing"]["scan"]["align"] == "rigid"  # patients lie anywhere
    assert loaded.config.objective == preset("practical").objective
