"""What is chosen on healthy slices: one file, one reader, and no wrong pairing."""

import dataclasses
import json
import shutil
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import tiny_scans
from conftest import GOLDEN, make_run, write_cache

import restore_brats
import tf_lesion
from tf_lesion.caches import restore as caches_restore
from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import SliceCache
from tf_lesion.calibration import Calibration, Threshold, scans, tv_weight
from tf_lesion.calibration.file import FILE_NAME
from tf_lesion.calibration.thresholds import (
    allowed_positives,
    find_thresholds,
    golden_section_threshold,
    left_out,
    share_above,
    streamed_thresholds,
)
from tf_lesion.calibration.tv_weight import Kept, chosen, measure_change, parse_grid
from tf_lesion.cli import calibrate, detect
from tf_lesion.cli.command import EXIT_INTERRUPTED
from tf_lesion.detection.files import find_scans
from tf_lesion.detection.maps import Detector
from tf_lesion.detection.postprocessing import HealthyMaps, HealthyResidual
from tf_lesion.detection.settings import crop_of
from tf_lesion.files import InputError
from tf_lesion.scans.discovery import Subject

STEPS = 6
GRID = "0.6,1.8"
SCORES = {"residual", "intensity", "equalized"}
TARGETS = (0.01, 0.05, 0.1)
SAME = 1e-9


