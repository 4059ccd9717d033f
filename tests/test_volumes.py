"""Reading scans of any kind, the MNI grid, and writing in the scan's own grid."""

import gzip

import nibabel as nib
import numpy as np
import pytest
import tiny_scans

from tf_lesion.caches.slices import RELEASED_CROP, is_legal_size
from tf_lesion.files import InputError
from tf_lesion.scans.volumes import MniGrid, load_labels, load_mask, load_scan, save_like

SHAPE = (6, 7, 8)
AFFINE = np.array([[1.5, 0, 0, -4], [0, 2.0, 0, -5], [0, 0, 2.5, 3], [0, 0, 0, 1.0]])


def values(seed=0):
    return np.random.default_rng(seed).uniform(1, 100, SHAPE).astype(np.float32)


def save(path, data, affine=AFFINE):
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def test_grid_at_1_mm_is_that_of_the_released_caches():
    grid = MniGrid()
    assert grid.shape == (197, 233, 189)
    assert grid.crop == RELEASED_CROP
    np.testing.assert_array_equal(grid.affine[:3, 3], [-98, -134, -72])


@pytest.mark.parametrize("voxel_size", [0.8, 1.5, 2.0, 3.0, 4.0, 5.0])
def test_grid_of_other_voxels_has_a_legal_crop_on_the_same_center(voxel_size):
    grid = MniGrid(voxel_size)
    x0, x1, y0, y1 = grid.crop
    for first, last, wanted, length, center in (
        (x0, x1, 158, grid.shape[0], 101),
        (y0, y1, 198, grid.shape[1], 116),
    ):
        assert 0 <= first < last <= length
        assert is_legal_size(last - first)
        assert abs((last - first) - wanted / voxel_size) <= 2 or last - first == 34
        assert abs((first + last) / 2 - center / voxel_size) <= 1


def test_grid_at_2_mm_has_the_documented_shape_and_crop():
    assert MniGrid(2).shape == (99, 117, 95)
    assert MniGrid(2).crop == (12, 90, 9, 107)


@pytest.mark.parametrize("voxel_size", [0, -1, np.nan, 7])
def test_impossible_voxel_sizes_are_refused(voxel_size):
    with pytest.raises(InputError, match=r"voxel size|Voxels of 7 mm"):
        MniGrid(voxel_size)


def test_an_ending_in_capitals_is_read_alike(tmp_path):
    path = save(tmp_path / "t2.nii.gz", np.repeat(values(), 50, axis=0))
    read = load_scan(path).data
    np.testing.assert_array_equal(load_scan(path.rename(tmp_path / "T2.NII.GZ")).data, read)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAI", "PSR", "IAL", "SLP"])
def test_any_orientation_is_read_as_the_same_ras_volume(tmp_path, axes):
    expected = values()
    scan = load_scan(tiny_scans.write(tmp_path / "t2.nii.gz", expected, AFFINE, axes=axes))
    np.testing.assert_array_equal(scan.data, expected)
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-5)
    stored = nib.load(tmp_path / "t2.nii.gz")
    assert nib.aff2axcodes(stored.affine) == tuple(axes)
    np.testing.assert_array_equal(scan.to_file_orientation(scan.data), stored.get_fdata())


@pytest.mark.parametrize("axes", ["LPS", "PSR"])
def test_saved_arrays_have_the_scans_shape_affine_codes_and_units(tmp_path, axes):
    path = tiny_scans.write(tmp_path / "t2.nii", values(), AFFINE, axes=axes, sform=2, qform=1)
    scan = load_scan(path)
    save_like(scan, scan.to_file_orientation(scan.data * 0.5), tmp_path / "half.nii.gz")
    written, given = nib.load(tmp_path / "half.nii.gz"), nib.load(path)
    np.testing.assert_array_equal(written.get_fdata(), given.get_fdata() * 0.5)
    np.testing.assert_array_equal(written.affine, given.affine)
    for code in ("sform_code", "qform_code", "xyzt_units"):
        assert written.header[code] == given.header[code]
    assert written.get_data_dtype() == np.float32


def test_a_mask_is_saved_as_uint8_from_an_int16_scan(tmp_path):
    path = save(tmp_path / "t2.nii", (values() * 10).astype(np.int16))
    scan = load_scan(path)
    save_like(scan, scan.data > 500, tmp_path / "m.nii")
    written = nib.load(tmp_path / "m.nii")
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(written.get_fdata() > 0, scan.data > 500)


def test_saving_checks_shape_and_name(tmp_path):
    scan = load_scan(save(tmp_path / "t2.nii", values()))
    with pytest.raises(ValueError, match=r"Expected an array of shape \(6, 7, 8\)"):
        save_like(scan, scan.data[1:], tmp_path / "x.nii")
    with pytest.raises(InputError, match=r"\.nii"):
        save_like(scan, scan.data, tmp_path / "x.mgz")


