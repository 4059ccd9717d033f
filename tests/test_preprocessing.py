"""Intensities, one scan there and back, and the two cohort commands on tiny cohorts."""

import dataclasses
import errno
import json
import os
import shutil
import signal

import h5py
import nibabel as nib
import numpy as np
import pytest
import tiny_scans
from scipy import ndimage

from preprocessing import brats, camcan, cohort
from tf_lesion.caches.slices import SliceCache
from tf_lesion.cli.command import EXIT_INTERRUPTED
from tf_lesion.files import InputError
from tf_lesion.scans import intensity, prepare
from tf_lesion.scans.discovery import find_scans, scan_names, subject_with_files
from tf_lesion.scans.prepare import ScanSettings, prepare_scan, to_scan_grid
from tf_lesion.scans.volumes import MniGrid, save_like

VOXEL = tiny_scans.VOXEL_MM
QUICK = ScanSettings(voxel_size=VOXEL, align="none")  # tiny scans are in MNI space
LESION_MM = (30.0, 0.0, 20.0)


def random_brain(seed=0, shape=(12, 14, 10)):
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, dtype=bool)
    mask[2:-2, 2:-2, 2:-2] = True
    return np.where(mask, rng.gamma(3, 100, shape), 0).astype(np.float32), mask


def test_normalized_brains_run_from_the_floor_to_1_and_are_0_outside():
    volume, mask = random_brain()
    found = intensity.normalize(volume, mask)
    assert found[mask].min() == np.float32(intensity.BRAIN_FLOOR)
    assert found[mask].max() == 1
    assert not found[~mask].any()
    low, high = np.percentile(volume[mask], [0.1, 99.9])
    inside = mask & (volume > low * 1.2) & (volume < high)
    np.testing.assert_allclose(found[inside], (volume[inside] - low) / (high - low), rtol=1e-5)


def test_one_spike_does_not_darken_the_brain():
    volume, mask = random_brain(shape=(24, 24, 24))
    spiked = volume.copy()
    spiked[12, 12, 12] = 1e6
    difference = intensity.normalize(spiked, mask) - intensity.normalize(volume, mask)
    difference[12, 12, 12] = 0
    assert np.abs(difference).max() < 0.02


def test_a_constant_or_empty_brain_is_refused():
    volume, mask = random_brain()
    with pytest.raises(InputError, match="constant"):
        intensity.normalize(np.ones_like(volume), mask)
    with pytest.raises(InputError, match="no voxel"):
        intensity.normalize(volume, np.zeros_like(mask))


def test_matching_gives_the_references_histogram_inside_the_brain_only():
    volume, mask = random_brain(0, (30, 30, 30))
    other, other_mask = random_brain(1, (30, 30, 30))
    other = intensity.normalize(np.sqrt(other), other_mask)
    reference = intensity.brain_quantiles(other, other_mask)
    assert reference.shape == (intensity.QUANTILES,)
    found = intensity.match_to_reference(intensity.normalize(volume, mask), mask, reference)
    matched = intensity.brain_quantiles(found, mask)
    assert (matched[2:] >= reference[:-2]).all()  # to 2 of 1001 ranks
    assert (matched[:-2] <= reference[2:]).all()
    assert not found[~mask].any()


def test_matching_is_monotone_and_stays_in_the_references_range_above_zero():
    volume, mask = random_brain()
    reference = np.linspace(0, 0.8, 1001) ** 2
    found = intensity.match_to_reference(volume, mask, reference)
    order = np.argsort(volume[mask], kind="stable")
    assert (np.diff(found[mask][order]) >= 0).all()
    assert found[mask].min() >= intensity.BRAIN_FLOOR  # no black patches
    assert found[mask].max() <= np.float32(0.64)


def test_matching_does_not_depend_on_how_much_background_there_is():
    volume, mask = random_brain()
    reference = np.linspace(0.1, 1, 1001)
    wide, wide_mask = np.pad(volume, 20), np.pad(mask, 20)
    found = intensity.match_to_reference(volume, mask, reference)
    np.testing.assert_array_equal(
        intensity.match_to_reference(wide, wide_mask, reference)[wide_mask], found[mask]
    )


@pytest.mark.parametrize("reference", [[], [0.5] * 9, [0.1, np.nan, 1]])
def test_a_reference_without_range_is_refused(reference):
    with pytest.raises(InputError, match="Reference"):
        intensity.match_to_reference(*random_brain(), reference)


