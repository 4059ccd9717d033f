"""The synthetic cohort: layout, determinism, labels, what it looks like, and bad input."""

import json
import shutil
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from preprocessing.phantom import HEALTHY, PATIENT, fields, tissues
from preprocessing.phantom import __main__ as phantom
from preprocessing.phantom import sources as anatomy_sources
from preprocessing.phantom import tumors as lesions
from preprocessing.phantom.subject import Grid, _push, _smooth_noise, anatomy_of, make_phantom
from tf_lesion.files import InputError

COARSE = 4.0  # mm, the largest voxels: a fraction of a second per subject
FIRST_CASE = "patients/HGG/Brats17_PHA_0_1/Brats17_PHA_0_1"
SECOND_CASE = "patients/LGG/Brats17_PHA_1_1/Brats17_PHA_1_1"
FIRST_HEALTHY = "healthy/sub-CC110033/anat/sub-CC110033_T2w.nii.gz"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom") / "cohort"
    manifest = phantom.write_cohort(out, healthy=2, patients=2, seed=5, voxel_size=COARSE)
    return out, manifest


@pytest.fixture(scope="module")
def patients():
    return [make_phantom(3, PATIENT, number, voxel_size=COARSE) for number in range(6)]


@pytest.fixture
def label_maps(tmp_path):
    """A folder with one label map, 80^3 voxels, stored L-I-A with numbers as floats.

    A ball of white matter in cortex in CSF in skin, a ventricle on either side and a cerebellum.
    """
    x, y, z = np.meshgrid(*[np.arange(80) - 39.5] * 3, indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    labels = np.zeros(x.shape, np.float32)
    for edge, left, right in ((36, 507, 507), (31, 24, 24), (28, 3, 42), (22, 2, 41)):
        labels[radius < edge] = np.where(x < 0, left, right)[radius < edge]
    labels[(np.abs(x) < 8) & (np.abs(y) < 10) & (np.abs(z) < 6)] = 4
    labels[(radius < 28) & (z < -16) & (y < 0)] = 8
    affine = np.array([[-1, 0, 0, 40], [0, 0, 1, -39], [0, -1, 0, 40], [0, 0, 0, 1]], float)
    stored = np.swapaxes(labels, 1, 2)[::-1, ::-1]
    folder = tmp_path / "maps"
    folder.mkdir()
    nib.save(nib.Nifti1Image(stored, affine), folder / "one_seg.nii.gz")
    return folder


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_cohort_has_the_layout_of_camcan_and_brats(cohort):
    out, _ = cohort
    assert set(files_of(out)) == {
        "phantom.json",
        "groups.csv",
        FIRST_HEALTHY,
        "healthy/sub-CC110034/anat/sub-CC110034_T2w.nii.gz",
        f"{FIRST_CASE}_t2.nii.gz",
        f"{FIRST_CASE}_seg.nii.gz",
        f"{SECOND_CASE}_t2.nii.gz",
        f"{SECOND_CASE}_seg.nii.gz",
        f"{FIRST_CASE}_twin.nii.gz",
        f"{SECOND_CASE}_twin.nii.gz",
    }


def test_a_twin_is_the_scan_without_its_tumors(cohort):
    out, _ = cohort
    scan, twin, label = (
        nib.load(out / f"{FIRST_CASE}_{part}.nii.gz").get_fdata() for part in ("t2", "twin", "seg")
    )
    far = ndimage.binary_dilation(label > 0, iterations=4)
    np.testing.assert_array_equal(twin == 0, scan == 0)
    np.testing.assert_array_equal(twin[~far], scan[~far])
    assert np.abs(twin - scan)[label > 0].mean() > 0.1 * scan[label > 0].mean()


def test_scans_are_int16_and_segmentations_uint8_on_the_same_ras_grid(cohort):
    out, _ = cohort
    scan = nib.load(out / f"{FIRST_CASE}_t2.nii.gz")
    segmentation = nib.load(out / f"{FIRST_CASE}_seg.nii.gz")
    assert scan.get_data_dtype() == np.int16
    assert segmentation.get_data_dtype() == np.uint8
    assert scan.shape == segmentation.shape
    np.testing.assert_array_equal(scan.affine, segmentation.affine)
    assert nib.aff2axcodes(scan.affine) == ("R", "A", "S")
    np.testing.assert_allclose(scan.header.get_zooms(), COARSE)
    assert scan.header.get_xyzt_units()[0] == "mm"


def test_manifest_tells_the_seed_and_the_lesion_volume(cohort):
    out, manifest = cohort
    assert manifest == json.loads((out / "phantom.json").read_text())
    assert manifest["seed"] == 5
    assert manifest["voxel_size"] == COARSE
    assert [entry["kind"] for entry in manifest["subjects"]] == ["healthy"] * 2 + ["patient"] * 2
    entry = manifest["subjects"][2]
    label = np.asarray(nib.load(out / entry["segmentation"]).dataobj)
    assert entry["lesion_ml"] == pytest.approx((label > 0).sum() * COARSE**3 / 1000, abs=0.01)
    assert entry["grade"] == "HGG"


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_from_one_process_or_two(cohort, tmp_path):
    out, _ = cohort
    again = tmp_path / "another_name"
    phantom.write_cohort(again, healthy=2, patients=2, seed=5, voxel_size=COARSE, jobs=2)
    assert files_of(again) == files_of(out)


def test_subject_does_not_depend_on_how_many_are_made(cohort, tmp_path):
    out, _ = cohort
    fewer = tmp_path / "fewer"
    phantom.write_cohort(fewer, healthy=1, patients=1, seed=5, voxel_size=COARSE)
    for name in (FIRST_HEALTHY, f"{FIRST_CASE}_t2.nii.gz", f"{FIRST_CASE}_seg.nii.gz"):
        assert (fewer / name).read_bytes() == (out / name).read_bytes()


def test_another_seed_and_another_subject_are_other_brains():
    first, other_seed, other_number, patient = (
        make_phantom(*words, voxel_size=COARSE)
        for words in ((1, HEALTHY, 0), (2, HEALTHY, 0), (1, HEALTHY, 1), (1, PATIENT, 0))
    )
    for other in (other_seed, other_number, patient):
        assert (first.image > 0).sum() != (other.image > 0).sum()


def test_labels_are_brats_labels_inside_the_brain(patients):
    for case in patients:
        assert set(np.unique(case.label)) <= {0, 1, 2, 4}
        assert (case.image[case.label > 0] > 0).all()
        assert (case.label > 0).any()


def test_high_grade_has_all_labels_and_is_larger_than_low_grade_on_average(patients):
    for case in patients[::2]:
        assert case.facts["grade"] == "HGG"
        assert set(np.unique(case.label)) == {0, 1, 2, 4}
    high, low = (np.mean([c.facts["lesion_ml"] for c in patients[k::2]]) for k in (0, 1))
    assert high > low > 1


def test_healthy_have_no_lesion_and_one_connected_brain_with_zeros_outside():
    case = make_phantom(3, HEALTHY, 0, voxel_size=COARSE)
    assert not case.label.any()
    assert case.image.min() == 0
    parts, count = ndimage.label(case.image > 0)
    assert count == 1
    assert 1000 < parts.sum() * COARSE**3 / 1000 < 2600  # ml
    for axis in range(3):  # the brain does not touch the edge of the scan
        assert not np.take(case.image, [0, -1], axis=axis).any()


def test_edema_is_brighter_than_the_tissue_around_and_darker_than_csf(patients):
    for case in patients:
        white = case.facts["white_level"]
        brain = case.image > 0
        lesion = case.label > 0
        ring = ndimage.binary_dilation(lesion, iterations=3) & brain & ~lesion
        around = np.median(case.image[ring])
        edema = np.median(case.image[case.label == lesions.EDEMA])
        assert edema > around + 0.15 * white
        assert edema < 3 * white  # below CSF


def test_dark_cores_are_rare_and_of_the_high_grade():
    def dark_share(grade):
        tumors = [tumor for number in range(200) for tumor in make_tumors(number, grade)]
        return np.mean([tumor["core_level"] < 1 for tumor in tumors])

    assert dark_share("LGG") == 0
    assert 0.02 < dark_share("HGG") < 0.12


def make_tumors(number, grade):
    rng = np.random.default_rng(number)
    places = rng.uniform(-60, 60, (200, 3))
    depth = rng.uniform(0, 40, 200)
    return [t.to_json() for t in lesions.draw_tumors(rng, grade, places=places, depth=depth)]


def test_intensities_are_ordered_as_on_t2():
    case = make_phantom(1, HEALTHY, 0, voxel_size=3.0)
    brain = case.image[case.image > 0] / case.facts["white_level"]
    median, bright = np.quantile(brain, [0.5, 0.995])
    assert 0.9 < median < 1.5  # white and gray matter
    assert 2.2 < bright < 6  # CSF
    for seed in range(20):
        levels = tissues.draw_intensities(np.random.default_rng(seed))
        assert levels["white"] == 1
        assert levels["pallidum"] < 1 < levels["cortex"]
        assert levels["cortex"] < min(levels["choroid"], levels["ventricle"])


def test_mass_effect_pushes_outward_and_spares_the_skull():
    rng = np.random.default_rng(0)
    tumor = lesions.draw_tumors(rng, "HGG", places=np.zeros((1, 3)), depth=np.array([40.0]))[0]
    points = np.array([[0.5 * tumor.radius, 0, 0], [0, -0.5 * tumor.radius, 0], [0, 0, 0]])
    moved = lesions.pull_back(tumor, points, np.full(3, -40.0))
    assert moved[0, 0] < -0.5 * tumor.push  # what is seen there came from nearer the center
    assert moved[1, 1] > 0.5 * tumor.push
    np.testing.assert_array_equal(moved[2], 0)
    np.testing.assert_array_equal(lesions.pull_back(tumor, points, np.zeros(3)), 0)


def test_mass_effect_never_folds_tissue_over():
    for number in range(30):
        rng = np.random.default_rng(number)
        tumor = lesions.draw_tumors(rng, "HGG", places=np.zeros((1, 3)), depth=np.ones(1))[0]
        line = np.zeros((400, 3))
        line[:, 0] = np.linspace(0, 3 * tumor.radius, 400)
        source = line + lesions.pull_back(tumor, line, np.full(400, -40.0))
        assert (np.diff(source[:, 0]) > 0).all()


@pytest.mark.parametrize("step", [1.5, 2.0, 4.0])
def test_spline_reproduces_linear_functions(step):
    shape = (13, 10, 7)
    axes = [fields.lattice_positions(n, step) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    result = fields.upsample(2 * x - y + 0.5 * z + 3, shape, step)
    i, j, k = np.indices(shape)
    np.testing.assert_allclose(result, 2 * i - j + 0.5 * k + 3, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0, 4.0, 6.5])
def test_random_fields_have_mean_0_and_standard_deviation_1(scale):
    rng = np.random.default_rng(4)
    field = np.stack([fields.random_field(rng, (40, 40, 40), scale) for _ in range(8)])
    assert abs(field.mean()) < 0.1
    assert abs(field.std() - 1) < 0.1


def test_cohort_from_label_maps_drops_what_is_not_brain(label_maps, tmp_path):
    out = tmp_path / "cohort"
    manifest = phantom.write_cohort(
        out, healthy=1, patients=1, seed=0, voxel_size=2.0, label_maps=label_maps
    )
    assert manifest["label_maps"] == ["one_seg.nii.gz"]
    entry = manifest["subjects"][0]
    assert entry["anatomy"] == "one_seg"
    image = np.asarray(nib.load(out / entry["scan"]).dataobj) / entry["white_level"]
    milliliters = (image > 0).sum() * 2.0**3 / 1000
    assert 65 < milliliters < 165  # balls of 28 mm (cortex) and 31 mm (CSF), with spread
    center = ndimage.center_of_mass(image > 0)
    middle = tuple(slice(int(c) - 1, int(c) + 2) for c in center)
    assert image[middle].mean() > 2  # the ventricle


def test_label_map_in_any_pose_comes_back_in_that_of_mni(label_maps):
    (path,) = anatomy_sources.find_label_maps(label_maps)
    straight = anatomy_sources.load_label_map(str(path), 1)
    image = nib.load(path)
    labels = np.asarray(image.dataobj)
    turned = ndimage.rotate(labels, 20, axes=(1, 2), reshape=False, order=0)  # a nod of 20 degrees
    nib.save(nib.Nifti1Image(turned, image.affine), path.with_name("turned_seg.nii.gz"))
    nodding = anatomy_sources.load_label_map(str(path.with_name("turned_seg.nii.gz")), 1)
    apart = nodding.pose[:3, :3] @ straight.pose[:3, :3].T
    degrees = np.rad2deg(np.arccos((np.trace(apart) - 1) / 2))
    assert degrees == pytest.approx(20, abs=1)


def test_every_anatomy_of_patients_has_every_grade():
    for count in (1, 2, 3, 4, 20):
        numbers = range(2 * count)
        met = {(anatomy_of(PATIENT, number, count), number % 2) for number in numbers}
        assert len(met) == 2 * count
        assert [anatomy_of(HEALTHY, number, count) for number in numbers] == [*range(count)] * 2


def test_the_anatomy_of_each_scan_is_told_as_a_group(cohort):
    out, manifest = cohort
    table = pd.read_csv(out / "groups.csv").set_index("scan")["group"]
    assert {"sub-CC110033", "Brats17_PHA_1_1"} < set(table.index)
    assert set(table) == {entry["anatomy"] for entry in manifest["subjects"]}


def test_no_anatomy_is_both_trained_on_and_tested_on(label_maps, tmp_path):
    one = next(label_maps.iterdir())
    for name in ("three", "two"):
        shutil.copy(one, one.with_name(f"{name}_seg.nii.gz"))
    out = tmp_path / "cohort"
    manifest = phantom.write_cohort(
        out,
        healthy=3,
        test=1,
        patients=1,
        held_out=1,
        seed=0,
        voxel_size=COARSE,
        label_maps=label_maps,
    )
    anatomies = {}
    for entry in manifest["subjects"]:
        anatomies.setdefault(entry["kind"], []).append(entry["anatomy"])
    assert manifest["held_out"] == ["two_seg.nii.gz"]
    assert anatomies["healthy"] == ["one_seg", "three_seg", "one_seg"]
    assert anatomies["healthy, held out"] == anatomies["patient"] == ["two_seg"]
    listed = (out / "test_subjects.txt").read_text().split()
    assert listed == ["sub-CC710033"]
    assert (out / "healthy/sub-CC710033/anat/sub-CC710033_T2w.nii.gz").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": 1, "test": 1}, "less than the label maps, got 1 of 1"),
        ({"test": 1}, "anatomies of their own"),
    ],
)
def test_split_that_leaves_no_anatomy_is_refused(change, message, label_maps, tmp_path):
    with pytest.raises(InputError, match=message):
        phantom.write_cohort(
            tmp_path / "out", healthy=1, patients=0, seed=0, label_maps=label_maps, **change
        )
    assert not (tmp_path / "out").exists()


