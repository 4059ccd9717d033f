"""Training by several processes: the loss curve of one, and what happens when a process dies."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import train_gmvae
from tf_lesion.files import InputError
from tf_lesion.training import distribution
from tf_lesion.training.distribution import make_placement

ROOT = Path(__file__).parents[1]
WORKERS = 2
STEPS = 50  # after which losses are logged
SECONDS_TO_NOTICE = 30  # a worker's death; it takes about one


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _start(argv, logs):
    """Processes of one training, each with its own TF_CONFIG; errors go to logs/worker-N."""
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(WORKERS)]
    processes = []
    for index in range(WORKERS):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(task), "CUDA_VISIBLE_DEVICES": ""}
        with (logs / f"worker-{index}").open("w") as log:
            command = [sys.executable, str(ROOT / "train_gmvae.py"), *argv]
            processes.append(
                subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log, stdout=log)
            )
    return processes


def _arguments(cache, out, *more):
    # The released learning rate: at ten times as much, rounding alone parts two runs in 50 steps.
    options = ["--preset", "released", "--batch-size", "4"]
    return ["--cache", str(cache), "--out", str(out), *options, *map(str, more)]


def _losses(run):
    with (run / "losses.csv").open(newline="") as file:
        return {int(row["step"]): float(row["nelbo"]) for row in csv.DictReader(file)}


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(cache_path, tmp_path):
    argv = ["--steps", STEPS]
    distributed = _arguments(cache_path, tmp_path / "two", *argv, "--distribute", "multi-worker")
    processes = _start(distributed, tmp_path)
    codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0, 0], (tmp_path / "worker-0").read_text()[-2000:]
    assert train_gmvae.main(_arguments(cache_path, tmp_path / "one", *argv)) == 0
    two, one = _losses(tmp_path / "two"), _losses(tmp_path / "one")
    assert list(one) == list(two) == [STEPS]
    np.testing.assert_allclose(two[STEPS], one[STEPS], rtol=1e-4)


@pytest.mark.slow
def test_a_killed_worker_is_reported_and_the_training_goes_on_from_the_checkpoint(
    cache_path, tmp_path
):
    run = tmp_path / "run"
    argv = _arguments(cache_path, run, "--checkpoint-every", 5, "--distribute", "multi-worker")
    chief, other = _start([*argv, "--steps", "100000"], tmp_path)
    deadline = time.time() + 200
    while not list(run.glob("checkpoints/*.index")):
        assert time.time() < deadline, (tmp_path / "worker-0").read_text()[-2000:]
        assert chief.poll() is None, (tmp_path / "worker-0").read_text()[-2000:]
        time.sleep(0.2)
    other.send_signal(signal.SIGKILL)
    assert chief.wait(timeout=SECONDS_TO_NOTICE) == 1
    assert "a worker is gone" in (tmp_path / "worker-0").read_text()
    reached = max(int(path.stem.split("-")[1]) for path in run.glob("checkpoints/*.index"))
    again = _start([*argv, "--steps", str(reached + 5), "--resume"], tmp_path)
    codes = [process.wait(timeout=300) for process in again]
    assert codes == [0, 0], (tmp_path / "worker-0").read_text()[-2000:]
    assert (run / "checkpoints" / f"ckpt-{reached + 5}.index").exists()


@pytest.mark.slow
def test_workers_stop_after_the_same_step_when_one_is_asked_to(cache_path, tmp_path):
    run = tmp_path / "run"
    argv = _arguments(cache_path, run, "--checkpoint-every", 5, "--distribute", "multi-worker")
    chief, other = _start([*argv, "--steps", "100000"], tmp_path)
    deadline = time.time() + 200
    while not list(run.glob("checkpoints/*.index")):
        assert time.time() < deadline, (tmp_path / "worker-0").read_text()[-2000:]
        time.sleep(0.2)
    other.send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=SECONDS_TO_NOTICE) for process in (chief, other)]
    assert codes == [128 + signal.SIGTERM] * 2, (tmp_path / "worker-0").read_text()[-2000:]
    said = (tmp_path / "worker-0").read_text()
    assert "Stopped and saved at step" in said


def test_workers_that_nobody_names_and_batches_that_do_not_split_are_refused(
    cache_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    argv = _arguments(cache_path, tmp_path / "run", "--distribute", "multi-worker")
    assert train_gmvae.main(argv) == 2
    assert "addresses of the workers in TF_CONFIG" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_step_of_slurm_names_its_workers(monkeypatch):
    step = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "2",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "2,1",
    }
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    config = distribution._slurm_config()
    port = 10_000 + 4711 * 16 % 20_000
    assert config == {
        "cluster": {"worker": [f"node1:{port}", f"node1:{port + 1}", f"node2:{port}"]},
        "task": {"type": "worker", "index": 2},
    }
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    assert distribution._slurm_config()["cluster"]["worker"][0] == f"node1:{port + 16}"


def _numbered(monkeypatch, cluster, kind, index):
    task = {"cluster": cluster, "task": {"type": kind, "index": index}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(task))
    return distribution._number(tf.distribute.cluster_resolver.TFConfigClusterResolver())


def test_a_chief_of_tf_config_is_the_first_process_and_writes_alone(monkeypatch):
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    assert _numbered(monkeypatch, cluster, "chief", 0) == (0, 3)
    assert _numbered(monkeypatch, cluster, "worker", 0) == (1, 3)
    assert _numbered(monkeypatch, {"worker": ["b:1", "c:1"]}, "worker", 1) == (1, 2)
    for wrong, kind in (({"ps": ["p:1"], "worker": ["b:1"]}, "worker"), ({"worker": ["b"]}, "ps")):
        with pytest.raises(InputError, match="Expected workers, and a chief at most"):
            _numbered(monkeypatch, wrong, kind, 0)
    for index in (3, 1, -1):
        with pytest.raises(InputError, match=rf"from 0 to 0, there are 1 of worker; got {index}"):
            _numbered(monkeypatch, {"worker": ["b:1"]}, "worker", index)


def test_each_process_reads_its_part_of_the_batch():
    placement = make_placement()
    rows = np.arange(8)
    np.testing.assert_array_equal(placement.local(rows), rows)
    two = type(placement)(placement.strategy, worker=1, workers=2)
    np.testing.assert_array_equal(two.local(rows), [4, 5, 6, 7])
    assert not two.chief


@pytest.mark.slow
def test_two_devices_of_one_process_train_as_one(cache_path, tmp_path):
    """Two logical CPU devices stand for two GPUs, in a process of their own."""
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import numpy as np
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from conftest import small_config
from tf_lesion.training.distribution import Placement, make_placement
from tf_lesion.files import InputError
from tf_lesion.caches.slices import SliceCache
from tf_lesion.baselines import METHODS
from tf_lesion.training.update import Updater
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
config = small_config(training={{"batch_size": 4, "learning_rate": 1e-3}})
config = config.replace(training={{"gradient_norm_limit": 5e3}})
both, one = Updater(config, Placement(strategy)), Updater(config, make_placement())
with SliceCache({str(cache_path)!r}, "Train") as cache:
    for step in range(20):
        rows = np.arange(4 * step, 4 * step + 4) % len(cache)
        images = cache.read(rows)
        losses = [each(tf.constant(images), tf.constant(rows)) for each in (both, one)]
        for name in losses[0]:
            np.testing.assert_allclose(losses[0][name], losses[1][name], rtol=1e-4, atol=1e-3)
asked = both(tf.constant(images), tf.constant(rows), stopping=True)
assert (asked["stopping"], losses[0]["stopping"]) == (1, 0)
refused = [config.replace(training={{"batch_size": 3}})]
refused += [small_config(name, training={{"batch_size": 4}}) for name in METHODS]
for config in refused:
    try:
        Updater(config, Placement(strategy))
        print("accepted", config.network.model)
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "that 2 devices share evenly, got 3" in done.stdout
    said = done.stdout.splitlines()
    assert [line for line in said if line.startswith("accepted")] == [
        "accepted gmvae",
        "accepted vae",
        "accepted denoiser",
    ]
    assert "Expected one device for aae-128, got 2: its batch normalization" in done.stdout