def test_n4_flattens_a_bias_field():
    values = tiny_scans.brain()[0][::2, ::2, ::2]
    mask = values > 0
    x = np.linspace(-1, 1, values.shape[0])[:, None, None]
    biased = (values * np.exp(0.5 * x)).astype(np.float32)
    corrected = intensity.correct_bias(biased, mask, [2 * VOXEL] * 3)

    def spread(volume):
        return np.log(volume[mask] / values[mask]).std()

    assert spread(corrected) < 0.35 * spread(biased)


def with_lesion(values, affine, center=LESION_MM, radius=13):
    """(values with a bright ball, label 4 in it)."""
    label = tiny_scans.blob(affine, values.shape, center, radius) & (values > 0)
    return np.where(label, 1100, values).astype(np.float32), label.astype(np.uint8) * 4


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAI", "SPR"])
def test_a_landmark_comes_back_within_one_voxel(tmp_path, axes):
    values, affine = tiny_scans.brain()
    moved = tiny_scans.rigid(degrees=(20, -6, 4), shift=(25, 30, -15))
    image, label = with_lesion(values, affine)
    path = tiny_scans.write(tmp_path / "t2.nii.gz", image, moved @ affine, axes=axes)
    seg = tiny_scans.write(tmp_path / "seg.nii.gz", label, moved @ affine, axes=axes)
    settings = ScanSettings(voxel_size=VOXEL)
    prepared = prepare_scan(path, settings=settings, label_path=seg)
    assert prepared.grid.shape == prepared.image.shape == prepared.label.shape
    # In the grid, the lesion is where it was before the head was moved.
    center = prepared.grid.affine @ [*ndimage.center_of_mass(prepared.label), 1]
    truth = affine @ [*ndimage.center_of_mass(label), 1]
    assert np.linalg.norm((center - truth)[:3]) < VOXEL
    # And back in the file's own voxels, it is where it is in the file.
    back = to_scan_grid(prepared.label, prepared, order=0)
    stored = np.asarray(nib.load(seg).dataobj)
    assert back.shape == stored.shape
    assert back.dtype == np.uint8
    shift = np.subtract(ndimage.center_of_mass(back), ndimage.center_of_mass(stored))
    assert np.linalg.norm(shift) < 1
    assert set(np.unique(back)) == {0, 4}
    save_like(prepared.scan, back, tmp_path / "back.nii.gz")
    np.testing.assert_allclose(nib.load(tmp_path / "back.nii.gz").affine, nib.load(path).affine)


def test_images_come_back_as_they_went_and_are_0_outside_the_brain(tmp_path):
    values, affine = tiny_scans.brain()
    path = tiny_scans.write(tmp_path / "t2.nii", values, affine, axes="LPS")
    prepared = prepare_scan(path, settings=QUICK)
    back = prepared.scan.to_file_orientation  # of an array in RAS
    image = to_scan_grid(prepared.image, prepared)
    stored = np.asarray(nib.load(path).dataobj)
    brain = back(prepared.scan_mask)
    assert not image[~brain].any()
    assert (image[brain] > 0).all()
    low, high = np.percentile(stored[brain], [0.1, 99.9])
    expected = np.clip((stored - low) / (high - low), intensity.BRAIN_FLOOR, 1)
    np.testing.assert_allclose(image[brain], expected[brain], atol=1e-5)
    with pytest.raises(ValueError, match="Expected a volume of shape"):
        to_scan_grid(prepared.image[1:], prepared)


def test_the_edge_of_the_brain_is_not_darkened_on_the_way_in_or_out(tmp_path):
    """Intensity rises evenly from left to right, in the rim of the brain as in its depth."""
    values, affine = tiny_scans.brain()
    x_mm = (affine[0, 0] * np.arange(values.shape[0]) + affine[0, 3])[:, None, None]
    ramp = np.where(values > 0, 500 + x_mm, 0).astype(np.float32)
    moved = tiny_scans.rigid(degrees=(9, 8, 7), shift=(2, 1, 3))
    path = tiny_scans.write(tmp_path / "t2.nii", ramp, moved @ affine)
    prepared = prepare_scan(path, settings=QUICK)
    mask = prepared.mask
    rim = mask & ~ndimage.binary_erosion(mask)
    index = np.argwhere(rim)
    points = np.linalg.inv(moved) @ prepared.grid.affine @ np.c_[index, np.ones(len(index))].T
    assert np.corrcoef(points[0], prepared.image[rim])[0, 1] > 0.99
    image, brain = to_scan_grid(prepared.image, prepared), values > 0
    rim = brain & ~ndimage.binary_erosion(brain) & (image > 0)
    assert np.corrcoef(ramp[rim], image[rim])[0, 1] > 0.99
    assert not image[~brain].any()


