"""The SavedModel: the numbers of the model in memory, alone with TensorFlow, and back into use."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import HEIGHT, WIDTH, phantom_slices, small_config

import restore_brats
import tf_lesion
from tf_lesion import methods
from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import SliceCache
from tf_lesion.calibration import Calibration, Threshold
from tf_lesion.cli import export as command
from tf_lesion.files import InputError
from tf_lesion.presets import preset
from tf_lesion.provenance import anonymous
from tf_lesion.restoration import Restorer, detect, restore, step_size_at
from tf_lesion.saved_model import export, exported, verify
from tf_lesion.saved_model import intensity as in_graph
from tf_lesion.saved_model.exported import read_assets
from tf_lesion.saved_model.signatures import signatures
from tf_lesion.scans import intensity as with_numpy
from tf_lesion.training import runs
from tf_lesion.training.trainer import Trainer

STEPS = 20
LAMBDA = 1.3
LIMITS = {0.05: 0.02, 0.01: 0.05}  # healthy false positive rate: residual
SAME_INTENSITY = 1e-6  # by which graph and NumPy may part


def _make_run(folder, cache_path, kind="gmvae"):
    """A run with untrained but saved weights, not calibrated."""
    run = runs.Run(folder)
    config = small_config(kind, restoration={"steps": STEPS, "gradient_clip": 20.0})
    with SliceCache(cache_path, "Train") as train, SliceCache(cache_path, "Test") as test:
        run.write(config, train)
        Trainer(run, config, train=train, test=test).save()
    return folder


def _calibrate(folder, name="calibration.h5", **changes):
    """A calibration as tf-lesion calibrate writes it."""
    prior = tf_lesion.load(folder)
    restoration = prior.describe(prior.restoration(tv_weight=LAMBDA))
    restoration |= changes.pop("restoration", {})
    points = tuple(Threshold(rate, limit, rate) for rate, limit in sorted(LIMITS.items()))
    content = {"points": {"residual": points}, "model_identity": prior.identity, **changes}
    made = Calibration(restoration=restoration, tv_weight=LAMBDA, **content)
    made.save(folder / name)
    return folder / name


def _export(model, out, *options):
    return command.main(["--model", str(model), "--out", str(out), *map(str, options)])


@pytest.fixture(scope="module")
def plain(cache_path, tmp_path_factory):
    """A run that was not calibrated."""
    return _make_run(tmp_path_factory.mktemp("runs") / "plain", cache_path)


@pytest.fixture(scope="module")
def run(plain):
    """The same run, calibrated."""
    folder = plain.with_name("run")
    shutil.copytree(plain, folder)
    _calibrate(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(run):
    return tf_lesion.load(run)


@pytest.fixture(scope="module")
def saved_path(run, tmp_path_factory):
    """The run's SavedModel, with the thresholds of its calibration."""
    out = tmp_path_factory.mktemp("exported") / "saved"
    assert _export(run, out) == 0
    return out


@pytest.fixture(scope="module")
def saved(saved_path):
    return tf.saved_model.load(str(saved_path))


@pytest.fixture(scope="module")
def batch():
    images = phantom_slices(5, seed=3)[..., None]
    return images, (images > 0).astype(np.float32)


def _restored(saved, images, mask, **changes):
    given = {"observed": images, "mask": mask, "slices": np.arange(len(images))}
    options = {"tv_weight": LAMBDA, "steps": STEPS, "seed": 4, **changes}
    return saved.signatures["restore"](**{**given, **options})


_RESTORERS = {}  # compiled once per model: what changes below is read at each call


def _in_memory(loaded, images, mask, *, seed=4, **changes):
    settings = {"tv_weight": LAMBDA, "steps": STEPS, **changes}
    restoration = loaded.config.restoration.changed(**settings)
    restorer = _RESTORERS.setdefault(loaded.model, Restorer(loaded.model, restoration))
    restorer.restoration, restorer.seed = restoration, seed
    return restore(restorer, images, mask, range(len(images)))[0]


# The same numbers -------------------------------------------------------------------------------


def test_restore_equals_the_model_in_memory_bitwise(saved, loaded, batch):
    images, mask = batch
    found, expected = _restored(saved, images, mask), _in_memory(loaded, images, mask)
    np.testing.assert_array_equal(found["restored"], expected)
    np.testing.assert_array_equal(found["residual"], np.abs(images - expected) * mask)
    assert np.abs(expected - images).max() > 1e-3


