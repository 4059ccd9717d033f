"""The benchmarks run, count what they time, and fail when a promise does."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from conftest import make_run

from eval import benchmark, benchmark_data, benchmark_models
from tf_lesion import config

SMALL = ("--rounds", "1", "--batch-size", "4", "--size", "38", "42")


@pytest.mark.slow
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
    for row in figures["rows"]:
        assert row["way"] in printed
        assert row["seconds per step"] > 0


def test_a_way_that_is_too_slow_fails():
    table = benchmark_data.as_table(pd.Series({"plain": 2.0, "fast": 1.0}), np.nan, unit="step")
    assert benchmark_models._keeps(table, {"fast": 2.0})
    assert not benchmark_models._keeps(table, {"fast": 2.1})


@pytest.mark.slow
def test_solvers_are_compared_on_patients(cache_path, tmp_path, monkeypatch, capsys):
    run, out = make_run(tmp_path / "run", cache_path), tmp_path / "solver.json"
    stored = json.loads((run / "config.json").read_text())
    stored["restoration"] = config.RestorationConfig().changed(steps=6).to_dict()
    (run / "config.json").write_text(json.dumps(stored))
    for solver in ("multirate", "huber"):
        short = dataclasses.replace(config.SOLVERS[solver], steps=5)
        monkeypatch.setitem(config.SOLVERS, solver, short)
    monkeypatch.setattr(benchmark_models, "AUC_LIMIT", 1.0)
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
    monkeypatch.setattr(benchmark_models, "AUC_LIMIT", -1.0)
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


def test_the_peak_memory_is_that_of_the_timed_part():
    if not benchmark_data.STATUS.exists():
        assert np.isnan(benchmark_data.timed_once(lambda: 1)[2])
        return
    big = {"big": lambda: np.ones(40_000_000).sum(), "small": lambda: np.ones(10).sum()}
    found = benchmark_data.interleaved(big, rounds=2, unit="sum")
    assert found["peak GB"]["big"] - found["peak GB"]["small"] > 0.25


def test_ratios_are_those_of_the_medians(monkeypatch):
    times = iter([0, 0, *(3, 9), *(1, 0.5), *(2, 0.4)])
    monkeypatch.setattr(benchmark_data, "timed_once", lambda way: (None, way(), float("nan")))
    ways = {"plain": lambda: next(times), "fast": lambda: next(times)}
    found = benchmark_data.interleaved(ways, rounds=3, unit="step", units=2)
    assert found["seconds per step"].tolist() == [1.0, 0.25]
    assert found["times faster"]["fast"] == pytest.approx(4.0)
    assert "peak GB" not in found


def test_counting_is_compared_with_the_released_way(tmp_path, monkeypatch, capsys):
    out = tmp_path / "metrics.json"
    monkeypatch.setattr(benchmark_data, "SPEEDUP_LIMIT", 0.0)
    monkeypatch.setattr(benchmark_data, "GIGABYTES_LIMIT", 1e9)  # of all tests so far
    argv = ["metrics", "--voxels", "20000", "--out", str(out)]
    assert benchmark.main(argv) == 0
    found = json.loads(out.read_text())
    assert found["same integers"]
    assert [row["way"] for row in found["rows"]] == ["plain, each threshold in turn", "one pass"]
    monkeypatch.setattr(benchmark_data, "plain_count", lambda *_: [0, 0, 0, 0])
    assert benchmark.main([*argv, "--force"]) == 1
    assert "promises more than this" in capsys.readouterr().err


def test_numbers_that_make_no_sense_are_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["restore", "--rounds", "0"])
    assert "whole number of 1 or more, got 0" in capsys.readouterr().err
