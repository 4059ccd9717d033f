"""Every command of README and docs/, run as it is typed, in a folder with the files it names."""

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import h5py
import nibabel as nib
import numpy as np
import pytest
import tiny_dicom
import tiny_scans
from conftest import GOLDEN, phantom_slices, write_cache
from pydicom.uid import generate_uid
from test_docs import COMMANDS, PAGES, ROOT, module_of

from preprocessing.phantom.tissues import FREESURFER
from tf_lesion import presets, tf1
from tf_lesion.baselines import METHODS
from tf_lesion.scans.alignment import to_grid
from tf_lesion.scans.finder.canonical import LANDMARKS
from tf_lesion.scans.volumes import MniGrid

SUBJECTS = 53  # of Cam-CAN: one to train on, as 52 are to test on
TRAINING = {"steps": 2, "batch_size": 2, "checkpoint_every": 2, "picture_every": 2}
# FreeSurfer's numbers, left and right
GRAY, WHITE, FLUID, VENTRICLE = (3, 42), (2, 41), 24, (4, 43)
# What takes several machines: tests/test_distribution.py starts them.
ELSEWHERE = "--distribute multi-worker"


def _patient(path, *, truth=None, number=0):
    values, affine = tiny_scans.brain()
    noise = np.random.default_rng(number).normal(0, 15, values.shape)
    values = np.where(values > 0, np.maximum(values + noise, 1), 0).astype(np.float32)
    ball = tiny_scans.blob(affine, values.shape, (-20, -10, 30), 14) & (values > 0)
    if truth is not None:
        tiny_scans.write(truth, ball.astype(np.uint8), affine)
    tiny_scans.write(path, np.where(ball & (truth is not None), 1500, values), affine)


def scan(folder):
    _patient(folder / "patient_t2.nii.gz", truth=folder / "patient_seg.nii.gz")


def exam(folder):
    (values, affine), study = tiny_scans.brain(), generate_uid()
    for number, tags in ((3, tiny_dicom.T1), (5, tiny_dicom.T2)):
        tiny_dicom.write_series(
            folder / "exam",
            values.astype(int),
            affine,
            number=number,
            study=study,
            name=f"IM{number}{{:04}}",
            **tags,
        )
    shutil.make_archive(str(folder / "exam"), "zip", folder / "exam")


def dataset(folder):
    for name in ("sub-01", "sub-02"):
        anat = folder / "dataset" / name / "anat"
        _patient(anat / f"{name}_t2.nii.gz", truth=anat / f"{name}_seg.nii.gz")


def healthy(folder, name="healthy", count=6):
    for number in range(count):
        subject = f"sub-{number:02}"
        _patient(folder / name / subject / "anat" / f"{subject}_T2w.nii.gz", number=number)


def cam_can(folder):
    healthy(folder, "CamCAN", SUBJECTS)


def patients(folder, name="patients"):
    for grade in ("LGG", "HGG"):
        case = folder / name / grade / f"P_{grade}_1"
        _patient(case / f"{case.name}_t2.nii.gz", truth=case / f"{case.name}_seg.nii.gz")


def brats(folder):
    patients(folder, "BRATS2017")


def caches(folder):
    grid = MniGrid(tiny_scans.VOXEL_MM)
    for number, name in enumerate(("healthy.h5", "patients.h5")):
        write_cache(folder / name, shape=grid.slice_shape, crop=grid.crop, train=4, seed=number)


def trained(folder):
    caches(folder)
    run = tiny_scans.run(folder / "made")
    (folder / "runs").mkdir()
    shutil.move(run, folder / "runs" / "gmvae")
    from tf_lesion.cli import calibrate

    argv = ["--model", "runs/gmvae", "--cache", "healthy.h5", "--tv-weight", "1.8"]
    assert calibrate.main(argv) == 0


def demo(folder):
    """What `make demo` leaves, and the configurations of experiments with few steps."""
    (folder / "demo").mkdir()
    caches(folder / "demo")
    (folder / "eval").mkdir()
    for path in (ROOT / "eval").glob("*.yaml"):
        fewer = re.sub(r"\b(\w*steps|\w+_every): \d+", r"\1: 2", path.read_text())
        (folder / "eval" / path.name).write_text(fewer)


def linear(_):
    """The method of the page, registered as its reader would."""
    page = (ROOT / "docs/tutorials/adding-a-method.md").read_text()
    (source,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "@register" in b)
    exec(compile(source, "adding-a-method.md", "exec"), {"__name__": "docs"})


def painted(folder):
    from preprocessing.phantom import __main__ as phantom

    sizes = ["--healthy", "0", "--patients", "2", "--voxel-size", "4", "--seed", "1"]
    assert phantom.main(["--out", str(folder / "scans"), *sizes]) == 0


