"""Training through its command line: resuming, stopping, refusing, and what it leaves on disk."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow as tf
from conftest import phantom_slices, small_config, write_cache

import train_gmvae
from tf_lesion import presets
from tf_lesion.caches.slices import CacheWriter, SliceCache
from tf_lesion.config import PRESET_NAMES, Config
from tf_lesion.files import InputError
from tf_lesion.prior import load
from tf_lesion.training import trainer
from tf_lesion.training.runs import Run
from tf_lesion.training.trainer import NonFiniteLossError, Trainer, batch_rows

ROOT = Path(__file__).parent.parent


def _train(cache, out, *options):
    argv = ["--cache", str(cache), "--out", str(out), "--preset", "practical"]
    argv += ["--precision", "float32", "--batch-size", "4"]
    return train_gmvae.main([*argv, *map(str, options)])


def _weights(folder):
    """Every tensor of the newest checkpoint: weights, optimizer, step."""
    reader = tf.train.load_checkpoint(Run(Path(folder)).latest_checkpoint())
    names = [name for name in reader.get_variable_to_shape_map() if "OBJECT_GRAPH" not in name]
    return {name: reader.get_tensor(name) for name in names if "save_counter" not in name}


def _assert_same(first, second):
    assert first.keys() == second.keys()
    assert any("optimizer" in name for name in first)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)


@pytest.fixture(scope="module")
def trained(cache_path, tmp_path_factory):
    """A run of 24 steps, uninterrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert _train(cache_path, folder, "--steps", 24, "--checkpoint-every", 8) == 0
    return folder


