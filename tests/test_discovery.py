"""Which files of a folder are scans: nothing is lost in silence, nothing else is a patient."""

import json
import os
import shutil

import h5py
import pytest
import tiny_scans

from preprocessing import brats, camcan
from tf_lesion.detection.files import find_scans
from tf_lesion.detection.layout import layout_of, one_scan
from tf_lesion.files import InputError
from tf_lesion.scans import discovery
from tf_lesion.scans.volumes import load_scan


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a scan")
    return path


def bids(folder, subject):
    return folder / f"sub-{subject}" / "anat" / f"sub-{subject}_T2w.nii.gz"


def annexed(path):
    """A link to content that was not fetched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("../../.git/annex/objects/xx/MD5E-s100--0.nii.gz")
    return path


def problems(subjects):
    return {subject.name: subject.problem for subject in subjects}


@pytest.mark.parametrize("find", [find_scans, camcan.find_subjects])
def test_content_that_was_not_fetched_is_a_subject_with_its_reason(tmp_path, find):
    touch(bids(tmp_path, "01"))
    annexed(bids(tmp_path, "02"))
    (tmp_path / "sub-03").mkdir()  # a data set in the data set, not installed
    (tmp_path / "sub-04").symlink_to(tmp_path / "nowhere")
    found = problems(find(tmp_path))
    assert found.pop("sub-01") == ""
    assert "its content is not here" in found.pop("sub-02")
    assert "an empty folder; fetch its content" in found.pop("sub-03")
    assert "a link to" in found.pop("sub-04")
    assert found == {}


def test_a_folder_that_cannot_be_read_is_a_subject_with_its_reason(tmp_path, monkeypatch):
    touch(bids(tmp_path, "01"))
    closed, real = bids(tmp_path, "02").parent, os.listdir
    touch(closed / "sub-02_T2w.nii.gz")

    def listdir(path):
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert "Permission denied" in problems(find_scans(tmp_path))["sub-02"]


@pytest.mark.parametrize("find", [find_scans, camcan.find_subjects])
def test_a_subject_without_a_scan_is_one_with_its_reason(tmp_path, find):
    touch(bids(tmp_path, "01"))
    touch(tmp_path / "sub-02" / "ses-1" / "anat" / "sub-02_ses-1_T2w.nii.gz")
    (tmp_path / "sub-02" / "ses-2").mkdir()  # sessions need not have one each
    touch(bids(tmp_path, "03").with_name("sub-03_T2w.NII.GZ"))
    touch(bids(tmp_path, "04").with_name("sub-04_T1w.nii.gz"))
    (tmp_path / "sub-05" / "anat").mkdir(parents=True)
    for name in ("sub-03.v2", "phenotype", "sub-01_ses-1", "derivatives/sub-06"):
        (tmp_path / name).mkdir(parents=True)
    found = {name.split("_")[0]: reason for name, reason in problems(find(tmp_path)).items()}
    failed = {name for name, reason in found.items() if "no scan found in this folder" in reason}
    assert failed == {"sub-03.v2", "sub-04", "sub-05"}
    assert found.keys() - failed == {"sub-01", "sub-02", "sub-03"}


def test_of_other_folders_those_are_subjects_that_are_called_like_one_with_a_scan(tmp_path):
    for name in ("p1", "p2", "site1/p7"):
        touch(tmp_path / name / "T2.nii.gz")
    (tmp_path / "p4").symlink_to(tmp_path / "p1")
    (tmp_path / "p5").symlink_to(tmp_path / "nowhere")
    for name in ("p3", "masks", "site1/p8", "p1/2"):
        (tmp_path / name).mkdir()
    found = problems(find_scans(tmp_path, pattern="**/T2.nii.gz"))
    assert {name for name, problem in found.items() if problem} == {"p3", "p5", "site1/p8"}
    assert found.keys() >= {"p1", "p2", "site1/p7"}
    narrow = find_scans(tmp_path, pattern="p[12]/T2.nii.gz")
    assert problems(narrow) == {"p1": "", "p2": ""}


def test_of_broken_links_those_to_files_of_other_kinds_are_no_subjects(tmp_path):
    touch(tmp_path / "a_t2.nii.gz")
    for name in ("a_t1.nii.gz", "notes.pdf", "Patient.001", "sub-4.backup"):
        (tmp_path / name).symlink_to("/nowhere")
    annexed(tmp_path / "1.2.840.113")
    found = problems(find_scans(tmp_path))
    assert {name for name, problem in found.items() if problem} == {"Patient.001", "sub-4.backup"}


def test_linked_folders_are_followed_once_and_loops_end(tmp_path):
    touch(bids(tmp_path / "elsewhere", "02"))
    data = tmp_path / "data"
    touch(bids(data, "01"))
    (data / "sub-02").symlink_to(tmp_path / "elsewhere" / "sub-02")
    for name in ("all", "again", "sub-01/others"):  # 3^40 folders to whoever walks on
        (data / name).symlink_to(data)
    assert problems(find_scans(data)) == {"sub-01": "", "sub-02": ""}


def test_two_subjects_of_the_same_content_stay_two(tmp_path):
    store = touch(tmp_path / "store" / "key.nii.gz")
    for name in ("01", "02"):
        path = bids(tmp_path / "data", name)
        path.parent.mkdir(parents=True)
        path.symlink_to(store)
    assert [subject.name for subject in find_scans(tmp_path / "data")] == ["sub-01", "sub-02"]


def test_rubbish_code_and_raw_data_are_no_patients_unless_named(tmp_path):
    touch(tmp_path / "a_t2.nii.gz")
    for folder in (".trash", "code", "sourcedata/raw", "derivatives/x", "b/.hidden"):
        touch(tmp_path / folder / "other_t2.nii.gz")
    touch(tmp_path / "._a_t2.nii.gz")
    assert [subject.name for subject in find_scans(tmp_path)] == ["a"]
    (named,) = find_scans(tmp_path, pattern="sourcedata/**/*_t2.nii.gz")
    assert named.scan == tmp_path / "sourcedata" / "raw" / "other_t2.nii.gz"


def test_the_globs_of_before_find_what_they_found(tmp_path):
    for name in ("a/T2.nii", "b/c/T2.nii", "T2.nii", "[x]/T2.nii"):
        touch(tmp_path / name)
    for pattern in ("*/T2.nii", "**/T2.nii", "**/c/*", "b/**/*.nii", "T2.nii", "**/**/T2.nii"):
        expected = sorted(path for path in tmp_path.glob(pattern) if path.is_file())
        assert discovery.find_scans(tmp_path, [pattern]) == expected
    assert discovery.find_scans(tmp_path / "a", ["../b/c/*"]) == [tmp_path / "a/../b/c/T2.nii"]
    for pattern in ("", "/T2.nii", ".."):
        with pytest.raises(InputError, match="Expected a glob relative to"):
            discovery.find_scans(tmp_path, [pattern])


def test_a_mask_that_was_not_fetched_is_said_not_to_be_here(tmp_path):
    scan = touch(bids(tmp_path, "01"))
    annexed(scan.with_name("mask.nii.gz"))
    (subject,) = find_scans(tmp_path, mask_pattern="{folder}/mask.nii.gz")
    assert "its content is not here" in subject.problem


def test_a_segmentation_that_was_not_fetched_is_noted_and_no_other_is_asked_for(tmp_path):
    seg = annexed(touch(tmp_path / "a_t2.nii.gz").with_name("a_seg.nii.gz"))
    (subject,) = find_scans(tmp_path)
    assert (subject.label, subject.problem) == (seg, "")
    (subject,) = brats.find_subjects(tmp_path)
    assert subject.problem.startswith(f"{seg}: its content is not here")


def test_a_mask_of_one_scan_that_is_not_here_is_named_before_anything_is_read(tmp_path):
    scan, mask = touch(tmp_path / "a_t2.nii.gz"), annexed(tmp_path / "mask.nii.gz")
    assert one_scan(scan, mask=mask).problem.startswith(f"{mask}: its content is not here")
    with pytest.raises(FileNotFoundError, match=r"mask\.nii\.gz: its content is not here"):
        load_scan(mask)
    assert one_scan(scan, mask=tmp_path / "no").problem == f"No such file: {tmp_path / 'no'}"
    assert one_scan(scan).problem == ""


def test_results_beside_or_around_the_scans_leave_the_scans_alone(tmp_path):
    data = tmp_path / "data"
    touch(data / "a_t2.nii.gz")
    touch(data / "maps" / "b_t2.nii.gz")
    for out in (data, tmp_path):
        names = [subject.name for subject in find_scans(data, out=out)]
        assert names == ["a", "b"]
    assert [subject.name for subject in find_scans(data, out=data / "maps")] == ["a"]


def test_a_cohort_skips_what_is_not_here_and_says_so(tmp_path, capsys):
    scan = tiny_scans.write(tmp_path / "cohort" / "a" / "a_t2.nii.gz", *tiny_scans.brain())
    shutil.copytree(scan.parent, tmp_path / "cohort" / "b")
    (tmp_path / "cohort" / "b" / "a_t2.nii.gz").rename(tmp_path / "cohort" / "b" / "b_t2.nii.gz")
    annexed(tmp_path / "cohort" / "c" / "c_t2.nii.gz")
    argv = ["--input", tmp_path / "cohort", "--out", tmp_path / "c.h5", "--no-labels"]
    argv += ["--no-matching", "--voxel-size", tiny_scans.VOXEL_MM, "--align", "none"]
    assert brats.main(list(map(str, argv))) == 1
    said = capsys.readouterr().err
    assert "c: " in said
    assert "its content is not here" in said
    with h5py.File(tmp_path / "c.h5") as file:
        assert set(json.loads(file.attrs["settings"])["skipped"]) == {"c"}


def test_a_patient_is_called_after_the_folder_where_the_file_says_t2_alone(tmp_path):
    touch(tmp_path / "p7" / "T2.nii.gz")
    (subject,) = find_scans(tmp_path, pattern="**/T2.nii.gz")
    assert subject.name == "p7"
    (subject,) = find_scans(tmp_path / "p7", pattern="T2.nii.gz")
    assert subject.name == "p7"
    touch(tmp_path / "p8" / "t2.nii.gz")
    found = find_scans(tmp_path, pattern="**/[tT]2.nii.gz")
    assert [subject.name for subject in found] == ["p7", "p8"]
    touch(tmp_path / "other" / "t2_t2.nii.gz")
    (subject,) = find_scans(tmp_path / "other")
    assert subject.name == "t2"


def test_sessions_and_labels_with_a_plus_are_scans_of_their_own(tmp_path):
    for name in ("sub-a+1_ses-1", "sub-a+1_ses-2", "sub-a+2_ses-1"):
        touch(tmp_path / name.replace("_", "/") / "anat" / f"{name}_T2w.nii.gz")
    names = [subject.name for subject in find_scans(tmp_path)]
    assert names == ["sub-a+1_ses-1", "sub-a+1_ses-2", "sub-a+2_ses-1"]


@pytest.mark.parametrize("bids", [False, True])
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (None, ["{}/anat/{}_T2w", "{}/anat/{}_run-1_T2w", "{}/anat/{}_run-2_T2w"]),
        (None, ["{}/anat/{}_acq-a_T2w", "{}/anat/{}_acq-a_run-1_T2w", "{}/anat/{}_rec-a_T2w"]),
        (None, ["{}/ses-1/anat/{}_ses-1_T2w", "{}/ses-2/anat/{}_ses-2_T2w"]),
        ("**/T2.nii.gz", ["{}/ses-1/T2", "{}/ses-2/T2", "{}/T2"]),
        ("**/*t2*.nii.gz", ["{}/ses-1/anat/t2", "{}/ses-2/anat/t2"]),
    ],
)
def test_all_scans_of_a_subject_get_files_of_their_own(tmp_path, bids, pattern, names):
    for subject in ("sub-1", "sub-2"):
        for name in names:
            touch(tmp_path / f"{name.replace('{}', subject)}.nii.gz")
    subjects = find_scans(tmp_path, pattern=pattern)
    made = {layout_of(one, "out", bids=bids, many=True).facts for one in subjects}
    assert len(made) == len(subjects) == 2 * len(names)


def test_maps_among_the_scans_are_no_scans(tmp_path):
    for name in ("sub-01_T2w.nii.gz", "sub-01_desc-restored_T2w.nii.gz"):
        touch(tmp_path / name)
    assert len(find_scans(tmp_path)) == 2  # of another program, to judge by what is there
    touch(tmp_path / "sub-01_desc-restored_T2w.json")
    assert [subject.name for subject in find_scans(tmp_path)] == ["sub-01"]