@pytest.fixture(scope="module")
def run(cache_path, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "gmvae", cache_path, restoration_steps=STEPS)


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run, to which files may be added."""
    return shutil.copytree(run, tmp_path / "run")


def make(run, cache, *extra):
    return calibrate.main(list(map(str, ["--model", run, "--cache", cache, *extra])))


def restore(run, cache, out, *extra):
    argv = ["--model", run, "--cache", cache, "--out", out, *extra]
    return restore_brats.main(list(map(str, argv)))


def equal(first, second):
    """Whether two calibrations are the same, maps included."""
    maps = [vars(each.healthy).values() if each.healthy else () for each in (first, second)]
    pairs = list(zip(*maps, strict=True))
    one, other = (dataclasses.replace(each, healthy=None) for each in (first, second))
    return one == other and all(np.array_equal(*pair) for pair in pairs)


# Lambda ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("0:4:0.2", [round(0.2 * n, 10) for n in range(20)]),
        ("0.6:4.0:0.2", [round(0.6 + 0.2 * n, 10) for n in range(17)]),
        ("1.8", [1.8]),
        ("0,3,1.5", [0, 3, 1.5]),
    ],
)
def test_grid_is_read_as_the_released_one(text, grid):
    assert parse_grid(text) == grid


@pytest.mark.parametrize("text", ["", "a", "1:2", "0:1:0", "-1,2", "nan", "2:1:0.5", "1,1", "inf"])
def test_a_grid_that_is_none_is_refused(text):
    with pytest.raises(InputError, match=r"lambda|grid"):
        parse_grid(text)


def test_change_is_a_mean_over_subjects_and_a_mean_over_voxels():
    ones = np.ones((3, 2, 2), np.float32)
    mask = ones.astype(bool)
    mask[2, 0, 0] = False  # outside the brain: not counted
    batches = [
        (np.array([0, 1]), 2 * ones[:2], ones[:2], mask[:2]),
        (np.array([2]), 3 * ones[2:], ones[2:], mask[2:]),
    ]
    change = measure_change(batches, np.array([0, 0, 1]))
    assert change["change_per_subject"] == (8 + 6) / 2
    assert change["std_per_subject"] == 1
    assert change["change_per_voxel"] == (8 + 6) / 11


def test_the_smallest_of_the_best_lambdas_is_chosen_and_an_end_of_the_grid_is_told():
    curve = [{"tv_weight": w, "change_per_subject": c} for w, c in ((3, 1), (2, 1), (1, 5))]
    assert chosen(curve) == {"tv_weight": 2, "at_end_of_grid": False}
    assert chosen(curve[1:])["at_end_of_grid"]
    assert not chosen(curve[:1])["at_end_of_grid"]


# Thresholds -----------------------------------------------------------------------------------


def residuals_of(kind):
    generator = np.random.default_rng(1)
    values = np.abs(generator.normal(0, 0.05, 5_000)).astype(np.float32)
    return {
        "smooth": values,
        "ties": np.round(values, 2),
        "zeros": np.zeros(100, np.float32),
        "plateau": np.full(100, 0.25, np.float32),
        "half zero": np.where(np.arange(5_000) % 2, values, 0),
        "two levels": np.repeat(np.float32([0.1, 0.2]), [95, 5]),
        "single": np.float32([0.3]),
        "single zero": np.float32([0]),
        "tiny": np.float32([0, 1e-45, 1e-40, 1e-38]),
    }[kind]


KINDS = (
    "smooth",
    "ties",
    "zeros",
    "plateau",
    "half zero",
    "two levels",
    "single",
    "single zero",
    "tiny",
)


def exact(residuals, *targets):
    found, _ = streamed_thresholds(lambda: iter(np.array_split(residuals, 3)), targets)
    return found[0] if len(targets) == 1 else found


@pytest.mark.parametrize("target", [0.0, 0.01, 0.05, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_threshold_keeps_the_limit_and_the_next_smaller_residual_would_not(kind, target):
    residuals = residuals_of(kind)
    threshold, rate = exact(residuals, target)
    assert threshold in residuals
    assert rate == (residuals > threshold).mean() <= target
    smaller = residuals[residuals < threshold]
    if smaller.size:
        assert (residuals > smaller.max()).mean() > target


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_are_the_quantiles_of_numpy(kind):
    residuals, targets = residuals_of(kind), (0.0, 0.25, 0.5, 0.875)  # 1 - target is not rounded
    expected = np.quantile(residuals, 1 - np.array(targets), method="inverted_cdf")
    assert [threshold for threshold, _ in exact(residuals, *targets)] == expected.tolist()


@pytest.mark.parametrize("total", [1, 3, 7, 100, 1_000, 12_345])
def test_allowed_positives_is_the_largest_number_within_the_target(total):
    round_shares = np.append(np.arange(0, 1, 0.01), 1 / 3)
    for target in [
        *round_shares,
        *np.nextafter(round_shares[1:], 0),
        *np.nextafter(round_shares, 1),
    ]:
        number = allowed_positives(total, target)
        assert number / total <= target < (number + 1) / total


def test_stated_answers_of_zeros_and_plateaus():
    assert exact(residuals_of("zeros"), 0.01) == (0, 0)
    assert exact(residuals_of("plateau"), 0.01) == (0.25, 0)
    assert exact(residuals_of("two levels"), 0.05) == (np.float32(0.1), 0.05)
    assert exact(residuals_of("two levels"), 0.04) == (np.float32(0.2), 0)


def test_golden_section_reproduces_the_released_thresholds_and_they_overshoot():
    with np.load(GOLDEN / "metrics.npz") as golden:
        residuals, targets = golden["healthy_residual"], golden["fpr_targets"]
        for target, expected in zip(targets, golden["fpr_thresholds"], strict=True):
            assert golden_section_threshold(residuals, target) == pytest.approx(expected, abs=SAME)
        released = [(residuals > t).mean() for t in golden["fpr_thresholds"]]
    assert (np.array(released) > targets).any()
    assert (np.array([rate for _, rate in exact(residuals, *targets)]) <= targets).all()


@pytest.mark.parametrize("kind", KINDS)
def test_golden_section_ends_on_any_residuals(kind):
    residuals = residuals_of(kind)
    threshold = golden_section_threshold(residuals, 0.05)
    assert residuals.min() <= threshold <= residuals.max()


def test_golden_section_gives_one_answer_for_every_target_on_a_plateau():
    plateau = residuals_of("plateau")
    assert {golden_section_threshold(plateau, target) for target in TARGETS} == {0.25}
    assert golden_section_threshold(residuals_of("zeros"), 0.01) == 0


def test_share_above_compares_float32_values_with_the_float64_threshold():
    ordered = np.sort(residuals_of("smooth"))
    for threshold in (float(ordered[100]), float(ordered[100]) + 1e-12, 0.1, 1e-300, 9.0):
        assert share_above(ordered, threshold) == (ordered > np.float64(threshold)).mean()


@pytest.mark.parametrize(
    ("residuals", "target", "message"),
    [
        ([], 0.1, "got none"),
        ([0.1, -0.1], 0.1, "at least 0"),
        ([0.1, np.nan], 0.1, "finite"),
        ([0.1, 0.2], 1.0, r"in \[0, 1\), got 1.0"),
        ([0.1, 0.2], -0.1, "got -0.1"),
    ],
)
def test_bad_residuals_and_targets_are_refused(residuals, target, message):
    residuals = np.array(residuals, np.float32)
    for method in ("exact", "golden"):
        with pytest.raises(InputError, match=message):
            find_thresholds(lambda: iter([residuals]), [target], method=method)
    with pytest.raises(InputError, match="exact, golden, got 'silver'"):
        find_thresholds(lambda: iter([residuals]), [0.1], method="silver")


def test_thresholds_come_by_ascending_rate_with_the_names_of_the_paper():
    found = find_thresholds(lambda: iter([residuals_of("smooth")]), (0.1, 0.005))
    assert [(point.name, point.key) for point in found] == [
        ("dsc0.5", "fpr_0.005"),
        ("dsc10", "fpr_0.1"),
    ]


# Subjects left out ----------------------------------------------------------------------------


def test_rates_of_left_out_subjects_are_those_counted_by_hand():
    ones = np.arange(1, 11, dtype=np.float32)
    subjects = [ones, 2 * ones, np.zeros(10, np.float32)]
    points = find_thresholds(lambda: iter(subjects), (0.1, 0.5))
    tenth, half = left_out(points, subjects)
    # Others at 10 % (2 of 20 above): 16, 8, 16; so 0 of 1..10, 6 of 2..20 and none of the zeros.
    assert tenth.left_out() == {
        "left_out_fpr": pytest.approx(0.2),
        "left_out_smallest": 0.0,
        "left_out_largest": 0.6,
    }
    # At 50 % (10 of 20 above): 0, 0 and 7; so all of 1..10 and 2..20, and none of the zeros.
    assert half.left_out() == {
        "left_out_fpr": pytest.approx(2 / 3),
        "left_out_smallest": 0.0,
        "left_out_largest": 1.0,
    }
    assert (tenth.threshold, tenth.fpr) == (points[0].threshold, points[0].fpr)


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_out_subject_meets_the_exact_threshold_of_the_others(kind):
    others, own = residuals_of(kind), residuals_of("smooth")
    points = find_thresholds(lambda: iter([others]), TARGETS)
    for point, known in zip(points, left_out(points, [own, others]), strict=True):
        rates = {(own > point.threshold).mean(), (others > exact(own, point.target_fpr)[0]).mean()}
        assert {known.left_out_smallest, known.left_out_largest} == rates


def test_of_one_subject_the_rate_is_in_sample():
    point = Threshold(0.1, 0.5, 0.09)
    assert left_out([point], [residuals_of("smooth"), np.zeros(0, np.float32)]) == (point,)
    assert point.left_out() == {}
    (_, line) = calibrate.lines(Calibration("m", {}, {"residual": (point,)}))
    assert line.endswith("in sample")


def test_healthy_maps_without_a_subject_are_those_of_the_others():
    axes = [np.arange(8) + 0.5] * 2 + [np.arange(5) + 0.5]
    generator = np.random.default_rng(0)
    images = generator.random((3, 2, 5, 8, 8)).astype(np.float32)
    mask = np.ones((5, 8, 8), bool)
    both, one = HealthyResidual((8, 8, 5)), HealthyResidual((8, 8, 5))
    for number, (observed, restored) in enumerate(images):
        both.add(observed, restored, mask, axes)
        if number != 1:
            one.add(observed, restored, mask, axes)
    others = both.without(*images[1], mask, axes).maps()
    for found, wanted in zip(vars(others).values(), vars(one.maps()).values(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-3)  # stored as float16
    assert not np.array_equal(others.change, both.maps().change)


# Healthy scans --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scanner(tmp_path_factory):
    """(run that restores scans, folder of 5 healthy scans of "another scanner", masks beside)."""
    folder = tmp_path_factory.mktemp("scanner")
    model = tiny_scans.run(folder)
    values, affine = tiny_scans.brain()
    for number in range(5):
        noise = np.random.default_rng(number).normal(0, 30, values.shape)
        scan = np.where(values > 0, np.maximum(values**0.9 + noise, 1), 0)
        path = folder / "healthy" / f"sub-{number}" / "anat" / f"sub-{number}_T2w.nii.gz"
        tiny_scans.write(path, scan.astype(np.float32), affine)
        mask = (values > 0).astype(np.uint8)
        tiny_scans.write(path.with_name(f"sub-{number}_mask.nii.gz"), mask, affine)
    return model, folder / "healthy"


MASKS = "{folder}/{subject}_mask.nii.gz"  # given, so that no brain must be found


def own_scanner(model, folder, *extra):
    argv = ["--model", model, "--healthy", folder, "--mask-pattern", MASKS, *extra]
    return calibrate.main(list(map(str, argv)))


def test_healthy_scans_calibrate_a_model_and_a_scan_of_the_same_scanner_uses_it(
    scanner, tmp_path, capsys
):
    model, folder = scanner
    out = tmp_path / "mine.h5"
    assert own_scanner(model, folder, "--out", out, "--postprocess", "relative,median=3") == 0
    assert "of 5 subjects" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]
    made = Calibration.load(out)
    assert (made.cohort["subjects"], made.postprocessing) == (5, "relative,median=3")
    assert (made.cohort["cache"], made.cohort["scans"]) == (None, str(folder))
    scan = folder / "sub-0" / "anat" / "sub-0_T2w.nii.gz"
    mask = scan.with_name("sub-0_mask.nii.gz")
    argv = [scan, tmp_path / "maps", "--model", model, "--calibration", out, "--mask", mask]
    assert detect.main(list(map(str, argv))) == 0
    (facts,) = (tmp_path / "maps").glob("*_restoration.json")
    facts = json.loads(facts.read_text())
    assert made.cohort["slices"] == 5 * facts["slices_restored"]  # of five scans of one brain
    lesions = facts["lesions"]
    for point in made.points["score"]:
        told = lesions[point.key]
        assert told["of"] == "score"
        assert told["threshold"] == point.threshold
        assert point.left_out().items() <= told.items()
        assert 0 <= point.left_out_smallest <= point.left_out_fpr <= point.left_out_largest <= 1


@pytest.mark.slow
def test_thresholds_of_scans_aligned_otherwise_are_told(scanner, tmp_path):
    model, folder = scanner
    out = tmp_path / "mine.h5"
    assert own_scanner(model, folder, "--out", out, "--align", "center") == 0
    prior = dataclasses.replace(tf_lesion.load(model), calibration=Calibration.load(out))
    scan = folder / "sub-0" / "anat" / "sub-0_T2w.nii.gz"
    for align, told in (("center", 0), ("none", 1)):
        maps = Detector(prior, align=align).detect(scan, mask=scan.with_name("sub-0_mask.nii.gz"))
        said = [text for text in maps.facts["warnings"] if "align center" in text]
        assert len(said) == told


def test_slices_of_healthy_scans_are_prepared_as_those_of_patients(scanner, tmp_path):
    model, folder = scanner
    detector = Detector(tf_lesion.load(model))
    subjects = find_scans(folder, mask_pattern=MASKS)
    assert scans.write_cache(detector, subjects, tmp_path / "c.h5") == 5
    prepared = detector.prepare(subjects[0].scan, mask=subjects[0].mask)
    with SliceCache(tmp_path / "c.h5") as cache:
        rows = np.flatnonzero(cache.index.subject == 0)
        slices = cache.index.slice_index[rows]
        window = crop_of(detector.prior, prepared.grid)
        observed = np.moveaxis(prepared.image[window][..., slices], 2, 0)
        np.testing.assert_array_equal(cache.read(rows)[..., 0], observed)


def test_fewer_than_five_usable_scans_are_refused(scanner, tmp_path, capsys):
    model, folder = scanner
    few = shutil.copytree(folder, tmp_path / "few")
    (few / "sub-3" / "anat" / "sub-3_T2w.nii.gz").write_bytes(b"no scan")
    assert own_scanner(model, few, "--out", tmp_path / "c.h5") == 2
    assert "5 or more healthy scans" in (told := capsys.readouterr().err)
    assert "4 of 5 that could be used" in told
    shutil.rmtree(few / "sub-3")
    assert own_scanner(model, few, "--out", tmp_path / "c.h5") == 2
    assert "got 4" in capsys.readouterr().err
    assert not (tmp_path / "c.h5").exists()


@pytest.mark.slow
def test_a_healthy_scan_that_fails_is_told_and_so_are_the_warnings_of_the_others(
    scanner, tmp_path, capsys
):
    model, folder = scanner
    more = shutil.copytree(folder, tmp_path / "more")
    for path in more.rglob("sub-0*.nii.gz"):
        image = nib.load(path)
        values, affine = np.asarray(image.dataobj), image.affine
        tiny_scans.write(path, values, affine, sform=0, qform=0)
    (more / "sub-5_T2w.nii.gz").symlink_to("../.git/annex/objects/KEY")
    (more / "sub-6" / "anat").mkdir(parents=True)
    assert own_scanner(model, more, "--out", tmp_path / "c.h5") == 1
    said = capsys.readouterr()
    assert "without 2 scans that failed" in said.out
    assert "error: sub-5: " in said.err
    assert "error: sub-6: " in said.err
    assert said.err.count("warning: sub-0: the header knows no orientation") == 1
    made = Calibration.load(tmp_path / "c.h5")
    assert (made.cohort["subjects"], made.cohort["scans_failed"]) == (5, 2)


def test_a_shipped_prior_is_calibrated_into_a_file_of_its_own(scanner, capsys):
    assert own_scanner("pretrained-denoiser", scanner[1]) == 2
    assert "read-only: give --out" in capsys.readouterr().err


def test_two_scans_of_a_participant_are_one_subject():
    names = ("sub-1_ses-1", "sub-1_ses-2", "sub-2", "my_1", "my_2")
    found = scans.first_of_each([Subject(name, Path(name)) for name in names])
    assert [subject.name for subject in found] == ["sub-1_ses-1", "sub-2", "my_1", "my_2"]


# The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(run, cache_path, tmp_path_factory):
    """(run, path of the calibration in it), lambda chosen from `GRID`."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("calibrated") / "run")
    assert make(folder, cache_path, "--tv-weight", "auto", "--grid", GRID) == 0
    return folder, folder / FILE_NAME


