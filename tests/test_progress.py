"""What a run over scans tells: a bar on a terminal, a line a scan elsewhere, a log, no noise."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import tiny_scans

import restore_brats
from tf_lesion.cli import detect
from tf_lesion.detection import maps, progress
from tf_lesion.detection.progress import LOG, QUIET, VERBOSE, Progress

ROOT = Path(__file__).parent.parent
SECONDS = {"reading": 1, "finding": 3, "aligning": 6, "restoring": 20, "writing": 10}


class Terminal(io.StringIO):
    """A screen that says it is one."""

    def isatty(self):
        """It is."""
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that only goes on when it is told."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def go_on(seconds):
        now[0] += seconds

    return go_on


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run."""
    keras.utils.set_random_seed(0)
    return tiny_scans.run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def scans(tmp_path):
    """A folder of two scans, and one that cannot be read."""
    values, affine = tiny_scans.brain()
    for name in "ac":
        path = tmp_path / "scans" / f"{name}_t2.nii.gz"
        tiny_scans.write(path, values, affine, sform=0, qform=0)
    (tmp_path / "scans" / "b_t2.nii.gz").write_bytes(b"nonsense")
    return tmp_path / "scans"


def _work(told, clock, seconds=SECONDS, parts=10):
    """All stages of a scan, on a clock."""
    for name, duration in seconds.items():
        told.stage(name, parts if name == "restoring" else 0)
        for _ in range(parts):
            clock(duration / parts)
            told.advance(1)


# The bar ----------------------------------------------------------------------------------------


def test_there_is_no_estimate_before_something_was_measured(clock):
    told = Progress(4)
    told._clock.begin()
    for name in ("reading", "finding", "aligning"):
        told.stage(name)
        clock(SECONDS[name])
        assert told._clock.left(1) is None
    told.stage("restoring", 100)
    assert told._clock.left(1) is None


def test_the_estimate_is_right_for_scans_that_take_as_long_as_the_first(clock):
    told, whole = Progress(3), sum(SECONDS.values())
    with told.scan("a"):
        _work(told, clock)
        told.tell("done")
    with told.scan("b"):
        for name in ("reading", "finding", "aligning"):
            told.stage(name)
            clock(SECONDS[name])
        told.number = 2
        told.stage("restoring", 10)
        clock(SECONDS["restoring"] / 2)
        told.advance(5)
        assert told._clock.left(2) == pytest.approx(20 + whole)
        assert told._clock.share() == pytest.approx(20 / whole)


def test_a_restoration_slower_than_before_is_seen_at_once(clock):
    told = Progress(1)
    told._clock.begin()
    told.stage("restoring", 10)
    clock(100)
    told.advance(5)
    assert told._clock.left(1) == pytest.approx(100 + progress.STAGES["writing"])
    clock(100)
    told.stage("writing")
    slower = 200 / progress.STAGES["restoring"]
    assert told._clock.left(1) == pytest.approx(slower * progress.STAGES["writing"])


def test_the_bar_fits_80_columns_and_goes_when_the_scan_is_done(clock, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    with Progress(12) as told:
        for name in ("sub-averylongname_ses-20260101_acq-highresolution_run-1", "b"):
            with told.scan(name):
                _work(told, clock)
                told.tell("done")
    drawn = [line for line in screen.getvalue().replace("\n", "\r").split("\r") if line.strip()]
    assert any("[1/12] sub-averylongname_se...: restoring" in line for line in drawn)
    assert any("[2/12] b: aligning" in line and "left in all" in line for line in drawn)
    assert max(map(len, drawn)) <= 80
    assert screen.getvalue().rstrip(" ").endswith("\r")


@pytest.mark.parametrize("screen", [QUIET, progress.NORMAL, VERBOSE])
def test_without_a_terminal_there_is_a_line_a_scan_and_no_bar(clock, capsys, screen):
    with Progress(2, screen=screen) as told:
        for name in ("a", "b"):
            with told.scan(name):
                _work(told, clock)
                told.warn("odd.")
                told.tell("done" if name == "a" else "failed", "" if name == "a" else "why")
    out, err = capsys.readouterr()
    if screen == QUIET:
        assert (out, err) == ("", "error: b: why\n")
        return
    lines = ["[1/2] a: done in 40 s", "[2/2] b: failed"]
    assert [line for line in out.splitlines() if line[0] == "["] == lines
    assert ("restoring 20 s" in out) == (screen == VERBOSE)
    assert err == "warning: a: odd.\nwarning: b: odd.\nerror: b: why\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (41.4, "41 s"), (119.6, "2 min 0 s"), (7500, "2 h 5 min")],
)
def test_durations_are_said_as_people_do(seconds, said):
    assert progress._duration(seconds) == said