@pytest.mark.parametrize(
    "changes", [{"seed": 5}, {"tv_weight": 0.2}, {"steps": STEPS + 7}, {"steps": 0}]
)
def test_seed_lambda_and_any_number_of_steps_are_inputs(saved, loaded, batch, changes):
    images, mask = batch
    found = _restored(saved, images, mask, **changes)["restored"]
    np.testing.assert_array_equal(found, _in_memory(loaded, images, mask, **changes))
    assert np.abs(found - _restored(saved, images, mask)["restored"]).max() > 1e-5


def test_any_batch_size_gives_the_same_images(saved, batch):
    images, mask = batch
    together = _restored(saved, images, mask)["restored"].numpy()
    for part in (slice(0, 1), slice(3, 5), slice(1, 4)):
        slices = np.arange(len(images))[part]
        alone = _restored(saved, images[part], mask[part], slices=slices)["restored"]
        np.testing.assert_array_equal(alone, together[part])


def test_a_mask_is_brain_where_it_is_above_0_in_every_signature(saved, batch):
    images, mask = batch
    weak = mask * np.float32(0.3)
    whole, faint = (_restored(saved, images, brain) for brain in (mask, weak))
    for name, values in whole.items():
        np.testing.assert_array_equal(faint[name], values)
    given = {"image": images, "observed": images, "slices": np.arange(5), "start": 0, "stop": 5}
    ascend = saved.signatures["ascend"]
    first, second = (ascend(**given, mask=m, tv_weight=1.0, seed=0) for m in (mask, weak))
    np.testing.assert_array_equal(first["image"], second["image"])
    first, second = (saved.signatures["detect"](raw=images, mask=m) for m in (mask, weak))
    for name, values in first.items():
        np.testing.assert_array_equal(second[name], values)


@pytest.mark.parametrize("name", ["released", "paper"])
def test_step_sizes_in_the_graph_are_those_of_the_config_and_go_on_after_it(name):
    solver = preset(name).restoration.solver
    size = tf.function(lambda step: step_size_at(solver, step))
    for step in (0, 99, 100, 101, solver.steps, 10 * solver.steps):
        assert size(tf.constant(step)) == np.float32(solver.step_size(step))


def test_detect_is_preprocessing_then_restoration_then_thresholds(saved, loaded, batch):
    images, mask = batch
    raw = (images * 812 + 100 * (1 - mask)).astype(np.float32)
    found = saved.signatures["detect"](raw=raw, mask=mask)
    observed = with_numpy.normalize(raw, mask > 0)
    observed = with_numpy.match_to_reference(observed, mask > 0, loaded.reference)
    np.testing.assert_allclose(found["observed"], observed, atol=SAME_INTENSITY)
    restored = _in_memory(loaded, found["observed"].numpy(), mask, seed=0)
    np.testing.assert_array_equal(found["restored"], restored)
    for rate, limit in LIMITS.items():
        lesions = found[f"lesions_fpr_{rate}".replace(".", "_")].numpy()
        expected = detect(found["observed"], restored, mask, limit)
        np.testing.assert_array_equal(lesions, expected)
        assert 0 < lesions.sum() < mask.sum()


@pytest.mark.parametrize("digits", [9, 0], ids=["distinct", "with ties"])
@pytest.mark.parametrize("levels", [np.linspace(0.2, 0.8, 1001), np.repeat([0.1, 0.7, 0.9], 5)])
def test_intensities_in_the_graph_are_those_of_preprocessing(digits, levels):
    rng = np.random.default_rng(digits)
    mask = rng.uniform(size=(3, 9, 11, 1)) > 0.4
    raw = np.round(rng.gamma(3, 20, mask.shape), digits).astype(np.float32)
    normal = with_numpy.normalize(raw, mask)
    found = in_graph.normalize(raw, mask)
    np.testing.assert_allclose(found, normal, atol=SAME_INTENSITY)
    matched = with_numpy.match_to_reference(normal, mask, levels)
    found = in_graph.match_to_reference(tf.constant(normal), mask, levels)
    np.testing.assert_allclose(found, matched, atol=SAME_INTENSITY)
    np.testing.assert_array_equal(found.numpy()[~mask], 0)


def test_reconstruct_decodes_the_posterior_mean_and_elbo_names_its_terms(saved, loaded, batch):
    images, _ = batch
    mean = loaded.model.decoder.mean(loaded.model.encoder(images)["z_mean"])
    found = saved.signatures["reconstruct"](image=images)["y_mean"]
    np.testing.assert_allclose(found, mean, atol=1e-5)
    terms = saved.signatures["elbo"](image=images, slices=np.arange(5), seed=1)
    assert set(terms) == {"elbo", "log_likelihood", "kl_z", "kl_omega", "kl_c"}
    total = terms["log_likelihood"] - terms["kl_z"] - terms["kl_omega"] - terms["kl_c"]
    np.testing.assert_allclose(terms["elbo"], total, rtol=1e-5)
    other = saved.signatures["elbo"](image=images, slices=np.arange(5), seed=2)
    assert (np.abs(other["elbo"] - terms["elbo"]) > 0).all()


