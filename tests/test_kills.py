"""kill -9 at any moment: the same command goes on to the same result, and no file is half there."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import tiny_scans
from conftest import make_run, write_cache
from PIL import Image

from tf_lesion.calibration import Calibration
from tf_lesion.prior import load

ROOT = Path(__file__).parent.parent
MOMENTS = (0.02, 1.05)  # of the time that the whole command takes
MOST_STARTS = 12  # for one kill that comes before the end

# Imports once and forks for every command, so that all kills come while it works.
SERVER = """
import importlib, json, os, signal, sys, time
import tensorflow, scipy.ndimage, matplotlib.pyplot, pandas
from tf_lesion import methods, restoration, tf1
from tf_lesion.detection import maps
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print("ready", flush=True)
for line in sys.stdin:
    name, argv, log, kill_after = json.loads(line)
    pid = os.fork()
    if pid == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(file, number)
        try:
            status = sys.modules[name].main(argv)
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)  # not waited for yet: the number is still its own
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
COMMANDS = {
    "preprocess": "preprocessing.camcan",
    **{n: f"tf_lesion.cli.{n}" for n in ("train", "calibrate", "evaluate", "detect")},
    "restore": "restore_brats",
}
KILLS = {"preprocess": 10, "train": 10, "restore": 10, "calibrate": 10, "evaluate": 5, "detect": 5}


class Server:
    """Starts commands, each in a process of its own."""

    def __init__(self, log):
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(list(COMMANDS.values()))],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self):
        return self._process.stdout.readline().strip()

    def run(self, name, argv, *, kill_after=None):
        """Its exit status, -9 if it was killed after so many seconds."""
        told = [COMMANDS[name], list(map(str, argv)), str(self.log), kill_after]
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def close(self):
        """End it."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


@dataclass
class Job:
    """A command that is killed.

    Attributes:
        argv: of the first start.
        out: the file or folder that it writes, in a folder of its own.
        again: what a later start is given too, if there is something in a folder.
    """

    name: str
    argv: list
    out: Path
    again: list = field(default_factory=list)

    def at(self, folder):
        """The same job with another output."""
        out = folder / self.out.name
        argv = [out if value == self.out else value for value in self.argv]
        return Job(self.name, argv, out, self.again)

    def next_argv(self):
        """The command line of the next start; None if it made its file, and was killed then."""
        if self.out.is_file():
            return None
        begun = self.out.is_dir() and any(path for path in self.out.glob("[!.]*"))
        return [*self.argv, *(self.again if begun else [])]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server") / "log")
    yield made
    made.close()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, server):
    folder = tmp_path_factory.mktemp("inputs")
    values, affine = tiny_scans.brain()
    for number in range(6):
        noise = np.random.default_rng(number).normal(0, 20, values.shape)
        scan = np.where(values > 0, np.maximum(values + noise, 1), 0).astype(np.float32)
        tiny_scans.write(folder / "scans" / f"sub-{number}_T2w.nii.gz", scan, affine)
    cache = write_cache(folder / "cache.h5", train=16, test=24)
    run = make_run(folder / "run", cache, restoration_steps=40)
    mni = tiny_scans.run(folder / "mni")
    restored = folder / "restored.h5"
    assert server.run("restore", ["--model", run, "--cache", cache, "--out", restored]) == 0

    def job(name, out, argv, *again):
        out = folder / name / out
        return Job(name, [*argv, "--out", out], out, list(again))

    scans = ["--input", folder / "scans", "--voxel-size", tiny_scans.VOXEL_MM]
    slices = ["--model", run, "--cache", cache]
    detecting = job("detect", "maps", [])
    detecting.argv = [folder / "scans", detecting.out, "--model", mni, "--align", "center"]
    training = ["--cache", cache, "--preset", "practical", "--precision", "float32"]
    training += ["--batch-size", 4, "--steps", 60, "--checkpoint-every", 5]
    return {
        "preprocess": job("preprocess", "c.h5", [*scans, "--test-subjects", 2, "--match"]),
        "train": job("train", "run", training, "--resume"),
        "restore": job("restore", "r.h5", [*slices, "--batch-size", 2]),
        "calibrate": job(
            "calibrate",
            "c.h5",
            [*slices, "--batch-size", 4, "--tv-weight", "auto", "--grid", "0.6,1.8,3"],
        ),
        "evaluate": job(
            "evaluate",
            "scores",
            ["--restored", restored, "--cache", cache, "--postprocess", "signed"],
            "--force",
        ),
        "detect": detecting,
    }


def _arrays(path):
    """Every dataset of an HDF5 file."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]}) if hasattr(item, "shape") else None
        )
    return {name: np.asarray(value).tolist() for name, value in found.items()}