# The log ----------------------------------------------------------------------------------------


def test_the_log_leaves_no_folder_behind_of_what_fails_before(tmp_path):
    with Progress(1, log=tmp_path / "out" / LOG) as told:
        told.say("begun")
        with contextlib.suppress(ValueError), told.scan("a"):
            raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / LOG).mkdir()
    with Progress(1, log=tmp_path / LOG) as told:
        told.say("begun")
    assert capsys.readouterr() == ("begun\n", "")


def test_a_run_over_a_folder_is_told_and_logged(run, scans, tmp_path, capsys, monkeypatch):
    out = tmp_path / "maps"
    assert detect.main([str(scans), str(out), "--model", str(run)]) == 1
    said = capsys.readouterr()
    lines = said.out.splitlines()
    found = [line.split(" in ")[0] for line in lines[:3]]
    assert found == ["[1/3] a: done", "[2/3] b: failed", "[3/3] c: done"]
    assert "2 done, 1 failed" in lines[3]
    assert str(out / LOG) in lines[4]
    assert "MIDL 2019" in lines[-1]
    assert "|" not in said.out + said.err
    assert "\r" not in said.out + said.err

    def fails(*_, **__):
        raise KeyError("nobody expects this")

    monkeypatch.setattr(maps, "to_scan_grid", fails)
    again = [str(scans), str(out), "--model", str(run), "--force", "--quiet"]
    assert detect.main(again) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert all(line.startswith("error: ") for line in said.err.splitlines() if line[0] != "N")
    log = (out / LOG).read_text()
    assert log.count("tf-lesion detect") == 2  # appended
    for part in ("tensorflow 2.", "[1/3] a: done in", "ERROR [2/3] b: failed: ", "WARNING a: "):
        assert part in log
    assert 'raise KeyError("nobody expects this")' in log
    assert log.count("MIDL") == 0
    assert all(row["status"] == "failed" for row in _rows(out))


def _rows(out):
    return json.loads((out / "summary.json").read_text())["scans"]


@pytest.mark.slow
def test_bids_validators_ignore_the_log(run, scans, tmp_path):
    out = tmp_path / "maps"
    argv = ["--model", run, "--input", scans / "a_t2.nii.gz", "--out", out, "--bids-out", "-q"]
    assert restore_brats.main(list(map(str, argv))) == 0
    assert (out / LOG).exists()
    assert LOG in (out / ".bidsignore").read_text().splitlines()


@pytest.mark.slow
def test_the_screen_of_a_fresh_process_shows_nothing_of_the_libraries(run, scans, tmp_path):
    """TensorFlow, absl and oneDNN write to file descriptor 2, past Python."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    command = [sys.executable, "-m", "tf_lesion.cli.main", "detect"]
    command += [scans / "a_t2.nii.gz", tmp_path / "maps", "--model", run]
    done = subprocess.run(
        list(map(str, command)), env=settings, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line]
    assert [line for line in told if not line.startswith(("warning: a_t2: ", "No lesion"))] == []
    assert len(done.stdout.splitlines()) == 4  # done, wrote, two lines of whom to cite