def test_one_file_holds_lambda_thresholds_and_what_they_were_chosen_on(calibrated, cache_path):
    folder, path = calibrated
    prior, made = tf_lesion.load(folder), Calibration.load(path)
    assert equal(prior.calibration, made)
    curve = {row["tv_weight"]: row["change_per_subject"] for row in made.curve}
    assert list(curve) == [0.6, 1.8]
    assert made.tv_weight == min(curve, key=curve.get) == made.restoration["tv_weight"]
    assert made.model_identity == prior.identity
    assert set(made.points) == SCORES
    with (
        RestoredReader(folder / "calibration.healthy.h5") as reader,
        SliceCache(cache_path) as cache,
    ):
        observed = cache.read(np.arange(7))
        residual = np.abs(observed - reader.read(np.arange(7)))[observed > 0]
        assert made.cache_identity == cache.identity == reader.settings["cache_identity"]
    expected = np.quantile(residual, 1 - np.array(TARGETS), method="inverted_cdf")
    for point, value in zip(made.points["residual"], expected, strict=True):
        assert point.threshold == value
        assert point.fpr == (residual > value).mean() <= point.target_fpr
    assert (made.cohort["subjects"], made.cohort["slices"], made.cohort["voxels"]) == (
        2,
        7,
        residual.size,
    )
    assert made.cohort["tv_weight"]["steps"] == STEPS
    assert made.chosen_by == dict.fromkeys(("thresholds", "tv_weight"), "healthy slices")
    assert made.made_with["tf_lesion_version"] == tf_lesion.__version__
    assert sorted(file.name for file in folder.glob("calib*")) == [
        "calibration.h5",
        "calibration.healthy.h5",
    ]


