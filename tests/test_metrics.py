"""Counts, curves, Dice, lesions and intervals of `eval.metrics` and `eval.lesions`."""

from pathlib import Path

import numpy as np
import pytest
from conftest import count_at
from sklearn.metrics import average_precision_score, roc_auc_score

from tf_lesion.detection.lesions import Counting, lesion_counts
from tf_lesion.evaluation import metrics
from tf_lesion.evaluation.metrics import (
    FN,
    FP,
    TN,
    TP,
    Curve,
    PooledScores,
    ThresholdCounter,
)

GOLDEN = Path(__file__).parent / "golden" / "metrics.npz"
SAME = 1e-9  # golden numbers
EXACT, BINNED = 1e-12, 1e-6  # against scikit-learn


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def released(golden):
    """(counts [4 subjects, 4, 401], pooled curve) of the released protocol."""
    counter = ThresholdCounter(metrics.released_thresholds())
    pairs = zip(golden["residual"], golden["label"], strict=True)
    counts = np.stack([counter.count(*pair) for pair in pairs])
    return counts, Curve.from_counts(counts.sum(axis=0), counter.thresholds)


def by_comparing(scores, lesion, thresholds):
    """TP, TN, FP, FN by comparing the array with each float64 threshold."""
    detected = np.stack([scores > np.float64(t) for t in thresholds])
    return np.stack(
        [
            (detected & lesion).sum(1),
            (~detected & ~lesion).sum(1),
            (detected & ~lesion).sum(1),
            (~detected & lesion).sum(1),
        ]
    )


def some_scores(number, *, ties, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    lesion = generator.random(number) < 0.2
    scores = np.abs(generator.normal(0.1 * lesion, 0.1)).astype(dtype)
    return (np.round(scores, 2) if ties else scores), lesion


def test_released_thresholds_are_the_401_of_the_released_code(golden):
    np.testing.assert_array_equal(metrics.released_thresholds(), golden["thresholds"])


def test_released_counts_equal_the_released_codes(golden, released):
    np.testing.assert_array_equal(released[0], golden["stat"])


def test_released_auc_threshold_and_rates_equal_the_released_codes(golden, released):
    counts, curve = released
    threshold = metrics.youden_threshold(curve)
    column = list(golden["thresholds"]).index(threshold)
    mean, std = metrics.mean_and_std(metrics.dice(counts)[:, column])
    total = counts.sum(axis=0)
    measured = {
        "auc": metrics.area(curve),
        "youden_threshold": threshold,
        "fpr": metrics.fpr(total)[column],
        "fnr": metrics.fnr(total)[column],
        "dsc_auc_mean": mean,
        "dsc_auc_std": std,
    }
    for name, value in measured.items():
        assert value == pytest.approx(float(golden[name]), abs=SAME), name


def test_dice_at_the_healthy_thresholds_equals_the_released_codes(golden):
    for column, threshold in enumerate(golden["fpr_thresholds"]):
        pairs = zip(golden["residual"], golden["label"], strict=True)
        dice = [metrics.dice(count_at(*pair, [threshold]))[0] for pair in pairs]
        expected = golden["dsc_at_fpr_mean"][column], golden["dsc_at_fpr_std"][column]
        assert metrics.mean_and_std(dice) == pytest.approx(expected, abs=SAME)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "thresholds",
    [
        metrics.released_thresholds(),
        np.array([0.1, 0.1 + 1e-12, 0.1 + 2e-12, 0.7]),  # too close for the table
        np.array([0.25, 0.25, 0.5]),  # repeated
        np.array([-1.0, 0.0, 300.0]),
        np.array([0.3]),
    ],
    ids=["released", "close", "repeated", "wide", "single"],
)
def test_counts_equal_comparing_with_each_threshold_even_on_the_thresholds(dtype, thresholds):
    generator = np.random.default_rng(0)
    at = thresholds.astype(dtype)
    low, high = np.nextafter(at, dtype(-np.inf)), np.nextafter(at, dtype(np.inf))
    spread = np.abs(generator.normal(0, 0.4, 40_000)).astype(dtype)  # more than one chunk
    scores = np.concatenate([at, low, high, spread, [0, 5, np.inf]]).astype(dtype)
    lesion = generator.random(scores.size) < 0.3
    expected = by_comparing(scores, lesion, thresholds)
    np.testing.assert_array_equal(count_at(scores, lesion, thresholds), expected)