def label_maps(folder):
    """Anatomies for `--label-maps`: the average brain in FreeSurfer's numbers, moved a little."""
    from nilearn import datasets

    grid = MniGrid()
    maps = [datasets.load_mni152_gm_template, datasets.load_mni152_wm_template]
    gray, white = (load(resolution=1).get_fdata(dtype=np.float32) for load in maps)
    (folder / "label_maps").mkdir()
    for number in range(5):
        moved = tiny_scans.rigid(degrees=(0, 0, number), shift=(0, number, 0))
        at = [to_grid(volume, grid.affine, moved, grid) for volume in (gray, white)]
        rest = 1 - at[0] - at[1]
        brain = at[0] + at[1] > 0.3
        left = (grid.affine[0, 0] * np.arange(brain.shape[0]) + grid.affine[0, 3] < 0)[
            :, None, None
        ]
        names = np.argmax([*at, rest], axis=0)
        labels = np.where(left, *[np.choose(names, (GRAY[s], WHITE[s], FLUID)) for s in (0, 1)])
        for side, label in zip((-1, 1), VENTRICLE, strict=True):
            labels[tiny_scans.blob(grid.affine, brain.shape, (12 * side, -10, 18), 9)] = label
        for name, (x, y, z) in list(LANDMARKS.items())[2:]:  # but for cortex and white matter
            for side, label in zip((-1, 1), FREESURFER[name][:2], strict=True):
                labels[tiny_scans.blob(grid.affine, brain.shape, (x * side, y, z), 4)] = label
        image = nib.Nifti1Image((labels * brain).astype(np.int16), grid.affine)
        nib.save(image, folder / "label_maps" / f"anatomy_{number}.nii.gz")


def released(folder):
    """A checkpoint and a cache of the released code, and restored slices to compare."""
    shutil.copytree(GOLDEN / "gmvae_k6_ckpt", folder / "tf1" / "model")
    images = phantom_slices(2, shape=(197, 233))
    with h5py.File(folder / "BraTSLGG_data.hdf5", "w") as file:
        file["Test"], file["Mask"] = images, images > 0
    shutil.copytree(GOLDEN, folder / "tests" / "golden")
    shutil.copy(folder / "BraTSLGG_data.hdf5", folder / "patients.h5")
    with h5py.File(folder / "restored.h5", "w") as file:
        file["Restore"] = images[:, 22:180, 17:215]


INPUTS = {
    "README.md": (scan,),
    "docs/development.md": (scan,),
    "docs/performance.md": (caches,),
    "docs/tutorials/adding-a-method.md": (caches, linear, painted),
    "docs/tutorials/camcan-brats.md": (cam_can, brats, caches, demo),
    "docs/tutorials/my-scanner.md": (scan, dataset, healthy, patients),
    "docs/tutorials/no-scans.md": (label_maps,),
    "docs/tutorials/one-scan.md": (scan, exam, dataset),
    "docs/tutorials/savedmodel.md": (trained,),
    "docs/tutorials/tf1.md": (released,),
}


@pytest.fixture
def small(monkeypatch):
    """Grids of 4 mm and few steps, wherever nothing else is typed."""
    preset, parse = presets.preset, argparse.ArgumentParser.parse_args

    def short(name, model="gmvae"):
        config = preset(name, model)
        return config.replace(training=TRAINING, restoration={"steps": 2})

    def coarse(parser, argv=None, namespace=None):
        args = parse(parser, argv, namespace)
        if getattr(args, "voxel_size", None) == 1:
            args.voxel_size = tiny_scans.VOXEL_MM
        return args

    monkeypatch.setattr(presets, "preset", short)
    monkeypatch.setattr(tf1, "preset", short)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", coarse)
    known = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(known)


def _run(command, arguments):
    """Run one command in this process, or in one that it sets up itself if it must."""
    argv = shlex.split(arguments, comments=True)
    module = module_of(command)
    if module == "eval.compare_tf1":
        environment = {n: value for n, value in os.environ.items() if "ONEDNN" not in n}
        environment["PYTHONPATH"] = str(ROOT)
        status = subprocess.run([sys.executable, "-m", module, *argv], env=environment).returncode
    else:
        if (ROOT / module.replace(".", "/")).is_dir():
            module += ".__main__"
        try:
            status = importlib.import_module(module).main(argv)
        except SystemExit as left:
            status = left.code
    assert status == 0, f"{command} {arguments}"


def test_every_page_with_commands_has_its_inputs():
    assert set(INPUTS) == {page for page, _, _ in COMMANDS}
    assert set(INPUTS) <= {page.relative_to(ROOT).as_posix() for page in PAGES}
    started = (ROOT / "tests" / "test_distribution.py").read_text()
    assert ", ".join(f'"{word}"' for word in ELSEWHERE.split()) in started


@pytest.mark.slow
@pytest.mark.parametrize("page", INPUTS)
def test_every_command_of_a_page_runs_as_it_is_typed(page, tmp_path, monkeypatch, small):
    monkeypatch.chdir(tmp_path)
    for make in INPUTS[page]:
        make(tmp_path)
    for where, command, arguments in COMMANDS:
        if where != page or ELSEWHERE in arguments:
            continue
        shards = (1, 2, 3) if "$SLURM_ARRAY_TASK_ID" in arguments else (1,)
        for shard in shards:
            _run(command, arguments.replace("$SLURM_ARRAY_TASK_ID", str(shard)))
