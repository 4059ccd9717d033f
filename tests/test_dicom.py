"""DICOM: the T2 series is found, lies where NIfTI would, and nothing of the patient is written."""

import dataclasses
import gzip
import json
import os
import shutil
import sys
import tempfile
import zipfile

import keras
import nibabel as nib
import numpy as np
import pytest
import tiny_dicom
import tiny_scans
from pydicom.uid import generate_uid

import restore_brats
import tf_lesion
from tf_lesion.calibration import Calibration
from tf_lesion.calibration.file import FILE_NAME
from tf_lesion.cli import detect, report
from tf_lesion.detection.layout import is_map
from tf_lesion.evaluation.results import Result
from tf_lesion.files import InputError
from tf_lesion.scans.dicom import files as dicom_files
from tf_lesion.scans.dicom.choice import find_exams, find_series
from tf_lesion.scans.volumes import load_scan

OBLIQUE = tiny_scans.rigid(degrees=(4, -3, 5), shift=(1.25, -2.5, 3.75))
OTHERS = {  # what else an exam holds, and what is said of it
    "localizer": (tiny_dicom.LOCALIZER, "a localizer"),
    "T1": (tiny_dicom.T1, r"not T2 \(TE 3, TR 1900 ms\)"),
    "FLAIR": (tiny_dicom.FLAIR, "FLAIR"),
    "unnamed FLAIR": (
        {**tiny_dicom.FLAIR, "SeriesDescription": "tse"},
        r"inversion recovery \(TI 2500 ms\)",
    ),
    "ADC": ({"SeriesDescription": "ep2d_ADC"}, "diffusion"),
    "DWI": ({"SeriesDescription": "ep2d", "ScanningSequence": "EP"}, "echo-planar"),
    "b-value": ({"DiffusionBValue": 1000.0}, "echo-planar"),
    "MRA": ({"SeriesDescription": "TOF 3D", "EchoTime": 3}, "angiography"),
    "T2*": ({"SeriesDescription": "t2*_fl2d", "ScanningSequence": "GR"}, r"T2\*"),
    "derived": ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "derived"),
    "proton density": ({"EchoTime": 20}, "not T2"),
    "CT": ({"Modality": "CT"}, "CT, not MR"),
    "spine": ({"BodyPartExamined": "LSPINE"}, "of the spine"),
    "nothing said": (
        {"EchoTime": None, "RepetitionTime": None, "SeriesDescription": "tse tra"},
        "nothing says T2",
    ),
}


@pytest.fixture(scope="module")
def volume():
    """(whole numbers [X, Y, Z], affine), a brain with a bright ball."""
    values, affine = tiny_scans.brain()
    ball = tiny_scans.blob(affine, values.shape, (-20, -10, 30), 12)
    return np.rint(np.where(ball & (values > 0), 1500, values)), affine


@pytest.fixture(scope="module")
def model(volume, tmp_path_factory):
    """{run, prior, scan}: a run with a calibration, and the volume as NIfTI."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("model")
    values, affine = volume
    scan = tiny_scans.write(folder / "t2.nii.gz", values.astype(np.int16), affine)
    run = tiny_scans.run(folder)
    prior = tf_lesion.load(run)
    residual = prior.detect(scan).volumes["residual"]
    limit = float(np.quantile(residual[residual > 0], 0.9))
    path = tiny_scans.thresholds(run / FILE_NAME, prior, prior.config.restoration, {0.05: limit})
    prior = dataclasses.replace(prior, calibration=Calibration.load(path))
    return {"run": run, "prior": prior, "scan": scan}


@pytest.fixture(scope="module")
def exam(volume, tmp_path_factory):
    """A folder as a hospital burns it: four series, nested, a DICOMDIR and other files."""
    return _exam(tmp_path_factory.mktemp("burned") / "exam", volume)


@pytest.fixture(scope="module")
def detected(model, exam, tmp_path_factory):
    """Maps of the exam, of a zip of it as BIDS, and what else was written."""
    folder = tmp_path_factory.mktemp("detected")
    scratch = folder / "scratch"
    scratch.mkdir()
    before = _everything(exam)
    zipped = tiny_dicom.zipped(exam, folder / "burned.zip", above="any/where")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        assert _detect(model, exam, folder / "plain") == 0
        assert _detect(model, zipped, folder / "bids", "--bids-out") == 0
    return {
        "plain": folder / "plain",
        "bids": folder / "bids",
        "before": before,
        "after": _everything(exam),
        "scratch": list(scratch.iterdir()),
    }


def _exam(folder, volume):
    values, affine = volume
    given = {"study": generate_uid()}
    tiny_dicom.write_series(
        folder / "DICOM/A/1", values[..., :3], affine, **given, **OTHERS["localizer"][0]
    )
    tiny_dicom.write_series(
        folder / "DICOM/A/2", values, affine, number=2, **given, **tiny_dicom.T1
    )
    tiny_dicom.write_series(folder / "DICOM/A/3", values, affine, number=3, **given)
    name = "slice {}.dcm"
    tiny_dicom.write_series(
        folder / "DICOM/B", values, affine, number=4, name=name, **given, **tiny_dicom.FLAIR
    )
    (folder / "README.TXT").write_text("autorun")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / ".DS_Store").write_bytes(b"\0" * 128 + b"DICM" + b"nonsense")
    return folder


def _run(command, *argv):
    return command.main(list(map(str, argv)))


def _detect(model, scan, out, *options):
    return _run(detect, scan, out, "--model", model["run"], *options)


def _facts(folder, pattern="*_restoration.json"):
    (path,) = folder.rglob(pattern)
    return json.loads(path.read_text())


def _everything(folder):
    """{path: (content, time)} of all below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


