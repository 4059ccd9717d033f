"""The cache: the released layout in both directions, whole files only, errors that help."""

import h5py
import numpy as np
import pytest
from conftest import phantom_slices, write_cache

from tf_lesion.caches.slices import RELEASED_CROP, CacheWriter, SliceCache
from tf_lesion.files import InputError


def _released_file(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


def test_a_cache_written_by_hand_in_the_released_layout_is_read_with_its_crop(tmp_path):
    slices = np.random.default_rng(0).uniform(0, 1, (3, 197, 233))  # float64, no attributes
    slices[:, :30] = 0
    path = _released_file(tmp_path / "CamCANT2_data.hdf5", Train=slices, Test=slices[:2])
    with SliceCache(path, "Train") as cache:
        assert (len(cache), cache.shape, cache.crop) == (3, (158, 198), RELEASED_CROP)
        read = cache.read([2, 0])
        assert (read.shape, read.dtype) == ((2, 158, 198, 1), np.float32)
        np.testing.assert_array_equal(read[0, ..., 0], slices[2, 22:180, 17:215].astype("f4"))
        np.testing.assert_array_equal(cache.mask([1]), cache.read([1]) > 0)
        assert cache.index.subject_ids == ["unknown"]
        assert cache.reference is None


def test_our_cache_opens_with_plain_h5py_under_the_released_names(tmp_path):
    path = write_cache(tmp_path / "cache.h5", train=5, test=4)
    with h5py.File(path) as file:
        assert {name: file[name].shape for name in ("Train", "Test", "Mask", "Label")} == {
            "Train": (5, 38, 42),
            "Test": (4, 38, 42),
            "Mask": (4, 38, 42),
            "Label": (4, 38, 42),
        }
        assert file["Train"].chunks == (1, 38, 42)
        assert file["Train"].compression == "gzip"
        np.testing.assert_array_equal(file["Train"][:], phantom_slices(5))
        assert file["Label"][:].sum() == 4 * 4 * 5


def test_subjects_slices_and_transforms_survive_the_file(tmp_path):
    transform = np.eye(4) + np.arange(16).reshape(4, 4) / 7
    images = phantom_slices(3)
    with CacheWriter(
        tmp_path / "c.h5", slice_shape=(38, 42), crop=(0, 38, 0, 42), settings={"n4": True}
    ) as cache:
        cache.append(
            "Train",
            images,
            subject_id="sub-é",
            slice_index=[7, 8, 11],
            scan_from_grid=transform,
            source="a.nii",
        )
        cache.append("Train", images[:1], subject_id="sub-2", slice_index=[4])
    with SliceCache(tmp_path / "c.h5", "Train") as cache:
        assert cache.index.subject_ids == ["sub-é", "sub-2"]
        assert cache.index.subject.tolist() == [0, 0, 0, 1]
        assert cache.index.slice_index.tolist() == [7, 8, 11, 4]
        np.testing.assert_array_equal(cache.index.scan_from_grid[0], transform)
        assert cache.index.source[0] == "a.nii"
        assert cache.settings == {"n4": True}


def test_counts_per_subject_index_a_released_cache(tmp_path):
    path = _released_file(tmp_path / "c.h5", Test=np.ones((5, 38, 42)))
    with SliceCache(path, counts=np.array([2, 3])) as cache:
        assert cache.index.subject.tolist() == [0, 0, 1, 1, 1]
        assert cache.index.slice_index.tolist() == [0, 1, 0, 1, 2]
    with pytest.raises(InputError, match="has 5 slices, but the counts per subject add up to 6"):
        SliceCache(path, counts=np.array([2, 4]))


def test_labels_may_come_from_a_file_of_their_own(tmp_path):
    path = _released_file(tmp_path / "data.h5", Test=np.ones((2, 38, 42)))
    label = np.zeros((2, 38, 42))
    label[1, 3, 4] = 4
    labels = _released_file(tmp_path / "label.h5", Label=label)
    with SliceCache(path, label_path=labels) as cache:
        assert np.argwhere(cache.label([0, 1])).tolist() == [[1, 3, 4, 0]]
    with SliceCache(path) as cache, pytest.raises(InputError, match="no dataset 'Label'"):
        cache.label([0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"Train": np.ones((2, 38, 42))}, "no dataset 'Test'; it has Train"),
        ({"Test": np.ones((38, 42))}, r"expected Test as \[N, X, Y\]"),
        ({"Test": np.ones((0, 38, 42))}, "with N > 0"),
        ({"Test": np.ones((2, 40, 42))}, r"30 \+ 4k pixels.*got 40 x 42 in .*c.h5; give a crop"),
        ({}, "it has nothing"),
    ],
)
def test_a_file_that_is_no_such_cache_says_what_is_missing(tmp_path, content, message):
    path = _released_file(tmp_path / "c.h5", **content)
    with pytest.raises(InputError, match=message):
        SliceCache(path, "Test")


