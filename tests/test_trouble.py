"""Full disks, no permission, no network, files replaced while they are read: told, nothing lost."""

import numpy as np
import pytest
from conftest import make_run, write_cache

from preprocessing import camcan, cohort
from tf_lesion.caches import restore as caches_restore
from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import SliceCache
from tf_lesion.calibration import make
from tf_lesion.files import InputError, locked
from tf_lesion.prior import load

pytestmark = pytest.mark.slow  # a server of commands starts first
NAMES = ("preprocess", "train", "restore", "calibrate", "evaluate", "detect")
EXPORTS = ("export", "ship")
BAD_INPUT = 2
SOME_FAILED = 1


def _outputs(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", [*NAMES, *EXPORTS])
def test_a_full_disk_is_told_in_a_line(server, jobs, tmp_path, name):
    job = jobs[name].at(tmp_path)
    status = server.run(name, job.argv, trouble=["full"])
    assert status == (SOME_FAILED if name == "detect" else BAD_INPUT), server.said()
    assert "error: " in server.said()
    assert "Traceback" not in server.said()
    left = _outputs(tmp_path)
    assert not [file for file in left if file.startswith(".") or file.endswith((".h5", ".gz"))]
    assert not [file for file in left if file.startswith("ckpt")]
    assert name not in EXPORTS or not left


@pytest.mark.parametrize("name", [*NAMES, *EXPORTS])
def test_a_folder_that_may_not_be_written_to_is_named(server, jobs, tmp_path, name):
    job = jobs[name].at(tmp_path / "locked")
    job.out.parent.mkdir(mode=0o555)
    assert server.run(name, job.argv, trouble=["powerless"]) == BAD_INPUT, server.said()
    assert "Permission denied" in server.said()
    assert str(tmp_path / "locked") in server.said()
    assert "Traceback" not in server.said()
    assert _outputs(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_may_not_be_read_is_named(server, jobs, tmp_path, name):
    job = jobs[name].at(tmp_path)
    of_scans = name in ("preprocess", "detect")
    given = "--cache" if not of_scans else "--input"
    folder = job.argv[0] if name == "detect" else job.argv[job.argv.index(given) + 1]
    files = sorted(folder.rglob("*.nii.gz")) if of_scans else [folder]
    modes = [file.stat().st_mode for file in files]
    for file in files:
        file.chmod(0)
    status = server.run(name, job.argv, trouble=["powerless"])
    for file, mode in zip(files, modes, strict=True):
        file.chmod(mode)
    assert status == (SOME_FAILED if name == "detect" else BAD_INPUT), server.said()
    assert "Permission denied" in server.said()
    assert files[0].name in server.said()
    assert "Traceback" not in server.said()
    told = {"summary.json", "scans.csv", "tf-lesion.log"}  # of the scans that failed
    assert not set(_outputs(tmp_path)) - told


def test_scans_are_examined_and_reported_without_a_network(server, jobs, tmp_path):
    job = jobs["detect"].at(tmp_path)
    assert server.run("detect", job.argv, trouble=["offline"]) == 0, server.said()
    assert "NETWORK" not in server.said()
    assert server.run("report", ["--results", job.out], trouble=["offline"]) == 0, server.said()
    assert "NETWORK" not in server.said()
    assert (job.out / "report.html").exists() or list(job.out.glob("*.html"))


@pytest.mark.parametrize("name", NAMES)
def test_every_command_works_without_a_network(server, jobs, tmp_path, name):
    job = jobs[name].at(tmp_path)
    assert server.run(name, job.argv, trouble=["offline"]) == 0, server.said()
    assert "NETWORK" not in server.said()


def test_two_processes_do_not_prepare_one_cache(jobs, tmp_path, capsys):
    job = jobs["preprocess"].at(tmp_path)
    parts = cohort.parts_folder(job.out)
    parts.mkdir()
    with locked(parts):
        assert camcan.main(list(map(str, job.argv))) == BAD_INPUT
    assert f"{parts} is in use by another process" in capsys.readouterr().err
    assert not job.out.exists()


# A cache that changes while it is used ----------------------------------------------------------


@pytest.fixture(scope="module")
def prior(tmp_path_factory, cache_path):
    return load(make_run(tmp_path_factory.mktemp("run") / "run", cache_path, restoration_steps=2))


def _replace(cache):
    new = write_cache(cache.with_name("new.h5"), seed=7)
    new.replace(cache)


def test_a_cache_replaced_while_it_is_read_stays_what_it_was(tmp_path):
    path = write_cache(tmp_path / "c.h5")
    with SliceCache(path) as cache:
        first, identity = cache.read([0]), cache.identity
        _replace(path)
        np.testing.assert_array_equal(cache.read([0]), first)
        with SliceCache(path) as other:
            assert other.identity != identity
            assert not np.array_equal(other.read([0]), first)


def test_what_was_restored_from_a_replaced_cache_is_not_paired_with_the_new_one(
    prior, tmp_path, monkeypatch
):
    path, out = write_cache(tmp_path / "c.h5"), tmp_path / "r.h5"
    restore, calls = caches_restore.restore, []

    def replaced(*given, **options):
        if not calls:
            _replace(path)
        calls.append(1)
        return restore(*given, **options)

    monkeypatch.setattr(caches_restore, "restore", replaced)
    caches_restore.restore_to_file(prior, path, out, batch_size=2)
    assert len(calls) == 4
    with (
        SliceCache(path) as cache,
        RestoredReader(out) as reader,
        pytest.raises(InputError, match=r"was restored from .* of the identity"),
    ):
        reader.check_cache(cache)


def test_lambda_and_thresholds_are_not_of_two_caches(prior, tmp_path, monkeypatch):
    path = write_cache(tmp_path / "c.h5")
    select = make.select

    def replaced(*given, **options):
        found = select(*given, **options)
        _replace(path)
        return found

    monkeypatch.setattr(make, "select", replaced)
    with pytest.raises(InputError, match="was replaced while it was in use; start again"):
        make.calibrate(
            prior, path, restored=tmp_path / "r.h5", tv_weight="auto", grid=[0.6], grid_slices=2
        )


def test_a_cache_that_is_overwritten_in_place_is_said_to_be_damaged(tmp_path):
    path = write_cache(tmp_path / "c.h5", test=40)
    with SliceCache(path) as cache:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(InputError, match="is damaged, or was not written to its end"):
            cache.read(range(40))