def test_a_calibration_is_read_as_it_was_written_maps_included(tmp_path):
    blocks = np.linspace(0, 1, 24, dtype=np.float16).astype(np.float32).reshape(2, 3, 4)
    made = Calibration(
        "0123456789ab",
        {"tv_weight": 1.8, "steps": 5, "step_sizes": [[0, 0.1]]},
        {"residual": (Threshold(0.01, 0.1, 0.009),), "score": (Threshold(0.05, 2.0, 0.05),)},
        tv_weight=1.8,
        curve=({"tv_weight": 1.8, "change_per_subject": 3.0},),
        postprocessing="relative,signed",
        healthy=HealthyMaps(blocks, blocks[::-1], blocks / 2),
        cache_identity="ba9876543210",
        cohort={"subjects": 3},
        chosen_by={"tv_weight": "labels of BRATS"},
    )
    made.save(tmp_path / "c.h5")
    assert equal(Calibration.load(tmp_path / "c.h5"), made)
    with pytest.raises(FileExistsError, match="pass --force"):
        made.save(tmp_path / "c.h5")


def test_a_calibration_whose_numbers_have_changed_is_refused(tmp_path):
    path = tmp_path / "c.h5"
    points = {"residual": (Threshold(0.01, 0.1, 0.009),)}
    Calibration("0123456789ab", {}, points).save(path)
    with h5py.File(path, "r+") as file:
        file.attrs["calibration"] = np.bytes_(file.attrs["calibration"].replace(b"0.1", b"0.7"))
    with pytest.raises(InputError, match="has changed since it was written"):
        Calibration.load(path)
    with h5py.File(path, "r+") as file:  # one of before there were checksums
        del file.attrs["sha256"]
    assert Calibration.load(path).points["residual"][0].threshold == 0.7


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_a_file_that_holds_no_calibration_is_refused(tmp_path, content):
    path = tmp_path / "other.h5"
    with pytest.raises(FileNotFoundError, match="tf-lesion calibrate"):
        Calibration.load(path)
    if content is None:
        write_cache(path, test=2, train=0)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"Expected a.* calibration.*other.h5"):
        Calibration.load(path)


