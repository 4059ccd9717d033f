"""Restorations of synthetic patients against their healthy twins."""

import numpy as np
import pytest

from eval import twins
from tf_lesion.files import InputError


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
    with pytest.raises(InputError, match="Expected patients of preprocessing"):
        twins.measure_twins(None, tmp_path)
