"""Damaged files: every one is read or refused in one line, whatever byte of it is wrong."""

import faulthandler
import functools
import gzip
import json
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest
from conftest import GOLDEN, make_run, write_cache
from tiny_maps import maps_of, with_tables

from tf_lesion.caches.restored import RestoredReader, RestoredWriter
from tf_lesion.caches.slices import SliceCache
from tf_lesion.calibration import Calibration, Threshold
from tf_lesion.cli import export
from tf_lesion.detection.layout import read_facts, read_summary
from tf_lesion.detection.postprocessing import HealthyMaps
from tf_lesion.evaluation.results import Result
from tf_lesion.files import InputError
from tf_lesion.prior import load
from tf_lesion.saved_model.exported import read_assets
from tf_lesion.scans.volumes import load_labels, load_mask, load_scan

SECONDS = 20  # of processor time for one file; a hang is a failure
HANG = 120  # seconds after which a hang inside of a library ends the tests: nothing else can
FEW, MANY = 12, 1300  # damaged files of a kind; of all kinds many are more than 10,000
EXTREMES = (b"\x00", b"\xff", b"\x7f", b"\x80")
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


def damaged(content, rng):
    """A copy with bytes changed, cut, doubled or left out; the first ones, a header, most often."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        last = min(len(content), 400) if rng.random() < 0.6 else len(content)
        place, size = int(rng.integers(0, max(1, last))), int(rng.integers(1, 9))
        kind = rng.integers(0, 5)
        if kind == 0:
            content[place : place + size] = rng.bytes(size)
        elif kind == 1:
            content[place : place + size] = size * EXTREMES[rng.integers(0, len(EXTREMES))]
        elif kind == 2:
            del content[place : place + size]
        elif kind == 3:
            content[place:place] = content[place : place + size]
        else:
            del content[int(rng.integers(0, len(content) + 1)) :]
    return bytes(content)


def _volume_values():
    return np.random.default_rng(0).uniform(1, 100, (12, 13, 14)).astype(np.float32)


def _volume():
    return nib.Nifti1Image(_volume_values(), AFFINE).to_bytes()


def _scan(path):
    scan = load_scan(path)
    assert np.isfinite(scan.data).all()
    load_labels(nib.Nifti1Image(np.zeros(scan.data.shape, np.uint8), scan.affine), scan)


def _cache(path):
    with SliceCache(path, "Test") as cache:
        cache.read(range(len(cache))), cache.mask([0]), cache.label([0]), cache.identity


def _restored(path):
    with RestoredReader(path) as reader:
        reader.read(range(len(reader)))


def _mask(path):
    grid = nib.Nifti1Image(_volume_values(), AFFINE)
    load_mask(path, load_scan(grid))


def _write_calibration(path):
    blocks = np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    points = {"residual": (Threshold(0.01, 0.1, 0.009), Threshold(0.05, 0.05, 0.049))}
    healthy = HealthyMaps(blocks, blocks, blocks)
    Calibration("0123456789ab", {"tv_weight": 1.8}, points, healthy=healthy).save(path)


def _calibration(path):
    """What is read is what was written: a damaged number is no other threshold."""
    read = Calibration.load(path)
    assert [point.threshold for point in read.points["residual"]] == [0.1, 0.05]


def _write_restored(path):
    with RestoredWriter(path, rows=[0, 1], shape=(38, 42), settings={"model": "gmvae"}) as writer:
        writer.write([0, 1], np.zeros((2, 38, 42, 1)))


def _write_maps(path):
    """A file of `tiny_maps` with all that belongs to it; the residual is not compressed."""
    folder = with_tables(maps_of(path.parent, truth=((-20, -10, 30), 14)))
    volume = nib.load(folder / "P_1_residual.nii.gz")
    nib.save(volume.slicer[:], folder / "P_1_residual.nii")
    facts = folder / "P_1_restoration.json"
    facts.write_text(facts.read_text().replace("P_1_residual.nii.gz", "P_1_residual.nii"))


def _maps(path):
    result = Result.read(path.with_name("P_1_restoration.json"), whole=True)
    result.labeled(), result.restored
    for point in result.facts["lesions"]:
        result.true_shares_at(point), result.numbers_at(point)


FACTS = {"name": "a", "input": "a.nii", "lesions": {}, "files": {}}
SUMMARY = {"scans": [{"name": "a", "reason": "", "status": "done", "facts": "a.json"}]}
KINDS = {  # name -> (writes a whole file, reads a file)
    "t2.nii": (lambda path: path.write_bytes(_volume()), _scan),
    "t2.nii.gz": (lambda path: path.write_bytes(gzip.compress(_volume())), _scan),
    "mask.nii": (lambda path: path.write_bytes(_volume()), _mask),
    "calibration.h5": (_write_calibration, _calibration),
    "cache.h5": (functools.partial(write_cache, train=0, test=2), _cache),
    "restored.h5": (_write_restored, _restored),
    "facts.json": (lambda path: path.write_text(json.dumps(FACTS)), read_facts),
    "P_1_residual.nii": (_write_maps, _maps),
    "P_1_labels_fpr_0.05.nii.gz": (_write_maps, _maps),
    "P_1_lesions.csv": (_write_maps, _maps),
    "P_1_restoration.json": (_write_maps, _maps),
    "summary.json": (
        lambda path: path.write_text(json.dumps(SUMMARY)),
        lambda path: read_summary(path.parent),
    ),
}


@pytest.fixture
def in_time():
    """A function to call before each file: a test that hangs then fails."""

    def late(*_):
        raise AssertionError("a damaged file was read for too long")

    before = signal.signal(signal.SIGPROF, late)

    def begin():
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        faulthandler.dump_traceback_later(HANG, exit=True)

    yield begin
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def _damage(path, read, *, count, in_time):
    """Damage a file in `count` ways and read each; returns how many were refused."""
    whole, refused = path.read_bytes(), 0
    before = sorted(path.parent.iterdir())
    for seed in range(count):
        path.write_bytes(damaged(whole, np.random.default_rng([seed, len(whole)])))
        in_time()
        try:
            read(path)
        except (InputError, FileNotFoundError):
            refused += 1
        except Exception as error:
            kept = shutil.copy(path, path.with_name(f"seed-{seed}-{path.name}"))
            pytest.fail(f"{kept}: {type(error).__name__}: {error}")
    assert sorted(path.parent.iterdir()) == before
    return refused


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused(tmp_path, in_time, name, count):
    write, read = KINDS[name]
    write(tmp_path / name)
    read(tmp_path / name)
    assert _damage(tmp_path / name, read, count=count, in_time=in_time) > count // 5


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache_path):
    return make_run(tmp_path_factory.mktemp("fuzz") / "run", cache_path, steps=1)


@pytest.mark.parametrize("count", [FEW // 4, pytest.param(MANY // 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "file", ["config.json", "checkpoints/checkpoint", "*.index", "*.data-*", "*.npy"]
)
def test_a_damaged_run_is_loaded_or_refused(run, tmp_path, in_time, file, count):
    _damage_model(run, tmp_path, file, count=count, in_time=in_time)


@pytest.mark.parametrize("count", [FEW // 4, pytest.param(MANY // 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["checkpoint", "*.index", "*.data-*"])
def test_a_damaged_tf1_checkpoint_is_loaded_or_refused(tmp_path, in_time, file, count):
    _damage_model(GOLDEN / "vae_ckpt", tmp_path, file, count=count, in_time=in_time)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["variables.index", "variables.data-*"])
def test_a_damaged_saved_model_is_loaded_or_refused(run, tmp_path, in_time, file):
    assert export.main(["--model", str(run), "--out", str(tmp_path / "saved")]) == 0
    _damage_model(tmp_path / "saved", tmp_path, file, count=FEW, in_time=in_time)


def _damage_model(model, tmp_path, file, *, count, in_time):
    """Damage a file of a model; what is read has the weights that were written."""
    folder = shutil.copytree(model, tmp_path / "copy")
    (path,) = folder.rglob(file)
    whole = load(folder).identity

    def read(_):
        assert load(folder).identity == whole

    _damage(path, read, count=count, in_time=in_time)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_damaged_assets_are_read_or_refused(tmp_path, in_time, count):
    (tmp_path / "saved_model.pb").touch()
    (tmp_path / "assets").mkdir()
    model = {"config": {}, "data": {}, "model_identity": "0", "restoration_settings": []}
    (tmp_path / "assets" / "model.json").write_text(json.dumps(model))
    np.save(tmp_path / "assets" / "reference.npy", np.linspace(0, 1, 50))
    for name in ("model.json", "reference.npy"):
        path = tmp_path / "assets" / name
        whole = path.read_bytes()
        _damage(path, lambda _: read_assets(tmp_path), count=count, in_time=in_time)
        path.write_bytes(whole)