def test_scaled_integers_are_read_in_their_own_units(tmp_path):
    image = nib.Nifti1Image(np.arange(336, dtype=np.int16).reshape(SHAPE), AFFINE)
    image.header.set_slope_inter(0.5, 10)
    raw = image.to_bytes()
    (tmp_path / "t2.nii").write_bytes(raw)
    stored = nib.load(tmp_path / "t2.nii")
    scan = load_scan(tmp_path / "t2.nii")
    assert stored.dataobj.slope == 0.5
    np.testing.assert_allclose(scan.data, np.asarray(stored.dataobj.get_unscaled()) * 0.5 + 10)
    assert scan.data.dtype == np.float32


def test_a_trailing_axis_of_one_is_squeezed_and_put_back(tmp_path):
    path = save(tmp_path / "t2.nii", values()[..., None])
    scan = load_scan(path)
    assert scan.data.shape == SHAPE
    save_like(scan, scan.to_file_orientation(scan.data), tmp_path / "out.nii")
    assert nib.load(tmp_path / "out.nii").shape == (*SHAPE, 1)


def test_an_image_in_memory_is_read_as_its_file_and_has_no_path(tmp_path):
    path = tiny_scans.write(tmp_path / "t2.nii.gz", values(), AFFINE, axes="PSR")
    stored, given = load_scan(path), load_scan(nib.load(path))
    np.testing.assert_array_equal(given.data, stored.data)
    np.testing.assert_array_equal(given.affine, stored.affine)
    assert (stored.path, stored.name) == (path, str(path))
    assert (given.path, given.name) == (None, "image in memory")
    label = nib.Nifti1Image((values() > 50).astype(np.uint8), AFFINE)
    np.testing.assert_array_equal(load_labels(label, given), values() > 50)
    save_like(given, given.to_file_orientation(given.data), tmp_path / "out.nii")
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii").affine, nib.load(path).affine)


def test_an_image_in_memory_that_is_no_scan_is_refused():
    with pytest.raises(InputError, match="image in memory: 1 of 336 voxels are NaN"):
        load_scan(nib.Nifti1Image(with_value(np.nan), AFFINE))
    with pytest.raises(InputError, match=r"image in memory: expected a NIfTI file .*MGHImage"):
        load_scan(nib.MGHImage(values(), AFFINE))


def truncated(path):
    save(path, values())
    path.write_bytes(path.read_bytes()[:600])


