"""The shipped finder on whole heads and stripped brains: mask, pose, and what is no head at all."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import tiny_scans
from scipy import ndimage

from tf_lesion.scans import brain_mask, intensity
from tf_lesion.scans.confidence import Confidence
from tf_lesion.scans.finder.find import find
from tf_lesion.scans.finder.weights import FILE
from tf_lesion.scans.prepare import PoorAlignmentError, ScanSettings, prepare_scan
from tf_lesion.scans.volumes import load_scan

VOXEL_MM = 3.0
RIGID = ScanSettings(voxel_size=VOXEL_MM)
TURN = tiny_scans.rigid(degrees=(18, -10, 12), shift=(30, -20, 15))
LARGEST_FILE = 3_000_000  # bytes


def scan_of(values, affine):
    return nib.Nifti1Image(np.asarray(values, np.float32), affine)


def dice(mask, truth):
    return 2 * np.sum(mask & truth) / (np.sum(mask) + np.sum(truth))


def moved_mm(found, expected):
    """Largest distance of the ends of a brain."""
    ends = np.array([[60, -18, 10], [-60, -18, 10], [0, 60, 10], [0, -95, 0], [0, 0, 70]])
    ends = np.c_[ends, np.ones(5)].T
    return np.linalg.norm(((found - expected) @ ends)[:3], axis=0).max()


@pytest.fixture(scope="module")
def brain():
    values, affine = tiny_scans.brain(VOXEL_MM)
    return values, affine, ndimage.binary_fill_holes(values > 0)


@pytest.fixture(scope="module")
def head():
    return tiny_scans.head(VOXEL_MM)


def test_the_weights_are_small():
    assert FILE.stat().st_size < LARGEST_FILE


@pytest.mark.parametrize("kind", ["brain", "head"])
def test_a_turned_scan_is_put_in_its_place_with_and_without_its_skull(kind, brain, head):
    values, affine = brain[:2] if kind == "brain" else head
    prepared = prepare_scan(scan_of(values, TURN @ affine), settings=RIGID)
    assert moved_mm(prepared.scan_from_grid, TURN) < 3
    assert dice(prepared.scan_mask, brain[2]) > (0.999 if kind == "brain" else 0.9)
    assert prepared.brain_kind == ("stripped" if kind == "brain" else "with skull")


@pytest.mark.parametrize(("gain", "offset"), [(250, 0), (0.01, 2000)])
def test_the_scale_of_intensities_does_not_matter(gain, offset, head, brain):
    for values, affine in (head, brain[:2]):
        expected = find(values, affine)
        found = find(gain * values + np.float32(offset), affine)
        np.testing.assert_allclose(found.outside, expected.outside, atol=0.1)
        np.testing.assert_allclose(found.scan_from_mni, expected.scan_from_mni, atol=0.1)


@pytest.mark.parametrize("gap", [0.09, pytest.param(0, marks=pytest.mark.slow)])
def test_a_standardized_brain_with_a_background_of_zero_is_prepared_as_the_brain_before(gap, brain):
    """The background lies in the middle of its intensities; how far it was below them is lost."""
    values, affine, mask = brain
    above = np.maximum(values - np.percentile(values[mask], intensity.DARK_PERCENTILE), 0)
    values = np.where(mask, above + gap * np.median(above[mask]) + 1e-3 * above.max(), 0)
    scored = np.where(mask, (values - values[mask].mean()) / values[mask].std(), 0)
    expected, found = (prepare_scan(scan_of(v, affine), settings=RIGID) for v in (values, scored))
    assert found.brain_kind == brain_mask.STRIPPED
    np.testing.assert_array_equal(found.scan_mask, expected.scan_mask)
    np.testing.assert_allclose(found.scan_from_grid, expected.scan_from_grid, atol=1e-3)
    np.testing.assert_allclose(found.image, expected.image, atol=1e-3)


def test_a_background_far_below_the_darkest_stays_there():
    """A T1-like brain: nothing in it is nearly as dark as the background."""
    volume = np.zeros((8, 8, 8), np.float32)
    volume[2:6, 2:6, 2:6] = np.arange(100, 164).reshape(4, 4, 4)
    np.testing.assert_array_equal(intensity.from_background(volume + 7), volume)


def test_voxels_of_a_brain_that_are_equal_to_its_background_stay_as_they_are():
    volume = np.zeros((8, 8, 8), np.float32)
    volume[2:6, 2:6, 2:6] = np.linspace(-3.1, 4, 64).reshape(4, 4, 4)
    volume = np.rint(10 * volume)
    volume[3, 3, 3] = 0
    found = intensity.from_background(volume)
    assert np.ptp((found - volume)[2:6, 2:6, 2:6]) < 1e-4
    assert np.all(found[:2] == 0)
    assert found[2:6, 2:6, 2:6].min() > 0


def test_what_was_background_in_a_head_is_it_after_standardization():
    """Bone that is 0 as the air is, in intensities that are no whole numbers."""
    volume = np.zeros((8, 8, 8), np.float32)
    volume[2:6, 2:6, 2:6] = np.linspace(1, 200, 64).reshape(4, 4, 4).round()
    volume[3, 3, 3] = 0
    scored = np.where(volume == 0, 0, (volume - 90) / 40)
    found = 40 * intensity.from_background(scored)
    np.testing.assert_array_equal(found == 0, volume == 0)
    np.testing.assert_allclose(found[volume > 0], volume[volume > 0], atol=3)  # the gap


def test_what_rings_around_a_brain_leaves_a_dark_background_as_it_is():
    volume = np.zeros((8, 8, 8), np.float32)
    volume[2:6, 2:6, 2:6] = np.linspace(1, 200, 64).reshape(4, 4, 4)
    volume[1, 1, 1:3] = -20
    np.testing.assert_array_equal(intensity.from_background(volume), volume)


@pytest.mark.parametrize("air", [0, 200])
def test_intensities_begin_at_the_background_whatever_is_added(air):
    """Constant air, and noise in all of it."""
    values = tiny_scans.brain(VOXEL_MM)[0].round()
    if air:
        values += np.random.default_rng(0).integers(1, air, values.shape)
    expected = intensity.from_background(values.astype(np.float32))
    for added in (-1024, 32768):
        np.testing.assert_array_equal(
            intensity.from_background((values + added).astype(np.float32)), expected
        )


def test_a_volume_of_one_value_stays_one():
    assert not intensity.from_background(np.full((4, 4, 4), 7, np.float32)).any()


@pytest.mark.parametrize("axes", ["LPS", "PIR", "SLA"])
def test_a_scan_with_other_axes_gives_the_same(axes, head, tmp_path):
    values, affine = head
    paths = [tiny_scans.write(tmp_path / f"{a}.nii", values, affine, axes=a) for a in ("RAS", axes)]
    first, other = (load_scan(path) for path in paths)
    expected, found = (find(scan.data, scan.affine) for scan in (first, other))
    np.testing.assert_array_equal(found.outside, expected.outside)


@pytest.mark.parametrize(("radius", "intensity"), [(7, 20), (7, 1600), (26, 1600)])
def test_a_lesion_at_the_surface_stays_in_the_mask(intensity, radius, brain, head):
    """1.4 ml, dark and bright, and 70 ml, bright."""
    lesion = tiny_scans.blob(brain[1], brain[2].shape, (46, -20, 36), radius) & brain[2]
    for values, affine in (head, brain[:2]):
        scan = load_scan(scan_of(np.where(lesion, intensity, values), affine))
        found = brain_mask.brain_of(scan, find(scan.data, scan.affine))
        assert np.sum(found.mask & lesion) > 0.95 * lesion.sum()


@pytest.mark.parametrize("share", [0.15, 0.35, 1.5])
def test_the_edge_of_a_stripped_lesion_is_its_own(share):
    """A ball whose edge is spread over voxels, as by interpolation; a dark or bright part of it."""
    place = np.indices((60, 60, 60)) - 29.5
    ball = np.linalg.norm(place, axis=0) < 25
    lesion = ball & (np.linalg.norm(place - np.array([20, 0, 0])[:, None, None, None], axis=0) < 14)
    values = ndimage.gaussian_filter(np.where(lesion, share, ball).astype(np.float64), 0.7)
    found = brain_mask.what_was_left(np.where(values > 0.005, 1000 * values, 0))
    assert dice(found, ball) > 0.98
    assert np.sum(found & lesion) > 0.97 * lesion.sum()


@pytest.mark.parametrize("what", ["noise", "ball", "upside down"])
def test_what_is_no_upright_head_is_refused(what, brain):
    rng = np.random.default_rng(0)
    values, affine, _ = brain
    if what == "noise":
        values = ndimage.gaussian_filter(rng.random(values.shape), 2)
    elif what == "ball":
        ball = tiny_scans.blob(affine, values.shape, (0, -20, 10), 60)
        values = np.where(ball, 500 + 50 * rng.standard_normal(ball.shape), 0)
    else:
        values = values[:, :, ::-1]
    with pytest.raises(PoorAlignmentError, match="--allow-poor-alignment") as refused:
        prepare_scan(scan_of(values, affine), settings=RIGID)
    assert refused.value.prepared.image.shape == RIGID.grid.shape


GOOD = Confidence(
    overlap=0.9, disagreement_mm=3.0, mutual_information=0.45, moved_mm=2.0, covered=1.0
)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"disagreement_mm": 5.0}, None),
        ({"mutual_information": 0.35}, None),
        ({"disagreement_mm": 5.0, "mutual_information": 0.35}, "neither the parts"),
        ({"disagreement_mm": 7.0}, "do not agree on where it lies"),
        ({"mutual_information": 0.2}, "poor alignment"),
        ({"overlap": 0.82}, None),
        ({"overlap": 0.78}, "overlaps little"),
        ({"overlap": 0.82, "disagreement_mm": 5.0}, "overlaps little"),
        ({"covered": 0.3}, "too little of the brain"),
    ],
)
def test_a_scan_is_doubted_for_one_reason_at_a_time(changed, reason):
    doubts = list(dataclasses.replace(GOOD, **changed).doubts())
    assert len(doubts) == (reason is not None)
    assert reason is None or reason in doubts[0]


def test_a_small_overlap_alone_is_told_of_and_no_reason_to_refuse():
    def cautions(**changed):
        return list(dataclasses.replace(GOOD, **changed).cautions())

    assert not cautions()
    assert not cautions(overlap=float("nan"))
    (caution,) = cautions(overlap=0.82)
    assert "(Dice 0.82, usually above 0.85); look at the result" in caution
    assert not cautions(overlap=0.82, disagreement_mm=5.0)  # refused


def test_a_slab_is_aligned_as_its_slices_allow_and_says_so(head):
    values, affine = head
    low, high = 22, 44  # 66 mm
    first = np.eye(4)
    first[2, 3] = low
    prepared = prepare_scan(scan_of(values[:, :, low:high], affine @ first), settings=RIGID)
    assert moved_mm(prepared.scan_from_grid, np.eye(4)) < 8
    assert prepared.confidence.covered < 0.8
    assert any("lie in the field of view" in warning for warning in prepared.warnings)