@pytest.mark.slow
def test_the_curve_is_that_of_restored_files(calibrated, run, cache_path, tmp_path):
    for row in Calibration.load(calibrated[1]).curve:
        path = tmp_path / f"{row['tv_weight']}.h5"
        assert restore(run, cache_path, path, "--tv-weight", row["tv_weight"]) == 0
        with RestoredReader(path) as reader, SliceCache(cache_path) as cache:
            rows = np.arange(len(cache))
            change = np.abs(cache.read(rows) - reader.read(rows)).sum(axis=(1, 2, 3))
            subject = cache.index.subject
        sums = [change[subject == number].sum() for number in np.unique(subject)]
        assert row["change_per_subject"] == pytest.approx(np.mean(sums), rel=1e-4)


@pytest.mark.slow
def test_a_killed_choice_goes_on_with_the_next_lambda_and_a_killed_restoration_with_the_next_batch(
    calibrated, copied, cache_path, monkeypatch
):
    wanted = Calibration.load(calibrated[1])
    measured = []

    def killed(*given):
        if measured:
            raise KeyboardInterrupt
        measured.append(measure_change(*given))
        return measured[0]

    options = ("--tv-weight", "auto", "--grid", GRID, "--batch-size", 3)
    with monkeypatch.context() as patch:
        patch.setattr(tv_weight, "measure_change", killed)
        assert make(copied, cache_path, *options) == EXIT_INTERRUPTED
    partial = copied / "calibration.healthy.lambda.json"
    assert list(json.loads(partial.read_text())["results"]) == ["0.6"]
    real, again, batches = caches_restore.restore, [], []

    def counted(*given):
        again.append(1)
        return measure_change(*given)

    def interrupted(*given, **options):
        if batches:
            raise KeyboardInterrupt
        batches.append(1)
        return real(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(tv_weight, "measure_change", counted)
        patch.setattr(caches_restore, "restore", interrupted)
        assert make(copied, cache_path, *options) == EXIT_INTERRUPTED
        assert len(again) == 1
        assert not (copied / FILE_NAME).exists()
        with h5py.File(copied / "calibration.healthy.h5.partial") as file:
            assert file["done"][:].tolist() == [1, 1, 1, 0, 0, 0, 0]
        patch.setattr(caches_restore, "restore", real)
        assert make(copied, cache_path, *options) == 0
        assert len(again) == 1  # the lambdas were kept over the second kill
    found = Calibration.load(copied / FILE_NAME)
    assert found.points == wanted.points
    assert found.tv_weight == wanted.tv_weight
    assert not list(copied.glob("*partial*"))
    assert not partial.exists()


@pytest.mark.slow
def test_what_was_begun_with_other_settings_is_not_gone_on_with(copied, cache_path, capsys):
    Kept(copied / "calibration.healthy.lambda.json", {"other": 1}).add("0.6", {})
    options = ("--tv-weight", "auto", "--grid", GRID, "--grid-slices", 2)
    assert make(copied, cache_path, *options) == 2
    assert "begun with other settings" in capsys.readouterr().err
    assert make(copied, cache_path, *options, "--force") == 0


@pytest.mark.slow
def test_a_subset_of_the_slices_is_drawn_by_the_seed(run, cache_path, tmp_path):
    options = ("--tv-weight", "auto", "--grid", GRID, "--grid-slices", 3, "--max-slices", 4)
    assert make(run, cache_path, "--out", tmp_path / "c.h5", *options, "--seed", 1) == 0
    made = Calibration.load(tmp_path / "c.h5")
    assert (made.cohort["tv_weight"]["slices"], made.cohort["slices"]) == (3, 4)
    assert made.restoration["seed"] == 1
    with RestoredReader(tmp_path / "c.healthy.h5") as reader:
        drawn = [caches_restore.chosen_rows(7, 4, seed=seed).tolist() for seed in (1, 2)]
        assert reader.rows.tolist() == drawn[0] != drawn[1]


def test_healthy_slices_are_restored_once_and_reused(copied, cache_path, capsys):
    assert make(copied, cache_path, "--tv-weight", 0.6) == 0
    assert "Restored healthy" in capsys.readouterr().out
    path, restored = copied / FILE_NAME, copied / "calibration.healthy.h5"
    first, changed = Calibration.load(path), restored.stat().st_mtime_ns
    assert make(copied, cache_path, "--tv-weight", 0.6) == 2
    assert "pass --force" in capsys.readouterr().err
    path.unlink()
    options = ("--method", "golden", "--targets", 0.02, "--chosen-by", "labels of BRATS")
    assert make(copied, cache_path, "--tv-weight", 0.6, *options) == 0
    assert "Reused healthy" in capsys.readouterr().out
    assert restored.stat().st_mtime_ns == changed
    second = Calibration.load(path)
    assert second.restoration == first.restoration
    assert second.chosen_by["tv_weight"] == "labels of BRATS"
    (point,) = second.points["residual"]
    with RestoredReader(restored) as reader, SliceCache(cache_path) as cache:
        observed = cache.read(np.arange(7))
        residual = np.abs(observed - reader.read(np.arange(7)))[observed > 0]
    assert point.threshold == golden_section_threshold(residual, 0.02)
    assert (point.name, second.method) == ("dsc2", "golden")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--tv-weight", 3), "restored with tv_weight 1.8, not 3.0"),
        (("--steps", 2), "restored with steps 6, not 2"),
        (("--seed", 4), "restored with seed 0, not 4"),
        (("--max-slices", 2), "holds 7 slices that are not the 2"),
        (("--targets", 1.5), "got 1.5"),
        (("--postprocess", "seeds=2"), "restored with seeds 1, not 2"),
    ],
)
def test_healthy_slices_restored_otherwise_are_not_reused(
    run, cache_path, tmp_path, capsys, extra, message
):
    restored, out = run.parent / "restored.h5", tmp_path / "c.h5"
    assert restored.exists() or restore(run, cache_path, restored) == 0
    assert make(run, cache_path, "--out", out, "--restored", restored, *extra) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_healthy_slices_of_a_cache_made_anew_under_the_same_name_are_not_reused(
    run, tmp_path, capsys
):
    cache, out = write_cache(tmp_path / "healthy.h5", train=0), tmp_path / "c.h5"
    assert restore(run, cache, tmp_path / "c.healthy.h5") == 0  # where calibrate looks
    cache.unlink()
    write_cache(cache, train=0, seed=7)
    assert make(run, cache, "--out", out) == 2
    assert "restored with cache_identity" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "c.healthy.h5").rename(tmp_path / "c.healthy.h5.partial")  # as if killed
    assert make(run, cache, "--out", out) == 2
    assert "was begun on another cache" in capsys.readouterr().err