def test_files_that_are_not_there_or_not_hdf5_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No slice cache at .*none.h5"):
        SliceCache(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(InputError, match=r"Expected an HDF5 slice cache, got .*text.h5"):
        SliceCache(tmp_path / "text.h5")


def test_non_finite_slices_are_named_by_row(tmp_path):
    slices = np.ones((3, 38, 42))
    slices[1, 0, 0] = np.nan
    path = _released_file(tmp_path / "c.h5", Test=slices)
    with SliceCache(path) as cache, pytest.raises(InputError, match="Test row 1 holds NaN"):
        cache.read([0, 1])


def test_a_cache_in_the_scanners_units_is_said_to_be_not_normalized(tmp_path):
    path = _released_file(tmp_path / "c.h5", Test=1200 * np.ones((3, 38, 42)))
    with SliceCache(path) as cache, pytest.raises(InputError, match="got 1200; normalize"):
        cache.read([0, 1])


def test_axes_in_another_order_are_not_blamed_on_the_crop(tmp_path):
    path = _released_file(tmp_path / "c.h5", Test=np.ones((197, 233, 5)))
    with pytest.raises(InputError, match=r"put the axes in order if they are not \[N, X, Y\]"):
        SliceCache(path)


def test_masks_of_another_shape_are_refused(tmp_path):
    path = _released_file(tmp_path / "c.h5", Test=np.ones((3, 38, 42)), Mask=np.ones((2, 38, 42)))
    with SliceCache(path) as cache, pytest.raises(InputError, match="they must be equal"):
        cache.mask([0])


def test_a_crop_outside_the_slice_is_refused(tmp_path):
    path = _released_file(tmp_path / "c.h5", Test=np.ones((3, 60, 60)))
    with pytest.raises(InputError, match=r"Crop \[0:62, 0:58\] lies outside the 60 x 60"):
        SliceCache(path, crop=(0, 62, 0, 58))
    with SliceCache(path, crop=(1, 59, 2, 60)) as cache:
        assert cache.shape == (58, 58)


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    images = phantom_slices(2)

    def write(*subjects):
        with CacheWriter(tmp_path / "c.h5", slice_shape=(38, 42), crop=(0, 38, 0, 42)) as cache:
            for slices, extra in subjects:
                cache.append("Test", slices, subject_id="a", slice_index=[0, 1], **extra)

    with pytest.raises(ValueError, match="Expected Test slices"):
        write((images, {}), (np.ones((2, 5, 5)), {}))
    with pytest.raises(ValueError, match="Mask was given for some subjects"):
        write((images, {"mask": images > 0}), (images, {}))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_cache_is_kept_without_force(tmp_path):
    path = write_cache(tmp_path / "c.h5", train=2, test=2)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="pass --force"), CacheWriter(path):
        pass
    assert path.read_bytes() == before


def test_a_mask_of_fractions_is_brain_where_it_is_above_0(tmp_path):
    images = phantom_slices(2)
    share = np.where(images > 0, 0.45, 0)
    with CacheWriter(tmp_path / "c.h5", slice_shape=(38, 42), crop=(0, 38, 0, 42)) as cache:
        cache.append("Test", images, subject_id="a", slice_index=[0, 1], mask=share)
    with SliceCache(tmp_path / "c.h5") as cache:
        np.testing.assert_array_equal(cache.mask([0, 1])[..., 0], images > 0)
