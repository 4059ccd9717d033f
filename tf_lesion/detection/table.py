"""The lesions of a scan as a table: how large, where, how sure; and all scans as another."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from nibabel.affines import apply_affine

from tf_lesion.detection import regions
from tf_lesion.detection.facts import LOOK, verdict
from tf_lesion.detection.layout import FAILED
from tf_lesion.detection.lesions import voxel_ml

AXES = ("x", "y", "z")
DECIMALS = {
    "volume_ml": 6,
    **{f"{kind}_{axis}_mm": 3 for kind in ("center", "mni") for axis in AXES},
    **dict.fromkeys(("peak_score", "mean_score", "mean_residual", "outside_window"), 4),
    "ventricle_distance_mm": 1,
}
COLUMNS = ("target_fpr", "lesion", "voxels", *DECIMALS, "region")


def lesion_table(
    numbers: np.ndarray,
    *,
    score: np.ndarray,
    residual: np.ndarray,
    seen: np.ndarray,
    affine: np.ndarray,
    scan_from_mni: np.ndarray,
    target_fpr: float,
) -> pd.DataFrame:
    """One row a lesion, in the order of its number.

    Args:
        numbers: [X, Y, Z] integers of `lesions.label_lesions`.
        score: [X, Y, Z], the map that was thresholded.
        residual: [X, Y, Z], normalized intensity.
        seen: [X, Y, Z], above 0 in the brain that lies in the model's window.
        affine: [4, 4], voxel -> mm of the scan.
        scan_from_mni: [4, 4], mm of MNI space -> mm of the scan.
        target_fpr: of the threshold.

    Returns:
        `COLUMNS`: volume in milliliters, centers of mass in mm of the scan (RAS) and of MNI space,
        largest and mean score, mean residual, share of the lesion outside the window, distance to
        the nearest ventricle and name of the region, see `detection.regions`.
    """
    shape = numbers.shape[:3]
    numbers, score, residual, seen = (
        np.reshape(volume, shape) for volume in (numbers, score, residual, seen)
    )
    voxels = np.argwhere(numbers)
    found = pd.DataFrame({"lesion": numbers[tuple(voxels.T)].astype(int)})
    inside = tuple(voxels.T)
    found["score"], found["residual"] = score[inside].astype(float), residual[inside].astype(float)
    found["outside"] = seen[inside] == 0
    places = {"center": apply_affine(affine, voxels)}
    places["mni"] = apply_affine(np.linalg.inv(scan_from_mni), places["center"])
    for kind, points in places.items():
        found[[f"{kind}_{axis}_mm" for axis in AXES]] = points
    lesions = found.groupby("lesion")
    table = lesions[[f"{kind}_{axis}_mm" for kind in places for axis in AXES]].mean()
    table["target_fpr"], table["voxels"] = target_fpr, lesions.size()
    table["volume_ml"] = table["voxels"] * voxel_ml(affine)
    table["peak_score"], table["mean_score"] = lesions["score"].max(), lesions["score"].mean()
    table["mean_residual"] = lesions["residual"].mean()
    table["outside_window"] = lesions["outside"].mean()
    of_lesion = [places["mni"][rows] for rows in lesions.indices.values()]
    table["ventricle_distance_mm"] = [regions.ventricle_distance(points) for points in of_lesion]
    table["region"] = [regions.region_of(points) for points in of_lesion]
    return table.reset_index()[list(COLUMNS)].round(DECIMALS)


def scan_row(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the table of scans says of one: numbers of its facts, a column each."""
    qc = facts.get("qc") or verdict(facts["warnings"])  # versions before had none
    row = {
        "qc": qc["verdict"],
        "qc_reasons": " ".join(qc["reasons"]),
        "brain_ml": round(facts["brain_ml"], 1),
        "examined_fraction": round(facts["examined_fraction"], 4),
        "mutual_information": facts["mutual_information"],
        "atlas_overlap": round(facts["atlas_overlap"], 4),
        "histogram_distance": facts["histogram_distance"],
    }
    for name, lesions in facts["lesions"].items():
        row |= {f"{key}_{name}": lesions[key] for key in ("volume_ml", "count", "largest_ml")}
    return row


def scan_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The table of scans: what to look at first (failed, then the verdict look), then by name."""
    table = pd.DataFrame(list(rows))
    rank = np.where(table["status"] == FAILED, 0, np.where(table["qc"] == LOOK, 1, 2))
    order = np.lexsort((table["name"].astype(str), rank))
    return table.iloc[order]
