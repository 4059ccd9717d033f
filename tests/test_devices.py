"""Device, precision, threads, a quiet screen; and no setting of the user's Keras reaches us."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tf_lesion import devices, provenance
from tf_lesion.files import InputError

ROOT = Path(__file__).parents[1]
# What a method computes, in two convolutions of each kind and one step of training.
PROGRAM = """
import hashlib, json
import sys
from tf_lesion import devices, prior
assert "tensorflow" not in sys.modules
devices.start(device="cpu", threads=2)
import keras
import numpy as np
from conftest import phantom_slices, small_config
from tf_lesion.training.distribution import make_placement
from tf_lesion.training.update import Updater
found = {}
for kind, precision in (("gmvae", "float32"), ("vae-128", "bfloat16")):
    config = small_config(kind, "released", network={"precision": precision})
    update = Updater(config, make_placement())
    update(phantom_slices(16)[..., None], np.arange(16))
    digest = hashlib.sha256()
    for weight in update.model.weights:
        digest.update(weight.numpy().tobytes())
    rates = [optimizer.learning_rate for optimizer in update.optimizers.values()]
    kinds = {str(variable.dtype) for variable in [*update.model.weights, *rates]}
    found[kind] = [digest.hexdigest(), sorted(kinds)]
found["threads"] = devices.describe()["threads"]
print(json.dumps(found))
"""


def _run(**environment):
    left_out = ("TF_CPP_MIN_LOG_LEVEL", "KERAS_BACKEND")
    own = {name: value for name, value in os.environ.items() if name not in left_out}
    own |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=own, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_the_users_settings_of_keras_change_nothing_and_the_screen_stays_empty(tmp_path):
    theirs = {"floatx": "float16", "image_data_format": "channels_first", "backend": "jax"}
    (tmp_path / "keras.json").write_text(json.dumps({**theirs, "epsilon": 0.1}))
    plain, screen = _run(KERAS_HOME=str(tmp_path / "none"))
    assert screen == ""
    assert plain["threads"] == 2
    assert plain["gmvae"][1] == plain["vae-128"][1] == ["float32"]
    changed, screen = _run(KERAS_HOME=str(tmp_path), KERAS_BACKEND="jax")
    assert screen == ""
    assert changed == plain


def test_keras_on_another_backend_is_refused_by_name(monkeypatch):
    config = SimpleNamespace(backend=lambda: "jax")
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(config=config))
    with pytest.raises(InputError, match="imported it on jax; set KERAS_BACKEND=tensorflow"):
        devices.start()


@pytest.mark.parametrize("device", ["tpu", "gpu:", "gpu:x", "GPU", ""])
def test_a_device_that_is_none_is_refused(device):
    with pytest.raises(InputError, match="Expected a device cpu, gpu, gpu:N or auto, got"):
        devices.start(device=device)


def test_a_device_that_is_not_there_is_refused_with_those_that_are():
    assert devices._wanted("gpu:1", ["a", "b"]) == ["b"]
    assert devices._wanted("gpu", ["a", "b"]) == ["a", "b"]
    assert devices._wanted("cpu", ["a", "b"]) == []
    with pytest.raises(InputError, match="got gpu:2; there is cpu, gpu:0, gpu:1"):
        devices._wanted("gpu:2", ["a", "b"])
    with pytest.raises(InputError, match="there is cpu; TensorFlow finds no GPU that it can use"):
        devices._wanted("gpu", [])


def test_starting_again_while_tensorflow_is_at_work_keeps_what_was_chosen():
    import tensorflow as tf

    assert float(tf.constant(1.0) + 1) == 2
    before = devices.describe()["threads"]
    devices.start(device="cpu", threads=1, tf32=True)
    devices.start()
    found = devices.describe()
    assert found["threads"] == before
    assert found["products"] == "float32"
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


INFO = "I0000 00:00:1795727457.652207 6868 cudart_stub.cc:31] Could not find cuda drivers\n"
ERROR = "E0000 00:00:1795727464.597982 6868 cuda_platform.cc:52] failed call to cuInit\n"
WARNING = "2026-01-02 03:04:05.678901: W gpu_device.cc:2343] Cannot dlopen some GPU libraries.\n"
TWICE = "E0000 00:00:1795727464.597982 6868 cuda_dnn.cc:8] Unable to register cuDNN factory\n"
PYTHON = "lib.py:3: DeprecationWarning: something\n"


def _writes(lines, failure=None):
    def set_up(*_):
        os.write(2, "".join(lines).encode())
        if failure is not None:
            raise failure

    return set_up


@pytest.mark.parametrize(
    ("gpu", "device", "shown"),
    [(False, "auto", [PYTHON]), (True, "auto", [ERROR, WARNING, PYTHON]), (True, "cpu", [PYTHON])],
)
def test_lines_of_tensorflow_are_shown_where_a_gpu_is_there_and_wanted(
    monkeypatch, capfd, gpu, device, shown
):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    monkeypatch.setattr(devices, "_set_up", _writes([INFO, ERROR, WARNING, TWICE, PYTHON]))
    monkeypatch.setattr(devices, "_has_gpu", lambda: gpu)
    devices.start(device=device)
    assert capfd.readouterr().err == "".join(shown)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_all_lines_are_shown_where_tensorflow_cannot_be_imported_or_is_asked_to(monkeypatch, capfd):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    lines = [INFO, ERROR, TWICE]
    monkeypatch.setattr(devices, "_set_up", _writes(lines, ImportError("no library")))
    with pytest.raises(ImportError, match="no library"):
        devices.start()
    assert capfd.readouterr().err == "".join(lines)
    monkeypatch.setattr(devices, "_set_up", _writes(lines, InputError("no GPU")))
    with pytest.raises(InputError, match="no GPU"):
        devices.start(device="gpu")
    assert capfd.readouterr().err == ERROR
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.setattr(devices, "_set_up", _writes(lines))
    devices.start()
    assert capfd.readouterr().err == "".join(lines)


def test_the_stamp_of_an_output_is_json_with_device_commit_and_versions():
    stamp = json.loads(json.dumps(provenance.stamp()))
    assert list(stamp) == ["tf_lesion_version", "commit", "changed", "versions", "device"]
    assert list(stamp["device"]) == ["name", "products", "threads"]
    assert {"python", "tensorflow", "keras"} <= set(stamp["versions"])


def test_the_commit_is_that_of_our_checkout_alone_and_changes_are_told(tmp_path, monkeypatch):
    def git(*command):
        name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *name, *command], cwd=tmp_path, check=True)

    def told(file):
        monkeypatch.setattr(provenance, "__file__", str(file))
        return provenance.checkout.__wrapped__()

    inside, top = (tmp_path / name / "tf_lesion" for name in ("venv", ""))
    for package in (inside, top):
        package.mkdir(parents=True)
        (package / "provenance.py").touch()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    nothing = {"commit": None, "changed": None}
    for package in (inside, top):  # neither is theirs: installed, and not in their repository
        assert told(package / "provenance.py") == nothing
    git("add", "tf_lesion")
    git("commit", "-q", "-m", "ours")
    (inside / "provenance.py").unlink()
    assert told(top / "provenance.py")["changed"] is False
    assert len(told(top / "provenance.py")["commit"]) == 40
    index = (tmp_path / ".git" / "index").read_bytes()
    os.utime(top / "provenance.py", (1e9, 1e9))  # git would note in its index that it looked
    assert told(top / "provenance.py")["changed"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == index
    (top / "provenance.py").write_text("edited")
    assert told(top / "provenance.py")["changed"] is True
    git("checkout", "-q", "--", ".")
    (top / "new_method.py").touch()
    assert told(top / "provenance.py")["changed"] is True


@pytest.mark.parametrize(
    ("flags", "slow"),
    [("flags : fma avx2", True), ("flags : avx512_bf16", False), ("flags : amx_bf16", False)],
)
def test_a_processor_that_emulates_bfloat16_is_known_by_its_flags(tmp_path, flags, slow):
    (tmp_path / "cpuinfo").write_text(flags + "\n")
    assert devices.slow_in_bfloat16(tmp_path / "cpuinfo") is slow
    assert not devices.slow_in_bfloat16(tmp_path / "none")
