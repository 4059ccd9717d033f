"""Files that are there: nothing of anybody's is replaced but what the same command made."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import write_cache

import train_gmvae
from preprocessing.phantom.__main__ import write_cohort
from tf_lesion.caches.restored import RestoredWriter
from tf_lesion.caches.slices import CacheWriter
from tf_lesion.detection import files as detection_files
from tf_lesion.detection.layout import FAILED, SUMMARY
from tf_lesion.files import (
    InputError,
    content_identity,
    locked,
    put_back,
    remove_abandoned,
    set_aside,
    written_whole,
)
from tf_lesion.scans.discovery import Subject
from tf_lesion.training.trainer import Trainer

ROOT = Path(__file__).parent.parent


class Other:
    """Another process, which runs a program up to `wait()` and then waits to be ended."""

    def __init__(self, program, *arguments):
        program = (
            "import sys; from pathlib import Path; from tf_lesion.files import *\n"
            "def wait(): print('there', flush=True); sys.stdin.readline()\n" + program
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "there\n"

    def end(self, number=signal.SIGKILL):
        """Kill it, or with no number let it go on; its exit status."""
        if number:
            self._process.send_signal(number)
        self._process.communicate("\n")
        return self._process.returncode


WRITER = """
with written_whole(sys.argv[1], marker=sys.argv[2]) as temporary:
    if sys.argv[2]:
        temporary.mkdir()
        (temporary / "a").write_text("half")
    else:
        temporary.write_text("half")
    wait()
    (temporary / sys.argv[2] if sys.argv[2] else temporary).write_text("whole")