def test_a_run_leaves_its_settings_losses_pictures_and_checkpoints(trained):
    settings = json.loads((trained / "config.json").read_text())
    assert settings["training"]["steps"] == 24
    assert settings["network"]["height"] == 38
    assert {"tf_lesion_version", "commit", "versions", "device", "data"} <= set(settings)
    assert settings["device"]["products"] == "float32"
    with (trained / "losses.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert int(row["step"]) == 24
    positions = 2 * 3
    for term in ("nelbo", "log_likelihood", "kl_z", "kl_omega", "kl_c"):
        assert float(row[f"{term}_per_position"]) == pytest.approx(float(row[term]) / positions)
    assert (trained / "test_losses.csv").exists()
    picture = tf.io.decode_png((trained / "pictures" / "reconstructions-0000024.png").read_bytes())
    assert picture.shape == (2 * 42, 7 * 38, 1)
    assert list((trained / "tensorboard").iterdir())
    steps = sorted(path.name for path in (trained / "checkpoints").glob("*.index"))
    assert steps == ["ckpt-16.index", "ckpt-24.index", "ckpt-8.index"]


def test_training_lowers_the_loss_on_test_slices(cache_path, tmp_path):
    config = small_config(
        training={"steps": 150, "batch_size": 8, "learning_rate": 2e-3}, name="paper"
    )
    with SliceCache(cache_path, "Train") as train, SliceCache(cache_path, "Test") as test:
        trainer = Trainer(Run(tmp_path), config, train=train, test=test)
        before = trainer.test_losses()["nelbo"]
        trainer.fit()
        assert trainer.test_losses()["nelbo"] < before - 500  # nats per image; 2,600 in practice


def test_every_weight_is_trained_saved_and_loaded(trained, tmp_path):
    config, _ = Run(trained).read()
    initial = Trainer(Run(tmp_path), config, train=None, test=None).model
    first, second = load(trained).model, load(trained).model
    for before, after, again in zip(initial.weights, first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(after, again, err_msg=after.path)
        assert np.abs(before.numpy() - after.numpy()).max() > 0, before.path


@pytest.mark.slow
def test_resuming_after_a_kill_equals_the_uninterrupted_run_bitwise(cache_path, trained, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "train_gmvae.py", "--cache", str(cache_path), "--out", str(out)]
    command += ["--preset", "practical", "--precision", "float32", "--batch-size", "4"]
    command += ["--steps", "24", "--checkpoint-every", "8"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "ckpt-8.index").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None or (out / "checkpoints" / "ckpt-8.index").exists()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert _train(cache_path, out, "--resume") == 0
    _assert_same(_weights(trained), _weights(out))


@pytest.mark.slow
def test_resuming_from_the_middle_equals_the_uninterrupted_run_bitwise(
    cache_path, trained, tmp_path
):
    config, _ = Run(trained).read()
    with SliceCache(cache_path, "Train") as train, SliceCache(cache_path, "Test") as test:
        run = Run(tmp_path / "half")
        run.write(config, train)
        trainer = Trainer(run, config, train=train, test=test)
        real, count = trainer._one_step, iter(range(11))

        def interrupted(*args):
            real(*args)
            if next(count, None) == 9:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer._one_step = interrupted
        assert trainer.fit() == signal.SIGTERM
        assert int(trainer.step.numpy()) == 10
    assert _train(cache_path, run.folder, "--resume") == 0
    _assert_same(_weights(trained), _weights(run.folder))
    with (run.folder / "losses.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [24]


def test_a_non_finite_loss_names_step_and_terms_and_keeps_the_last_good_checkpoint(
    tmp_path, capsys
):
    images = phantom_slices(12)
    path = tmp_path / "c.h5"
    with CacheWriter(path, slice_shape=(38, 42), crop=(0, 38, 0, 42)) as cache:
        cache.append("Train", images, subject_id="a", slice_index=range(12))
        cache.append("Test", images[:2], subject_id="b", slice_index=range(2))
    out = tmp_path / "run"
    options = ("--steps", 400, "--learning-rate", 1e6, "--checkpoint-every", 1)
    assert _train(path, out, *options) == 1
    message = capsys.readouterr().err
    assert "a loss is not finite" in message
    assert "kl_z" in message
    kept = Run(out).latest_checkpoint()
    if kept is not None:
        assert all(np.isfinite(values).all() for values in _weights(out).values())


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_without_a_finite_gradient_is_left_out_where_the_norm_is_limited(
    cache_path, tmp_path, monkeypatch, bad
):
    config = small_config(training={"steps": 3, "batch_size": 4, "gradient_norm_limit": 5.0})
    with SliceCache(cache_path, "Train") as train, SliceCache(cache_path, "Test") as test:
        trainer = Trainer(Run(tmp_path), config, train=train, test=test)
        real = tf.linalg.global_norm

        def norm_of(gradients):
            return tf.where(trainer.step == 1, bad, real(gradients))

        monkeypatch.setattr(tf.linalg, "global_norm", norm_of)
        assert trainer.fit() is None
    assert all(np.isfinite(weight.numpy()).all() for weight in trainer.model.weights)
    assert int(trainer.step.numpy()) == 3
    config = small_config(training={"steps": 3, "batch_size": 4})
    monkeypatch.setattr(tf.linalg, "global_norm", lambda _: tf.constant(bad, tf.float32))
    with SliceCache(cache_path, "Train") as train, SliceCache(cache_path, "Test") as test:
        trainer = Trainer(Run(tmp_path / "unlimited"), config, train=train, test=test)
        with pytest.raises(NonFiniteLossError, match="gradient_norm"):
            trainer.fit()


def test_non_finite_losses_raise_before_anything_is_saved(cache_path, tmp_path):
    config = small_config(training={"steps": 3, "batch_size": 4, "checkpoint_every": 1})
    with SliceCache(cache_path, "Train") as train, SliceCache(cache_path, "Test") as test:
        trainer = Trainer(Run(tmp_path), config, train=train, test=test)
        kernel = trainer.model.encoder.heads["z_mean"].kernel
        kernel.assign(np.full(kernel.shape, np.nan))
        with pytest.raises(NonFiniteLossError, match=r"step 0: .*kl_z nan.*checkpoint is none"):
            trainer.fit()
    assert not list((tmp_path / "checkpoints").glob("*.index"))


def test_epochs_are_permutations_and_batches_do_not_depend_on_the_start():
    rows = np.concatenate([batch_rows(s, num_rows=10, batch_size=4, seed=1) for s in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    again = batch_rows(3, num_rows=10, batch_size=4, seed=1)
    np.testing.assert_array_equal(again, rows[12:16])
    assert batch_rows(0, num_rows=10, batch_size=4, seed=2).tolist() != rows[:4].tolist()


def test_a_cache_with_nan_is_told_in_a_line_and_leaves_no_run(tmp_path, capsys):
    cache = write_cache(tmp_path / "c.h5")
    with h5py.File(cache, "r+") as file:
        file["Train"][:, 20, 20] = np.nan
    assert _train(cache, tmp_path / "run", "--steps", 6) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: {cache}: Train row \d+ holds NaN or infinite values\.", said)
    assert [path.name for path in tmp_path.iterdir()] == ["c.h5"]


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_killed_as_its_index_is_written_is_passed_over(trained, tmp_path, named):
    run = Run(shutil.copytree(trained, tmp_path / "run"))
    newest, state = Path(run.latest_checkpoint()), run.checkpoints / "checkpoint"
    later = newest.with_name("ckpt-99.index")
    later.write_bytes(newest.with_name(f"{newest.name}.index").read_bytes()[:40])
    if not named:
        state.unlink()
    run.remove_unfinished()
    assert run.latest_checkpoint() == str(newest)
    assert not later.exists()


def test_a_damaged_checkpoint_is_not_resumed(cache_path, trained, tmp_path, capsys):
    run = Run(shutil.copytree(trained, tmp_path / "run"))
    data = Path(f"{run.latest_checkpoint()}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    assert _train(cache_path, run.folder, "--resume", "--steps", 30) == 2
    assert "ckpt-24 cannot be read as the checkpoint of" in capsys.readouterr().err
    (run.checkpoints / "checkpoint").write_text("damaged")
    assert _train(cache_path, run.folder, "--resume", "--steps", 30) == 2
    assert "ckpt-24 cannot be read as the checkpoint of" in capsys.readouterr().err


def test_options_that_contradict_the_run_are_refused_on_resume(cache_path, trained, capsys):
    assert _train(cache_path, trained, "--resume", "--clusters", 6) == 2
    assert "was trained with --clusters 9, got 6" in capsys.readouterr().err
    before = (trained / "config.json").read_bytes()
    assert _train(cache_path, trained, "--resume", "--steps", 5) == 2
    assert "Expected --steps of 24 or more" in capsys.readouterr().err
    assert (trained / "config.json").read_bytes() == before
    assert _train(cache_path, trained, "--resume", "--model", "vae") == 2
    assert "was trained with --model gmvae, got vae" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_prolonged_keeps_its_schedules(cache_path, trained, tmp_path):
    run = Run(shutil.copytree(trained, tmp_path / "run"))
    first = run.read()[0].training
    for steps in (25, 26):
        assert _train(cache_path, run.folder, "--resume", "--steps", steps) == 0
    longer = run.read()[0].training
    assert (longer.steps, longer.length, first.length) == (26, 24, 24)
    schedules = [
        [(each.kl_weight(step), each.learning_rate_at(step)) for step in range(24)]
        for each in (first, longer)
    ]
    assert schedules[0] == schedules[1]
    assert len(set(schedules[0])) > 3


@pytest.mark.slow
def test_slow_steps_are_saved_by_the_clock(cache_path, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    assert _train(cache_path, tmp_path / "run", "--steps", 3, "--checkpoint-every", 100) == 0
    steps = {path.stem for path in (tmp_path / "run" / "checkpoints").glob("*.index")}
    assert steps == {"ckpt-1", "ckpt-2", "ckpt-3"}


def test_an_existing_run_is_kept_without_force(cache_path, trained, capsys):
    before = _weights(trained)
    assert _train(cache_path, trained) == 2
    assert "exists; choose another name or pass --force" in capsys.readouterr().err
    _assert_same(before, _weights(trained))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--clusters", 0), "num_clusters of 1 or more, got 0"),
        (("--steps", 0), "steps of 1 or more, got 0"),
        (("--batch-size", 0), "a batch_size of 1 or more, got 0"),
        (("--learning-rate", 0), "a learning_rate above 0"),
        (("--crop", 0, 37, 0, 42), "got 37 x 42"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(cache_path, tmp_path, capsys, options, message):
    assert _train(cache_path, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_cache_without_train_is_refused(tmp_path, capsys):
    path = write_cache(tmp_path / "c.h5", train=0)
    assert _train(path, tmp_path / "run") == 2
    assert "no dataset 'Train'" in capsys.readouterr().err


def test_a_dry_run_prints_the_resolved_configuration_and_writes_nothing(
    cache_path, tmp_path, capsys
):
    assert _train(cache_path, tmp_path / "run", "--dry-run", "--clusters", 12) == 0
    config = Config.from_dict(json.loads(capsys.readouterr().out))
    assert config.network.num_clusters == 12
    assert config.network.initializer == "he_normal"
    assert not (tmp_path / "run").exists()


def test_presets_hold_the_numbers_of_their_source():
    released = presets.preset("released")
    assert released.network.num_clusters == 6
    training = released.training
    assert (training.steps, training.batch_size, training.learning_rate) == (1_600_000, 16, 5e-5)
    assert (training.beta_1, training.beta_2, training.epsilon) == (0.9, 0.999, 1e-8)
    assert (training.checkpoint_every, training.checkpoints_kept) == (5_000, 30)
    assert (released.objective.responsibilities, released.objective.kl_c_floor) == ("released", 0.5)
    paper = presets.preset("paper")
    assert (paper.network.num_clusters, paper.objective.responsibilities) == (9, "bayes")
    assert (paper.objective.kl_c_floor, paper.objective.precision_offset) == (0.0, 0.0)
    assert paper.training == training


def test_the_practical_schedules_rise_and_drop_where_they_say():
    training = presets.preset("practical").training
    assert training.kl_weight(0) == training.kl_weight(1_999) == 1.0
    assert training.kl_weight(2_750) == pytest.approx(5.5)
    assert training.kl_weight(3_500) == training.kl_weight(4_999) == 10.0
    assert training.learning_rate_at(3_499) == 5e-4
    assert training.learning_rate_at(3_500) == pytest.approx(1e-4)


@pytest.mark.slow
def test_the_norm_of_the_gradient_is_limited_before_adam(cache_path, tmp_path):
    """With epsilon above every gradient, Adam's first step is proportional to the gradient."""
    epsilon = 1e9
    options = {"steps": 1, "batch_size": 4, "learning_rate": 1e9, "epsilon": epsilon}
    moved = {}
    for limit in (None, 1e-3):
        config = small_config(training={**options, "gradient_norm_limit": limit})
        with SliceCache(cache_path, "Train") as train, SliceCache(cache_path, "Test") as test:
            trainer = Trainer(Run(tmp_path / str(limit)), config, train=train, test=test)
            before = [weight.numpy() for weight in trainer.model.weights]
            trainer.fit()
            changes = zip(before, trainer.model.weights, strict=True)
            moved[limit] = np.sqrt(sum(np.sum((b - w.numpy()) ** 2) for b, w in changes))
    assert moved[1e-3] == pytest.approx(1e-3 * np.sqrt(1 - 0.999), rel=0.01)
    assert moved[None] > 1e3 * moved[1e-3]


def test_a_config_survives_json():
    for name in PRESET_NAMES:
        config = presets.preset(name, "vae")
        copy = Config.from_dict(json.loads(json.dumps(config.to_dict())))
        assert copy == config


def test_a_checkpoint_of_another_k_is_refused_when_loading(trained, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    settings = json.loads((copy / "config.json").read_text())
    settings["network"]["num_clusters"] = 4
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match=r"read as the checkpoint of .* another model or num_clusters"
    ):
        load(copy)
