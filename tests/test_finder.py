"""The brain finder: its grids, its fits, and what a perfect network would make of it."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tiny_heads import PAINTED_MM, write_label_map

from preprocessing.finder import __main__ as command
from preprocessing.finder import shards, training
from preprocessing.phantom.heads import geometry, write
from preprocessing.phantom.heads.anatomy import load_head
from preprocessing.phantom.heads.paint import paint_head
from tf_lesion.scans.finder import canonical, grid, networks, pose, weights
from tf_lesion.scans.finder import find as finder

LARGEST_FILE = 3_000_000  # bytes, of the weights


def similarity(degrees, scale, shift):
    matrix = np.eye(4)
    matrix[:3, :3] = scale * Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


@pytest.fixture(scope="module")
def places():
    return np.random.default_rng(0).uniform(-80, 80, (200, 3))


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / "head.nii.gz"
    write_label_map(path)
    return load_head(path)


def test_similarity_is_found_exactly(places):
    wanted = similarity((20, -35, 10), 1.1, (5, -20, 30))
    np.testing.assert_allclose(
        pose.fit_similarity(places, pose.apply(wanted, places)), wanted, atol=1e-9
    )


def test_a_quarter_of_wrong_places_hardly_matters(places):
    wanted = similarity((20, -35, 10), 1.1, (5, -20, 30))
    seen = pose.apply(wanted, places)
    rng = np.random.default_rng(1)
    seen += rng.normal(0, 1, seen.shape)
    seen[:50] = rng.uniform(-80, 80, (50, 3))
    found, left, _ = pose.fit_robustly(places, seen, np.ones(200), np.full(200, 3.0))
    assert (
        np.linalg.norm(pose.apply(found, places) - pose.apply(wanted, places), axis=1).max() < 1.5
    )
    assert np.median(left[50:]) < 3 < np.median(left[:50])
    plain = pose.fit_similarity(places, seen)
    assert np.linalg.norm(pose.apply(plain, places) - pose.apply(wanted, places), axis=1).max() > 5


def test_landmarks_are_found_in_a_head_of_other_proportions(places):
    """Places at the back alone: their own best similarity is not that of the landmarks."""
    landmarks = canonical.landmarks()
    proportions = similarity((20, -35, 10), 1.1, (5, -20, 30))
    proportions[:3, :3] = proportions[:3, :3] @ [[1.1, 0.05, 0], [0, 0.95, 0.05], [0, 0, 0.9]]
    back = places - [0, 60, 0]
    expected = pose.fit_similarity(
        pose.apply(np.linalg.inv(proportions), landmarks), landmarks
    )  # of the landmarks themselves
    seen = pose.apply(proportions, back)
    given = np.ones(len(back)), np.full(len(back), 3.0)
    found, left = pose.fit_landmarks(back, seen, *given, landmarks)
    plain, left_by_plain, _ = pose.fit_robustly(back, seen, *given)
    points = pose.apply(np.linalg.inv(proportions), landmarks)

    def error(matrix):
        return np.abs(pose.apply(matrix, points) - pose.apply(expected, points)).max()

    assert error(found) < 1 < 4 < error(plain)
    np.testing.assert_array_equal(left, left_by_plain)


def test_a_slab_has_the_proportions_of_its_similarity_across(places):
    slab = places * [1, 1, 0.05]
    wanted = similarity((3, -2, 10), 1.1, (5, -20, 30))
    noisy = pose.apply(wanted, slab) + np.random.default_rng(0).normal(0, 3, slab.shape)
    near, _, weights = pose.fit_robustly(slab, noisy, np.ones(200), np.full(200, 3.0))
    found = pose.affine_near(near, slab, noisy, weights)
    across = np.linalg.norm(found[:3, 2] - near[:3, 2])
    without = np.linalg.lstsq(slab - slab.mean(axis=0), noisy - noisy.mean(axis=0), rcond=None)[0]
    assert across < 0.05 < np.linalg.norm(without[2] - near[:3, 2])


def test_without_scale_keeps_the_center(places):
    matrix = similarity((20, -35, 10), 1.1, (5, -20, 30))
    rigid = pose.without_scale(matrix, [1.0, 2, 3])
    np.testing.assert_allclose(rigid[:3, :3] @ rigid[:3, :3].T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(
        pose.apply(rigid, np.array([1.0, 2, 3])), pose.apply(matrix, np.array([1.0, 2, 3]))
    )


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_between_two_poses_is_that_share_of_the_turn_and_of_the_way(share):
    center, shift = np.array([1.0, 2, 3]), np.array([4.0, -6, 8])
    first, second = np.eye(4), np.eye(4)
    second[:3, :3] = Rotation.from_rotvec([0, 0.4, 0]).as_matrix()
    second[:3, 3] = center + shift - second[:3, :3] @ center
    for pair, part in (((first, second), share), ((second, first), 1 - share)):
        found = pose.between(*pair, center, share)
        turn = Rotation.from_rotvec([0, 0.4 * part, 0]).as_matrix()
        np.testing.assert_allclose(found[:3, :3], turn, atol=1e-12)
        np.testing.assert_allclose(pose.apply(found, center), center + part * shift, atol=1e-12)


@pytest.mark.parametrize(("gain", "offset"), [(1, 0), (250, 0), (0.01, -3), (40, 1000)])
def test_any_linear_scale_of_intensities_gives_one_input(gain, offset):
    rng = np.random.default_rng(0)
    data = ndimage.gaussian_filter(rng.random((30, 40, 20)), 1).astype(np.float32)
    affine = np.diag([2.0, 2, 4, 1])
    expected, _, _ = grid.network_input(data, affine)
    found, _, _ = grid.network_input(gain * data + np.float32(offset), affine)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (0.5, 0.5, 4), (6.5, 1, 1)])
def test_network_input_keeps_places(sizes):
    """A ramp in mm stays that ramp, in voxels of any size."""
    shape = [int(90 / size) for size in sizes]
    affine = np.diag([*sizes, 1.0])
    affine[:3, 3] = (5, -7, 11)
    place = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    data = pose.apply(affine, place) @ np.array([1.0, 0.5, -0.3])
    low, high = np.percentile(data, (grid.DARK_PERCENTILE, grid.BRIGHT_PERCENTILE))
    volume, grid_affine, inside = grid.network_input(data.astype(np.float32), affine)
    assert [n % grid.CUBE for n in volume.shape] == [0, 0, 0]
    middle = tuple(slice(a + 4, b - 4) for a, b in inside)
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in volume.shape], indexing="ij"), -1)[middle]
    expected = pose.apply(grid_affine, voxels) @ np.array([1.0, 0.5, -0.3])
    expected = np.clip((expected - low) / (high - low), 0, grid.BRIGHTEST)
    assert np.abs(volume[middle] - expected).max() < 0.03


def test_channels_are_the_voxels_in_cubes():
    volume = np.random.default_rng(0).random((4, 6, 8)).astype(np.float32)
    channels = grid.to_channels(volume)
    assert channels.shape == (2, 3, 4, 8)
    np.testing.assert_array_equal(grid.from_channels(channels), volume)
    np.testing.assert_allclose(channels.mean(-1), grid.halved(volume), rtol=1e-6)


def test_logits_of_the_two_bins_around_a_place_mean_that_place():
    place = np.array([[-33.0, 17, 60], [0, 0, 0]])
    logits = []
    for axis, bins in enumerate(canonical.BINS):
        share = np.maximum(1 - np.abs(place[:, axis, None] - bins) / canonical.BIN_MM, 0)
        logits.append(np.log(share + 1e-30))
    found, spread = canonical.places_of(np.concatenate(logits, axis=-1))
    np.testing.assert_allclose(found, place, atol=1e-9)
    assert spread[0] > 10
    assert spread[1] == pytest.approx(0, abs=1e-5)


def _perfect_network(head, monkeypatch):
    """A network that knows the truth about a head, in the places where it is asked."""
    look, asked = finder._look, {}

    def recorded(network, volume, inside, affine):
        asked.update(affine=affine, shape=volume.shape, mirrored=False)
        return look(network, volume, inside, affine)

    def network(inputs):
        shape, mirrored = asked["shape"], asked["mirrored"]
        asked["mirrored"] = True
        voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        places = pose.apply(asked["affine"], voxels)
        seen = pose.apply(np.linalg.inv(head.outside_affine), places)
        outside = ndimage.map_coordinates(
            head.outside, np.moveaxis(seen, -1, 0), order=1, mode="nearest"
        )
        coarse = pose.apply(
            grid.coarser(asked["affine"], grid.COARSE), voxels[tuple(slice(n // 4) for n in shape)]
        )
        true = head.geometry.mni(coarse.reshape(-1, 3)).reshape(coarse.shape)
        if mirrored:
            outside, true = outside[::-1], true[::-1] * [-1, 1, 1]
        shares = [
            np.maximum(1 - np.abs(true[..., axis, None] - bins) / canonical.BIN_MM, 0)
            for axis, bins in enumerate(canonical.BINS)
        ]
        return {
            "outside": grid.to_channels(outside.astype(np.float32) / 10)[None],
            "coordinates": np.log(np.concatenate(shares, -1) + 1e-30)[None],
        }

    monkeypatch.setattr(finder, "_look", recorded)
    return network


def test_with_a_perfect_network_pose_and_mask_are_right(anatomy, monkeypatch):
    """Of heads that are turned and scaled, but neither sheared nor bent."""
    for name, value in {"BEND_MM": (0, 1e-9), "SHEAR": 0, "AXIS_SCALE": 0}.items():
        monkeypatch.setattr(geometry, name, value)
    similar = pose.fit_similarity(anatomy.landmarks, canonical.landmarks())
    placed = pose.apply(np.linalg.inv(similar), canonical.landmarks())
    anatomy = dataclasses.replace(anatomy, mni_from_head=similar, landmarks=placed)
    for number in (1, 4):
        head = paint_head([anatomy], 5, number, fine_mm=PAINTED_MM)
        with monkeypatch.context() as patch:
            found = finder.find(head.image, head.affine, _perfect_network(head, patch))
        true_pose = write.true_pose(head)
        errors = write.landmark_errors(head.landmarks, true_pose, found.scan_from_grid)
        assert errors.max() < 0.5
        mask, true = found.outside_on(head.image.shape, head.affine) < 0, write.true_mask(head)
        assert 2 * (mask & true).sum() / (mask.sum() + true.sum()) > 0.97
        assert found.disagreement_mm < 0.5


@pytest.mark.slow
def test_the_training_command_goes_from_label_maps_to_weights(tmp_path, monkeypatch, capsys):
    maps, out = tmp_path / "maps", tmp_path / "work"
    maps.mkdir()
    write_label_map(maps / "head.nii.gz")
    monkeypatch.setattr(shards, "SHARD", 2)
    monkeypatch.setattr(training, "SHARD", 2)
    arguments = ["--out", str(out), "--label-maps", str(maps), "--heads", "2", "--batch-size", "1"]
    assert command.main([*arguments, "--steps", "1"]) == 0
    assert command.main([*arguments, "--steps", "2"]) == 0  # goes on after the first step
    assert str(out / "finder.npz") in capsys.readouterr().out
    network = weights.load(out / "finder.npz")
    assert (out / "finder.npz").stat().st_size < LARGEST_FILE
    trained = networks.build_network()
    trained.load_weights(out / "finder.weights.h5")
    for kept, value in zip(network.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_allclose(kept, value, atol=np.abs(value).max() / 250)
