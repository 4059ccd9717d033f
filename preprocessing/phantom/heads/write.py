"""Painted heads as NIfTI files with the truth beside them: a test set of any size.

Files of head 7:
    OUT/head-0007_T2w.nii.gz    the scan, as acquired (of any contrast; the name is what users have)
    OUT/head-0007_mask.nii.gz   the brain, on the scan's grid
    OUT/head-0007_seg.nii.gz    its lesions, on the scan's grid; empty without any
    OUT/head-0007.json          landmarks, pose, and what was drawn
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.phantom.heads.anatomy import HeadAnatomy
from preprocessing.phantom.heads.paint import Head, on_acquired, paint_head
from preprocessing.phantom.nifti import write_nifti
from tf_lesion.scans.finder import canonical
from tf_lesion.scans.finder.pose import apply, fit_similarity, without_scale

INTENSITY = 1000  # of the 99th percentile, in the file
HALF = 0.5


def true_pose(head: Head) -> np.ndarray:
    """Rigid [4, 4], mm of the scan -> mm in MNI space: the best fit of the landmarks."""
    fit = fit_similarity(head.landmarks, canonical.landmarks())
    return without_scale(fit, head.landmarks.mean(axis=0))


def landmark_errors(
    landmarks: np.ndarray, mni_from_scan: np.ndarray, scan_from_mni: np.ndarray
) -> np.ndarray:
    """[20] mm: how far apart the true pose and another put each landmark [20, 3] of the scan."""
    found = apply(np.linalg.inv(scan_from_mni), landmarks)
    return np.linalg.norm(found - apply(mni_from_scan, landmarks), axis=1)


def true_mask(head: Head) -> np.ndarray:
    """[X, Y, Z] bool, the brain on the voxels of the scan."""
    return on_acquired(head.outside, head) < 0


def lesion_mask(head: Head) -> np.ndarray:
    """[X, Y, Z] bool, lesions in the brain on the voxels of the scan."""
    if head.lesion is None:
        return np.zeros(head.image.shape, bool)
    return (on_acquired(head.lesion, head) >= HALF) & true_mask(head)


def write_head(
    folder: str | Path, anatomies: list[HeadAnatomy], seed: int, number: int, *, fine_mm: float
) -> dict[str, Any]:
    """Paint head `number` and write its four files; returns the content of the last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = paint_head(anatomies, seed, number, fine_mm=fine_mm)
    top = float(np.percentile(head.image, 99)) or 1.0
    name = f"head-{number:04d}"
    for suffix, values in (
        ("T2w", np.rint(head.image / top * INTENSITY).clip(0, 32767).astype(np.int16)),
        ("mask", true_mask(head).astype(np.uint8)),
        ("seg", lesion_mask(head).astype(np.uint8)),
    ):
        write_nifti(folder / f"{name}_{suffix}.nii.gz", values, head.affine)
    truth = {
        "scan": f"{name}_T2w.nii.gz",
        "mni_from_scan": true_pose(head).tolist(),
        "landmarks_mm": np.round(head.landmarks, 3).tolist(),
        **head.facts,
    }
    (folder / f"{name}.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    return truth