"""


def precious(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    return folder


@pytest.mark.parametrize("changed", ["t2.hdr", "t2.img"])
@pytest.mark.parametrize("named", ["t2.hdr", "t2.img"])
def test_a_scan_of_two_files_is_another_when_either_is(named, changed, tmp_path):
    nib.save(nib.Nifti1Pair(np.ones((4, 4, 4)), np.eye(4)), tmp_path / "t2.hdr")
    before = content_identity(tmp_path / named)
    with (tmp_path / changed).open("r+b") as file:
        file.seek(150)  # descrip in the header
        file.write(b"x")
    assert content_identity(tmp_path / named) != before


def test_force_never_replaces_a_folder_of_another_kind(tmp_path):
    folder = precious(tmp_path / "home")
    (tmp_path / "empty").mkdir()
    for taken in (folder, tmp_path / "empty"):
        with pytest.raises(InputError, match="a file to replace"), written_whole(taken):
            pass
        with pytest.raises(InputError, match="a file to replace"):
            RestoredWriter(taken, rows=[0], shape=(38, 42), settings={}, force=True)
    expected = pytest.raises(InputError, match=r"a folder with config\.json to replace")
    with expected, written_whole(folder, marker="config.json"):
        pass
    with pytest.raises(InputError, match=r"a folder with phantom\.json"):
        write_cohort(folder, healthy=1, patients=0, seed=0, voxel_size=4.0, force=True)
    with pytest.raises(InputError, match="a file to replace"):
        CacheWriter(folder, slice_shape=(38, 42), crop=(0, 38, 0, 42), force=True).__enter__()
    assert (folder / "thesis.tex").read_text() == "precious"


def test_a_folder_set_aside_comes_back_unless_it_is_given_up(tmp_path):
    folder = precious(tmp_path / "run")
    with set_aside(folder):
        folder.mkdir()
        (folder / "half").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "thesis.tex"]
    with set_aside(folder) as give_up:
        folder.mkdir()
        give_up()
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]
    with set_aside(tmp_path / "new") as give_up:
        (tmp_path / "new").mkdir()
        give_up()
    assert (tmp_path / "new").exists()
    with set_aside(tmp_path / "newer"):
        (tmp_path / "newer").mkdir()
    assert not (tmp_path / "newer").exists()


@pytest.mark.slow
def test_a_run_is_replaced_only_when_the_new_one_trains(tmp_path, monkeypatch, capsys):
    cache, run = write_cache(tmp_path / "c.h5"), tmp_path / "run"
    argv = ["--cache", str(cache), "--out", str(run), "--preset", "practical", "--steps", "1"]
    argv += ["--precision", "float32", "--batch-size", "2"]
    assert train_gmvae.main(argv) == 0
    before = sorted(path.name for path in run.rglob("*"))
    old = (run / "config.json").read_text()

    def fails(*_):
        raise InputError("no memory")

    monkeypatch.setattr(Trainer, "_one_step", fails)
    assert train_gmvae.main([*argv, "--force", "--seed", "1"]) == 2
    assert "no memory" in capsys.readouterr().err
    assert sorted(path.name for path in run.rglob("*")) == before
    assert (run / "config.json").read_text() == old
    monkeypatch.undo()
    assert train_gmvae.main([*argv, "--force", "--seed", "1"]) == 0
    assert json.loads((run / "config.json").read_text())["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.h5", "run"]


def test_the_description_and_ignored_files_of_a_data_set_are_kept(tmp_path):
    about, ignored = tmp_path / "dataset_description.json", tmp_path / ".bidsignore"
    about.write_text('{"Name": "Our raw data", "Authors": ["A", "Ü"]}', encoding="utf-8")
    ignored.write_bytes("größe/\n".encode("latin-1"))
    with pytest.raises(FileExistsError, match="describes another data set"):
        detection_files.refuse_other_dataset(tmp_path, force=False)
    detection_files.refuse_other_dataset(tmp_path, force=True)
    about.unlink()
    for _ in range(2):
        detection_files.write_dataset_description(tmp_path, tmp_path)
        lines = ["größe/", *detection_files.BIDS_IGNORED]
        assert ignored.read_text(encoding="latin-1").splitlines() == lines
        detection_files.refuse_other_dataset(tmp_path, force=False)


def test_the_summary_keeps_what_it_says_of_other_scans(tmp_path):
    def summary(*names):
        subjects = [Subject(name, tmp_path / name, problem="not here") for name in names]
        detection_files.detect_many(None, subjects, tmp_path / "maps")
        rows = json.loads((tmp_path / "maps" / SUMMARY).read_text())["scans"]
        return {row["name"]: row["status"] for row in rows}

    assert list(summary("a", "b")) == ["a", "b"]
    assert summary("b", "c") == dict.fromkeys(("a", "b", "c"), FAILED)
    (tmp_path / "maps" / SUMMARY).write_text('{"cells": 3}')
    with pytest.raises(InputError, match=r"Expected .*summary\.json"):
        summary("d")
    assert (tmp_path / "maps" / SUMMARY).read_text() == '{"cells": 3}'


@pytest.mark.parametrize("marker", ["", "config.json"])
def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path, marker):
    out = tmp_path / "out"
    killed, living = (Other(WRITER, out, marker) for _ in range(2))
    foreign = tmp_path / ".partial-00000000-1-out"  # of another machine: nobody knows
    theirs = tmp_path / ".partial-mine"
    foreign.touch(), theirs.touch()
    assert len(list(tmp_path.iterdir())) == 4
    killed.end()
    with written_whole(tmp_path / "else") as temporary:
        temporary.touch()
    hidden = {path.name for path in tmp_path.glob(".*")}
    assert hidden >= {foreign.name, theirs.name}
    assert len(hidden) == 3
    assert living.end(number=None) == 0
    assert (out / marker).read_text() == "whole"
    assert {path.name for path in tmp_path.glob(".*")} == {foreign.name, theirs.name}


def test_of_two_processes_that_make_one_file_the_later_is_told(tmp_path):
    out = tmp_path / "out"
    other = Other(WRITER, out, "")

    def second():
        with written_whole(out, force=False) as temporary:
            temporary.write_text("second")
            other.end(number=None)

    with pytest.raises(FileExistsError, match="pass --force"):
        second()
    assert out.read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_for_one_process_and_goes_with_it_when_it_is_killed(tmp_path):
    other = Other("with locked(Path(sys.argv[1])): wait()", tmp_path)
    with pytest.raises(InputError, match="in use by another process"), locked(tmp_path):
        pass
    other.end()
    with locked(tmp_path), locked(tmp_path / "not there"):
        pass


def test_what_a_killed_process_had_set_aside_is_put_back_and_what_a_living_one_has_is_not(tmp_path):
    folder = precious(tmp_path / "run")
    program = "with set_aside(Path(sys.argv[1])): Path(sys.argv[1]).mkdir(); wait()"
    other = Other(program, folder)
    assert not put_back(folder)
    assert not (folder / "thesis.tex").exists()
    other.end()
    assert not put_back(tmp_path / "other")
    assert put_back(folder)
    assert (folder / "thesis.tex").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_was_given_up_is_not_put_back_half_deleted(tmp_path):
    """The kill comes while the old folder is being deleted."""
    folder = precious(tmp_path / "run")
    program = (
        "import shutil; shutil.rmtree = lambda *_, **__: wait()\n"
        "with set_aside(Path(sys.argv[1])) as give_up: Path(sys.argv[1]).mkdir(); give_up()"
    )
    Other(program, folder).end()
    assert not put_back(folder)
    remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_training_takes_away_what_a_killed_one_left_and_shares_its_folder_with_none(
    tmp_path, capsys
):
    cache, run = write_cache(tmp_path / "c.h5"), tmp_path / "run"
    argv = ["--cache", str(cache), "--out", str(run), "--preset", "practical", "--steps", "1"]
    argv += ["--precision", "float32", "--batch-size", "2"]
    run.mkdir()
    Other(WRITER, run / "config.json", "").end()
    assert list(run.iterdir()) != []
    holder = Other("with locked(Path(sys.argv[1])): wait()", run)
    for more in ([], ["--force"], ["--resume"]):
        assert train_gmvae.main([*argv, *more]) == 2
        assert f"{run} is in use by another process" in capsys.readouterr().err
    holder.end()
    assert train_gmvae.main(argv) == 0
    assert not list(run.glob(".*"))
    program = "with set_aside(Path(sys.argv[1])): Path(sys.argv[1]).mkdir(); wait()"
    Other(program, run).end()  # killed before its first step
    assert train_gmvae.main(argv) == 2
    said = capsys.readouterr().err
    assert "as it was before a training that was killed" in said
    assert "pass --force" in said
    assert (run / "checkpoints" / "ckpt-1.index").exists()


@pytest.mark.slow
def test_two_processes_add_to_one_summary(tmp_path):
    program = """
from tf_lesion.detection import files
from tf_lesion.scans.discovery import Subject
wait()
names = [f"{sys.argv[2]}{number}" for number in range(40)]
subjects = [Subject(name, Path(name), problem="not here") for name in names]
files.detect_many(None, subjects, sys.argv[1])
"""
    others = [Other(program, tmp_path / "maps", letter) for letter in "ab"]
    for other in others:
        other._process.stdin.write("\n")
        other._process.stdin.flush()
    assert [other.end(number=None) for other in others] == [0, 0]
    rows = json.loads((tmp_path / "maps" / SUMMARY).read_text())["scans"]
    assert sorted(row["name"][0] for row in rows) == ["a"] * 40 + ["b"] * 40