def test_the_shipped_prior_is_read_only(cache_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make("pretrained", cache_path) == 2
    assert "shipped prior is read-only: give --out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_healthy_maps_need_a_cache_that_says_where_its_slices_lie(
    run, cache_path, tmp_path, capsys
):
    cache, out = tmp_path / "bare.h5", tmp_path / "c.h5"
    with h5py.File(cache_path) as file, h5py.File(cache, "w") as bare:
        bare["Test"] = file["Test"][:]
    assert make(run, cache, "--out", out, "--postprocess", "normalize", "--steps", 1) == 2
    assert "does not say where its slices lie" in capsys.readouterr().err
    assert make(run, cache, "--out", out, "--steps", 1) == 0
    assert Calibration.load(out).healthy is None


# What it is used for ----------------------------------------------------------------------------


def test_auto_takes_the_lambda_of_the_calibration(calibrated, run, cache_path, tmp_path, capsys):
    out = tmp_path / "restored.h5"
    assert restore(run, cache_path, out, "--tv-weight", "auto") == 2
    assert "make one with tf-lesion calibrate" in capsys.readouterr().err
    assert restore(calibrated[0], cache_path, out, "--tv-weight", "auto") == 0
    with RestoredReader(out) as reader:
        assert reader.settings["tv_weight"] == Calibration.load(calibrated[1]).tv_weight


