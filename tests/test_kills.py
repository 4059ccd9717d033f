"""kill -9 at any moment: the same command goes on to the same result, and no file is half there."""

import csv
import json
import shutil
import signal
import time

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tf_lesion.calibration import Calibration
from tf_lesion.prior import load

MOMENTS = (0.2, 1.02)  # of the time that the whole command takes
MOST_OF_AN_OUTPUT = 4  # kills, before it may come to its end
MOST_STARTS = 12  # for one kill that comes before the end

KILLS = {"preprocess": 10, "train": 10, "restore": 10, "calibrate": 10, "evaluate": 5, "detect": 5}


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
    if path.suffix in (".csv", ".md"):  # what was done before the kill is skipped after it
        return path.read_text(errors="replace").replace(",skipped,", ",done,")
    return None


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
    assert server.run(name, whole.argv) == 0, server.said()[-3000:]
    seconds = time.monotonic() - began
    rng, kills, number, starts = np.random.default_rng(len(name)), 0, 0, 0
    expected = _final(whole)
    while kills < KILLS[name]:
        assert starts < MOST_STARTS * KILLS[name], "too quick to be killed"
        job = jobs[name].at(tmp_path / f"killed-{number}")
        job.out.parent.mkdir()
        number += 1
        status, started = -signal.SIGKILL, 0
        while status != 0 and (argv := job.next_argv()) is not None:
            last = started == MOST_OF_AN_OUTPUT or kills == KILLS[name]
            moment = None if last else rng.uniform(*MOMENTS) * seconds
            began = time.monotonic()
            status = server.run(name, argv, kill_after=moment)
            if status == 0 and started == 0:  # it was measured beside other work
                seconds = min(seconds, time.monotonic() - began)
            assert status in (0, -signal.SIGKILL), server.said()[-3000:]
            kills, started, starts = kills + (status != 0), started + 1, starts + 1
            _check_whole(job, whole)
        assert _final(job) == expected
        names = (".*", "*_temp", "*tempstate*", "checkpoint.tmp*")
        left = [path.name for pattern in names for path in job.out.parent.rglob(pattern)]
        assert status != 0 or left == []  # else a later command in this folder takes it away
        shutil.rmtree(job.out.parent)
    print(f"{name}: {kills} kills in {number} outputs, {seconds:.1f} s unharmed")
