"""What was chosen for a model on healthy slices: its lambda and its thresholds, read from JSON."""

import json
from pathlib import Path

from tf_lesion.config import check
from tf_lesion.files import InputError

AUTO = "auto"
FILE_NAME = "lambda.json"  # in the folder of a run, from eval.select_lambda
# Likewise, from eval.thresholds: of the residual, and of its post-processed score.
THRESHOLD_FILES = {"residual": "thresholds.json", "score": "thresholds_score.json"}


def restoration_of(loaded, *, tv_weight=None, steps=None, solver=None):
    """The model's `RestorationConfig` with what was given.

    Args:
        loaded: `runs.LoadedModel`.
        tv_weight: a number or the text of one; "auto" takes the run's own; None the preset's.
        steps: of gradient ascent; None takes the preset's, or those of the solver.
        solver: one of `config.SOLVERS`; None takes the preset's.

    Raises:
        InputError: if a value makes no sense or means nothing to the model, or the run has no
            lambda of its own.
    """
    _check_meaning(loaded, tv_weight=tv_weight, steps=steps, solver=solver)
    if tv_weight == AUTO:
        tv_weight = read_lambda(loaded)
    try:
        tv_weight = None if tv_weight is None else float(tv_weight)
    except ValueError as error:
        raise InputError(f"Expected --tv-weight as a number or auto, got {tv_weight!r}.") from error
    given = {"tv_weight": tv_weight, "steps": steps}
    config = loaded.config
    if solver is not None:
        config = config.replace(restoration=config.restoration.with_solver(solver))
    config = config.replace(
        restoration={name: value for name, value in given.items() if value is not None}
    )
    return check(config).restoration


def _check_meaning(loaded, *, tv_weight, steps, solver):
    which = f"{loaded.path} ({loaded.config.network.model})"
    if tv_weight is not None and not loaded.model.has_lambda:
        raise InputError(
            f"Expected no lambda (--tv-weight), since {which} is not restored with a total "
            f"variation; leave it out, and leave eval.select_lambda out."
        )
    if solver is not None and not loaded.model.has_lambda:
        raise InputError(f"Expected no --solver, since {which} is not restored by ascent.")
    if steps is not None and not loaded.model.has_steps:
        raise InputError(f"Expected no --steps, since {which} detects in one pass; leave it out.")


def read_lambda(loaded, path=None):
    """The lambda chosen for a model; from `lambda.json` in its run by default.

    Raises:
        InputError: if there is none, or it was chosen for other weights.
    """
    path = Path(path or loaded.extras / FILE_NAME)
    how = f"make it with python -m eval.select_lambda --model {loaded.path} --cache HEALTHY.h5"
    if not path.exists():
        raise InputError(f"--tv-weight auto needs {path}, which is not there; {how}.")
    try:
        stored = json.loads(path.read_text())
        identity, tv_weight = stored["model_identity"], float(stored["tv_weight"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"Expected a choice of lambda in {path} ({error!r}); {how}.") from error
    if identity != loaded.identity:
        raise InputError(
            f"{path} was chosen for model {identity}, but {loaded.path} now is "
            f"{loaded.identity}; {how} --force."
        )
    return tv_weight


def read_thresholds(loaded, path):
    """The thresholds of the residual that eval.thresholds chose for a model.

    Returns:
        ({name: {"target_fpr", "threshold", "fpr"}}, settings of the healthy restoration), with
        names such as fpr_0.05, by ascending rate.

    Raises:
        InputError: if `path` is no such file, or belongs to another model.
    """
    try:
        stored = json.loads(Path(path).read_text())
        points = sorted(stored["points"]["residual"], key=lambda point: point["target_fpr"])
        named = {
            f"fpr_{point['target_fpr']:g}": {
                name: float(point[name]) for name in ("target_fpr", "threshold", "fpr")
            }
            for point in points
        }
        restoration, identity = stored["restoration"], stored["model_id"]
        if loaded.model.has_lambda:
            float(restoration["tv_weight"]), int(restoration["steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"Expected thresholds written by eval.thresholds in {path} ({error!r})."
        ) from error
    if identity != loaded.identity:
        raise InputError(
            f"{path} belongs to model {identity}, not to {loaded.identity}; make thresholds for "
            f"{loaded.path} with eval.thresholds."
        )
    return named, restoration