def test_a_calibration_of_other_weights_is_left_out_with_a_warning_or_refused_by_name(
    calibrated, copied, cache_path, tmp_path, capsys
):
    stranger = dataclasses.replace(Calibration.load(calibrated[1]), model_identity="ffffffffffff")
    stranger.save(copied / FILE_NAME)
    assert tf_lesion.load(copied).calibration is None
    said = capsys.readouterr().err
    assert "warning: no calibration" in said
    assert "belongs to model ffffffffffff, not to" in said
    out = tmp_path / "restored.h5"
    options = ("--calibration", copied / FILE_NAME)
    assert restore(calibrated[0], cache_path, out, *options) == 2
    assert "error: " in (said := capsys.readouterr().err)
    assert "belongs to model ffffffffffff" in said
    assert not out.exists()


@pytest.fixture(scope="module")
def detected(calibrated, cache_path):
    """A restored file with lesion maps."""
    out = calibrated[0] / "detected.h5"
    extra = ("--calibration", calibrated[1], "--tv-weight", "auto", "--batch-size", 3)
    assert restore(calibrated[0], cache_path, out, *extra) == 0
    return out


def test_lesion_maps_are_the_residual_above_the_threshold_in_the_brain(
    calibrated, detected, cache_path
):
    points = Calibration.load(calibrated[1]).points["residual"]
    with RestoredReader(detected) as reader, SliceCache(cache_path) as cache:
        rows = np.arange(len(cache))
        thresholds = reader.settings["thresholds"]
        assert list(thresholds) == ["fpr_0.01", "fpr_0.05", "fpr_0.1"]
        residual = np.abs(cache.read(rows) - reader.read(rows))
        for (name, threshold), point in zip(thresholds.items(), points, strict=True):
            expected = (residual > point.threshold) & cache.mask(rows)
            assert expected.any()
            np.testing.assert_array_equal(reader.read(rows, f"Detection/{name}"), expected)
            assert threshold == point.threshold


def test_lesion_maps_open_with_plain_h5py_and_a_file_without_says_so(run, detected):
    with h5py.File(detected) as file:
        stored = file["Detection/fpr_0.05"]
        assert stored.shape == file["Restore"].shape
        assert stored.dtype == np.uint8
        assert set(np.unique(stored[:])) == {0, 1}
    with h5py.File(detected.parent / "calibration.healthy.h5") as file:
        assert "Detection" not in file


