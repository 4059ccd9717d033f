"""Restored slices against those of a run of the released code, in the files it writes."""

import json
import re

import h5py
import numpy as np
import pytest
from conftest import count_at, phantom_slices

from eval import compare_tf1
from eval.compare_restored import ReleasedSlices
from tf_lesion.caches.restored import RestoredWriter
from tf_lesion.caches.slices import CacheWriter, SliceCache
from tf_lesion.evaluation.metrics import released_thresholds
from tf_lesion.files import InputError

COUNT, BATCH = 12, 5
SHAPE = (38, 42)
DIFFERENCE = 0.05


@pytest.fixture
def cohort(tmp_path):
    """(folder, images): a cache of three subjects and our restored slices of it."""
    images = phantom_slices(COUNT)
    label = np.zeros_like(images, dtype=np.uint8)
    label[:, 16:20, 22:27] = 1
    observed = np.where(label, images + 0.3, images)
    with CacheWriter(tmp_path / "cache.h5", slice_shape=SHAPE, crop=(0, 38, 0, 42)) as cache:
        for number, part in enumerate(np.split(np.arange(COUNT), 3)):
            cache.append(
                "Test",
                observed[part],
                subject_id=f"s{number}",
                slice_index=range(len(part)),
                mask=images[part] > 0,
                label=label[part],
            )
    restored = images + np.random.default_rng(1).normal(0, 0.01, images.shape).astype(np.float32)
    write_ours(tmp_path / "ours.h5", restored)
    return tmp_path, restored


def write_ours(path, images, rows=None):
    rows = np.arange(len(images)) if rows is None else rows
    with RestoredWriter(path, rows=rows, shape=SHAPE, settings={}) as writer:
        writer.write(np.arange(len(rows)), images[..., None])


def write_batches(folder, images, *, batch=BATCH):
    """As the released code: full batches in order, the last begins one slice too early."""
    folder.mkdir()
    full = len(images) // batch
    for number in range(full):
        part = images[number * batch : (number + 1) * batch]
        np.save(folder / f"restored_images{number}.npy", part[..., None].astype(np.float64))
    np.save(folder / f"restored_images{full}.npy", images[full * batch - 1 :, ..., None])
    return folder


def compare(folder, theirs, *extra):
    argv = ["--restored", folder / "ours.h5", "--tf1-restored", theirs, *extra]
    status = compare_tf1.main([*map(str, argv), "--out", str(folder / "out.json"), "--force"])
    return status, json.loads((folder / "out.json").read_text()) if status == 0 else None


@pytest.mark.parametrize("extra", [False, True])
def test_batches_of_the_released_code_equal_ours_with_the_repeated_slice_left_out(cohort, extra):
    folder, images = cohort
    cache = ("--cache", folder / "cache.h5") if extra else ()
    status, found = compare(folder, write_batches(folder / "theirs", images), *cache)
    assert status == 0
    assert found["largest_difference"] == [0] * COUNT
    if extra:
        assert found["residual_correlation"] == pytest.approx(1)
        assert found["pooled_auc"][0] == found["pooled_auc"][1] > 0.9


def test_repeated_slice_is_found_when_batches_divide_the_slices(tmp_path):
    images = np.arange(10.0)[:, None, None] * np.ones((1, *SHAPE))
    released = ReleasedSlices(write_batches(tmp_path / "theirs", images))
    assert len(released) == 11
    np.testing.assert_array_equal(released.read(released.positions(10))[:, 0, 0], np.arange(10))


def test_an_empty_last_batch_is_no_obstacle(tmp_path):
    images = np.arange(10.0)[:, None, None] * np.ones((1, *SHAPE))
    folder = write_batches(tmp_path / "theirs", images)
    np.save(folder / "restored_images2.npy", np.zeros((0, *SHAPE, 1)))
    released = ReleasedSlices(folder)
    np.testing.assert_array_equal(released.read(released.positions(10))[:, 0, 0], np.arange(10))


def test_more_than_ten_batches_are_read_in_the_order_of_their_numbers(tmp_path):
    images = np.arange(25.0)[:, None, None] * np.ones((1, *SHAPE))
    released = ReleasedSlices(write_batches(tmp_path / "theirs", images, batch=2))
    np.testing.assert_array_equal(released.read(released.positions(25))[:, 0, 0], np.arange(25))


