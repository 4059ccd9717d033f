"""The benchmarks run, count what they time, and fail when a promise does."""

import json

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run

from eval import benchmark, benchmark_data, benchmark_models, benchmark_solver, benchmark_timing
from tf_lesion import config

SMALL = ("--rounds", "1", "--batch-size", "4", "--size", "38", "42")


@pytest.mark.parametrize("what", ["restore", "train"])
def test_models_are_timed_against_the_plain_network(what, tmp_path, capsys, monkeypatch):
    out = tmp_path / "figures.json"
    for name in ("RESTORE_LIMITS", "TRAIN_LIMITS"):
        monkeypatch.setattr(benchmark_models, name, {"float32": 0.0, "bfloat16": 0.0})
    monkeypatch.setattr(benchmark_models, "RUN_LIMIT", 0.0)
    assert benchmark.main([what, *SMALL, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert figures["rows"][0]["way"] == "plain float32"
    assert figures["rows"][0]["times faster"] == 1.0
    assert figures["GFLOP per slice-step"] > 0
    for row in figures["rows"]:
        assert row["way"] in printed
        assert row["seconds per step"] > 0
    monkeypatch.setattr(benchmark_models, "RUN_LIMIT", 1e9)
    monkeypatch.setattr(benchmark_models, "TRAIN_LIMITS", {"float32": 1e9})
    assert benchmark.main([what, *SMALL]) == 1


def test_solvers_are_compared_on_patients(cache_path, tmp_path, monkeypatch, capsys):
    run, out = make_run(tmp_path / "run", cache_path), tmp_path / "solver.json"
    for solver in ("multirate", "huber"):
        monkeypatch.setitem(config.SOLVERS[solver], "steps", 5)
    monkeypatch.setattr(benchmark_solver, "AUC_LIMIT", 1.0)
    argv = ["solver", "--model", str(run), "--cache", str(cache_path), "--max-slices", "3"]
    benchmark.main([*argv, "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    steps = {row["way"]: [] for row in rows}
    assert len(steps) == 6
    for row in rows:
        steps[row["way"]].append(int(row["step"]))
    assert steps["released float32"] == [1, 2, 3, 4, 5, 6]  # of the run
    assert steps["multirate bfloat16"] == [1, 2, 3, 4, 5]
    assert all(0 <= row["AUC"] <= 1 and np.isfinite(row["objective"]) for row in rows)
    monkeypatch.setattr(benchmark_solver, "AUC_LIMIT", -1.0)
    assert benchmark.main(argv) == 1
    assert benchmark.main(["solver"]) == 2
    assert "Expected --model and --cache" in capsys.readouterr().err


def test_batches_are_timed(monkeypatch):
    monkeypatch.setattr(benchmark_data, "CACHE_SLICES", 8)
    monkeypatch.setattr(benchmark_data, "BATCHES_TIMED", 3)
    monkeypatch.setattr(benchmark_data, "SLICES_PER_SECOND", 0.0)
    assert benchmark.main(["cache", "--rounds", "1", "--batch-size", "4"]) == 0
    monkeypatch.setattr(benchmark_data, "SLICES_PER_SECOND", 1e12)
    assert benchmark.main(["cache", "--rounds", "1", "--batch-size", "4"]) == 1


def test_work_is_counted_as_tensorflow_counts_it():
    image, kernel = tf.zeros([2, 10, 12, 3]), tf.zeros([3, 3, 3, 5])
    step = tf.function(lambda: tf.nn.conv2d(image, kernel, 1, "VALID"))
    assert benchmark_timing.graph_gflop(step) == pytest.approx(2 * 2 * 8 * 10 * 27 * 5 / 1e9)


def test_the_peak_memory_is_that_of_the_timed_part():
    if benchmark_timing.peak_gigabytes() is None:
        assert not benchmark_timing.STATUS.exists()
        return
    big = {"big": lambda: np.ones(40_000_000).sum(), "small": lambda: np.ones(10).sum()}
    found = benchmark_timing.interleaved(big, rounds=2)
    assert found[0].peak_gigabytes - found[1].peak_gigabytes > 0.25


def test_ratios_are_those_of_the_medians():
    plain = benchmark_timing.Measured("plain", (3.0, 1.0, 2.0))
    fast = benchmark_timing.Measured("fast", (9.0, 0.5, 0.4), work=10.0)
    assert fast.faster_than(plain) == pytest.approx(4.0)
    assert fast.speed == pytest.approx(20.0)
    rows = benchmark_timing.as_rows([plain, fast], unit="step", peaks={"float32": 40.0})
    assert rows[1]["of peak"] == pytest.approx(0.5)
    assert "4" in benchmark_timing.table(rows).splitlines()[2]


def test_numbers_that_make_no_sense_are_refused(capsys):
    assert benchmark.main(["restore", "--rounds", "0"]) == 2
    assert "Expected --rounds 1 or more, got 0" in capsys.readouterr().err