def truncated_gzip(path):
    raw = gzip.compress(nib.Nifti1Image(values(), AFFINE).to_bytes())
    path.write_bytes(raw[: len(raw) // 2])


def with_value(value):
    data = values()
    data[2, 3, 4] = value
    return data


def singular():
    affine = AFFINE.copy()
    affine[2, 2] = 0
    return affine


BAD_SCANS = {
    "truncated.nii": (truncated, "cannot be read"),
    "truncated.nii.gz": (truncated_gzip, "cannot be read"),
    "text.nii": (lambda path: path.write_text("not an image"), "cannot be read"),
    "text.nii.gz": (lambda path: path.write_text("not an image"), "cannot be read"),
    "none.nii": (lambda path: path.write_bytes(b""), "cannot be read"),
    "flat.nii": (lambda path: save(path, values()[:, :, 0]), "expected a 3-D volume, got 2-D"),
    "4d.nii": (lambda path: save(path, np.stack([values()] * 2, -1)), "3-D volume, got 4-D"),
    "thin.nii": (lambda path: save(path, values()[:, :, :1]), "at least 4 voxels"),
    "zero.nii": (lambda path: save(path, values() * 0), "every voxel is 0"),
    "constant.nii": (lambda path: save(path, values() * 0 + 7), "every voxel is 7"),
    "nan.nii": (lambda path: save(path, with_value(np.nan)), "1 of 336 voxels are NaN"),
    "inf.nii": (lambda path: save(path, with_value(np.inf)), "NaN or infinite"),
    "huge.nii": (lambda path: save(path, with_value(1).astype(float) * 1e300), "NaN or infinite"),
    "complex.nii": (lambda path: save(path, values().astype(np.complex64)), "expected numbers"),
    "scan.mgz": (lambda path: nib.save(nib.MGHImage(values(), AFFINE), path), "got MGHImage"),
}


@pytest.mark.parametrize("name", BAD_SCANS)
def test_bad_scans_are_refused_with_the_files_name(tmp_path, name):
    write, message = BAD_SCANS[name]
    write(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        load_scan(tmp_path / name)


def test_a_singular_affine_is_refused(tmp_path):
    image = nib.Nifti1Image(values(), AFFINE)
    header = image.header.copy()
    header.set_sform(singular(), 1)
    header.set_qform(None, 0)
    (tmp_path / "flat.nii").write_bytes(nib.Nifti1Image(values(), None, header).to_bytes())
    with pytest.raises(InputError, match=r"flat\.nii: its affine is singular"):
        load_scan(tmp_path / "flat.nii")


def coded(path, *, sform=None, qform=None, shape=SHAPE, unit=2, data=None):
    """A NIfTI file with exactly these forms (code 0 for None), whatever they say."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    header["pixdim"][1:4] = 1.5, 2.0, 2.5
    if qform is not None:
        header.set_qform(qform, 1)
    if sform is not None:
        header.set_sform(sform, 1)
    header["xyzt_units"], header["vox_offset"] = unit, 352
    body = (values() * 100).astype("<i2").tobytes(order="F") if data is None else data
    raw = header.binaryblock + bytes(4) + body
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def test_a_header_without_orientation_is_told(tmp_path):
    scan = load_scan(coded(tmp_path / "t2.nii"))
    assert scan.placed_by == "nothing"
    (said,) = scan.warnings
    assert "which side is left, and every position in mm, is a guess" in said
    known = load_scan(coded(tmp_path / "q.nii", qform=AFFINE))
    assert (known.placed_by, known.warnings) == ("qform", ())


def test_forms_that_disagree_are_told_and_those_that_round_are_not(tmp_path):
    near, far, mirrored = AFFINE.copy(), AFFINE.copy(), AFFINE.copy()
    near[0, 3] += 0.01
    far[0, 3] += 30
    mirrored[0] *= -1
    assert load_scan(coded(tmp_path / "a.nii", sform=near, qform=AFFINE)).warnings == ()
    scan = load_scan(coded(tmp_path / "b.nii", sform=far, qform=AFFINE))
    (said,) = scan.warnings
    assert said.endswith("up to 30.0 mm apart; positions follow the sform.")
    np.testing.assert_allclose(scan.affine, far, atol=1e-3)
    (said,) = load_scan(coded(tmp_path / "c.nii", sform=mirrored, qform=AFFINE)).warnings
    assert said.endswith("follow the sform, and so does which side is left.")


def test_a_singular_sform_gives_way_to_the_qform_with_a_warning(tmp_path):
    scan = load_scan(coded(tmp_path / "t2.nii", sform=np.diag([0.0, 0, 0, 1]), qform=AFFINE))
    assert scan.placed_by == "qform"
    assert scan.warnings == ("the sform of the header is singular; the qform was used.",)
    np.testing.assert_allclose(scan.affine, AFFINE, atol=1e-3)
    save_like(scan, scan.data, tmp_path / "out.nii")
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize(("unit", "mm"), [(1, 1e3), (3, 1e-3)])
def test_meters_and_micrometers_become_millimeters_and_go_back(tmp_path, unit, mm):
    given = np.diag([1 / mm] * 3 + [1.0]) @ AFFINE
    scan = load_scan(coded(tmp_path / "t2.nii", sform=given, unit=unit))
    np.testing.assert_allclose(scan.voxel_sizes, [1.5, 2.0, 2.5], rtol=1e-6)
    save_like(scan, scan.data, tmp_path / "out.nii")
    written = nib.load(tmp_path / "out.nii")
    np.testing.assert_allclose(written.affine, given, rtol=1e-6)
    assert int(written.header["xyzt_units"]) == unit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sform": np.diag([1e3, 1e3, 1e3, 1])}, "tells of 6000 x 7000 x 8000 mm"),
        ({"sform": np.diag([1e-3, 1e-3, 1e-3, 1])}, "tells of 0.006 x 0.007 x 0.008 mm"),
        ({"sform": AFFINE, "unit": 1}, r"xyzt_units 1\)"),
        ({"sform": np.diag([0.01, 0.01, 0.01, 1]), "shape": (30000,) * 3}, "30000 x 30000 x 30000"),
        ({"sform": AFFINE, "shape": (300, 300, 300)}, "54000000 bytes, and .* are there"),
        ({"sform": AFFINE, "shape": (*SHAPE, 900)}, "3-D volume, got 4-D"),
    ],
)
@pytest.mark.parametrize("name", ["t2.nii", "t2.nii.gz"])
def test_numbers_of_a_header_are_refused_before_any_voxel_is_read(
    tmp_path, monkeypatch, changes, message, name
):
    def read(*_):
        pytest.fail("voxels were read")

    monkeypatch.setattr(nib.arrayproxy.ArrayProxy, "__array__", read)
    with pytest.raises(InputError, match=message):
        load_scan(coded(tmp_path / name, **changes))


def test_a_gzip_bomb_is_refused_before_it_is_opened(tmp_path):
    bomb = coded(tmp_path / "t2.nii.gz", sform=AFFINE / 10, shape=(2000,) * 3, data=bytes(10**7))
    with pytest.raises(InputError, match=r"2000 x 2000 x 2000 voxels"):
        load_scan(bomb)


def test_an_image_without_an_affine_is_one_without_orientation():
    assert load_scan(nib.Nifti1Image(values(), None)).placed_by == "nothing"
    header = nib.Nifti1Header()
    assert load_scan(nib.Nifti1Image(values(), AFFINE, header)).placed_by == "sform"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file: .*gone\.nii"):
        load_scan(tmp_path / "gone.nii")


def test_labels_in_another_orientation_of_the_same_grid_are_accepted(tmp_path):
    scan = load_scan(tiny_scans.write(tmp_path / "t2.nii", values(), AFFINE, axes="LPS"))
    label = (values(1) > 50).astype(np.uint8) * 4
    path = tiny_scans.write(tmp_path / "seg.nii", label, AFFINE, axes="RAS")
    np.testing.assert_array_equal(load_labels(path, scan), label)


def test_labels_on_another_grid_are_refused(tmp_path):
    scan = load_scan(save(tmp_path / "t2.nii", values()))
    shifted = AFFINE.copy()
    shifted[0, 3] += 3
    label = (values(1) > 50).astype(np.uint8)
    with pytest.raises(InputError, match=r"seg\.nii: .*corners of the two grids are 3\.0 mm apart"):
        load_labels(save(tmp_path / "seg.nii", label, shifted), scan)
    with pytest.raises(InputError, match=r"expected the grid of its scan .*got \(5, 7, 8\)"):
        load_labels(save(tmp_path / "small.nii", label[1:]), scan)


@pytest.mark.parametrize("unplaced", ["t2.nii", "mask.nii"])
def test_a_header_without_orientation_is_not_called_another_grid(tmp_path, unplaced):
    for name in ("t2.nii", "mask.nii"):
        codes = {"sform": 0, "qform": 0} if name == unplaced else {}
        tiny_scans.write(tmp_path / name, values(), AFFINE, axes="LPS", **codes)
    expected = rf"affine of its scan .*t2\.nii, but the header of .*{unplaced} knows no orientation"
    with pytest.raises(InputError, match=expected) as told:
        load_mask(tmp_path / "mask.nii", load_scan(tmp_path / "t2.nii"))
    assert "resample" not in str(told.value)


def test_no_memory_is_taken_for_what_a_small_file_tells_of(tmp_path):
    small, large = np.diag([0.2, 0.2, 0.4, 1.0]), (1000, 1000, 500)
    body = np.random.default_rng(0).bytes(1_100_000)
    path = coded(tmp_path / "seg.nii.gz", sform=small, shape=large, data=body)
    scan = load_scan(save(tmp_path / "t2.nii", values()))
    with pytest.raises(InputError, match=r"seg\.nii\.gz: .* are there; it is truncated or blank"):
        load_scan(path)
    for load in (load_labels, load_mask):
        with pytest.raises(InputError, match=r"expected the grid of its scan .*, 1000, 500\)"):
            load(path, scan)


def test_labels_that_are_no_labels_are_refused_but_none_at_all_is_fine(tmp_path):
    scan = load_scan(save(tmp_path / "t2.nii", values()))
    with pytest.raises(InputError, match="labels from 0 to 255"):
        load_labels(save(tmp_path / "negative.nii", -values()), scan)
    with pytest.raises(InputError, match="labels from 0 to 255"):
        load_labels(save(tmp_path / "nan.nii", with_value(np.nan)), scan)
    assert not load_labels(save(tmp_path / "empty.nii", values() * 0), scan).any()


def test_a_mask_is_brain_where_it_is_above_0_and_a_label_is_rounded(tmp_path):
    scan = load_scan(save(tmp_path / "t2.nii", values()))
    share = np.where(values() > 50, np.float32(0.45), np.float32(-0.01))
    path = save(tmp_path / "mask.nii", share)
    np.testing.assert_array_equal(load_mask(path, scan), values() > 50)
    assert not load_labels(save(tmp_path / "seg.nii", np.maximum(share, 0)), scan).any()
    np.testing.assert_array_equal(load_mask(save(tmp_path / "m.nii", values() * 1000), scan), True)
    with pytest.raises(InputError, match="expected finite values"):
        load_mask(save(tmp_path / "nan.nii", with_value(np.nan)), scan)
    with pytest.raises(InputError, match="expected the grid of its scan"):
        load_mask(save(tmp_path / "small.nii", share[1:]), scan)
