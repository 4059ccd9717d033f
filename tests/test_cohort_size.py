"""A cohort of the paper's size: each step once, and nothing grows faster than the cohort."""

import numpy as np
import pytest
from conftest import HEIGHT, WIDTH, make_run, phantom_slices, write_cache
from other_process import Server

from tf_lesion.caches.slices import CacheWriter

TRAIN_SUBJECTS, TEST_SUBJECTS = 652, 285  # Cam-CAN; BRATS (You et al., MIDL 2019)
SLICES = 48  # of a subject; of all together about 45,000
PARTS = (4, 2, 1)  # a quarter of the cohort, a half, all of it
SLACK = 1.3  # times linear: of times measured beside other work
KINDS = 6  # of subjects


def _write(path, subjects, *, dataset):
    """A cache of so many subjects, all of a few kinds."""
    images = [phantom_slices(SLICES, seed=kind) for kind in range(KINDS)]
    label = np.zeros((SLICES, HEIGHT, WIDTH), np.uint8)
    label[10:20, 15:19, 25:30] = 1
    with CacheWriter(path, slice_shape=(HEIGHT, WIDTH), crop=(0, HEIGHT, 0, WIDTH)) as cache:
        for number in range(subjects):
            values = images[number % KINDS]
            more = {"mask": values > 0, "label": label} if dataset == "Test" else {}
            told = {"subject_id": f"s{number}", "slice_index": range(SLICES)}
            cache.append(dataset, values, **told, **more)
        if dataset == "Train":  # training looks at Test too
            told = {"subject_id": "t", "slice_index": range(SLICES)}
            cache.append("Test", images[0], **told, mask=images[0] > 0)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server") / "log")
    yield made
    made.close()


@pytest.mark.slow
def test_time_and_memory_are_at_most_linear_in_the_cohort(server, tmp_path):
    small = make_run(tmp_path / "small", write_cache(tmp_path / "c.h5"), restoration_steps=1)
    used = {}
    for part in PARTS:
        healthy = _write(tmp_path / f"h{part}.h5", TRAIN_SUBJECTS // part, dataset="Train")
        sick = _write(tmp_path / f"p{part}.h5", TEST_SUBJECTS // part, dataset="Test")
        run, restored = tmp_path / f"run{part}", tmp_path / f"r{part}.h5"
        of_sick = ["--model", small, "--cache", sick, "--batch-size", 64]
        calibration = tmp_path / f"cal{part}.h5"
        training = ["--preset", "practical", "--steps", 20, "--precision", "float32"]
        for name, argv in (
            ("train", ["--cache", healthy, "--out", run, *training]),
            ("restore", [*of_sick, "--out", restored]),
            ("calibrate", [*of_sick, "--out", calibration, "--postprocess", "signed"]),
            ("evaluate", ["--restored", restored, "--cache", sick, "--out", tmp_path / f"e{part}"]),
        ):
            assert server.run(name, argv) == 0, server.said()[-3000:]
            used.setdefault(name, []).append((server.seconds, server.megabytes))
            print(f"{name} 1/{part}: {server.seconds:.1f} s, {server.megabytes:.0f} MB", flush=True)
    for name, figures in used.items():
        first, last = figures[0], figures[-1]
        for small_one, large_one in zip(first, last, strict=True):
            assert large_one < SLACK * PARTS[0] * small_one, (name, figures)
