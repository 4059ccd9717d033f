"""The comparison of cohorts: what its figures mean, its command, and bad input."""

import numpy as np
import pytest
from conftest import write_cache
from matplotlib import image as pictures

from preprocessing import cohort_figure
from preprocessing.cohort_figure import SPECTRUM, regions_on
from tf_lesion.caches.slices import CacheWriter
from tf_lesion.files import InputError
from tf_lesion.scans.alignment import atlas_mask_on
from tf_lesion.scans.volumes import MniGrid

GRID = MniGrid(4.0)
HEIGHTS = np.arange(9, 31)  # of the cerebrum, by index
NOISE = 0.05  # relative to white matter


def write_brains(path, *, levels=(0.2, 0.4), noise=NOISE, fluid=3.5, lesion=0.0):
    """A cache with one subject for each level of white matter; ventricles are `fluid` times it."""
    rng = np.random.default_rng(0)
    brain, regions = atlas_mask_on(GRID), regions_on(GRID)
    ventricles = regions["ventricles"]
    label = np.zeros(GRID.shape, bool)
    label[20:24, 28:32] = bool(lesion)
    with CacheWriter(
        path, slice_shape=GRID.slice_shape, crop=GRID.crop, grid_affine=GRID.affine
    ) as cache:
        for number, level in enumerate(levels):
            image = 1 + noise * rng.standard_normal(GRID.shape)
            image = np.where(label & brain, lesion, np.where(ventricles, fluid, image))
            volumes = {"slices": level * image * brain, "mask": brain, "label": label}
            slices = {name: np.moveaxis(v[:, :, HEIGHTS], 2, 0) for name, v in volumes.items()}
            images = slices.pop("slices")
            cache.append("Test", images, subject_id=f"s{number}", slice_index=HEIGHTS, **slices)
    return path


def test_noise_is_recovered_whatever_the_scale_of_the_scanner(tmp_path):
    for one in cohort_figure.measure(write_brains(tmp_path / "a.h5"), "Test"):
        assert one.figures["noise"] == pytest.approx(NOISE, rel=0.2)
        assert one.figures["spread"] == pytest.approx(NOISE, rel=0.2)
        assert one.figures["intensity 1"] == pytest.approx(1 - 2.33 * NOISE, abs=0.03)


@pytest.mark.slow
def test_fluid_is_counted_and_fills_the_histogram_of_the_ventricles(tmp_path):
    wet, dry = (
        cohort_figure.measure(write_brains(tmp_path / f"{fluid}.h5", fluid=fluid), "Test")[0]
        for fluid in (3.5, 1.0)
    )
    assert dry.figures["fluid"] == dry.figures["ventricles"] == 0
    assert wet.figures["ventricles"] > wet.figures["fluid"] > 0
    bins = np.arange(cohort_figure.BINS) + 0.5
    peak = bins[wet.curves["ventricles"].argmax()] * cohort_figure.BRIGHTEST
    assert peak / cohort_figure.BINS == pytest.approx(3.5, abs=0.05)


def test_lesions_are_left_out_of_the_figures_but_not_of_the_pictures(tmp_path):
    (one,) = cohort_figure.measure(
        write_brains(tmp_path / "a.h5", levels=(0.3,), fluid=1.0, lesion=2.5), "Test"
    )
    assert one.figures["fluid"] == 0
    assert max(image.max() for image in one.examples) > 2.3


def test_noise_is_flat_in_the_spectrum_and_smooth_brains_are_not(tmp_path):
    noisy, smooth = (
        cohort_figure.measure(write_brains(tmp_path / f"{noise}.h5", noise=noise), "Test")[0]
        for noise in (0.3, 0.0)
    )
    assert noisy.curves[SPECTRUM][-5:].mean() > 3 * smooth.curves[SPECTRUM][-5:].mean()


@pytest.mark.slow
def test_command_writes_a_picture_and_a_table_and_does_not_overwrite(tmp_path, capsys):
    caches = [write_brains(tmp_path / f"{name}.h5", levels=(0.3,)) for name in "ab"]
    out = tmp_path / "figure.png"
    arguments = ["--caches", *map(str, caches), "--out", str(out)]
    assert cohort_figure.main(arguments) == 0
    assert pictures.imread(out).shape[1] > 1000
    header, *rows = capsys.readouterr().out.splitlines()
    assert "gradient 90" in header
    assert [row.split("  ")[0] for row in rows] == ["a Test", "b Test"]
    assert cohort_figure.main(arguments) == 2
    assert cohort_figure.main([*arguments, "--force"]) == 0


@pytest.mark.parametrize("names", [["Test"] * 3, ["Train", "Test", "Test"]])
def test_number_of_datasets_must_fit_that_of_caches(names, tmp_path, capsys):
    arguments = ["--caches", "a.h5", "b.h5", "--datasets", *names, "--out", str(tmp_path / "f.png")]
    assert cohort_figure.main(arguments) == 2
    assert "one for each of 2 caches, got 3" in capsys.readouterr().err


def test_cache_of_another_grid_is_refused(tmp_path):
    with pytest.raises(InputError, match="slices of the MNI grid"):
        cohort_figure.measure(write_cache(tmp_path / "plain.h5"), "Test")


def test_subject_without_white_matter_is_named(tmp_path):
    path = tmp_path / "empty.h5"
    empty = np.zeros((2, *GRID.slice_shape))
    with CacheWriter(
        path, slice_shape=GRID.slice_shape, crop=GRID.crop, grid_affine=GRID.affine
    ) as cache:
        cache.append("Train", empty, subject_id="nobody", slice_index=[20, 21])
    with pytest.raises(InputError, match="nobody has no white matter"):
        cohort_figure.measure(path, "Train")