def test_counts_do_not_depend_on_how_voxels_are_split():
    scores, lesion = some_scores(100_000, ties=False)
    counter = ThresholdCounter(metrics.released_thresholds())
    parts = [counter.count(scores[i::3], lesion[i::3]) for i in range(3)]
    np.testing.assert_array_equal(sum(parts), counter.count(scores, lesion))


def test_integer_and_half_scores_are_counted_as_their_float64_values():
    lesion = np.array([1, 0, 1], np.uint8)
    for dtype in (np.int16, np.float16):
        counts = count_at(np.array([0, 1, 3], dtype), lesion, [0.0, 1.0, 2.5])
        np.testing.assert_array_equal(counts[TP], [1, 1, 1])
        np.testing.assert_array_equal(counts[FP], [1, 0, 0])


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="ascending"):
        ThresholdCounter([0.2, 0.1])
    with pytest.raises(ValueError, match="ascending"):
        ThresholdCounter([0.2, np.nan])
    with pytest.raises(ValueError, match="as many labels as scores, got 2 and 3"):
        count_at(np.zeros(3), np.zeros(2), [0.1])
    with pytest.raises(ValueError, match="NaN"):
        count_at(np.array([0.0, np.nan], np.float32), np.zeros(2), [0.1])
    with pytest.raises(ValueError, match="NaN"):
        Curve.from_scores(np.array([0.0, np.nan]), np.zeros(2))
    with pytest.raises(ValueError, match="at least 0"):
        PooledScores().add(np.array([-0.1]), np.array([1]))


# Curves


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", [20, 3_000, 50_000])
def test_auc_and_auprc_agree_with_scikit_learn(number, dtype, ties):
    scores, lesion = some_scores(number, ties=ties, dtype=dtype)
    rounded = scores.astype(np.float32)
    expected = roc_auc_score(lesion, rounded), average_precision_score(lesion, rounded)
    curve = Curve.from_scores(scores, lesion)
    measured = metrics.area(curve), metrics.average_precision(curve)
    assert measured == pytest.approx(expected, abs=EXACT)
    pooled = PooledScores()
    for part in range(3):
        pooled.add(scores[part::3], lesion[part::3])
    measured = metrics.area(pooled.curve()), metrics.average_precision(pooled.curve())
    assert pooled.method == "exact"
    assert measured == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("ties", [False, True])
def test_binned_auc_and_auprc_agree_with_scikit_learn(ties):
    scores, lesion = some_scores(2_000_000, ties=False)
    if ties:
        scores[::3] = np.round(scores[::3], 2)
    pooled = PooledScores(max_bins=1_000_000)
    for part in range(3):
        pooled.add(scores[part::3], lesion[part::3])
    expected = roc_auc_score(lesion, scores), average_precision_score(lesion, scores)
    measured = metrics.area(pooled.curve()), metrics.average_precision(pooled.curve())
    assert pooled.method == "binned"
    assert measured == pytest.approx(expected, abs=BINNED)


def test_pooled_scores_keep_within_their_bins_and_say_so(monkeypatch):
    monkeypatch.setattr(metrics, "JOINED_VOXELS", 300)  # join many times
    scores, lesion = some_scores(5_000, ties=False)
    pooled, exact = PooledScores(max_bins=100), PooledScores()
    for part in np.array_split(np.arange(5_000), 40):
        pooled.add(scores[part], lesion[part])
        exact.add(scores[part], lesion[part])
    assert (pooled.method, exact.method) == ("binned", "exact")
    assert 50 < pooled.curve().tp.size <= 101
    assert (pooled.curve().positives, pooled.curve().negatives) == (lesion.sum(), (~lesion).sum())
    kept = exact.curve()
    np.testing.assert_array_equal(kept.threshold[1:], np.unique(scores))
    np.testing.assert_array_equal(kept.tp, by_comparing(scores, lesion, kept.threshold)[TP])