def test_a_mask_that_is_given_goes_before_what_is_found(tmp_path):
    values, affine = tiny_scans.head()
    path = tiny_scans.write(tmp_path / "t2.nii", values, affine)
    truth = tiny_scans.brain()[0] > 0
    mask = tiny_scans.write(tmp_path / "mask.nii", truth.astype(np.uint8), affine)
    given = prepare_scan(path, settings=QUICK, mask_path=mask)
    np.testing.assert_array_equal(given.mask, truth)
    np.testing.assert_array_equal(given.image > 0, truth)
    assert given.brain_kind == "mask given"
    fractions = tiny_scans.write(tmp_path / "share.nii", 0.45 * truth, affine)
    np.testing.assert_array_equal(
        prepare_scan(path, settings=QUICK, mask_path=fractions).mask, truth
    )


def test_a_brain_outside_the_crop_is_warned_of(tmp_path):
    values, affine = tiny_scans.brain()
    good = tiny_scans.write(tmp_path / "good.nii", values, affine)
    assert prepare_scan(good, settings=QUICK).warnings == []
    aside = tiny_scans.write(
        tmp_path / "aside.nii", values, tiny_scans.rigid(shift=(40, 0, 0)) @ affine
    )
    found = prepare_scan(aside, settings=QUICK).warnings
    assert any("outside the crop" in warning for warning in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"align": "affine"}, "align to"), ({"mask": "no"}, "mask to"), ({"voxel_size": -2}, "voxel")],
)
def test_settings_outside_what_is_allowed_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        ScanSettings(**changes)


def test_settings_are_json():
    assert json.loads(json.dumps(dataclasses.asdict(QUICK)))["align"] == "none"


# The two commands ------------------------------------------------------------------------------


def write_healthy(folder, names, *, seed=0):
    values, affine = tiny_scans.brain()
    for number, name in enumerate(names):
        noise = np.random.default_rng(seed + number).normal(0, 20, values.shape)
        volume = np.where(values > 0, np.maximum(values + noise, 1), 0).astype(np.float32)
        tiny_scans.write(folder / name / "anat" / f"{name}_T2w.nii.gz", volume, affine)
    return folder


def write_patient(folder, case, *, suffix="_t2", seg="_seg", ending=".nii.gz", scale=1.0):
    values, affine = tiny_scans.brain()
    image, label = with_lesion(values, affine)
    tiny_scans.write(folder / case / f"{case}{suffix}{ending}", image * scale, affine, axes="LPS")
    if seg:
        tiny_scans.write(folder / case / f"{case}{seg}{ending}", label, affine, axes="LPS")


def healthy_argv(folder, out, *more):
    base = ["--input", str(folder), "--out", str(out), "--voxel-size", str(VOXEL)]
    return [*base, "--align", "none", *map(str, more)]


def patient_argv(folder, out, *more):
    return ["--input", str(folder), "--out", str(out), "--align", "none", *map(str, more)]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """(folder of three healthy scans, their cache)."""
    folder = tmp_path_factory.mktemp("healthy")
    write_healthy(folder / "scans", ["sub-CC110033", "sub-CC1", "sub-CC2"])
    assert camcan.main(healthy_argv(folder / "scans", folder / "healthy.h5")) == 0
    return folder / "scans", folder / "healthy.h5"


def test_the_healthy_cache_has_all_slices_with_brain_split_by_subject(healthy):
    _, path = healthy
    grid = MniGrid(VOXEL)
    mask = tiny_scans.brain()[0] > 0
    expected = np.flatnonzero(mask[grid.crop_window].any(axis=(0, 1)))
    with SliceCache(path, "Train") as train, SliceCache(path, "Test") as test:
        assert (len(train), len(test)) == (2 * len(expected), len(expected))
        assert len(train.index.subject_ids) == 2
        assert len(test.index.subject_ids) == 1
        assert not set(train.index.subject_ids) & set(test.index.subject_ids)
        np.testing.assert_array_equal(test.index.slice_index, expected)
        assert test.shape == (38, 50)
        assert test.reference.shape == (1001,)
        assert test.settings["reference"] == "sub-CC110033"
        assert test.settings["scan"]["voxel_size"] == VOXEL
        rows = range(len(test))
        np.testing.assert_array_equal(test.mask(rows), test.read(rows) > 0)
        np.testing.assert_array_equal(test.mask(rows)[..., 0].any(axis=(1, 2)), True)
    with h5py.File(path) as file:
        stored = np.moveaxis(file["Test"][:], 0, 2) > 0
        np.testing.assert_array_equal(stored, mask[:, :, expected])
    assert not cohort.parts_folder(path).exists()


