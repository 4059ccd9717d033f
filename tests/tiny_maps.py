"""Small maps of a scan, as `tf-lesion detect` writes them, for the tests of the report."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import tiny_scans
from scipy import ndimage

from tf_lesion.report.pages import VERSION_NAMES

LIMIT = 0.15  # the threshold at 5 %
VOXEL_MM = tiny_scans.VOXEL_MM
UNPLACED = 2  # the lesion of `with_tables` of which little is known
AFFINE_ML = (VOXEL_MM / 10) ** 3


def maps_of(folder, name="P_1", *, blobs=(((-20, -10, 30), 14),), truth=None, **changes):
    """Maps and JSON as restore_brats.py writes them: a brain, and a residual in balls."""
    values, affine = tiny_scans.brain()
    brain = values > 0
    residual = np.where(brain, 0.02 + 0.05 * values / values.max(), 0)
    for center, radius in blobs:
        residual[tiny_scans.blob(affine, values.shape, center, radius) & brain] = 0.3
    mask = residual > LIMIT
    scan = tiny_scans.write(folder / f"{name}_t2.nii.gz", values.astype(np.int16), affine)
    maps = {"restored": 0.5 * brain, "residual": residual, "fpr_0.05": mask.astype(np.uint8)}
    maps["fpr_0.1"] = (residual > LIMIT / 2).astype(np.uint8)
    for key, volume in maps.items():
        volume = volume if volume.dtype == np.uint8 else volume.astype(np.float32)
        tiny_scans.write(folder / f"{name}_{key}.nii.gz", volume, affine)
    if truth is not None:
        label = tiny_scans.blob(affine, values.shape, *truth) & brain
        tiny_scans.write(folder / f"{name}_seg.nii.gz", label.astype(np.uint8), affine)
    at = {"count": len(blobs), "volume_ml": mask.sum() * AFFINE_ML, "largest_ml": 1.0}
    at |= {"largest_center_mm": [0, 0, 0], "threshold": LIMIT}
    facts = {
        "name": name,
        "command": "restore_brats.py --input x",
        "tf_lesion_version": "0.1.0",
        "commit": None,
        "versions": dict.fromkeys(VERSION_NAMES, "1.2.3"),
        "input": str(scan),
        "model": "gmvae",
        "model_path": "runs/gmvae",
        "model_identity": "0123456789ab",
        "precision": "float32",
        "seed": 7,
        "steps": 150,
        "tv_weight": 1.8,
        "slice_step": 1,
        "slices_restored": 30,
        "scan_settings": {"align": "rigid"},
        "scan": {"shape": list(values.shape), "voxel_sizes_mm": [4, 4, 4], "orientation": "RAS"},
        "brain_ml": brain.sum() * AFFINE_ML,
        "examined_fraction": 0.987,
        "mutual_information": 0.5,
        "atlas_overlap": 0.9,
        "histogram_distance": None,
        "lesions": {
            "fpr_0.05": {"target_fpr": 0.05, "healthy_fpr": 0.0499, **at},
            "fpr_0.1": {"target_fpr": 0.1, "healthy_fpr": 0.0998, **at, "threshold": LIMIT / 2},
        },
        "warnings": [],
        "truth": None if truth is None else str(folder / f"{name}_seg.nii.gz"),
        "files": {key: f"{name}_{key}.nii.gz" for key in maps},
        **changes,
    }
    (folder / f"{name}_restoration.json").write_text(json.dumps(facts))
    return folder


def with_tables(folder, name="P_1", *, verdict="look"):
    """Add to maps what newer versions write: numbers, a table of lesions, a check, more volumes."""
    path = folder / f"{name}_restoration.json"
    facts = json.loads(path.read_text())
    mask = nib.load(folder / facts["files"]["fpr_0.05"])
    restored = nib.load(folder / facts["files"]["restored"]).get_fdata(dtype=np.float32)
    numbers, count = ndimage.label(np.asarray(mask.dataobj))
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)[1:]
    numbers = np.r_[0, 1 + np.argsort(np.argsort(-sizes))][numbers]  # the largest is 1
    volumes = {
        "labels_fpr_0.05": numbers.astype(np.uint16),
        "labels_fpr_0.1": numbers.astype(np.uint16),
        "uncertainty": (0.01 * numbers).astype(np.float32),
        "normalized": restored,
        "brain": (restored != 0).astype(np.uint8),
    }
    for key, volume in volumes.items():
        tiny_scans.write(folder / f"{name}_{key}.nii.gz", volume, mask.affine)
        facts["files"][key] = f"{name}_{key}.nii.gz"
    found = range(1, count + 1)
    centers = np.array(ndimage.center_of_mass(numbers > 0, numbers, found)).reshape(-1, 3)
    table = pd.DataFrame(
        {"lesion": found, "volume_ml": np.bincount(numbers.ravel())[1:] * AFFINE_ML}
    )
    table[["center_x_mm", "center_y_mm", "center_z_mm"]] = centers * VOXEL_MM + mask.affine[:3, 3]
    table[["mni_x_mm", "mni_y_mm", "mni_z_mm"]] = [-41.0, 2.0, 3.0]
    table["region"] = [f"region {number}" for number in found]
    table["peak_score"], table["mean_score"], table["mean_residual"] = 0.712, 0.5, 0.3
    table["ventricle_distance_mm"], table["outside_window"] = 12.0, 0.25
    table.loc[table["lesion"] == UNPLACED, ["mni_x_mm", "region", "peak_score"]] = np.nan
    both = pd.concat([table.assign(target_fpr=rate) for rate in (0.05, 0.1)])
    both.to_csv(folder / f"{name}_lesions.csv", index=False)
    (folder / f"{name}_qc.png").write_bytes(b"picture")
    facts["tables"] = {"lesions": f"{name}_lesions.csv"}
    facts["qc"] = {"verdict": verdict, "reasons": [], "picture": f"{name}_qc.png"}
    if verdict != "pass":
        facts["qc"]["reasons"] = ["Half of the <brain> is cut."]
    path.write_text(json.dumps(facts))
    return folder
