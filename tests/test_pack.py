"""An exported run restores as the run did, without options, and names no folder of this machine."""

import json
import shutil

import h5py
import numpy as np
import pytest
from conftest import make_run

import tf_lesion
from tf_lesion.calibration import Calibration, Threshold
from tf_lesion.cli import export

LAMBDA = 0.7


def _pack(run, out, *options):
    return export.main(["--as", "run", "--model", str(run), "--out", str(out), *options])


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_path):
    """A run, calibrated for three steps of another solver."""
    folder = make_run(tmp_path_factory.mktemp("run") / "run", cache_path)
    prior = tf_lesion.load(folder)
    restoration = prior.describe(prior.restoration(tv_weight=LAMBDA, solver="paper", steps=3))
    Calibration(
        model_identity=prior.identity,
        restoration=restoration,
        points={"residual": (Threshold(0.05, 0.1, 0.04),)},
        tv_weight=LAMBDA,
        postprocessing="signed",
        cohort={"cache": str(cache_path)},
    ).save(folder / "calibration.h5")
    return folder


def test_a_packed_run_restores_as_the_run_with_its_own_lambda(run, tmp_path):
    out = tmp_path / "p"
    assert _pack(run, out) == 0
    first, second = tf_lesion.load(run), tf_lesion.load(out)
    assert second.config.restoration == first.calibrated() == second.calibrated()
    assert (second.config.restoration.tv_weight, second.config.restoration.steps) == (LAMBDA, 3)
    assert second.identity == first.identity
    images = np.random.default_rng(0).uniform(0.1, 1, (3, 38, 42)).astype(np.float32)
    np.testing.assert_array_equal(*(prior.restore(images, images > 0) for prior in (first, second)))
    np.testing.assert_array_equal(first.reference, second.reference)
    assert second.calibration.points == first.calibration.points
    assert str(second.calibration.steps()) == "signed"


def test_a_packed_run_has_no_optimizer_and_no_local_path(run, tmp_path):
    out = tmp_path / "p"
    prior = tf_lesion.load(run)
    size = prior.save(out, align=None)
    assert size == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    weights = sum(weight.numpy().nbytes for weight in prior.model.weights)
    stored = (out / "checkpoints" / "ckpt-12.data-00000-of-00001").stat().st_size
    assert weights < stored < 1.5 * weights
    for path in out.rglob("*"):
        assert path.is_dir() or str(run.parent).encode() not in path.read_bytes(), path
    assert Calibration.load(out / "calibration.h5").cohort["cache"] == "healthy.h5"


@pytest.mark.slow
def test_a_run_on_a_cache_of_the_released_layout_is_packed(tmp_path, cache_path):
    with h5py.File(cache_path) as file, h5py.File(tmp_path / "released.h5", "w") as copy:
        copy["Train"], copy["Test"] = file["Train"][:], file["Test"][:]
    run = make_run(tmp_path / "run", tmp_path / "released.h5", steps=1)
    assert _pack(run, tmp_path / "p", "--align", "rigid") == 0
    assert tf_lesion.load(tmp_path / "p").data["preprocessing"] == {"scan": {"align": "rigid"}}


@pytest.mark.parametrize("kind", ["run", pytest.param("savedmodel", marks=pytest.mark.slow)])
def test_an_export_names_no_folder_and_no_subject(run, tmp_path, kind):
    named = shutil.copytree(run, tmp_path / "clinic-7" / "gmvae")
    stored = json.loads((named / "config.json").read_text())
    stored["data"]["preprocessing"] |= {
        "reference": "sub-Meier",
        "test_subjects": ["sub-Meier", "sub-Huber"],
        "skipped": {"sub-Moser": "/home/ward/sub-Moser_T2w.nii.gz is truncated"},
        "matched_to": "ward/healthy.h5",
    }
    (named / "config.json").write_text(json.dumps(stored))
    for source, out in ((named, tmp_path / "p"), (tmp_path / "p", tmp_path / "again")):
        assert _pack(source, out, "--as", kind) == 0
        for path in out.rglob("*"):
            content = b"" if path.is_dir() else path.read_bytes()
            for name in (
                b"Meier",
                b"Huber",
                b"Moser",
                b"ward",
                b"clinic-7",
                str(tmp_path).encode(),
            ):
                assert name not in content, (path, name)
        if kind != "run":
            break  # a SavedModel is no run to export again
        told = tf_lesion.load(out).data["preprocessing"]
        assert (told["test_subjects"], told["skipped"], told["matched_to"]) == (2, 1, "healthy.h5")