def test_healthy_subjects_are_matched_to_the_reference_if_asked(healthy, tmp_path):
    folder, plain = healthy
    assert camcan.main(healthy_argv(folder, tmp_path / "matched.h5", "--match")) == 0
    distances = []
    for path in (plain, tmp_path / "matched.h5"):
        with SliceCache(path, "Test") as test:
            values = test.read(range(len(test)))
            brain = values[test.mask(range(len(test)))]
            levels = np.linspace(0, 1, len(test.reference))
            distances.append(np.abs(np.quantile(brain, levels) - test.reference).max())
    assert distances[1] < 0.7 * distances[0]
    assert distances[0] > 0.01


def test_patients_are_matched_to_the_healthy_reference_with_their_labels(healthy, tmp_path):
    _, reference = healthy
    write_patient(tmp_path / "scans" / "HGG", "Brats17_A", scale=3.0)
    write_patient(tmp_path / "scans" / "LGG", "Brats17_B")
    out = tmp_path / "patients.h5"
    assert brats.main(patient_argv(tmp_path / "scans", out, "--reference", reference)) == 0
    with SliceCache(out) as cache, SliceCache(reference) as source:
        assert cache.index.subject_ids == ["Brats17_B", "Brats17_A"]  # LGG first
        np.testing.assert_array_equal(cache.reference, source.reference)
        assert cache.settings["scan"]["voxel_size"] == VOXEL  # that of the reference
        rows = np.flatnonzero(cache.index.subject == 1)
        brain = cache.read(rows)[cache.mask(rows)]
        quantiles = np.quantile(brain, np.linspace(0, 1, 1001))
        # The lesion is the brightest 0.5 %, all of one intensity.
        assert np.abs(quantiles - source.reference)[10:-10].max() < 0.02
        first = np.flatnonzero(cache.index.subject == 0)
        np.testing.assert_allclose(cache.read(first), cache.read(rows), atol=1e-3)  # scale undone
    with h5py.File(out) as file:
        assert set(np.unique(file["Label"][:])) == {0, 4}
        label = np.moveaxis(file["Label"][: len(first)], 0, 2)
        planes = file["Test_info/slice_index"][: len(first)]
        x, y, row = ndimage.center_of_mass(label)
        center = file.attrs["grid_affine"] @ [x, y, row + planes[0], 1]
        assert np.linalg.norm(center[:3] - LESION_MM) < VOXEL


@pytest.mark.parametrize(
    ("suffix", "seg", "ending"),
    [("_t2", "_seg", ".nii.gz"), ("_t2", "_seg", ".nii"), ("-t2w", "-seg", ".nii.gz")],
)
def test_flat_folders_of_later_challenges_are_found(tmp_path, suffix, seg, ending):
    for case in ("BraTS-GLI-00002-000", "BraTS-GLI-00001-000"):
        write_patient(tmp_path, case, suffix=suffix, seg=seg, ending=ending)
    subjects = brats.find_subjects(tmp_path)
    assert [s.name for s in subjects] == ["BraTS-GLI-00001-000", "BraTS-GLI-00002-000"]
    assert all(s.label.name == f"{s.name}{seg}{ending}" and not s.problem for s in subjects)
    case = tmp_path / "BraTS-GLI-00001-000"
    assert [s.name for s in brats.find_subjects(case)] == ["BraTS-GLI-00001-000"]


def test_any_layout_is_found_by_patterns(tmp_path):
    values, affine = tiny_scans.brain()
    for patient in ("patient07", "patient[19]"):
        for name in ("T2", "lesions_gold", "brain"):
            tiny_scans.write(tmp_path / patient / f"{name}.nii.gz", values, affine)
    subjects = brats.find_subjects(
        tmp_path,
        pattern="*/T2.nii.gz",
        seg_pattern="{folder}/lesions*.nii.gz",
        mask_pattern="{subject}/brain.nii.gz",
    )
    assert [s.name for s in subjects] == ["patient07", "patient[19]"]
    for subject in subjects:
        assert subject.label == tmp_path / subject.name / "lesions_gold.nii.gz"
        assert subject.mask == tmp_path / subject.name / "brain.nii.gz"


