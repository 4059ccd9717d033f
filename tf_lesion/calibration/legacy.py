"""Runs calibrated by earlier versions: five files beside the weights, read as one calibration.

lambda.json             thresholds.json  thresholds_score.json
postprocessing.json     healthy_residual.npz
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from tf_lesion.calibration.file import HEALTHY_SLICES, Calibration, Threshold
from tf_lesion.config import solver_name
from tf_lesion.detection.postprocessing import HealthyMaps
from tf_lesion.files import InputError


def read_legacy(folder: str | Path) -> Calibration | None:
    """The `Calibration` in the old files of a folder, or None if there are none.

    Raises:
        InputError: if a file cannot be read, or two belong to different weights.
    """
    names = ("lambda", "thresholds", "thresholds_score", "postprocessing")
    paths = {name: Path(folder) / f"{name}.json" for name in names}
    stored = {name: _json(path) for name, path in paths.items() if path.exists()}
    if not stored:
        return None
    try:
        identities = {_identity(values) for values in stored.values()}
        if len(identities) > 1:
            raise InputError(f"Expected files of one model in {folder}, got {sorted(identities)}.")
        return _joined(stored, Path(folder) / "healthy_residual.npz", identities.pop())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"Expected the files of a calibration in {folder} ({error!r}).") from error


def _joined(stored: dict[str, Any], maps: Path, identity: str) -> Calibration:
    chosen = stored.get("lambda", {})
    # Those of the score have the residual's too, of the same restoration: it may average.
    made = stored.get("thresholds_score") or stored.get("thresholds", {})
    restoration = dict(made.get("restoration", {}))
    if "solver" in restoration:
        restoration["solver"] = solver_name(restoration)
    steps = stored.get("postprocessing", {}).get("steps")
    return Calibration(
        model_identity=identity,
        restoration=restoration,
        points={
            score: tuple(sorted((Threshold(**p) for p in found), key=lambda p: p.target_fpr))
            for score, found in made.get("points", {}).items()
        },
        tv_weight=chosen.get("tv_weight", restoration.get("tv_weight")),
        curve=tuple(chosen.get("curve", ())),
        postprocessing=steps or restoration.get("postprocessing", ""),
        healthy=_maps(maps) if maps.exists() else None,
        method=made.get("method", "exact"),
        cohort=made.get("cohort", {}),
        chosen_by={"thresholds": HEALTHY_SLICES} if made else {},
    )


def _identity(values):
    return values.get("model_identity") or values["model_id"]


def _json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"Expected JSON in {path} ({error}).") from error


def _maps(path):
    with np.load(path) as stored:
        names = [field.name for field in dataclasses.fields(HealthyMaps)]
        return HealthyMaps(*(stored[name].astype(np.float32) for name in names))
