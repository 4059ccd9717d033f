"""Restorations of synthetic patients against their healthy twins."""

import dataclasses
import itertools
from types import SimpleNamespace

import keras
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import tiny_scans

import tf_lesion
from eval import twins
from tf_lesion.config import SOLVERS
from tf_lesion.detection.maps import Detector, RestoredVolume
from tf_lesion.files import InputError
from tf_lesion.scans.intensity import brain_quantiles, normalize
from tf_lesion.scans.prepare import ScanSettings, prepare_scan

AS_PAINTED = ScanSettings(tiny_scans.VOXEL_MM, align="none", mask="nonzero")


def _brains():
    rng = np.random.default_rng(0)
    mask = np.ones((20, 20, 10), bool)
    lesion = np.zeros_like(mask)
    lesion[5:10, 5:10, 3:6] = True
    twin = rng.uniform(0.2, 0.4, mask.shape).astype(np.float32)
    return twin, twin + 0.4 * lesion, mask, lesion


def test_a_perfect_restoration_leaves_nothing_and_none_leaves_all():
    twin, observed, mask, lesion = _brains()
    perfect = twins.against_twin(observed, twin, twin, mask=mask, lesion=lesion)
    assert (perfect["outside"], perfect["inside"], perfect["left"]) == (0, 0, 0)
    assert perfect["ssim"] == pytest.approx(1)
    assert perfect["contrast"] == pytest.approx(0.4)
    none = twins.against_twin(observed, observed, twin, mask=mask, lesion=lesion)
    assert none["left"] == pytest.approx(1)
    assert none["ssim"] < 1


def test_errors_are_told_inside_and_outside():
    twin, observed, mask, lesion = _brains()
    restored = np.where(lesion, twin + 0.1, twin - 0.02)
    found = twins.against_twin(observed, restored, twin, mask=mask, lesion=lesion)
    assert found["inside"] == pytest.approx(0.1, abs=1e-5)
    assert found["outside"] == pytest.approx(0.02, abs=1e-5)
    assert found["left"] == pytest.approx(0.25, abs=1e-4)


def test_a_folder_without_patients_is_refused(tmp_path):
    with pytest.raises(InputError, match="No scans found"):
        twins.measure_twins(None, tmp_path)
    (tmp_path / "a_t2.nii.gz").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"Expected patients of preprocessing.*not here"):
        twins.measure_twins(None, tmp_path)


