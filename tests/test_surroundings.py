"""What a user's machine brings along breaks nothing: notebooks, settings, encodings, old names."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import matplotlib as mpl
import pytest
import tiny_scans
from tiny_maps import maps_of

from preprocessing import brats
from tf_lesion.cli import evaluate, report
from tf_lesion.files import readable
from tf_lesion.scans.discovery import find_subjects

ROOT = Path(__file__).parent.parent
OLD_NAME = os.fsdecode("élève".encode("latin-1"))


@pytest.fixture
def elsewhere(tmp_path):
    """The environment of a notebook, with a matplotlibrc of its own and a strict ASCII screen."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: No Such Font\n")
    return {
        **os.environ,
        "MPLBACKEND": "module://matplotlib_inline.no_such_backend",
        "MATPLOTLIBRC": str(tmp_path),
        "PYTHONIOENCODING": "ascii:strict",
    }


@pytest.mark.slow
def test_reports_and_tables_need_no_screen_no_latex_and_no_encoding(tmp_path, elsewhere):
    folder = tmp_path / f"cas {OLD_NAME}"
    folder.mkdir()
    maps_of(folder, truth=((-20, -10, 30), 14))
    for command in (
        ["report", "--results", folder],
        ["evaluate", "--results", folder, "--out", tmp_path / "scores"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "tf_lesion.cli.main", *map(os.fspath, command)],
            env=elsewhere,
            cwd=ROOT,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert "cas élève" in (folder / "report.html").read_text(encoding="utf-8")
    assert list((tmp_path / "scores").glob("*_panel.png"))


def test_names_of_older_systems_are_read_as_latin_1(tmp_path):
    assert readable(OLD_NAME) == "élève"
    assert readable(f"Žofie, {OLD_NAME}") == "Žofie, élève"
    assert readable("Žofie".encode().decode("ascii", "surrogateescape")) == "Žofie"
    scan = tiny_scans.write(tmp_path / "in" / f"{OLD_NAME}_t2.nii.gz", *tiny_scans.brain())
    shutil.copy(scan, scan.with_name(f"{OLD_NAME}_mask.nii.gz"))
    (subject,) = find_subjects(
        scan.parent, brats.NAMES, suffixes=["_t2"], mask_pattern="{subject}_mask.nii.gz"
    )
    assert (subject.name, subject.scan, subject.problem) == ("élève", scan, "")
    argv = ["--input", scan.parent, "--out", tmp_path / "c.h5", "--no-labels", "--align", "none"]
    argv += ["--no-matching", "--voxel-size", tiny_scans.VOXEL_MM]
    assert brats.main(list(map(str, argv))) == 0
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["Test_info/subject_ids"].asstr()[0] == "élève"
        assert file["Test_info/source"].asstr()[0].endswith("in/élève_t2.nii.gz")


@pytest.mark.slow
def test_scans_with_old_names_are_measured_and_shown(tmp_path):
    maps_of(tmp_path, OLD_NAME, truth=((-20, -10, 30), 14))
    (facts,) = tmp_path.glob("*_restoration.json")
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"name": readable(OLD_NAME)}))
    assert report.main(["--results", str(tmp_path)]) == 0
    assert "élève" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert evaluate.main(["--results", str(tmp_path), "--out", str(tmp_path / "scores")]) == 0
    assert "élève" in (tmp_path / "scores" / "scans.csv").read_text(encoding="utf-8")


def test_pictures_are_the_same_whatever_matplotlibrc_says_and_leave_it_alone(tmp_path, drawn):
    maps_of(tmp_path / "a$_$b", "a$_$b", truth=((-20, -10, 30), 14))
    argv = ["--results", str(tmp_path / "a$_$b"), "--out", str(tmp_path / "scores")]
    picture = tmp_path / "scores" / "a$_$b_panel.png"
    assert evaluate.main(argv) == 0
    assert drawn[0].get_suptitle().startswith("a$_$b: AUC")
    before = picture.read_bytes()
    with mpl.rc_context({"text.usetex": True, "figure.facecolor": "red", "font.size": 30}):
        mine = dict(mpl.rcParams)
        assert evaluate.main([*argv, "--force"]) == 0
        assert dict(mpl.rcParams) == mine
    assert picture.read_bytes() == before
