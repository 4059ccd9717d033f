"""Restorations of synthetic patients against their healthy twins."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny_scans

from eval import twins
from tf_lesion.files import InputError
from tf_lesion.scans.prepare import ScanSettings


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
        scan_settings=ScanSettings(tiny_scans.VOXEL_MM, align="none", mask="nonzero"),
        restore_volume=lambda prepared: prepared,
    )
    monkeypatch.setattr("tf_lesion.detection.maps.Detector", lambda *_, **__: detector)
    monkeypatch.setattr("tf_lesion.prior.load", lambda *_, **__: None)
    assert twins.main(["--input", str(folder), "--out", str(tmp_path / "t.csv")]) == 1
    assert pd.read_csv(tmp_path / "t.csv")["patient"].tolist() == ["a_1"]
    assert "a_2 is not measured: No such file" in capsys.readouterr().err