def test_patients_of_linked_folders_are_measured_and_those_without_a_twin_named(
    tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "patients"
    values, affine = tiny_scans.brain()
    lesion = tiny_scans.blob(affine, values.shape, (-20, -10, 30), 14)
    volumes = {"t2": values + 100 * lesion, "seg": lesion.astype(np.uint8), "twin": values}
    for name, (part, volume) in itertools.product(("a_1", "a_2"), volumes.items()):
        tiny_scans.write(folder / name / f"{name}_{part}.nii.gz", volume, affine)
    (folder / "a_2" / "a_2_twin.nii.gz").unlink()
    (folder / "a_1").rename(tmp_path / "elsewhere")
    (folder / "a_1").symlink_to(tmp_path / "elsewhere")
    detector = SimpleNamespace(
        prior=SimpleNamespace(reference=None),
        prepare=lambda scan, label: prepare_scan(scan, settings=AS_PAINTED, label_path=label),
        restore_volume=lambda prepared: prepared,
    )
    monkeypatch.setattr("tf_lesion.detection.maps.Detector", lambda *_, **__: detector)
    monkeypatch.setattr("tf_lesion.prior.load", lambda *_, **__: None)
    assert twins.main(["--input", str(folder), "--out", str(tmp_path / "t.csv")]) == 1
    assert pd.read_csv(tmp_path / "t.csv")["patient"].tolist() == ["a_1"]
    assert "a_2 is not measured: No such file" in capsys.readouterr().err


@pytest.fixture
def large(tmp_path):
    """A prior whose reference is a healthy brain, and the files of that brain with 200 ml in it."""
    keras.utils.set_random_seed(0)
    prior = tf_lesion.load(tiny_scans.run(tmp_path))
    values, affine = tiny_scans.brain()
    lesion = tiny_scans.blob(affine, values.shape, (-28, -10, 28), 36) & (values > 0)
    assert 180 < lesion.sum() * tiny_scans.VOXEL_MM**3 / 1e3 < 220
    parts = {
        "t2": np.where(lesion, 0.3 * values + 600, values),
        "seg": lesion.astype(np.uint8),
        "twin": values,
    }
    paths = {
        part: tiny_scans.write(tmp_path / f"p_{part}.nii.gz", volume, affine)
        for part, volume in parts.items()
    }
    mask = values > 0
    reference = brain_quantiles(normalize(values, mask), mask)
    return dataclasses.replace(prior, reference=reference), paths


def _without_lesion(paths):
    """What is called in the place of `Detector._restored`: the twin."""

    def restored(prepared, slices, advance=None):
        image = twins.twin_on_grid(prepared, paths["twin"])
        return RestoredVolume(image, np.zeros_like(image), slices)

    return restored


def test_a_lesion_of_200_ml_neither_dims_itself_nor_moves_what_is_healthy(large, monkeypatch):
    prior, paths = large
    once = Detector(prior, align="none")
    denoiser = dataclasses.replace(prior.config.restoration, solver=SOLVERS["denoiser"])
    again = Detector(prior, denoiser, align="none")
    assert (once.matches_again, again.matches_again) == (False, True)
    monkeypatch.setattr(again, "_restored", _without_lesion(paths))
    shifts, levels = [], []
    for detector in (once, again):
        prepared = detector.prepare(paths["t2"], label=paths["seg"])
        lesion, twin = prepared.label > 0, twins.twin_on_grid(prepared, paths["twin"])
        settings = {"mask": prepared.mask, "lesion": lesion, "reference": prior.reference}
        shifts.append(twins.shift(prepared.image, twin, **settings))
        levels.append(np.median(prepared.image[lesion]))
        on_scan = prepared.to_brain_box(prepared.image, order=1)
        same = prepared.normalized[prepared.brain_box]
        assert np.abs(on_scan - same)[same > 0].mean() < 0.01
    assert shifts[0] > 0.04
    assert shifts[1] < 0.005
    assert levels[1] > levels[0] + 0.05


def test_a_twin_has_the_intensities_of_its_patient_whatever_was_added(large, tmp_path):
    prior, paths = large
    for part in ("t2", "twin"):
        scan = nib.load(paths[part])
        moved = tmp_path / f"moved_{part}.nii.gz"
        nib.save(nib.Nifti1Image(scan.get_fdata(dtype=np.float32) + 700, scan.affine), moved)
        paths[part] = moved
    prepared = Detector(prior, align="none").prepare(paths["t2"], label=paths["seg"])
    healthy = prepared.mask & (prepared.label == 0)
    difference = twins.twin_on_grid(prepared, paths["twin"]) - prepared.image
    assert np.abs(difference[healthy]).mean() < 1e-3


@pytest.mark.slow
def test_a_scan_without_a_lesion_is_matched_to_the_same(large, monkeypatch):
    prior, paths = large
    denoiser = dataclasses.replace(prior.config.restoration, solver=SOLVERS["denoiser"])
    detector = Detector(prior, denoiser, align="none")
    monkeypatch.setattr(detector, "_restored", _without_lesion(paths))
    again = detector.prepare(paths["twin"])
    once = prepare_scan(paths["twin"], settings=detector.scan_settings, reference=prior.reference)
    np.testing.assert_allclose(again.image, once.image, atol=2e-3)
    np.testing.assert_allclose(again.normalized, once.normalized, atol=2e-3)