@pytest.fixture(scope="module")
def vae_paths(cache_path, tmp_path_factory):
    """A VAE's run without reference, and its SavedModel in bfloat16."""
    folder = tmp_path_factory.mktemp("vae")
    run, out = _make_run(folder / "run", cache_path, "vae"), folder / "saved"
    (run / "reference.npy").unlink()
    assert _export(run, out, "--tv-weight", LAMBDA, "--precision", "bfloat16") == 0
    return run, out


def test_a_vae_exports_too_in_another_precision_without_reference_or_thresholds(vae_paths, batch):
    images, mask = batch
    run, out = vae_paths
    saved, loaded = tf.saved_model.load(str(out)), tf_lesion.load(run, precision="bfloat16")
    found = _restored(saved, images, mask)["restored"]
    np.testing.assert_array_equal(found, _in_memory(loaded, images, mask))
    assert set(saved.signatures["elbo"].structured_outputs) == {"elbo", "log_likelihood", "kl_z"}
    found = saved.signatures["detect"](raw=images, mask=mask)
    assert set(found) == {"observed", "restored", "residual"}
    np.testing.assert_allclose(
        found["observed"], with_numpy.normalize(images, mask > 0), atol=SAME_INTENSITY
    )
    assets = read_assets(out)
    assert assets["reference"] is None
    assert assets["calibration"] is None
    assert assets["model"]["tv_weight"] == LAMBDA
    assert not assets["model"]["detect"]["matched_to_reference"]


class _Halved(methods.Method):
    """A method without lambda: it restores at once, and has neither z nor ELBO."""

    def restored(self, observed, mask, **inputs):
        return observed * (1 - 0.5 * mask)


def test_a_method_without_lambda_restores_and_detects_by_the_same_code(batch):
    images, mask = batch
    config = small_config()
    halved = _Halved(config.network, config.objective, name="halved")
    made = signatures(halved, config.restoration, thresholds={"fpr_0.05": 0.3})
    assert set(made) == {"restore", "detect", "ascend"}
    found = made["restore"](images, mask, np.arange(5), 0.0, 1, 0)
    np.testing.assert_array_equal(found["restored"], images * (1 - 0.5 * mask))
    found = made["detect"](images, mask)
    np.testing.assert_array_equal(found["lesions_fpr_0_05"], found["observed"].numpy() > 0.6)


# Alone with TensorFlow --------------------------------------------------------------------------

ALONE = """
import sys
for name in ("tf_lesion", "tensorflow_probability", "tf_keras", "preprocessing"):
    sys.modules[name] = None  # an import of it is an error
import numpy as np, tensorflow as tf
saved = tf.saved_model.load(sys.argv[1])
given = np.load(sys.argv[2])
found = saved.signatures["restore"](**given, tv_weight=1.3, steps=20, seed=4)
np.save(sys.argv[3], found["restored"])
"""


@pytest.mark.slow
def test_it_restores_where_nothing_but_tensorflow_can_be_imported(
    saved_path, loaded, batch, tmp_path
):
    images, mask = batch
    given, found = tmp_path / "given.npz", tmp_path / "found.npy"
    np.savez(given, observed=images, mask=mask, slices=np.arange(5))
    command = [sys.executable, "-I", "-c", ALONE, saved_path, given, found]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(found), _in_memory(loaded, images, mask))


@pytest.mark.slow
def test_verify_finds_what_another_model_changes_and_passes_the_rest(saved_path, loaded):
    bias = loaded.model.decoder.mean_head.bias
    before = bias.numpy()
    bias.assign(before + 0.01)
    try:
        differences = verify.verify(
            loaded,
            saved_path,
            restoration=loaded.calibrated(),
            thresholds=loaded.calibration.points["residual"],
        )
    finally:
        bias.assign(before)
    assert differences["reconstruct/y_mean"] == pytest.approx(0.01, rel=1e-3)
    changed = {name for name, difference in differences.items() if difference != 0}
    same = {"detect/observed", "elbo/kl_z", "elbo/kl_omega", "elbo/kl_c"}
    assert same <= set(differences) - changed
    assert {"restore/restored", "detect/residual", "ascend/image", "elbo/elbo"} <= changed


