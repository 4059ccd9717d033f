"""Every step on a cohort of a given size, in processes of their own, with time and memory.

The paper's cohort (652 healthy subjects, 285 patients), in slices of 3 mm:

    python tests/cohort_steps.py 652 285 FOLDER
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
VOXEL_MM = 3
TRAINING_STEPS = 20
EXPERIMENT = """
out: {folder}/experiment
healthy: {folder}/healthy.h5
patients: {{painted: {folder}/patients.h5}}
preset: practical
methods:
  - {{method: denoiser, run: {folder}/run}}
"""


@dataclass(frozen=True)
class Used:
    """What a step took.

    Attributes:
        seconds: from its start to its end.
        megabytes: of memory, by the largest of its processes, at most.
    """

    seconds: float
    megabytes: float


def steps(healthy: int, patients: int, folder: Path, jobs: int) -> dict[str, list]:
    """{step: its command line}, in order; a later one takes what an earlier one made."""
    scans, cache, sick = (folder / name for name in ("scans", "healthy.h5", "patients.h5"))
    run, restored, maps = folder / "run", folder / "restored.h5", folder / "maps"
    lesion = ["-m", "tf_lesion.cli.main"]
    common = ["--align", "none", "--mask", "nonzero", "--jobs", jobs]
    counts = ["--healthy", healthy, "--patients", patients]
    tested = ["--test-subjects", max(2, healthy * 52 // 652)]
    phantom = ["--out", scans, *counts, "--voxel-size", VOXEL_MM, "--seed", 1, "--jobs", jobs]
    camcan = ["--input", scans / "healthy", "--out", cache, *tested, "--match", *common]
    brats = ["--input", scans / "patients", "--reference", cache, "--out", sick, *common]
    training = ["--model", "denoiser", "--preset", "practical", "--steps", TRAINING_STEPS]
    restoration = ["--model", run, "--cache", sick, "--out", restored]
    detection = [scans / "patients", maps, "--model", run, "--align", "none"]
    return {
        "paint scans": ["-m", "preprocessing.phantom", *phantom],
        "preprocess healthy": ["-m", "preprocessing.camcan", *camcan, "--voxel-size", VOXEL_MM],
        "preprocess patients": ["-m", "preprocessing.brats", *brats],
        "train": [*lesion, "train", "--cache", cache, "--out", run, *training],
        "calibrate": [*lesion, "calibrate", "--model", run, "--cache", cache],
        "restore": ["restore_brats.py", *restoration],
        "evaluate slices": [
            *(*lesion, "evaluate", "--restored", restored, "--cache", sick),
            *("--calibration", run / "calibration.h5", "--out", folder / "slices"),
        ],
        "tables": ["-m", "eval.tables", "--config", folder / "experiment.yaml"],
        "detect": [*lesion, "detect", *detection],
        "evaluate maps": [*lesion, "evaluate", "--results", maps, "--out", folder / "measured"],
        "report": [*lesion, "report", "--results", maps],
    }


def run(name: str, argv: list, folder: Path) -> Used:
    """Run one step; what it says goes to a file named like it.

    Raises:
        RuntimeError: it failed; says with which last lines.
    """
    log = folder / f"{name}.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        process.returncode = os.waitstatus_to_exitcode(status)
        raise RuntimeError(f"{name}: {log.read_text(errors='replace')[-2000:]}")
    return Used(time.monotonic() - began, used.ru_maxrss / 1024)


def measure(healthy: int, patients: int, folder: Path, jobs: int = 2) -> dict[str, Used]:
    """{step: what it took} of all steps on a cohort of this size, each printed when it is done."""
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(EXPERIMENT.format(folder=folder))
    taken = {}
    for name, argv in steps(healthy, patients, folder, jobs).items():
        taken[name] = run(name, argv, folder)
        print(f"{name:20} {taken[name].seconds:7.0f} s {taken[name].megabytes:7.0f} MB", flush=True)
    return taken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Every step on a cohort, with time and memory.")
    parser.add_argument("healthy", type=int, help="subjects")
    parser.add_argument("patients", type=int, help="subjects")
    parser.add_argument("folder", type=Path, help="to work in; must not exist")
    given = parser.parse_args()
    measure(given.healthy, given.patients, given.folder.resolve())