def test_a_companion_that_is_missing_or_not_alone_is_a_problem_of_its_subject(tmp_path):
    for name in ("T2.nii", "a_mask.nii", "b_mask.nii"):
        (tmp_path / name).touch()
    scan = tmp_path / "T2.nii"
    found = subject_with_files("x", scan, tmp_path, mask_pattern="*_mask.nii")
    assert "found a_mask.nii, b_mask.nii" in found.problem
    found = subject_with_files("x", scan, tmp_path, seg_pattern="{subject}_seg.nii")
    assert "seg_pattern" in found.problem
    assert "x_seg.nii" in found.problem


def test_grades_choose_folders_and_a_missing_grade_is_an_error(tmp_path):
    for grade, case in (("HGG", "A"), ("HGG", "C"), ("LGG", "B")):
        write_patient(tmp_path / grade, case)
    names = {g: [s.name for s in brats.find_subjects(tmp_path, grade=g)] for g in ("HGG", "all")}
    assert names == {"HGG": ["A", "C"], "all": ["B", "A", "C"]}
    assert [s.name for s in brats.find_subjects(tmp_path / "LGG", grade="LGG")] == ["B"]
    shutil.rmtree(tmp_path / "LGG")
    with pytest.raises(InputError, match="No scans found in a folder LGG"):
        brats.find_subjects(tmp_path, grade="LGG")


def test_no_scans_found_names_the_patterns(tmp_path, capsys):
    assert camcan.main(healthy_argv(tmp_path, tmp_path / "x.h5")) == 2
    assert "sub-*/**/*_T2w.nii*" in capsys.readouterr().err
    assert brats.main(patient_argv(tmp_path, tmp_path / "x.h5", "--no-matching")) == 2
    assert "**/*_t2.nii.gz or **/*_t2.nii or **/*-t2w.nii.gz" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="No such folder"):
        find_scans(tmp_path / "gone", ["*"])
    assert not any(tmp_path.iterdir())


def test_two_scans_of_one_subject_are_refused(tmp_path):
    for run in (1, 2):
        path = tmp_path / "sub-1" / "anat" / f"sub-1_run-{run}_T2w.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(InputError, match=r"Two scans of sub-1: .*run-1.*run-2"):
        camcan.find_subjects(tmp_path)


@pytest.mark.parametrize("find", [camcan.find_subjects, brats.find_subjects])
@pytest.mark.parametrize("name", ["sub-{}_ses-{}_T2w", "T2"])
def test_sessions_of_a_subject_are_never_split_between_train_and_test(tmp_path, find, name):
    for subject in (1, 2, 3):
        for session in (1, 2):
            folder = tmp_path / f"sub-{subject}" / f"ses-{session}" / "anat"
            folder.mkdir(parents=True)
            (folder / f"{name.format(subject, session)}.nii.gz").touch()
    with pytest.raises(InputError, match=r"Two scans of sub-1: .*ses-1.*ses-2.*one scan\s+per"):
        find(tmp_path, pattern="**/*.nii.gz")
    for session in (1, 2):
        found = find(tmp_path, pattern=f"**/ses-{session}/anat/*.nii.gz")
        assert [subject.name for subject in found] == ["sub-1", "sub-2", "sub-3"]


def test_scans_are_named_after_bids_file_or_folder(tmp_path):
    paths = [tmp_path / "sub-9" / "a.nii", tmp_path / "x" / "b_t2.nii.gz"]
    assert scan_names(paths, tmp_path, suffixes=["_t2"]) == ["sub-9", "b"]
    paths = [tmp_path / "p1" / "T2.nii", tmp_path / "p2" / "T2.nii"]
    assert scan_names(paths, tmp_path) == ["p1", "p2"]


def test_the_split_is_by_seed_and_has_the_papers_size():
    names = [f"sub-{number}" for number in range(652)]
    assert len(camcan.split(names, seed=0)) == 52
    assert camcan.split(names, seed=0) == camcan.split(names[::-1], seed=0)
    assert camcan.split(names, seed=0) != camcan.split(names, seed=1)
    assert len(camcan.split(names[:5], seed=0)) == 1
    assert len(camcan.split(names, seed=0, test_subjects=100)) == 100


@pytest.mark.parametrize(("count", "test_subjects"), [(1, None), (3, 3), (3, 0), (3, -1)])
def test_a_split_without_train_or_test_subjects_is_refused(count, test_subjects):
    with pytest.raises(InputError, match="at least one subject to train on"):
        camcan.split([str(n) for n in range(count)], seed=0, test_subjects=test_subjects)