@pytest.mark.parametrize(("difference", "status"), [(0.0, 0), (1e-7, 1), (float("nan"), 1)])
def test_a_difference_makes_the_exit_status_1(
    run, tmp_path, monkeypatch, capsys, difference, status
):
    monkeypatch.setattr(export, "export", lambda *args, **options: None)
    monkeypatch.setattr(verify, "verify", lambda *args, **options: {"a": 0.0, "b": difference})
    assert _export(run, tmp_path / "saved", "--verify") == status
    assert f"to memory: {difference:.1e}" in capsys.readouterr().out


def test_assets_tell_what_the_model_is_without_loading_it(saved_path, loaded):
    assets = read_assets(saved_path)
    model = assets["model"]
    assert model["model_identity"] == loaded.identity
    assert (model["preset"], model["tv_weight"], model["detect"]["steps"]) == ("paper", 1.3, STEPS)
    assert model["data"] == anonymous(loaded.data)
    assert model["versions"]["tensorflow"] == tf.__version__
    assert list(model["detect"]["thresholds"]) == ["lesions_fpr_0_01", "lesions_fpr_0_05"]
    assert model["detect"]["thresholds"]["lesions_fpr_0_05"]["threshold"] == LIMITS[0.05]
    kept = Calibration.load(assets["calibration"])
    assert (kept.points, kept.tv_weight) == (loaded.calibration.points, LAMBDA)
    np.testing.assert_array_equal(assets["reference"], loaded.reference)
    described = model["signatures"]["restore"]["inputs"]
    assert list(described) == ["observed", "mask", "slices", "tv_weight", "steps", "seed"]
    assert described["observed"] == {"dtype": "float32", "shape": [None, HEIGHT, WIDTH, 1]}


# Back into use ----------------------------------------------------------------------------------


def _restore_cache(model, cache, out, *options):
    argv = ["--model", str(model), "--cache", str(cache), "--out", str(out)]
    assert restore_brats.main([*argv, *map(str, options)]) == 0
    with RestoredReader(out) as restored:
        rows = range(len(restored))
        names = restored.settings.get("thresholds", {})
        maps = {name: restored.read(rows, f"Detection/{name}") for name in names}
        steps = [restored.read(rows, f"Trajectory/{step}") for step in restored.trajectory_steps]
        return restored.read(rows), maps, steps, restored.settings


def test_restoring_a_cache_with_the_saved_model_equals_the_run(
    run, saved_path, cache_path, tmp_path
):
    options = ["--tv-weight", "auto", "--save-every", 8]
    options += ["--calibration", saved_path / "assets" / "calibration.h5"]
    ours = _restore_cache(run, cache_path, tmp_path / "run.h5", *options)
    options += ["--batch-size", 3]
    theirs = _restore_cache(saved_path, cache_path, tmp_path / "saved.h5", *options)
    np.testing.assert_array_equal(theirs[0], ours[0])
    assert set(theirs[1]) == {"fpr_0.01", "fpr_0.05"}
    for name, lesions in ours[1].items():
        np.testing.assert_array_equal(theirs[1][name], lesions)
    np.testing.assert_array_equal(theirs[2], ours[2])
    assert {**theirs[3], "model_path": None} == {**ours[3], "model_path": None}


def test_an_export_is_a_prior_with_the_lambda_steps_and_thresholds_of_the_run(saved_path, loaded):
    again = tf_lesion.load(saved_path)
    for restoration in (again.config.restoration, again.calibrated()):
        assert (restoration.tv_weight, restoration.steps) == (LAMBDA, STEPS)
    assert again.identity == loaded.identity
    assert again.calibration.points == loaded.calibration.points
    images = phantom_slices(3, seed=1)
    found, expected = (prior.restore(images, images > 0) for prior in (again, loaded))
    np.testing.assert_array_equal(found, expected)


def test_another_precision_than_the_exported_is_refused(saved_path, vae_paths):
    with pytest.raises(InputError, match="computes in float32, not in bfloat16"):
        tf_lesion.load(saved_path, precision="bfloat16")
    run, out = vae_paths
    with pytest.raises(InputError, match="export the run with precision float32"):
        tf_lesion.load(out)
    assert tf_lesion.load(out, precision="bfloat16").identity == tf_lesion.load(run).identity


def test_step_sizes_that_are_not_in_the_graph_are_refused(saved_path):
    loaded = tf_lesion.load(saved_path)
    other = loaded.config.restoration.changed(gradient_clip=3.0)
    with pytest.raises(InputError, match=r"was exported with .*clip=20.0.*, not .*clip=3.0"):
        Restorer(loaded.model, other)


# What is refused --------------------------------------------------------------------------------