# Where it lies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SRA"])
def test_a_series_lies_where_its_volume_does_whatever_its_plane(volume, tmp_path, axes):
    values, affine = volume
    path = tiny_scans.write(tmp_path / "n.nii", values, OBLIQUE @ affine, axes=axes)
    image = nib.load(path)
    values = np.asarray(image.dataobj)
    tiny_dicom.write_series(tmp_path / "d", values, image.affine, MRAcquisitionType="3D")
    wanted, got = load_scan(path), load_scan(tmp_path / "d")
    np.testing.assert_array_equal(got.data, wanted.data)
    np.testing.assert_allclose(got.affine, wanted.affine, atol=2e-3)
    assert got.placed_by == "sform"
    assert got.warnings == ()


def test_a_multiframe_image_is_a_series_too(volume, tmp_path):
    path = tiny_dicom.write_multiframe(tmp_path / "exam" / "image", *volume, number=9)
    scan = load_scan(path.parent)
    np.testing.assert_array_equal(scan.data, volume[0])
    np.testing.assert_array_equal(scan.affine, volume[1])
    assert scan.series.facts()["spacing_mm"] == [4, 4, 4]
    assert scan.series.facts()["slices"] == volume[0].shape[2]


def test_maps_of_a_series_are_exactly_those_of_the_scan_as_nifti(model, exam):
    wanted, got = model["prior"].detect(model["scan"]), model["prior"].detect(exam)
    assert set(got.volumes) == set(wanted.volumes)
    for name in wanted.volumes:
        first, other = (nib.as_closest_canonical(maps.image(name)) for maps in (wanted, got))
        np.testing.assert_array_equal(first.dataobj, other.dataobj)
        np.testing.assert_array_equal(first.affine, other.affine)
        assert np.any(first.dataobj)


def test_the_scan_is_kept_beside_its_maps_and_gives_the_same_maps(model, detected):
    maps = detected["plain"]
    kept = maps / _facts(maps)["files"]["scan"]
    assert kept.name == "exam_scan.nii.gz"
    assert is_map(kept)
    assert is_map(detected["bids"] / "sub-burned/anat/sub-burned_desc-scan_T2w.nii.gz")
    assert nib.load(kept).get_data_dtype() == np.uint16
    again = model["prior"].detect(kept)
    for name, volume in again.volumes.items():
        written = maps / _facts(maps)["files"][name]
        np.testing.assert_array_equal(nib.load(written).dataobj, volume)


# Which series -----------------------------------------------------------------------------------


def test_the_t2_series_of_an_exam_is_found(exam):
    series = find_series(exam)
    assert (series.first.number, series.first.description) == (3, "t2_tse_tra")
    assert series.facts()["echo_time_ms"] == 100


@pytest.mark.parametrize("kind", OTHERS)
def test_another_series_is_not_taken_and_the_reason_is_told(volume, tmp_path, kind):
    tags, reason = OTHERS[kind]
    tiny_dicom.write_series(tmp_path, *volume, number=7, **tags)
    with pytest.raises(
        InputError, match=rf"found none.*\n +7  .*48 slices, 4 x 4 x 4 mm.*{reason}"
    ):
        find_series(tmp_path)
    assert find_series(tmp_path, "7").first.number == 7