@pytest.mark.parametrize("max_bins", [100, 10_000])
def test_each_threshold_of_a_curve_detects_what_the_curve_says(max_bins):
    scores, lesion = some_scores(2_000, ties=False)
    scores[:50] = 0
    pooled = PooledScores(max_bins=max_bins)
    pooled.add(scores, lesion)
    curve = pooled.curve()
    assert curve.threshold[0] == -np.inf  # zeros are detected only by detecting everything
    expected = by_comparing(scores, lesion, curve.threshold)
    np.testing.assert_array_equal(curve.tp, expected[TP])
    np.testing.assert_array_equal(curve.fp, expected[FP])


def test_scores_of_any_size_keep_their_order():
    scores = np.array([-0.0, 1e-38, 2.0**-26, 0.5, 65_000.0, np.inf], np.float32)
    lesion = np.array([0, 1, 1, 0, 1, 0], bool)
    pooled = PooledScores()
    pooled.add(scores, lesion)
    curve = pooled.curve()
    np.testing.assert_array_equal(curve.threshold[1:], scores[np.argsort(scores)])
    np.testing.assert_array_equal(curve.tp, by_comparing(scores, lesion, curve.threshold)[TP])


def test_average_precision_of_released_points_takes_the_last_point_as_the_first_step():
    scores, lesion = np.array([2.0, 3.0, 0.5, 0.2]), np.array([1, 0, 1, 0], bool)
    counts = count_at(scores, lesion, [0.0, 0.4, 1.0])
    curve = Curve.from_counts(counts, [0.0, 0.4, 1.0])
    assert metrics.average_precision(curve) == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 3)


def test_youden_threshold_and_largest_dice_are_the_best_of_all_thresholds():
    scores, lesion = some_scores(500, ties=True)
    curve = Curve.from_scores(scores, lesion)
    tried = np.append(0.0, np.unique(scores).astype(float))
    counts = by_comparing(scores, lesion, tried)
    gap = (1 - metrics.fnr(counts)) - metrics.fpr(counts)
    assert metrics.youden_threshold(curve) == tried[np.argmax(gap)]
    best, threshold = metrics.largest_dice(curve)
    assert best == metrics.dice(counts).max()
    assert metrics.dice(count_at(scores, lesion, [threshold]))[0] == best


def test_perfect_scores_have_auc_and_dice_one():
    curve = Curve.from_scores(np.array([0.1, 0.25, 0.8, 0.9]), np.array([0, 0, 1, 1]))
    assert metrics.area(curve) == metrics.average_precision(curve) == 1
    assert metrics.youden_threshold(curve) == 0.25
    assert metrics.largest_dice(curve) == (1, 0.25)


# Corner cases


def test_subject_without_lesion_has_dice_zero_or_one_and_no_auc():
    scores, none = np.array([0.1, 0.3], np.float32), np.zeros(2, bool)
    counts = count_at(scores, none, [0.0, 0.2, 0.4, 0.5])
    np.testing.assert_array_equal(metrics.dice(counts), [0, 0, 1, 1])
    assert np.isnan(metrics.fnr(counts)).all()
    np.testing.assert_array_equal(metrics.fpr(counts), [1, 0.5, 0, 0])
    curve = Curve.from_scores(scores, none)
    undefined = metrics.area(curve), metrics.average_precision(curve)
    assert np.isnan([*undefined, metrics.youden_threshold(curve)]).all()
    assert metrics.largest_dice(curve)[0] == 1  # detect nothing