def test_a_list_of_test_subjects_is_the_split(tmp_path):
    names = ["sub-1", "sub-2", "sub-3"]
    listed = tmp_path / "test.txt"
    listed.write_text("sub-3\nsub-1\n")
    assert camcan.read_test_list(listed, names) == {"sub-1", "sub-3"}
    for encoding in ("latin-1", "utf-8"):
        listed.write_text("müller\n", encoding=encoding)
        assert camcan.read_test_list(listed, ["müller", "sub-1"]) == {"müller"}
    for content, message in (
        ("sub-4", "there is no 'sub-4'"),
        ("", "at least one subject to test on"),
        ("sub-1 sub-2 sub-3", "got 3 of 3"),
    ):
        listed.write_text(content)
        with pytest.raises(InputError, match=message):
            camcan.read_test_list(listed, names)


def test_a_bad_subject_is_named_and_skipped_and_the_status_says_so(tmp_path, capsys):
    write_healthy(tmp_path / "scans", ["sub-1", "sub-2", "sub-3"])
    bad = tmp_path / "scans" / "sub-2" / "anat" / "sub-2_T2w.nii.gz"
    bad.write_bytes(bad.read_bytes()[:2000])
    out = tmp_path / "healthy.h5"
    test = camcan.split(["sub-1", "sub-2", "sub-3"], seed=1)
    assert test != {"sub-2"}
    assert camcan.main(healthy_argv(tmp_path / "scans", out, "--seed", 1)) == 1
    printed = capsys.readouterr()
    assert "1 of 3 subjects were skipped" in printed.err
    assert "sub-2: " in printed.err
    assert "sub-2_T2w.nii.gz: expected a NIfTI file" in printed.err
    assert "Train: 1 subjects" in printed.out
    with SliceCache(out, "Train") as train, SliceCache(out, "Test") as cache:
        assert set(train.index.subject_ids) | set(cache.index.subject_ids) == {"sub-1", "sub-3"}
        assert list(train.settings["skipped"]) == ["sub-2"]
        assert train.settings["brains"] == dict.fromkeys(["sub-1", "sub-3"], "stripped")
    assert "Brains: 2 stripped\n" in printed.out


def test_the_few_brains_that_were_taken_for_another_kind_are_named():
    brains = {f"sub-{i}": "with skull" if i == 7 else "stripped" for i in range(30)}
    assert cohort._counted(brains) == "29 stripped, 1 with skull (sub-7)"
    halves = {f"sub-{i}": "stripped" if i < 15 else "with skull" for i in range(30)}
    assert cohort._counted(halves) == "15 stripped, 15 with skull"


def test_a_mended_subject_is_all_that_is_prepared_again(tmp_path, monkeypatch, capsys):
    write_healthy(tmp_path / "scans", ["sub-1", "sub-2", "sub-3"])
    bad, out = tmp_path / "scans" / "sub-2" / "anat" / "sub-2_T2w.nii.gz", tmp_path / "healthy.h5"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:2000])
    assert camcan.main(healthy_argv(tmp_path / "scans", out, "--seed", 1)) == 1
    assert "the others are kept in" in capsys.readouterr().err
    bad.write_bytes(whole)
    real, made = prepare.prepare_scan, []
    monkeypatch.setattr(prepare, "prepare_scan", lambda p, **kw: made.append(p) or real(p, **kw))
    assert camcan.main(healthy_argv(tmp_path / "scans", out, "--seed", 1, "--force")) == 0
    assert made == [bad]
    assert not cohort.parts_folder(out).exists()


def test_if_all_subjects_fail_there_is_no_cache_and_nothing_half_written(tmp_path, capsys):
    folder = tmp_path / "scans" / "sub-1" / "anat"
    folder.mkdir(parents=True)
    (folder / "sub-1_T2w.nii").write_text("no image")
    shutil.copytree(tmp_path / "scans" / "sub-1", tmp_path / "scans" / "sub-2")
    (tmp_path / "scans/sub-2/anat/sub-1_T2w.nii").rename(
        tmp_path / "scans/sub-2/anat/sub-2_T2w.nii"
    )
    assert camcan.main(healthy_argv(tmp_path / "scans", tmp_path / "out" / "x.h5")) == 2
    assert "All 2 subjects failed" in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir())