@pytest.mark.parametrize("extra", [("--tv-weight", 3), ("--tv-weight", "auto", "--steps", 2)])
def test_thresholds_of_another_restoration_are_refused(
    calibrated, cache_path, tmp_path, capsys, extra
):
    out = tmp_path / "restored.h5"
    assert restore(calibrated[0], cache_path, out, "--calibration", calibrated[1], *extra) == 2
    assert "false positive rates hold only there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "score", "message"),
    [
        ({"tv_weight": 2.0}, "residual", "tv_weight 1.8, not 2.0"),
        ({"steps": 7}, "residual", "steps 5, not 7"),
        ({"solver": "huber"}, "residual", "solver released, not huber"),
        ({"seeds": 4}, "residual", "seeds 1, not 4"),
        ({"flip": True}, "residual", "flip False, not True"),
        ({}, "score", "postprocessing signed, not median=3"),
        ({}, "intensity", "no thresholds of the intensity; it has those of residual, score"),
    ],
)
def test_thresholds_hold_only_for_images_made_alike(changed, score, message):
    made = {"tv_weight": 1.8, "steps": 5, "solver": "released", "seeds": 1, "flip": False}
    point = (Threshold(0.01, 0.1, 0.009),)
    stored = Calibration("a", made, {"residual": point, "score": point}, postprocessing="signed")
    assert stored.thresholds("residual", restoration=made) == point
    assert stored.thresholds("score", restoration=made, postprocessing="signed") == point
    with pytest.raises(InputError, match=message):
        stored.thresholds(score, restoration={**made, **changed}, postprocessing="median=3")


# Runs of earlier versions -----------------------------------------------------------------------


def legacy(folder, identity, *, seeds=1):
    """The five files of earlier versions."""
    used = {"tv_weight": 0.6, "steps": STEPS, "solver": "released", "step_sizes": [[0, 1e-3]]}
    points = [{"target_fpr": rate, "threshold": 1 - rate, "fpr": rate} for rate in (0.1, 0.01)]
    thresholds = {"method": "exact", "model_id": identity, "cohort": {"subjects": 2}}
    files = {
        "lambda": {
            "model_identity": identity,
            "tv_weight": 0.6,
            "steps": 3,
            "curve": [{"tv_weight": 0.6, "change_per_subject": 1.0}],
        },
        "thresholds": {**thresholds, "restoration": used, "points": {"residual": points}},
        "thresholds_score": {
            **thresholds,
            "restoration": {**used, "seeds": seeds, "postprocessing": "signed,smooth=4"},
            "points": {"residual": points, "score": points[::-1]},
        },
        "postprocessing": {"model_identity": identity, "steps": "signed,smooth=4"},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    blocks = np.linspace(0, 1, 24, dtype=np.float16).reshape(2, 3, 4)
    np.savez_compressed(folder / "healthy_residual.npz", change=blocks, size=blocks, power=blocks)
    return blocks


def test_the_five_files_of_earlier_versions_are_read_as_one_calibration(copied, tmp_path):
    prior = tf_lesion.load(copied)
    blocks = legacy(copied, prior.identity, seeds=2)
    prior = tf_lesion.load(copied)
    made = prior.calibration
    assert (made.tv_weight, made.postprocessing) == (0.6, "signed,smooth=4")
    assert [row["tv_weight"] for row in made.curve] == [0.6]
    assert set(made.points) == {"residual", "score"}
    assert [point.target_fpr for point in made.points["residual"]] == [0.01, 0.1]
    for kept in vars(made.healthy).values():
        np.testing.assert_array_equal(kept, blocks.astype(np.float32))
    restoration = prior.calibrated()
    assert (restoration.tv_weight, restoration.steps, restoration.seeds) == (0.6, STEPS, 2)
    used = prior.describe(restoration)
    assert made.thresholds("score", restoration=used, postprocessing="signed,smooth=4")
    assert equal(Calibration.load(_saved(made, tmp_path / "c.h5")), made)


def _saved(calibration, path):
    calibration.save(path)
    return path


def test_of_lambda_alone_only_lambda_is_taken(copied):
    legacy(copied, tf_lesion.load(copied).identity)
    for path in (*copied.glob("thresholds*.json"), copied / "postprocessing.json"):
        path.unlink()
    prior = tf_lesion.load(copied)
    wanted = prior.config.restoration.changed(tv_weight=0.6)
    assert prior.calibrated() == wanted == prior.restoration(tv_weight="auto")


def test_old_files_that_belong_to_different_weights_are_left_out_with_a_warning(copied, capsys):
    legacy(copied, tf_lesion.load(copied).identity)
    (copied / "lambda.json").write_text(json.dumps({"model_identity": "other", "tv_weight": 1}))
    assert tf_lesion.load(copied).calibration is None
    assert "Expected files of one model" in capsys.readouterr().err
    (copied / "lambda.json").write_text("[]")
    assert tf_lesion.load(copied).calibration is None
    assert "Expected the files of a calibration" in capsys.readouterr().err