def _content(path):
    """What a whole file says that does not depend on when and where it was made."""
    if path.suffix == ".h5":
        return _arrays(path)
    if path.suffix == ".gz":
        return np.asanyarray(nib.load(path).dataobj).tobytes()
    if path.suffix == ".json":
        told = json.loads(path.read_text())
        return sorted(told), told.get("lesions")
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return np.asarray(picture).tobytes()
    return path.read_text(errors="replace") if path.suffix in (".csv", ".md") else None


def _files(folder):
    """{name: content} of what is called as if it were whole."""
    growing = ("losses.csv", "test_losses.csv")  # row by row
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.suffix != ".partial"
        and path.name not in growing
    }


def _final(job):
    """What must be the same in the end, whatever happened before."""
    folder = job.out.parent
    found = _files(folder)
    if job.name == "train":
        rows = list(csv.reader((job.out / "losses.csv").open(newline="")))
        return load(job.out).identity, rows
    if job.name == "calibrate":
        made = Calibration.load(job.out)
        return found, made.points, made.tv_weight, made.curve, made.cohort
    return found


def _check_whole(job, expected):
    """Each file that is there is that of a run that was not killed, if that has one."""
    found, at_end = _files(job.out.parent), _files(expected.out.parent)
    exact = (".h5", ".gz", ".png", ".csv", ".md")
    if job.name == "train":  # a checkpoint is read by the next start
        return
    for name, content in found.items():
        if name in at_end and name.endswith(exact):
            assert content == at_end[name], name


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_killed_at_random_moments_it_comes_to_the_same_result(server, jobs, tmp_path, name):
    whole = jobs[name].at(tmp_path / "whole")
    whole.out.parent.mkdir()
    began = time.monotonic()
    assert server.run(name, whole.argv) == 0, server.log.read_text()[-3000:]
    seconds = time.monotonic() - began
    rng, kills, number, starts = np.random.default_rng(len(name)), 0, 0, 0
    expected = _final(whole)
    while kills < KILLS[name]:
        assert starts < MOST_STARTS * KILLS[name], "too quick to be killed"
        job = jobs[name].at(tmp_path / f"killed-{number}")
        job.out.parent.mkdir()
        number += 1
        for left in range(4, -1, -1):  # the same output up to four times, then to the end
            argv, starts = job.next_argv(), starts + 1
            if argv is None:
                break
            moment = rng.uniform(*MOMENTS) * seconds
            last = left == 0 or kills == KILLS[name]
            status = server.run(name, argv, kill_after=None if last else moment)
            assert status in (0, -signal.SIGKILL), server.log.read_text()[-3000:]
            kills += status != 0
            _check_whole(job, whole)
            if status == 0:
                break
        if job.next_argv() is not None:
            assert server.run(name, job.next_argv()) == 0, server.log.read_text()[-3000:]
        assert _final(job) == expected
        # What a kill in the last moment left, the next command in this folder takes away.
        hidden = [path.name for path in job.out.parent.rglob(".*")]
        assert not hidden or status != 0, hidden
        shutil.rmtree(job.out.parent)
    print(f"{name}: {kills} kills in {number} outputs, {seconds:.1f} s unharmed")