def test_without_times_the_description_says_what_it_is(volume, tmp_path):
    tags = {"EchoTime": None, "RepetitionTime": None, "SeriesDescription": "sT2W_TSE"}
    tiny_dicom.write_series(tmp_path, *volume, **tags)
    assert np.isnan(find_series(tmp_path).first.echo_time)


def test_a_sagittal_series_is_taken_only_if_it_is_3d(volume, tmp_path):
    values, affine = np.moveaxis(volume[0], 0, 2), volume[1][:, [1, 2, 0, 3]]
    tiny_dicom.write_series(tmp_path / "2d", values, affine)
    with pytest.raises(InputError, match="neither axial nor 3-D"):
        find_series(tmp_path / "2d")
    tiny_dicom.write_series(tmp_path / "3d", values, affine, MRAcquisitionType="3D")
    scan = load_scan(tmp_path / "3d")
    np.testing.assert_array_equal(scan.data, volume[0])


def test_of_several_the_one_with_most_slices_is_taken_and_a_tie_is_told(volume, tmp_path):
    study = generate_uid()
    values, affine = volume
    for number, slices in ((2, range(0, 48, 2)), (5, None)):
        thick = affine @ np.diag([1, 1, 2 if slices else 1, 1])
        part = values[..., slices] if slices else values
        tiny_dicom.write_series(tmp_path / str(number), part, thick, number=number, study=study)
    assert find_series(tmp_path).first.number == 5
    tiny_dicom.write_series(
        tmp_path / "6", *volume, number=6, study=study, SeriesDescription="t2 again"
    )
    with pytest.raises(InputError, match=r"found 2; choose.*\n +2 .*fits\n +5 .*fits\n +6 .*fits"):
        find_series(tmp_path)
    assert find_series(tmp_path, "6").first.number == 6
    assert find_series(tmp_path, "AGAIN").first.number == 6
    with pytest.raises(InputError, match=r"'t1'.*found none"):
        find_series(tmp_path, "t1")


def test_two_echoes_of_one_series_are_two(volume, tmp_path):
    values, affine = volume
    study = generate_uid()
    tiny_dicom.write_series(tmp_path / "a", values // 2, affine, number=4, study=study, EchoTime=12)
    tiny_dicom.write_series(tmp_path / "b", values, affine, number=4, study=study)
    one = {path.SeriesInstanceUID: path for path in _headers(tmp_path)}
    for path in tmp_path.rglob("IM*"):
        _change(path, SeriesInstanceUID=min(one))
    np.testing.assert_array_equal(load_scan(tmp_path).data, values)


def _headers(folder):
    import pydicom

    return [pydicom.dcmread(path) for path in sorted(folder.rglob("IM*"))]


def _change(path, **tags):
    import pydicom

    made = pydicom.dcmread(path)
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    made.save_as(path)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "IM0020").unlink(), "slices are missing: 4 to 8 mm"),
        (lambda folder: os.truncate(folder / "IM0020", 4000), "a truncated file"),
        (lambda folder: _change(folder / "IM0020", Rows=2, Columns=2), "several sizes"),
        (
            lambda folder: _change(folder / "IM0020", ImagePositionPatient=[98, 134, -72]),
            "several images at one place",
        ),
        (
            lambda folder: _change(folder / "IM0020", ImageOrientationPatient=[1, 0, 0, 0, 0, 1]),
            "several directions",
        ),
        (
            lambda folder: _change(folder / "IM0020", ImagePositionPatient=None),
            "slices without a position",
        ),
        (lambda folder: [path.unlink() for path in folder.glob("IM00[1-4]*")], "only 40 mm"),
    ],
)
def test_what_is_no_volume_is_refused_also_by_hand(volume, tmp_path, spoil, reason):
    folder = tiny_dicom.write_series(tmp_path, *volume, number=3)
    spoil(folder)
    with pytest.raises(InputError, match=reason):
        find_series(folder)
    if "only" not in reason:
        with pytest.raises(InputError, match=reason):
            find_series(folder, "3")