def test_mass_effect_goes_outward_in_mirrored_brains_too():
    grid = Grid((24, 24, 24), 4.0, np.full(3, -46.0))
    points = grid.lattice()
    coarse = SimpleNamespace(outside=np.full((60, 60, 60), -40.0), affine=np.diag([2, 2, 2, 1]))
    coarse.affine = coarse.affine + np.pad(np.full((3, 1), -60.0), ((0, 1), (3, 0)))
    rng = np.random.default_rng(0)
    tumor = lesions.draw_tumors(rng, "HGG", places=np.zeros((1, 3)), depth=np.array([40.0]))[0]
    mirrored = points * [-1, 1, 1]
    pushed = _push([tumor], SimpleNamespace(coarse=coarse), grid, mirrored)
    right = (points[..., 0] > 4) & (np.abs(points) < 0.7 * tumor.radius).all(axis=-1)
    # Tissue seen on the right came from nearer the middle, whichever way the anatomy is turned.
    assert (np.abs(pushed[..., 0]) < np.abs(mirrored[..., 0]))[right].all()


def test_thick_slices_smooth_along_the_third_axis_and_keep_the_strength_of_noise():
    noise = np.random.default_rng(0).standard_normal((30, 30, 60))
    smooth = _smooth_noise(noise, 1.5)
    assert smooth.std() == pytest.approx(1, abs=0.01)
    along, across = (np.diff(smooth, axis=axis).std() for axis in (2, 0))
    assert along < 0.6 * across


