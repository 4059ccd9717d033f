"""Synthetic strokes and multiple sclerosis: volumes, places, twins, and that gliomas stay."""

import hashlib
import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from preprocessing.phantom import GLIOMA, LESIONS, MS, PATIENT, STROKE, sclerosis, strokes, tumors
from preprocessing.phantom import __main__ as phantom
from preprocessing.phantom.fields import Grid
from preprocessing.phantom.lesions import Lesion, Places, box_of, region
from preprocessing.phantom.subject import LESION_MODULES, make_phantom
from tf_lesion.cli.options import OPTIONS

VOXEL_MM = 3.0
VOXEL_ML = VOXEL_MM**3 / 1000
FLUID = 2.3  # of white matter: more of it than tissue
SIZES = {STROKE: (0.1, 100), MS: (1, 40)}  # ml, of all lesions of a patient


@pytest.fixture(scope="module", params=[STROKE, MS])
def patients(request):
    cases = [
        make_phantom(2, PATIENT, n, voxel_size=VOXEL_MM, lesions=request.param) for n in (0, 1)
    ]
    return request.param, cases


@pytest.fixture(scope="module")
def places():
    """Places in a ball of 70 mm with a ball of 15 mm as ventricle, white matter but for a shell."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-70, 70, (20_000, 3))
    radius = np.linalg.norm(points, axis=1)
    points, radius = points[(radius > 15) & (radius < 70)], radius[(radius > 15) & (radius < 70)]
    outward = points / radius[:, None]
    white = np.clip((68 - radius) / 6, 0, 1)
    return Places(points, 70 - radius, white, radius - 15, -outward, outward)


def many(module, places, count=300):
    return [module.draw(np.random.default_rng(seed), seed, places) for seed in range(count)]


def test_every_kind_that_can_be_asked_for_has_a_module():
    assert tuple(LESION_MODULES) == LESIONS == OPTIONS["--lesions"]["choices"]


def test_label_is_one_that_counts_as_lesion_and_has_the_volume_drawn(patients):
    kind, cases = patients
    for case in cases:
        assert set(np.unique(case.label)) == {0, tumors.EDEMA}
        facts = case.facts
        assert facts["lesion_kind"] == kind
        assert facts["label_ml"] == {"edema": facts["lesion_ml"]}
        assert facts["lesion_ml"] == pytest.approx((case.label > 0).sum() * VOXEL_ML, abs=1e-3)
        drawn = sum(max(lesion["volume_ml"], VOXEL_ML) for lesion in facts["lesions"])
        assert facts["lesion_ml"] == pytest.approx(drawn, rel=0.15, abs=VOXEL_ML)
        assert SIZES[kind][0] * 0.9 <= facts["lesion_ml"] <= SIZES[kind][1] * 1.1


def test_lesions_lie_in_the_brain_and_not_in_the_ventricles(patients):
    _, cases = patients
    for case in cases:
        lesion = case.label > 0
        assert (case.image[lesion] > 0).all()
        assert (case.twin[lesion] / case.facts["white_level"] > FLUID).mean() < 0.1


def test_lesions_are_brighter_than_the_twin_and_the_rest_is_the_same(patients):
    _, cases = patients
    for case in cases:
        lesion = case.label > 0
        white = case.facts["white_level"]
        assert np.median(case.image[lesion]) > np.median(case.twin[lesion]) + 0.15 * white
        far = ~ndimage.binary_dilation(lesion, iterations=4)
        np.testing.assert_array_equal(case.twin == 0, case.image == 0)
        np.testing.assert_array_equal(case.twin[far], case.image[far])


def test_sclerosis_never_darkens():
    case = make_phantom(2, PATIENT, 0, voxel_size=VOXEL_MM, lesions=MS)
    loss = np.maximum(case.twin.astype(int) - case.image, 0)
    # Rician noise can take a voxel of noise down, never a lesion's contrast.
    assert loss.max() <= 0.05 * case.facts["white_level"]


def test_strokes_are_territories_of_2_to_100_ml_or_lacunes_of_1_ml_at_most(places):
    drawn = many(strokes, places)
    assert {len(lesions) for lesions in drawn} == {1}
    infarcts = [lesions[0] for lesions in drawn]
    lacunes = [i.volume_ml for i in infarcts if i.site == "lacune"]
    territories = [i for i in infarcts if i.site == "territory"]
    assert 0.18 < len(lacunes) / len(infarcts) < 0.32
    assert max(lacunes) <= 1
    volumes = [i.volume_ml for i in territories]
    assert 2 <= min(volumes) < 3
    assert 70 < max(volumes) <= 100
    assert 10 < np.median(volumes) < 20  # log-uniform: sqrt(2 * 100) = 14
    assert all(1.4 <= i.level <= 2.6 and 0.6 <= i.edge <= 4 for i in infarcts)
    depth = [70 - np.linalg.norm(i.center) for i in territories]
    assert max(depth) < 20


def test_sclerosis_is_many_small_lesions_most_of_them_near_the_ventricles(places):
    drawn = many(sclerosis, places, count=100)
    assert all(5 <= len(lesions) <= 60 for lesions in drawn)
    assert all(1 <= sum(lesion.volume_ml for lesion in lesions) <= 40 for lesions in drawn)
    lesions = [lesion for of_one in drawn for lesion in of_one]
    volumes = np.array([lesion.volume_ml for lesion in lesions])
    assert 0.06 < np.median(volumes) < 0.12
    assert volumes.max() <= 5
    assert all(1.5 <= lesion.level <= 2.6 for lesion in lesions)
    distance = np.array([np.linalg.norm(lesion.center) - 15 for lesion in lesions])
    assert 0.5 < (distance < 8).mean() < 0.75


@pytest.mark.parametrize("module", [strokes, sclerosis])
def test_lesions_do_not_depend_on_the_number_of_a_patient(module, places):
    first, second = (module.draw(np.random.default_rng(4), n, places) for n in (0, 1))
    assert first == second


@pytest.mark.parametrize("module", [strokes, sclerosis])
def test_a_brain_without_a_fitting_place_has_lesions_all_the_same(module):
    points, direction = np.zeros((3, 3)), np.tile([1.0, 0.0, 0.0], (3, 1))
    where = Places(points, np.full(3, 90.0), np.full(3, 0.3), np.zeros(3), direction, direction)
    assert all(many(module, where, count=10))


def test_a_region_takes_its_volume_and_nothing_but_room():
    grid = Grid((40, 40, 40), 2.0, np.full(3, -39.0))
    lesion = Lesion("here", (0, 0, 0), (1, 0, 0), 5.0, 1.0, 0.0, 2.0, 1.0, 0.0, 0.0)
    box = box_of(lesion, grid)
    room = np.zeros(grid.shape, bool)
    room[20:] = True
    inside, depth = region(
        np.random.default_rng(0), lesion, room=room[box], barrier=np.float32(0), box=box, grid=grid
    )
    assert inside.sum() == 5.0 * 1000 / 2.0**3
    assert not (inside & ~room[box]).any()
    assert (depth[inside] >= 0).all()


@pytest.mark.parametrize("kind", [STROKE, MS])
def test_command_writes_patients_of_a_kind_the_same_every_time(kind, tmp_path, capsys):
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        words = f"--out {out} --healthy 0 --patients 1 --seed 1 --voxel-size 4 --lesions {kind}"
        assert phantom.main(words.split()) == 0
    case = phantom.CASE_NAMES[kind] + "_PHA_0_1"
    for part in ("t2", "seg", "twin"):
        path = f"patients/{kind}/{case}/{case}_{part}.nii.gz"
        assert (outs[0] / path).read_bytes() == (outs[1] / path).read_bytes()
    (entry,) = json.loads((outs[0] / phantom.MANIFEST).read_text())["subjects"]
    label = np.asarray(nib.load(outs[0] / entry["segmentation"]).dataobj)
    assert entry["lesion_ml"] == pytest.approx((label > 0).sum() * 4**3 / 1000, abs=1e-3)
    assert entry["lesions"]


def test_gliomas_are_the_default_and_have_no_lesion_kind():
    case, named = (
        make_phantom(5, PATIENT, 1, voxel_size=4.0, **options)
        for options in ({}, {"lesions": GLIOMA})
    )
    assert list(case.facts)[-4:] == ["grade", "lesion_ml", "label_ml", "tumors"]
    assert case.facts == named.facts
    digests = [hashlib.sha256(c.image.tobytes()).hexdigest() for c in (case, named)]
    assert digests[0] == digests[1]
