"""Which cache something was made from: the same content has one identity, every pairing checks."""

import re
import shutil

import h5py
import numpy as np
import pytest
from conftest import make_run, phantom_slices, write_cache

import restore_brats
import train_gmvae
from tf_lesion.caches.restored import RestoredReader, RestoredWriter, merge_shards, shard_path
from tf_lesion.caches.slices import CacheWriter, SliceCache
from tf_lesion.files import InputError


def _identity(path, dataset="Test", **options):
    with SliceCache(path, dataset, **options) as cache:
        return cache.identity


def _write(path, *, change=""):
    """A cache of two subjects; `change` names what differs from the usual one."""
    images = phantom_slices(6)
    if change == "slices":
        images[5, 20, 20] = np.nextafter(images[5, 20, 20], 1)
    label, mask = np.zeros((6, 38, 42)), images > 0
    label[0, 20, 20] = change == "label"
    mask[3, 20, 20] ^= change == "mask"
    transform = np.eye(4) * (2 if change == "transform" else 1)
    settings = {"made": change}
    crop = (0, 34, 0, 42) if change == "crop" else (0, 38, 0, 42)
    with CacheWriter(path, slice_shape=(38, 42), crop=crop, settings=settings) as cache:
        for name, rows in (("a", slice(0, 4)), ("b", slice(4, 6))):
            cache.append(
                "Test",
                images[rows],
                subject_id=name + ("x" if change == "name" else ""),
                slice_index=np.arange(6)[rows] + (change == "index"),
                scan_from_grid=transform,
                source=path / name,
                mask=mask[rows],
                label=label[rows],
            )
        if change != "no reference":
            cache.set_reference(np.linspace(0, 1 + (change == "reference"), 11))
    return path


def test_the_same_content_has_the_same_identity_wherever_and_whenever_it_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first = _write(tmp_path / "a.h5")
    second = _write(tmp_path / "elsewhere" / "b.h5", change="settings and sources")
    assert _identity(first) == _identity(second)
    assert re.fullmatch("[0-9a-f]{12}", _identity(first))


@pytest.mark.parametrize(
    "change",
    ["slices", "label", "mask", "name", "index", "transform", "crop", "reference", "no reference"],
)
def test_any_other_content_has_another_identity(tmp_path, change):
    assert _identity(_write(tmp_path / "a.h5")) != _identity(
        _write(tmp_path / "b.h5", change=change)
    )


def _released(path, *, slices=100, changed=None):
    """A cache that does not say its identity, in float64 as the released ones."""
    images = np.arange(slices * 38 * 42).reshape(slices, 38, 42) % 251 / 251
    if changed is not None:
        images[changed] += 1
    with h5py.File(path, "w") as file:
        file["Test"], file["Mask"] = images, images > 0.1
    return path


def test_a_released_cache_has_the_identity_of_its_shapes_and_of_64_slices(tmp_path):
    path = _released(tmp_path / "a.h5")
    assert _identity(path) == "d16bac29e563"  # on every machine
    assert _identity(path, crop=(0, 34, 0, 42)) == _identity(path)
    last = _released(tmp_path / "last.h5", changed=99)
    longer = _released(tmp_path / "longer.h5", slices=101)
    assert len({_identity(path), _identity(last), _identity(longer)}) == 3


def _restored(path, cache, *, rows=range(7), **settings):
    with SliceCache(cache) as opened:
        settings = {
            "cache": str(cache),
            "cache_identity": opened.identity,
            "crop": list(opened.crop),
            **settings,
        }
        with RestoredWriter(path, rows=rows, shape=opened.shape, settings=settings) as writer:
            writer.write(range(len(rows)), opened.read(rows))
    return path


def _check(restored, cache, **options):
    with RestoredReader(restored) as reader, SliceCache(cache, **options) as opened:
        reader.check_cache(opened)


