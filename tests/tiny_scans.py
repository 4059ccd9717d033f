"""Small T2-like scans for the tests of preprocessing, made from the ICBM152 tissue maps."""

import functools

import nibabel as nib
import numpy as np
from nilearn import datasets
from scipy import ndimage
from scipy.spatial.transform import Rotation

from tf_lesion.scans.alignment import atlas_mask_on, to_grid
from tf_lesion.scans.volumes import MniGrid

VOXEL_MM = 4.0
GRAY, WHITE, CSF = 600.0, 350.0, 1000.0  # T2 order, arbitrary units
SKULL, SCALP, AIR_NOISE = 60.0, 700.0, 4.0


@functools.lru_cache(maxsize=2)
def brain(voxel_size=VOXEL_MM):
    """(T2-like brain [X, Y, Z] float32, affine) in MNI space, 0 outside the brain."""
    grid, fine = MniGrid(voxel_size), MniGrid()
    maps = (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    gray, white = (
        to_grid(load(resolution=1).get_fdata(dtype=np.float32), fine.affine, np.eye(4), grid)
        for load in maps
    )
    rest = np.clip(1 - gray - white, 0, 1)
    values = GRAY * gray + WHITE * white + CSF * rest
    noise = np.random.default_rng(0).normal(0, 8, values.shape)
    mask = atlas_mask_on(grid)
    return np.where(mask, np.maximum(values + noise, 1), 0).astype(np.float32), grid.affine


def head(voxel_size=VOXEL_MM):
    """The brain with a dark skull, a bright scalp and noise in the air around it."""
    values, affine = brain(voxel_size)
    distance = ndimage.distance_transform_edt(values == 0) * voxel_size
    air = np.abs(np.random.default_rng(1).normal(0, AIR_NOISE, values.shape))
    whole = np.select([values > 0, distance < 6, distance < 14], [values, SKULL, SCALP], air)
    return whole.astype(np.float32), affine


def rigid(*, degrees=(0, 0, 0), shift=(0, 0, 0), center=(0, -18, 10)):
    """[4, 4] rotation about `center` (mm), then a shift in mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = np.asarray(center) + shift - matrix[:3, :3] @ center
    return matrix


def write(path, values, affine, *, axes="RAS", sform=1, qform=1):
    """Write a volume in RAS to a NIfTI file with other axes and codes."""
    image = nib.Nifti1Image(values, affine)
    start = nib.orientations.io_orientation(affine)
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axes))
    image = image.as_reoriented(turn)
    image.set_sform(image.affine, sform)
    image.set_qform(image.affine, qform)
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def blob(affine, shape, center_mm, radius_mm):
    """[X, Y, Z] bool ball about a point in mm."""
    index = np.indices(shape).reshape(3, -1)
    points = affine[:3, :3] @ index + affine[:3, 3:]
    inside = np.linalg.norm(points - np.reshape(center_mm, (3, 1)), axis=0) <= radius_mm
    return inside.reshape(shape)


def run(folder, *, steps=3, reference=True, align="center"):
    """A run with untrained weights that restores scans on the grid of `VOXEL_MM`."""
    import json

    from conftest import small_config, write_cache

    from tf_lesion.caches.slices import SliceCache
    from tf_lesion.training.runs import Run
    from tf_lesion.training.trainer import Trainer

    grid = MniGrid(VOXEL_MM)
    cache = write_cache(folder / "healthy.h5", shape=grid.slice_shape, crop=grid.crop, train=4)
    made = Run(folder / "run")
    with SliceCache(cache, "Train") as train:
        size = {"height": train.shape[0], "width": train.shape[1]}
        config = small_config(network=size, restoration={"steps": steps, "gradient_clip": 20.0})
        made.write(config, train)
        Trainer(made, config, train=train, test=train).save()
    stored = json.loads(made.config_path.read_text())
    stored["data"]["preprocessing"] = {"scan": {"voxel_size": VOXEL_MM, "align": align}}
    made.config_path.write_text(json.dumps(stored))
    if not reference:
        made.reference_path.unlink()
    return made.folder


def thresholds(path, prior, restoration, values):
    """Write a calibration with thresholds {target FPR: residual} of a prior; returns its path."""
    from tf_lesion.calibration import Calibration, Threshold

    points = tuple(Threshold(rate, value, rate * 0.99) for rate, value in values.items())
    Calibration(
        prior.identity,
        prior.describe(restoration),
        {"residual": points},
        tv_weight=restoration.tv_weight,
    ).save(path, force=True)
    return path
