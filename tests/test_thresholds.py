"""Thresholds from healthy residuals: exact, streamed, and the released search."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from eval import thresholds
from eval.thresholds import (
    allowed_positives,
    golden_section_threshold,
    load_thresholds,
    smallest_threshold,
    streamed_thresholds,
)
from tf_lesion.caches.slices import CacheWriter
from tf_lesion.evaluation.scans import Cohort
from tf_lesion.files import InputError

GOLDEN = Path(__file__).parent / "golden" / "metrics.npz"
SAME = 1e-9
TARGETS = (0.01, 0.05, 0.1)
SHAPE = (34, 38)


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


@pytest.mark.parametrize("target", [0.0, 0.01, 0.05, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_threshold_keeps_the_limit_and_the_next_smaller_residual_would_not(kind, target):
    residuals = residuals_of(kind)
    threshold = smallest_threshold(residuals, target)
    assert threshold in residuals
    assert (residuals > threshold).mean() <= target
    smaller = residuals[residuals < threshold]
    if smaller.size:
        assert (residuals > smaller.max()).mean() > target


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_thresholds_equal_the_exact_ones(kind):
    residuals = residuals_of(kind)
    targets = (0.0, 0.05, 0.3, 0.999)
    found, total = streamed_thresholds(lambda: iter(np.array_split(residuals, 3)), targets)
    assert total == residuals.size
    for (threshold, rate), target in zip(found, targets, strict=True):
        assert threshold == smallest_threshold(residuals, target)
        assert rate == (residuals > threshold).mean()


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
    assert smallest_threshold(residuals_of("zeros"), 0.01) == 0
    assert smallest_threshold(residuals_of("plateau"), 0.01) == 0.25
    assert smallest_threshold(residuals_of("two levels"), 0.05) == np.float32(0.1)
    assert smallest_threshold(residuals_of("two levels"), 0.04) == np.float32(0.2)


def test_golden_section_reproduces_the_released_thresholds():
    with np.load(GOLDEN) as golden:
        for target, expected in zip(golden["fpr_targets"], golden["fpr_thresholds"], strict=True):
            found = golden_section_threshold(golden["healthy_residual"], target)
            assert found == pytest.approx(expected, abs=SAME)


def test_released_thresholds_overshoot_where_exact_ones_do_not():
    with np.load(GOLDEN) as golden:
        residuals, targets = golden["healthy_residual"], golden["fpr_targets"]
        released = [(residuals > t).mean() for t in golden["fpr_thresholds"]]
    exact = [(residuals > smallest_threshold(residuals, target)).mean() for target in targets]
    assert (np.array(released) > targets).any()
    assert (np.array(exact) <= targets).all()


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
        assert (
            thresholds.share_above(ordered, threshold) == (ordered > np.float64(threshold)).mean()
        )


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
    with pytest.raises(InputError, match=message):
        smallest_threshold(residuals, target)
    with pytest.raises(InputError, match=message):
        streamed_thresholds(lambda: iter([residuals]), [target])


# The command


@pytest.fixture
def healthy(tmp_path):
    """Cache and restored slices of three healthy subjects of 4 slices; model id "m1"."""
    generator = np.random.default_rng(0)
    cache, restored = tmp_path / "healthy.h5", tmp_path / "healthy_restored.h5"
    brain = np.zeros(SHAPE, bool)
    brain[4:-4, 4:-4] = True
    images = []
    with CacheWriter(cache, slice_shape=SHAPE, crop=(0, SHAPE[0], 0, SHAPE[1])) as writer:
        for subject in range(3):
            images.append(generator.uniform(0.2, 0.8, (4, *SHAPE)).astype(np.float32) * brain)
            writer.append("Test", images[-1], subject_id=f"s{subject}", slice_index=range(4))
    observed = np.concatenate(images)
    noise = generator.normal(0, 0.05, observed.shape).astype(np.float32)
    with h5py.File(restored, "w") as file:
        file["Restore"], file["rows"] = observed + noise, np.arange(len(observed))
        file.attrs["settings"] = json.dumps({"model_identity": "m1", "tv_weight": 1.8})
    residuals = np.abs(observed - (observed + noise))[observed > 0]
    return tmp_path, cache, restored, residuals


def run(healthy, *extra):
    folder, cache, restored, _ = healthy
    out = folder / "thresholds.json"
    flags = ["--restored", str(restored), "--cache", str(cache), "--out", str(out), *extra]
    return thresholds.main(flags), out


def test_command_stores_threshold_rate_cohort_and_model(healthy):
    status, out = run(healthy)
    assert status == 0
    _, cache, restored, residuals = healthy
    stored = load_thresholds(out, model_id="m1")
    assert stored.method == "exact"
    assert stored.restoration["tv_weight"] == 1.8
    assert stored.cohort == {
        "cache": str(cache),
        "restored": str(restored),
        "subjects": 3,
        "slices": 12,
        "voxels": residuals.size,
    }
    assert [point.name for point in stored.points["residual"]] == ["dsc1", "dsc5", "dsc10"]
    for point in stored.points["residual"]:
        assert point.threshold == smallest_threshold(residuals, point.target_fpr)
        assert point.fpr == (residuals > point.threshold).mean() <= point.target_fpr
    assert set(stored.points) == {"residual", "intensity", "equalized"}


def test_command_gives_the_released_search_when_asked(healthy):
    status, out = run(healthy, "--method", "golden", "--targets", "0.02")
    assert status == 0
    stored = load_thresholds(out)
    (point,) = stored.points["residual"]
    assert stored.method == "golden"
    assert point.threshold == golden_section_threshold(healthy[3], 0.02)
    assert point.name == "dsc2"


def test_thresholds_of_another_model_are_refused(healthy):
    _, out = run(healthy)
    with pytest.raises(InputError, match="belongs to model m1, not to m2"):
        load_thresholds(out, model_id="m2")


def test_thresholds_of_another_lambda_are_refused(healthy):
    _, out = run(healthy)
    assert load_thresholds(out, model_id="m1", restoration={"tv_weight": 1.8, "steps": 500})
    with pytest.raises(InputError, match=r"made with tv_weight 1.8, not 2.0"):
        load_thresholds(out, model_id="m1", restoration={"tv_weight": 2.0})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"points": {"residual": [{"x": 1}]}}'])
def test_a_file_that_holds_no_thresholds_is_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"written by eval.thresholds in .*other.json"):
        load_thresholds(path)


def test_existing_thresholds_are_kept_without_force(healthy, capsys):
    _, out = run(healthy)
    before = out.read_text()
    assert run(healthy)[0] == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_text() == before
    assert run(healthy, "--force")[0] == 0


def test_bad_target_leaves_no_file(healthy, capsys):
    status, out = run(healthy, "--targets", "1.5")
    assert status == 2
    assert "got 1.5" in capsys.readouterr().err
    assert not out.exists()


def test_model_is_named_by_id_then_by_path_then_unknown():
    assert thresholds.model_id({"model_identity": "a", "model_path": "b"}) == "a"
    assert thresholds.model_id({"model_path": "b"}) == "b"
    assert thresholds.model_id({}) == "unknown"


def test_labels_are_not_needed(healthy):
    _, cache, restored, _ = healthy
    found = thresholds.find_thresholds(Cohort(restored, cache), progress=False)
    assert found.cohort["subjects"] == 3