def test_linked_folders_are_read_and_links_that_lead_back_are_not(volume, tmp_path):
    (tmp_path / "exam").mkdir()
    (tmp_path / "exam" / "again").symlink_to(tmp_path / "exam")
    (tmp_path / "exam" / "linked").symlink_to(tiny_dicom.write_series(tmp_path / "far", *volume))
    assert find_series(tmp_path / "exam").count == volume[0].shape[2]


def test_an_image_that_is_there_twice_counts_once(volume, tmp_path):
    folder = tiny_dicom.write_series(tmp_path / "exam", *volume)
    shutil.copytree(folder, folder / "copy")
    assert find_series(folder).count == volume[0].shape[2]


# What is written --------------------------------------------------------------------------------


def test_nothing_of_the_patient_is_written_and_nothing_beside_the_input(detected):
    assert detected["after"] == detected["before"]
    assert detected["scratch"] == []
    written = _everything(detected["plain"]) | _everything(detected["bids"])
    assert len(written) > 10
    for path, (content, _) in written.items():
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        for secret in ("Mustermann", "Erika", tiny_dicom.NUMBER, tiny_dicom.BORN):
            assert secret.encode() not in content, path


def test_facts_name_the_series_and_its_content(exam, detected):
    plain, bids = _facts(detected["plain"]), _facts(detected["bids"], "*restored_T2w.json")
    assert plain["input"] == str(exam)
    assert bids["input"].endswith("burned.zip")
    assert plain["series"] == bids["series"]
    assert plain["series"].pop("converter").startswith("dcm2niix 1.0")
    assert plain["series"] == {
        "number": 3,
        "description": "t2_tse_tra",
        "modality": "MR",
        "slices": 48,
        "spacing_mm": [4, 4, 4],
        "echo_time_ms": 100,
        "repetition_time_ms": 6000,
        "identity": plain["input_identity"],
    }


def test_a_name_in_the_description_is_left_out(volume, tmp_path):
    tiny_dicom.write_series(tmp_path, *volume, SeriesDescription="t2 tra MUSTERMANN_Erika pat4711")
    facts = find_series(tmp_path).facts()
    assert facts["description"] == "t2 tra ..._... ..."


@pytest.mark.slow
def test_results_are_read_and_shown_without_the_dicom(model, exam, tmp_path):
    moved = shutil.copytree(exam, tmp_path / "exam")
    assert _detect(model, moved, tmp_path / "maps") == 0
    shutil.rmtree(moved)
    (path,) = (tmp_path / "maps").glob("*_restoration.json")
    assert Result.read(path).scan.data.shape == (50, 59, 48)
    assert _run(report, "--results", tmp_path / "maps") == 0
    kept = Result.read(path).scan_path
    tiny_scans.write(kept, np.ones((50, 59, 48)), np.eye(4))
    with pytest.raises(InputError, match="another file has taken"):
        Result.read(path)


@pytest.mark.slow
def test_restore_brats_takes_dicom_too(model, exam, tmp_path):
    argv = ["--model", model["run"], "--input", exam, "--out", tmp_path / "maps", "--series", 2]
    assert _run(restore_brats, *argv) == 0
    assert _facts(tmp_path / "maps")["series"]["number"] == 2


# Many -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_of_exams_is_a_cohort_that_goes_on_where_it_was(model, volume, tmp_path, capsys):
    cohort, out = tmp_path / "cohort", tmp_path / "cohort" / "maps"
    for name in ("p1", "p2/first", "p2/second"):
        tiny_dicom.write_series(cohort / name / "DICOM", *volume)
    tiny_dicom.write_series(tmp_path / "other", *volume)
    tiny_dicom.zipped(tmp_path / "other", cohort / "p3.zip")
    tiny_dicom.write_series(cohort / "p4", *volume, **tiny_dicom.T1)
    assert _detect(model, cohort, out) == 1
    rows = json.loads((out / "summary.json").read_text())["scans"]
    assert [row["name"] for row in rows] == ["p1", "p2/first", "p2/second", "p3", "p4"]
    assert [row["status"] for row in rows] == ["done"] * 4 + ["failed"]
    assert "t1_mprage_sag" in rows[-1]["reason"]
    assert (out / "p2/first/first_restored.nii.gz").exists()
    facts = json.loads((out / "p2/first/first_restoration.json").read_text())
    assert facts["input"] == str(cohort / "p2/first")
    _change(cohort / "p1/DICOM/IM0000", SeriesDescription="t2 changed")
    assert _detect(model, cohort, out) == 1
    told = capsys.readouterr()
    assert "2 failed, 3 skipped" in told.out
    assert "another input_identity" in told.err