def test_restored_slices_are_paired_with_their_own_cache_alone(tmp_path):
    cache = write_cache(tmp_path / "cache.h5")
    restored = _restored(tmp_path / "restored.h5", cache)
    _check(restored, cache)
    _check(restored, shutil.copy(cache, tmp_path / "copy.h5"))
    identity = _identity(cache)
    cache.unlink()
    write_cache(cache, seed=1)  # made anew under the same name
    with pytest.raises(InputError, match=f"restored.h5 was restored from .*cache.h5 .*{identity}"):
        _check(restored, cache)


def test_restored_slices_are_paired_with_their_own_crop_alone(tmp_path):
    cache = write_cache(tmp_path / "cache.h5", shape=(42, 42))
    restored = _restored(tmp_path / "restored.h5", cache, crop=[0, 42, 0, 42])
    with pytest.raises(InputError, match="do not belong together"):
        _check(restored, cache, crop=(0, 38, 0, 42))


def test_restored_slices_of_the_released_code_are_paired_with_any_cache_they_fit(tmp_path):
    cache = write_cache(tmp_path / "cache.h5")
    with h5py.File(tmp_path / "restored.h5", "w") as file:
        file["Restore"] = np.zeros((7, 38, 42))
    _check(tmp_path / "restored.h5", cache)
    with pytest.raises(InputError, match="names rows outside the 5 slices"):
        _check(tmp_path / "restored.h5", write_cache(tmp_path / "short.h5", test=5))


def test_shards_of_two_caches_are_not_merged(tmp_path):
    caches = [write_cache(tmp_path / f"{seed}.h5", seed=seed) for seed in (0, 1)]
    out = tmp_path / "restored.h5"
    for number, cache in enumerate(caches, start=1):
        rows = range(number - 1, 7, 2)
        _restored(shard_path(out, (number, 2)), cache, rows=rows)
    with pytest.raises(InputError, match=r"shard-2-of-2.h5 was restored from another cache than"):
        merge_shards(out)


def test_shards_of_one_cache_are_merged_wherever_each_machine_keeps_it(tmp_path):
    caches = [write_cache(tmp_path / f"{place}.h5") for place in "ab"]
    out = tmp_path / "restored.h5"
    for number, cache in enumerate(caches, start=1):
        _restored(shard_path(out, (number, 2)), cache, rows=range(number - 1, 7, 2))
    assert merge_shards(out) == 7
    _check(out, caches[1])


@pytest.fixture(scope="module")
def run(cache_path, tmp_path_factory):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return make_run(folder, cache_path, steps=1, restoration_steps=1)


@pytest.mark.slow
def test_a_killed_restoration_does_not_go_on_over_another_cache(run, tmp_path, capsys):
    cache = write_cache(tmp_path / "cache.h5")
    argv = ["--model", str(run), "--cache", str(cache), "--out", str(tmp_path / "restored.h5")]
    assert restore_brats.main(argv) == 0
    with h5py.File(tmp_path / "restored.h5", "r+") as file:
        file["done"][:] = np.array([1, 1, 0, 0, 0, 0, 0], np.uint8)
    (tmp_path / "restored.h5").rename(tmp_path / "restored.h5.partial")
    cache.unlink()
    write_cache(cache, seed=1)
    assert restore_brats.main(argv) == 2
    assert "was begun on another cache (cache_identity)" in capsys.readouterr().err
    assert not (tmp_path / "restored.h5").exists()
    moved = write_cache(tmp_path / "moved.h5")  # the content of before at another place
    assert restore_brats.main([*argv[:3], str(moved), *argv[4:]]) == 0


@pytest.mark.slow
def test_a_training_does_not_go_on_over_another_cache(run, cache_path, tmp_path, capsys):
    other = write_cache(tmp_path / "other.h5", seed=1)
    before = (run / "config.json").read_text()
    argv = ["--out", str(run), "--resume", "--steps", "2", "--cache"]
    assert train_gmvae.main([*argv, str(other)]) == 2
    error = capsys.readouterr().err
    assert f"was trained on {cache_path} of the identity {_identity(cache_path)}" in error
    assert _identity(other) in error
    assert (run / "config.json").read_text() == before
    assert train_gmvae.main([*argv, str(shutil.copy(cache_path, tmp_path / "copy.h5"))]) == 0