def test_patients_without_segmentation_are_skipped_unless_labels_are_not_wanted(tmp_path, capsys):
    write_patient(tmp_path / "scans", "A")
    write_patient(tmp_path / "scans", "B", seg=None)
    argv = patient_argv(tmp_path / "scans", tmp_path / "x.h5", "--no-matching", "--voxel-size", 4)
    assert brats.main(argv) == 1
    assert "B: no segmentation beside" in capsys.readouterr().err
    with SliceCache(tmp_path / "x.h5") as cache:
        assert cache.index.subject_ids == ["A"]
        assert cache.reference is None
    assert brats.main([*argv, "--no-labels", "--force"]) == 0
    with SliceCache(tmp_path / "x.h5") as cache:
        assert cache.index.subject_ids == ["A", "B"]
        assert not cache.has_label


def test_a_segmentation_on_another_grid_is_skipped_with_the_reason(tmp_path, capsys):
    write_patient(tmp_path / "scans", "A")
    write_patient(tmp_path / "scans", "B")
    seg = tmp_path / "scans" / "B" / "B_seg.nii.gz"
    image = nib.load(seg)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine), seg)
    argv = patient_argv(tmp_path / "scans", tmp_path / "x.h5", "--no-matching", "--voxel-size", 4)
    assert brats.main(argv) == 1
    assert "B_seg.nii.gz: expected the grid of its scan" in capsys.readouterr().err


def test_an_output_that_exists_is_kept_without_force(healthy, tmp_path, capsys):
    folder, cache = healthy
    before = cache.read_bytes()
    assert camcan.main(healthy_argv(folder, cache)) == 2
    assert "--force" in capsys.readouterr().err
    assert cache.read_bytes() == before


def test_a_killed_run_goes_on_where_it_stopped_and_gives_the_same_cache(
    healthy, tmp_path, monkeypatch
):
    folder, expected = healthy
    prepare_scan, made = prepare.prepare_scan, []

    def killed_at_the_third(path, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path)
        return prepare_scan(path, **kwargs)

    out = tmp_path / "healthy.h5"
    monkeypatch.setattr(prepare, "prepare_scan", killed_at_the_third)
    assert camcan.main(healthy_argv(folder, out)) == EXIT_INTERRUPTED
    assert not out.exists()
    assert len(list(cohort.parts_folder(out).iterdir())) == 2

    monkeypatch.setattr(
        prepare, "prepare_scan", lambda path, **kw: made.append(path) or prepare_scan(path, **kw)
    )
    assert camcan.main(healthy_argv(folder, out)) == 0
    assert len(made) == len(set(made)) == 3
    with h5py.File(out) as found, h5py.File(expected) as file:
        for name in ("Train", "Test", "Mask", "Reference"):
            np.testing.assert_array_equal(found[name][:], file[name][:])
        assert found.attrs["identity"] == file.attrs["identity"]


def _replace(path):
    """Put another file of the same size and time in its place."""
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_parts_of_other_settings_or_replaced_files_are_not_used_again(tmp_path):
    write_patient(tmp_path, "A")
    shutil.copy(tmp_path / "A" / "A_seg.nii.gz", tmp_path / "A" / "A_mask.nii.gz")
    (subject,) = brats.find_subjects(tmp_path, mask_pattern="{folder}/A_mask.nii.gz")
    settings = cohort.CohortSettings(QUICK)
    names = {
        cohort._part_name(subject, settings, None),
        cohort._part_name(subject, dataclasses.replace(settings, slice_step=2), None),
        cohort._part_name(subject, settings, np.linspace(0, 1, 5)),
        cohort._part_name(subject, settings, np.linspace(0, 0.9, 5)),
    }
    for file in (subject.scan, subject.mask, subject.label):
        _replace(file)
        names.add(cohort._part_name(subject, settings, None))
    names.add(cohort._part_name(dataclasses.replace(subject, label=None), settings, None))
    assert len(names) == 8