def test_bone_that_the_closed_brain_reaches_is_dark_and_no_part_of_it(label_maps):
    (path,) = anatomy_sources.find_label_maps(label_maps)
    image = nib.load(path)
    labels = np.asarray(image.dataobj).copy()
    x, y, z = np.indices(labels.shape)
    spur = (np.abs(x - 55) < 3) & (y > 45) & (np.abs(z - 45) < 3) & (labels > 0)
    labels[spur] = 514
    bony = path.with_name("bony_seg.nii.gz")
    nib.save(nib.Nifti1Image(labels, image.affine), bony)
    anatomy = anatomy_sources.load_label_map(str(bony), 1)
    levels = tissues.draw_intensities(np.random.default_rng(0))
    painted = anatomy.paint(np.random.default_rng(1), levels)
    bone = anatomy.tissue == tissues.TISSUE_INDEX["bone"]
    within = bone & (anatomy.from_coarse(anatomy.coarse.outside) < -4)
    assert within.sum() > 100
    assert np.median(painted[within]) < 0.6
    assert anatomy.coarse.cerebrum.sum() < _cerebrum(path)


def _cerebrum(path):
    return anatomy_sources.load_label_map(str(path), 1).coarse.cerebrum.sum()


def test_left_and_right_hemispheres_part_at_the_midline(label_maps):
    (path,) = anatomy_sources.find_label_maps(label_maps)
    anatomy = anatomy_sources.load_label_map(str(path), 1)
    midline = anatomy.coarse.midline
    middle = midline.shape[0] // 2
    assert midline[middle - 1 : middle + 1].max() < 3
    assert midline[middle + 8, midline.shape[1] // 2, midline.shape[2] // 2] > 5


def test_command_line_writes_a_cohort_and_refuses_to_replace_it(tmp_path, capsys):
    out = tmp_path / "cohort"
    arguments = f"--out {out} --healthy 1 --patients 0 --seed 1 --voxel-size 4".split()
    assert phantom.main(arguments) == 0
    assert "1 healthy subjects and 0 patients" in capsys.readouterr().out
    before = files_of(out)
    assert phantom.main(arguments) == 2
    assert "exists; choose another name or pass --force" in capsys.readouterr().err
    assert phantom.main([*arguments, "--force"]) == 0
    assert files_of(out) == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"healthy": -1}, "--healthy from 0 to 9000, got -1"),
        ({"patients": -2}, "--patients from 0 to 9000, got -2"),
        ({"healthy": 0, "patients": 0}, "Nothing to make"),
        ({"seed": -1}, "--seed of 0 or more, got -1"),
        ({"voxel_size": 0.4}, "--voxel-size from 0.5 to 4.0 mm, got 0.4"),
        ({"voxel_size": 4.5}, "--voxel-size from 0.5 to 4.0 mm, got 4.5"),
        ({"voxel_size": float("nan")}, "--voxel-size from 0.5 to 4.0 mm, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message, tmp_path):
    settings = {"healthy": 1, "patients": 1, "seed": 0, **change}
    with pytest.raises(InputError, match=message):
        phantom.write_cohort(tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_folder_without_label_maps_is_refused_with_the_pattern(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--healthy", "1", "--patients", "0"]
    arguments += ["--seed", "0", "--label-maps", str(tmp_path)]
    assert phantom.main(arguments) == 2
    assert r"label maps *.nii.gz or *.nii" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "zoom", "message"),
    [
        (np.arange(512.0).reshape(8, 8, 8) / 10, 1.0, "expected whole numbers"),
        (np.arange(512.0).reshape(8, 8, 8) % 2 * 3, 1.0, "no cerebral white"),
        (np.arange(512.0).reshape(8, 8, 8) % 2 + 2, 1.0, "no cerebral ventricle"),
        (np.arange(512.0).reshape(8, 8, 8) % 3, 2.0, "voxels of 1 mm, got voxels of"),
        (np.zeros((8, 8, 8, 2)), 1.0, "3-D"),
        (None, 1.0, "broken.nii"),
    ],
)
def test_file_that_is_no_label_map_is_named_and_nothing_is_written(values, zoom, message, tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    path = folder / "broken.nii"
    if values is None:
        path.write_bytes(b"not an image")
    else:
        nib.save(nib.Nifti1Image(values, np.diag([zoom] * 3 + [1])), path)
    with pytest.raises(InputError, match=message):
        phantom.write_cohort(
            tmp_path / "out", healthy=1, patients=0, seed=0, voxel_size=COARSE, label_maps=folder
        )
    assert list(tmp_path.iterdir()) == [folder]
