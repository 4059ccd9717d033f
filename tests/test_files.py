"""Files that are there: nothing of anybody's is replaced but what the same command made."""

import json

import pytest
from conftest import write_cache

import train_gmvae
from preprocessing.phantom.__main__ import write_cohort
from tf_lesion.caches.slices import CacheWriter
from tf_lesion.detection import files as detection_files
from tf_lesion.detection.layout import FAILED, SUMMARY
from tf_lesion.files import InputError, set_aside, written_whole
from tf_lesion.scans.discovery import Subject
from tf_lesion.training.trainer import Trainer


def precious(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    return folder


def test_force_never_replaces_a_folder_of_another_kind(tmp_path):
    folder = precious(tmp_path / "home")
    with pytest.raises(InputError, match="a file to replace"), written_whole(folder):
        pass
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
    ignored.write_text("extra/\n")
    with pytest.raises(FileExistsError, match="describes another data set"):
        detection_files.refuse_other_dataset(tmp_path, force=False)
    detection_files.refuse_other_dataset(tmp_path, force=True)
    about.unlink()
    for _ in range(2):
        detection_files.write_dataset_description(tmp_path, tmp_path)
        assert ignored.read_text().splitlines() == ["extra/", "summary.json", "*.html"]
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