@pytest.mark.slow
def test_a_damaged_part_is_made_again(tmp_path):
    subject = camcan.find_subjects(write_healthy(tmp_path, ["sub-1"]))[0]
    settings = cohort.CohortSettings(QUICK)
    first = cohort._prepare_one(subject, tmp_path, settings, None)
    part = first.part
    quantiles, size = cohort.quantiles_of(first), part.stat().st_size
    for damage in (b"", part.read_bytes()[: size // 2], b"no HDF5"):
        part.write_bytes(damage)
        again = cohort._prepare_one(subject, tmp_path, settings, None)
        assert (again.part, again.reason) == (part, "")
        np.testing.assert_array_equal(cohort.quantiles_of(again), quantiles)


def test_a_full_disk_stops_the_run_instead_of_skipping_every_subject(
    healthy, tmp_path, monkeypatch, capsys
):
    folder, _ = healthy

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cohort, "require_space", full)
    assert camcan.main(healthy_argv(folder, tmp_path / "x.h5")) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.slow
def test_two_jobs_give_the_same_cache_as_one(healthy, tmp_path):
    folder, expected = healthy
    out = tmp_path / "healthy.h5"
    assert camcan.main(healthy_argv(folder, out, "--jobs", 2)) == 0
    with h5py.File(out) as found, h5py.File(expected) as file:
        for name in ("Train", "Test", "Train_info/subject_ids", "Train_info/slice_index"):
            np.testing.assert_array_equal(found[name][:], file[name][:])
        assert found.attrs["identity"] == file.attrs["identity"]


def test_work_is_done_in_the_folder_of_who_asks_for_it(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert list(cohort.in_processes(os.getcwd, [(), ()], 2)) == [str(tmp_path / name)] * 2


def _die(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_process_is_an_error_that_says_so():
    with pytest.raises(InputError, match=r"A process was killed, .*lower --jobs"):
        list(cohort.in_processes(_die, [(1,), (2,)], 2))


def test_slice_step_min_brain_and_limit_thin_out_the_cache(healthy, tmp_path):
    folder, everything = healthy
    out = tmp_path / "thin.h5"
    more = ("--slice-step", 3, "--min-brain", 0.25, "--limit", 2)
    assert camcan.main(healthy_argv(folder, out, *more)) == 0
    with SliceCache(out, "Train") as thin, SliceCache(everything, "Train") as full:
        assert 0 < len(thin) < len(full) / 4
        assert (thin.index.slice_index % 3 == 0).all()
        share = (thin.read(range(len(thin))) > 0).mean(axis=(1, 2, 3))
        assert share.min() > 0.25
        assert len(thin.index.subject_ids) == 1


@pytest.mark.slow
def test_the_reference_is_the_subject_asked_for_and_must_be_usable(tmp_path, capsys):
    write_healthy(tmp_path / "scans", ["sub-1", "sub-2", "sub-3"])
    out = tmp_path / "x.h5"
    assert camcan.main(healthy_argv(tmp_path / "scans", out, "--reference", "sub-9")) == 2
    assert "No subject 'sub-9'" in capsys.readouterr().err
    assert camcan.main(healthy_argv(tmp_path / "scans", out, "--reference", "sub-2")) == 0
    with SliceCache(out, "Train") as cache:
        assert cache.settings["reference"] == "sub-2"
    (tmp_path / "scans" / "sub-2" / "anat" / "sub-2_T2w.nii.gz").write_text("broken")
    argv = healthy_argv(tmp_path / "scans", out, "--reference", "sub-2", "--force")
    assert camcan.main(argv) == 2
    assert "--reference sub-2 could not be prepared" in capsys.readouterr().err


def test_matching_needs_a_healthy_cache_with_a_reference_and_its_voxel_size(
    healthy, tmp_path, capsys
):
    write_patient(tmp_path / "scans", "A")
    argv = patient_argv(tmp_path / "scans", tmp_path / "x.h5")
    assert brats.main(argv) == 2
    assert "Expected --reference" in capsys.readouterr().err
    assert brats.main([*argv, "--reference", str(healthy[1]), "--voxel-size", "2"]) == 2
    assert "Expected --voxel-size 4" in capsys.readouterr().err
    bare = tmp_path / "bare.h5"
    with h5py.File(bare, "w") as file:
        file["Test"] = np.zeros((1, 197, 233), np.float32)
    assert brats.main([*argv, "--reference", str(bare)]) == 2
    assert "no Reference to match histograms to" in capsys.readouterr().err
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--min-brain", "1.5"), "--min-brain"),
        (("--seed", "-1"), "--seed"),
        (("--voxel-size", "9"), "smaller voxel_size"),
    ],
)
def test_options_out_of_range_are_refused(healthy, tmp_path, capsys, option, message):
    assert camcan.main([*healthy_argv(healthy[0], tmp_path / "x.h5"), *option]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--slice-step", "--limit", "--jobs"])
def test_counts_below_1_are_refused(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        camcan.main([*healthy_argv(tmp_path, tmp_path / "x.h5"), option, "0"])
    assert f"{option}: expected a whole number of 1 or more, got 0" in capsys.readouterr().err