def test_subject_that_is_all_lesion_has_no_fpr_and_no_auc():
    scores, every = np.array([0.1, 0.3], np.float32), np.ones(2, bool)
    counts = count_at(scores, every, [0.0, 0.2, 0.5])
    np.testing.assert_allclose(metrics.dice(counts), [1, 2 / 3, 0])
    assert np.isnan(metrics.fpr(counts)).all()
    curve = Curve.from_scores(scores, every)
    assert np.isnan([metrics.area(curve), metrics.youden_threshold(curve)]).all()
    assert metrics.average_precision(curve) == 1


@pytest.mark.parametrize("lesion", [False, True])
def test_a_single_voxel_is_measured(lesion):
    counts = count_at(np.array([0.3], np.float32), np.array([lesion]), [0.0, 0.5])
    np.testing.assert_array_equal(counts.sum(axis=0), [1, 1])
    np.testing.assert_array_equal(counts[TP if lesion else FP], [1, 0])
    np.testing.assert_array_equal(metrics.dice(counts), [1, 0] if lesion else [0, 1])
    assert np.isnan(metrics.area(Curve.from_scores(np.array([0.3]), np.array([lesion]))))


def test_all_zero_residuals_have_auc_one_half_and_under_the_released_protocol_zero():
    scores, lesion = np.zeros(10, np.float32), np.arange(10) < 3
    pooled = PooledScores()
    pooled.add(scores, lesion)
    assert metrics.area(pooled.curve()) == 0.5
    assert metrics.average_precision(pooled.curve()) == 0.3
    assert metrics.youden_threshold(pooled.curve()) == 0
    assert metrics.largest_dice(pooled.curve()) == (0, 0)  # a residual of 0 is no detection
    thresholds = metrics.released_thresholds()
    curve = Curve.from_counts(count_at(scores, lesion, thresholds), thresholds)
    assert metrics.area(curve) == 0
    assert metrics.youden_threshold(curve) == 0


def test_a_plateau_above_zero_moves_as_one():
    scores, lesion = np.full(10, 0.25), np.arange(10) < 3
    curve = Curve.from_scores(scores, lesion)
    np.testing.assert_array_equal(curve.threshold, [0, 0.25])
    assert metrics.area(curve) == 0.5


def test_a_curve_of_no_voxels_is_undefined_not_an_error():
    curve = PooledScores().curve()
    assert np.isnan([metrics.area(curve), metrics.average_precision(curve)]).all()
    assert metrics.largest_dice(curve)[0] == 1


def test_mean_leaves_undefined_subjects_out():
    assert metrics.mean_and_std([0.2, np.nan, 0.4]) == pytest.approx((0.3, 0.1))
    assert np.isnan(metrics.mean_and_std([np.nan])).all()


# Lesions


def test_voxels_touching_at_a_corner_are_one_lesion_in_three_dimensions():
    truth = np.zeros((4, 4, 4), bool)
    truth[0, 0, 0] = truth[1, 1, 1] = True
    truth[3, 3, 3] = True
    detected = np.zeros_like(truth)
    detected[1, 1, 1] = True
    counts = lesion_counts(detected, truth)
    assert (counts.lesions, counts.found, counts.false_positives) == (2, 1, 0)


def test_a_detection_is_false_only_if_no_voxel_of_it_is_lesion():
    truth, detected = np.zeros((2, 9, 9, 3), bool)
    truth[1:3, 1:3, 1] = True
    detected[2:5, 2:5, 1] = True  # overlaps
    detected[7, 7, 0] = detected[0, 8, 2] = True  # two false ones
    counts = lesion_counts(detected, truth)
    assert (counts.lesions, counts.found, counts.false_positives) == (1, 1, 2)


@pytest.mark.parametrize(("connectivity", "lesions"), [(26, 1), (18, 2), (6, 3)])
def test_neighbors_that_connect_are_those_asked_for(connectivity, lesions):
    truth = np.zeros((4, 4, 4), bool)
    truth[0, 0, 0] = truth[1, 1, 0] = truth[2, 2, 1] = True  # by an edge, then by a corner
    counts = lesion_counts(truth, truth, counting=Counting(connectivity=connectivity))
    assert counts.lesions == counts.found == lesions