def test_hdf5_of_the_released_code_is_read_with_and_without_the_repeated_slice(tmp_path):
    images = np.arange(121.0)[:, None, None] * np.ones((1, *SHAPE))
    repeated = np.concatenate([images[:120], images[119:]])
    for number, stored in enumerate((images, repeated)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with h5py.File(folder / "restored_images.hdf5", "w") as file:
            file["Restore"] = stored
        for path in (folder, folder / "restored_images.hdf5"):
            released = ReleasedSlices(path)
            found = released.read(released.positions(121))
            np.testing.assert_array_equal(found[:, 0, 0], np.arange(121))


def test_differences_are_reported_slice_by_slice(cohort, capsys):
    folder, images = cohort
    theirs = images.copy()
    theirs[7, 10, 11] += DIFFERENCE
    status, found = compare(folder, write_batches(folder / "theirs", theirs))
    assert status == 0
    assert np.flatnonzero(found["largest_difference"]).tolist() == [7]
    assert found["largest_difference"][7] == pytest.approx(DIFFERENCE, rel=1e-4)
    assert found["mean_difference"][7] == pytest.approx(DIFFERENCE / (38 * 42), rel=1e-4)
    assert re.search(r"largest_difference .* 0\.05", capsys.readouterr().out)


def test_a_shuffled_subset_of_ours_is_matched_by_row(cohort):
    folder, images = cohort
    rows = np.array([8, 0, 3])
    (folder / "ours.h5").unlink()
    write_ours(folder / "ours.h5", images[rows], rows)
    theirs = write_batches(folder / "theirs", images)
    status, found = compare(folder, theirs, "--cache", folder / "cache.h5")
    assert status == 0
    assert found["largest_difference"] == [0, 0, 0]


def test_statistics_and_thresholds_of_the_released_run_are_compared(cohort):
    folder, images = cohort
    theirs = images + np.random.default_rng(0).normal(0, 0.1, images.shape).astype(np.float32)
    released = write_batches(folder / "theirs", theirs)
    with SliceCache(folder / "cache.h5") as cache:
        rows = np.arange(COUNT)
        observed, mask, label = (
            read(rows)[..., 0] for read in (cache.read, cache.mask, cache.label)
        )
        subject = cache.index.subject
    residual = np.abs(observed - theirs)
    counts = []
    for number in range(3):
        inside = mask & (subject == number)[:, None, None]
        counts.append(count_at(residual[inside], label[inside], released_thresholds()))
    np.save(released / "LGsta.npy", np.stack(counts))
    np.save(released / "fprthresholds.npy", np.array([0.2, 0.1, 0.05]))
    status, found = compare(folder, released, "--cache", folder / "cache.h5")
    assert status == 0
    assert found["LGsta.npy: pooled_auc"] == found["pooled_auc"]
    assert found["LGsta.npy: mean_subject_dsc_auc"] == found["mean_subject_dsc_auc"]
    assert found["pooled_auc"][0] > found["pooled_auc"][1]
    assert 0 < found["LGsta.npy: share_of_voxels_counted_otherwise"][1] < 1
    ours, worse = found["mean_subject_dice_at_0.2000"]
    assert ours > worse
    assert found["residual_correlation"] < 0.95


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("gap", "restored_images1.npy is missing"),
        ("short", "Expected 12 slices of the released code"),
        ("size", "38 x 42 pixels, the released run 42 x 42"),
        ("text", "Expected an array"),
        ("none", "No restored slices of the released code"),
        ("statistics", "are they of the same subjects"),
        ("both", "say which with --tf1-statistics"),
    ],
)
def test_files_that_do_not_fit_are_refused(cohort, capsys, damage, message):
    folder, images = cohort
    if damage == "size":
        images = np.pad(images, ((0, 0), (2, 2), (0, 0)))
    theirs = write_batches(folder / "theirs", images)
    if damage == "gap":
        (theirs / "restored_images1.npy").unlink()
    if damage == "short":
        (theirs / "restored_images2.npy").unlink()
    if damage == "text":
        (theirs / "restored_images0.npy").write_text("no array")
    if damage == "none":
        theirs = folder / "nowhere"
    if damage in ("statistics", "both"):
        np.save(theirs / "LGsta.npy", np.zeros((2, 4, 401)))
    if damage == "both":
        np.save(theirs / "HGsta.npy", np.zeros((2, 4, 401)))
    status, _ = compare(folder, theirs, "--cache", folder / "cache.h5")
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out.json").exists()


def test_a_batch_of_one_axis_too_few_is_refused(tmp_path):
    np.save(tmp_path / "restored_images0.npy", np.zeros(SHAPE))
    with pytest.raises(InputError, match=r"expected slices \[n, H, W, 1\]"):
        ReleasedSlices(tmp_path)