def test_what_exists_is_replaced_by_force_and_only_if_it_is_a_saved_model(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert _export(run, out) == 2
    assert "pass --force" in capsys.readouterr().err
    assert _export(run, out, "--force") == 2
    assert "Expected a folder with saved_model.pb to replace" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_a_failed_export_leaves_nothing(loaded, tmp_path, monkeypatch):
    def fails(module, folder, **options):
        (tmp_path / folder).mkdir()
        raise RuntimeError("no space")

    monkeypatch.setattr(tf.saved_model, "save", fails)
    with pytest.raises(RuntimeError, match="no space"):
        export.export(loaded, tmp_path / "out", restoration=loaded.config.restoration)
    assert list(tmp_path.iterdir()) == []


def _copied(run, folder):
    shutil.copytree(run, folder)
    return folder


@pytest.fixture
def told(monkeypatch):
    """What the command hands to `export`, which makes nothing."""
    content = {}
    monkeypatch.setattr(export, "export", lambda prior, out, **options: content.update(options))
    return content


def test_a_restoration_that_the_calibration_does_not_hold_for_has_no_lesion_maps(
    run, tmp_path, capsys, told
):
    assert _export(run, tmp_path / "saved", "--tv-weight", LAMBDA + 1) == 0
    assert "No lesion maps: The calibration was made with tv_weight 1.3" in capsys.readouterr().err
    assert told["thresholds"] == ()
    assert told["restoration"].tv_weight == LAMBDA + 1


def test_averages_are_not_in_the_graph_nor_are_their_thresholds(plain, tmp_path, capsys, told):
    own = _copied(plain, tmp_path / "run")
    _calibrate(own, restoration={"seeds": 4})
    assert _export(own, tmp_path / "saved") == 0
    assert "made with seeds 4, not 1" in capsys.readouterr().err
    assert told["thresholds"] == ()
    assert told["restoration"].seeds == 1


def test_a_calibration_in_the_run_of_other_weights_is_left_out(plain, tmp_path, capsys, told):
    own = _copied(plain, tmp_path / "run")
    _calibrate(own, model_identity="other")
    assert _export(own, tmp_path / "saved") == 0
    assert "belongs to model other, not to" in capsys.readouterr().err
    assert told["thresholds"] == ()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model_identity": "other"}, [], "belongs to model other, not to"),
        ({}, ["--tv-weight", 2], r"made with tv_weight 1.3, not 2.0"),
        ({}, ["--steps", 3, "--tv-weight", LAMBDA], "made with steps 20, not 3"),
        ({"points": {}}, [], "no thresholds of the residual"),
    ],
)
def test_a_calibration_of_something_else_is_refused(
    plain, tmp_path, capsys, changes, options, message
):
    path = _calibrate(_copied(plain, tmp_path / "run"), "given.h5", **changes)
    assert _export(plain, tmp_path / "out", "--calibration", path, *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_another_precision_than_that_of_the_calibration_is_told(run, tmp_path, capsys, told):
    assert _export(run, tmp_path / "saved", "--precision", "bfloat16") == 0
    assert "calibration was made in float32, the SavedModel" in capsys.readouterr().err
    assert [point.threshold for point in told["thresholds"]] == [LIMITS[0.01], LIMITS[0.05]]


def test_a_saved_model_is_not_exported_again(saved_path, tmp_path, capsys):
    assert _export(saved_path, tmp_path / "out") == 2
    assert "is a SavedModel already" in capsys.readouterr().err


def test_a_saved_model_of_someone_else_is_refused(tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"Expected a SavedModel of tf-lesion export in"):
        tf_lesion.load(tmp_path / "other")
    (tmp_path / "other" / "assets" / "model.json").write_text("{}")
    with pytest.raises(InputError, match=r"not that of an exported model.* export the run again"):
        tf_lesion.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"make one with tf-lesion export"):
        exported.read_assets(tmp_path / "missing")


@pytest.mark.parametrize(
    ("raw", "mask", "message"),
    [
        (1.0, 0.0, "the brain mask holds no pixel"),
        (1.0, 1.0, "the brain is constant"),
        (np.nan, 1.0, "NaN or infinite"),
    ],
)
def test_detect_says_what_is_wrong_with_its_input(saved, raw, mask, message):
    shape = (1, HEIGHT, WIDTH, 1)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        saved.signatures["detect"](
            raw=np.full(shape, raw, np.float32), mask=np.full(shape, mask, np.float32)
        )


def test_a_restoration_that_diverges_is_an_error(saved, batch):
    images, mask = batch
    with pytest.raises(tf.errors.InvalidArgumentError, match="the restoration diverged"):
        _restored(saved, images, mask, tv_weight=np.inf)