def test_studies_in_one_folder_get_names_without_the_patient(volume, tmp_path):
    for number in range(2):
        tiny_dicom.write_series(tmp_path, *volume, name=f"{number}-{{}}")
    names = [subject.name for subject in find_exams(tmp_path)]
    assert len(set(names)) == 2
    assert all(name.startswith("study-") and len(name) == 12 for name in names)
    assert names == [subject.name for subject in find_exams(tmp_path)]
    with pytest.raises(InputError, match="one exam, got 2 studies"):
        find_series(tmp_path)


def test_a_folder_with_nifti_stays_what_it_is(model, exam, tmp_path):
    data = shutil.copytree(exam, tmp_path / "data")
    shutil.copy(model["scan"], data / "p_t2.nii.gz")
    found = detect.find(data, detect.parser().parse_args([str(data), str(tmp_path / "maps")]))
    assert found.many
    assert [subject.scan.name for subject in found.subjects] == ["p_t2.nii.gz"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--pattern", "*"], "need a folder of NIfTI scans"),
        (["--participant-label", "01"], "needs a BIDS dataset"),
        (["--series", "9"], "expected one series '9'"),
    ],
)
def test_options_that_make_no_sense_with_dicom_are_refused(exam, tmp_path, capsys, options, reason):
    assert _run(detect, exam, tmp_path / "maps", *options) == 2
    assert reason in capsys.readouterr().err


def test_series_is_for_dicom(model, tmp_path, capsys):
    assert _run(detect, model["scan"], tmp_path / "maps", "--series", "2") == 2
    assert "--series needs DICOM" in capsys.readouterr().err


def test_a_link_to_a_file_that_is_not_here_is_told(volume, tmp_path):
    folder = tiny_dicom.write_series(tmp_path, *volume)
    (folder / "IM0100").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="IM0100"):
        find_series(folder)


# Zips -------------------------------------------------------------------------------------------


def _zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "c:/evil", "..\\evil"])
def test_a_zip_that_names_places_outside_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="names inside of the zip"):
        find_series(_zip(tmp_path / "a.zip", {name: b"x"}))


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = _zip(tmp_path / "a.zip", {"a": bytes(20 * 2**20)})
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # nobody may read from it
    with pytest.raises(InputError, match="at most 200 times its size"):
        find_series(path)
    monkeypatch.setattr(dicom_files, "MOST_BYTES", 20 * 2**20 - 1)
    with pytest.raises(InputError, match="bytes unpacked"):
        find_series(path)
    monkeypatch.setattr(dicom_files, "MOST_FILES", 0)
    with pytest.raises(InputError, match="at most 0 files"):
        find_series(path)


def test_a_zip_whose_directory_lies_is_refused(volume, tmp_path):
    folder = tiny_dicom.write_series(tmp_path / "exam", *volume)
    path = tiny_dicom.zipped(folder, tmp_path / "a.zip")
    content, name = path.read_bytes(), b"IM0020"
    at = content.rindex(name) - 46 + 24  # the unpacked size in the directory
    path.write_bytes(content[:at] + (1000).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(InputError, match="IM0020: Bad CRC"):
        find_series(path)


def test_zips_in_a_zip_are_not_looked_at(exam, tmp_path):
    inner = tiny_dicom.zipped(exam, tmp_path / "inner.zip")
    outer = _zip(tmp_path / "outer.zip", {"inner.zip": inner.read_bytes(), "a.txt": "text"})
    with pytest.raises(InputError, match="found none"):
        find_series(outer)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and then nothing"])
def test_a_damaged_zip_is_told(tmp_path, content, capsys):
    (tmp_path / "a.zip").write_bytes(content)
    assert _run(detect, tmp_path / "a.zip", tmp_path / "maps") == 2
    assert "expected a zip of DICOM, but it cannot be read" in capsys.readouterr().err


def test_damage_inside_of_a_zip_is_told(exam, tmp_path):
    path = tiny_dicom.zipped(exam, tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    at = content.index(b"DICOM/A/3/IM0000") + 400
    content[at : at + 50] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        load_scan(path)


# What must be installed -------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["pydicom", "dcm2niix"])
def test_without_the_extra_the_error_names_it(exam, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=rf"{module} to be installed.*tf-lesion\[dicom\]"):
        load_scan(exam)
