"""Commands of README and docs/, run as they are typed, in a folder with the files they name."""

import importlib
import shlex
import shutil

import numpy as np
import pytest
import tiny_scans
from conftest import write_cache
from test_docs import COMMANDS, ROOT, module_of

from tf_lesion.scans.volumes import MniGrid

# In this order: each finds what those before made. Models are tiny, steps few, scans of 4 mm.
ON_A_RUN = (
    ("tutorials/my-scanner.md", "tf-lesion calibrate --model runs/gmvae --cache healthy.h5 --tv-w"),
    ("tutorials/my-scanner.md", "tf-lesion detect patient_t2.nii.gz maps --model runs/gmvae"),
    ("tutorials/my-scanner.md", "tf-lesion detect dataset lesions --model runs/gmvae --bids-out"),
    ("tutorials/my-scanner.md", "tf-lesion detect dataset lesions participant"),
    ("tutorials/one-scan.md", "tf-lesion report --results lesions"),
    ("tutorials/one-scan.md", "tf-lesion evaluate --results lesions --out scores"),
    ("tutorials/my-scanner.md", "tf-lesion calibrate --model runs/gmvae --cache healthy.h5 --tv-w"),
    ("tutorials/my-scanner.md", "tf-lesion detect patient_t2.nii.gz maps_score"),
    ("tutorials/my-scanner.md", "python restore_brats.py --model runs/gmvae --cache patients.h5"),
    ("tutorials/my-scanner.md", "tf-lesion evaluate --restored restored.h5"),
    ("development.md", "python -m eval.restored_figure --results maps --out restored.png"),
)
MADE = (
    *("runs/gmvae/calibration.h5", "maps", "lesions/sub-01", "lesions/index.html", "scores"),
    *("maps_score", "restored.h5", "results/table.md", "restored.png"),
)
GOLDEN = "python -m eval.compare_tf1 --tf1-checkpoint"


def _lines(page, begin):
    """Command lines of a page that begin so."""
    found = [
        (command, arguments)
        for where, command, arguments in COMMANDS
        if where == f"docs/{page}" and f"{command} {arguments}".startswith(begin)
    ]
    assert found, begin
    return found


def _run(command, arguments):
    argv = shlex.split(arguments, comments=True)
    try:
        status = importlib.import_module(module_of(command)).main(argv)
    except SystemExit as left:
        status = left.code
    assert status == 0, f"{command} {arguments}"


def _patient(path, truth=None):
    values, affine = tiny_scans.brain()
    ball = tiny_scans.blob(affine, values.shape, (-20, -10, 30), 14)
    tiny_scans.write(path, np.where(ball & (values > 0), 1500, values), affine)
    if truth is not None:
        tiny_scans.write(truth, ball.astype(np.uint8), affine)


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The working folder of somebody who follows the docs."""
    monkeypatch.chdir(tmp_path)
    run = tiny_scans.run(tmp_path / "made")
    (tmp_path / "runs").mkdir()
    shutil.move(run, tmp_path / "runs" / "gmvae")
    grid = MniGrid(tiny_scans.VOXEL_MM)
    for number, name in enumerate(("healthy.h5", "patients.h5")):
        write_cache(tmp_path / name, shape=grid.slice_shape, crop=grid.crop, train=4, seed=number)
    _patient(tmp_path / "patient_t2.nii.gz")
    for name in ("sub-01", "sub-02"):
        folder = tmp_path / "dataset" / name / "anat"
        _patient(folder / f"{name}_t2.nii.gz", folder / f"{name}_seg.nii.gz")
    return tmp_path


@pytest.mark.slow
def test_commands_on_a_trained_model_run_as_they_are_typed(there):
    taken = {}
    for page, begin in ON_A_RUN:
        lines = _lines(page, begin)
        number = taken.get(begin, 0)  # the first line of a page that begins so, then the next
        taken[begin] = number + 1
        _run(*lines[number])
    missing = [name for name in MADE if not (there / name).exists()]
    assert missing == []


@pytest.mark.slow
def test_commands_on_the_golden_checkpoints_run_as_they_are_typed(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = _lines("tutorials/tf1.md", GOLDEN)
    assert len(lines) == 5
    for line in lines:
        _run(*line)
