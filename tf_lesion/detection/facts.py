"""What is said of a scan and its maps: the JSON beside them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from nibabel import aff2axcodes

from tf_lesion.calibration.file import Threshold
from tf_lesion.detection.lesions import voxel_ml
from tf_lesion.scans.prepare import PreparedScan
from tf_lesion.scans.volumes import Scan

SEEN_SHARE = 0.95  # of the brain; below it a warning says so
DIGITS = 3  # of milliliters and millimeters
NO_REFERENCE = "no reference histogram comes with this model: intensities not matched."
PASS, LOOK = "pass", "look"  # verdicts of quality control


def preparation_facts(prepared: PreparedScan, seen: np.ndarray) -> dict[str, Any]:
    """Facts of a `PreparedScan`, JSON-serializable.

    Args:
        prepared: the scan.
        seen: above 0 on the scan's voxels in the brain inside the model's window.
    """
    brain = np.count_nonzero(prepared.scan_mask)
    return {
        "scan": _scan_facts(prepared.scan),
        "scan_from_grid": prepared.scan_from_grid.tolist(),
        "scan_from_mni": prepared.scan_from_mni.tolist(),
        "brain_ml": brain * voxel_ml(prepared.scan.affine),
        "examined_fraction": np.count_nonzero(seen) / brain,
        "mutual_information": _number(prepared.mutual_information),
        "brain": {"kind": prepared.brain_kind, **prepared.confidence.facts()},
        "atlas_overlap": prepared.atlas_overlap,
        "histogram_distance": _number(prepared.histogram_distance),
    }


def warnings_of(prepared: PreparedScan, examined: float, *, matched: bool) -> list[str]:
    """Sentences about what a reader must know: of the header, the brain, the window, the model."""
    warnings = [*prepared.scan.warnings, *prepared.warnings]
    if not matched:
        warnings.append(NO_REFERENCE)
    if examined < SEEN_SHARE:
        warnings.append(f"only {examined:.0%} of the brain were examined.")
    return warnings


def verdict(warnings: list[str]) -> dict[str, Any]:
    """The verdict of quality control, and why: `pass`, or `look` where there is a warning."""
    return {"verdict": LOOK if warnings else PASS, "reasons": warnings}


def lesion_facts(
    lesions: pd.DataFrame, points: Mapping[str, Threshold], *, of: str, unit: str
) -> dict[str, Any]:
    """{threshold: what was found at it}, of the table of the lesions.

    Args:
        lesions: of `table.lesion_table`, of all thresholds.
        points: {name: `Threshold`}.
        of: the map that was thresholded.
        unit: of that map.
    """
    found = {}
    for name, point in points.items():
        rows = lesions[lesions["target_fpr"] == point.target_fpr]
        largest = None if rows.empty else rows.iloc[0]
        center = None if rows.empty else [float(largest[f"center_{axis}_mm"]) for axis in "xyz"]
        found[name] = {
            "of": of,
            "unit": unit,
            "threshold": point.threshold,
            "target_fpr": point.target_fpr,
            "healthy_fpr": point.fpr,
            **point.left_out(),
            "volume_ml": round(float(rows["volume_ml"].sum()), DIGITS),
            "count": len(rows),
            "largest_ml": 0.0 if rows.empty else round(float(largest["volume_ml"]), DIGITS),
            "largest_center_mm": center,
        }
    return found


def _scan_facts(scan: Scan):
    return {
        "shape": list(scan.file_shape),
        "voxel_sizes_mm": [round(float(size), 4) for size in scan.voxel_sizes],
        "orientation": "".join(aff2axcodes(scan.file_affine)),
        "orientation_from": scan.placed_by,
    }


def _number(value):
    return None if math.isnan(value) else value