def test_components_below_the_smallest_volume_are_neither_lesions_nor_false():
    truth, detected = np.zeros((2, 9, 9, 9), bool)
    truth[:2, :2, :2] = truth[5, 5, 5] = True  # 8 voxels and 1
    detected[:1, :1, :1] = detected[8, 8, :] = detected[8, 0, 0] = True  # 1, false 9, false 1
    plain = lesion_counts(detected, truth, voxel_ml=0.01)
    assert (plain.lesions, plain.found, plain.false_positives) == (2, 1, 2)
    assert plain.volumes_ml == pytest.approx([0.08, 0.01])
    counts = lesion_counts(detected, truth, voxel_ml=0.01, counting=Counting(smallest_ml=0.05))
    assert (counts.lesions, counts.found, counts.false_positives) == (1, 0, 1)


@pytest.mark.parametrize(("overlap", "found"), [(0, 1), (0.2, 1), (0.25, 0), (0.5, 0)])
def test_a_lesion_is_found_if_more_than_the_share_asked_for_is_detected(overlap, found):
    truth, detected = np.zeros((2, 4, 4, 4), bool)
    truth[:2, :2, :2] = True
    detected[0, 0, :2] = True  # 2 of 8
    assert lesion_counts(detected, truth, counting=Counting(overlap=overlap)).found == found


def test_lesions_of_empty_scans_are_counted_as_none():
    empty = np.zeros((3, 3, 3), bool)
    assert lesion_counts(empty, empty).lesions == 0
    assert lesion_counts(~empty, empty).false_positives == 1
    assert lesion_counts(empty, ~empty).found == 0


# Bootstrap


def test_bootstrap_draws_as_many_subjects_as_there_are_and_repeats_with_its_seed():
    weights = metrics.bootstrap_weights(range(7), seed=3, draws=50)
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(weights, metrics.bootstrap_weights(range(7), seed=3, draws=50))
    assert (weights != metrics.bootstrap_weights(range(7), seed=4, draws=50)).any()


def test_mean_interval_is_that_of_resampled_subjects():
    values = np.array([0.1, 0.9, np.nan, 0.4, 0.6])
    weights = metrics.bootstrap_weights(range(5), draws=200)
    resampled = [np.repeat(values, row) for row in weights]
    means = [np.nanmean(v) for v in resampled if not np.isnan(v).all()]
    expected = np.percentile(means, [2.5, 97.5])
    np.testing.assert_allclose(metrics.mean_interval(values, weights), expected)


def test_area_interval_is_that_of_resampled_subjects():
    thresholds = np.linspace(0, 0.5, 40)
    counts = np.stack(
        [count_at(*some_scores(300, ties=False, seed=s), thresholds) for s in range(6)]
    )
    weights = metrics.bootstrap_weights(range(6), draws=100)
    areas = [
        metrics.area(Curve.from_counts(np.repeat(counts, row, axis=0).sum(axis=0), thresholds))
        for row in weights
    ]
    expected = np.percentile(areas, [2.5, 97.5])
    np.testing.assert_allclose(metrics.area_interval(counts, weights), expected)
    assert expected[0] < expected[1]


def test_interval_of_one_subject_has_no_width():
    weights = metrics.bootstrap_weights(range(1))
    assert metrics.mean_interval([0.3], weights) == (0.3, 0.3)
    assert np.isnan(metrics.mean_interval([np.nan], weights)).all()


def test_counts_add_up_at_every_threshold(released):
    counts, _ = released
    sums = counts.sum(axis=1)
    assert (sums == sums[:, :1]).all()
    assert (counts[:, TP] + counts[:, FN] == counts[:, TP, :1] + counts[:, FN, :1]).all()
    assert (np.diff(counts[:, TN], axis=1) >= 0).all()
