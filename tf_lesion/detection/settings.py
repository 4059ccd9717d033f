"""How scans are detected in with a prior: what its training and its calibration decide."""

from typing import Any

from tf_lesion.calibration.file import Threshold
from tf_lesion.config import AUTO
from tf_lesion.detection.postprocessing import HealthyMaps, Postprocessing
from tf_lesion.files import InputError
from tf_lesion.scans.prepare import ScanSettings
from tf_lesion.scans.volumes import MniGrid


def postprocessing_of(prior: Any, steps: str) -> Postprocessing:
    """The `Postprocessing` of a text; "auto" is the calibration's own, if there is one."""
    if steps != AUTO:
        return Postprocessing.parse(steps)
    return Postprocessing() if prior.calibration is None else prior.calibration.steps()


def own_points(
    prior: Any, described: dict[str, Any], processing: Postprocessing
) -> tuple[tuple[Threshold, ...], str]:
    """Thresholds of the prior's calibration, and why there are none ("" if there are).

    Args:
        prior: `Prior`.
        described: how scans will be restored.
        processing: steps of the score; without any, thresholds are those of the residual.
    """
    if prior.calibration is None:
        return (), f"{prior.path} has no calibration; make one with tf-lesion calibrate."
    score = "score" if str(processing) else "residual"
    try:
        return prior.calibration.thresholds(
            score, restoration=described, postprocessing=str(processing)
        ), ""
    except InputError as error:
        return (), str(error)


def healthy_maps(prior: Any) -> HealthyMaps:
    """The healthy maps of its calibration; an `InputError` without them."""
    if prior.calibration is None or prior.calibration.healthy is None:
        raise InputError(
            f"Expected healthy maps with {prior.path} for normalize or relative; make them with "
            f"tf-lesion calibrate."
        )
    return prior.calibration.healthy


def scan_settings(prior: Any, *, align: str | None = None) -> ScanSettings:
    """`ScanSettings` of the training cache; those of the released code where the run has none."""
    stored = dict(prior.data.get("preprocessing", {}).get("scan", {}))
    stored["align"] = align or stored.get("align", "rigid")
    return ScanSettings(**stored)


def aligned_otherwise(prior: Any, settings: ScanSettings) -> list[str]:
    """A sentence if the healthy scans behind the thresholds were aligned otherwise, else none."""
    cohort = {} if prior.calibration is None else prior.calibration.cohort
    align = cohort.get("scan_settings", {}).get("align", settings.align)
    if align == settings.align:
        return []
    return [
        f"the thresholds come from healthy scans with align {align}, this scan has align "
        f"{settings.align}: healthy tissue may exceed them more or less often than stated."
    ]


def crop_of(prior: Any, grid: MniGrid) -> tuple[slice, slice]:
    """The window (x, y) of the grid's slices that the model was trained on.

    Raises:
        InputError: if the grid's is of another size than the model's slices.
    """
    network = prior.config.network
    x0, x1, y0, y1 = prior.data.get("crop", grid.crop)
    if (x1 - x0, y1 - y0) != (network.height, network.width):
        raise InputError(
            f"{prior.path} restores {network.height} x {network.width} slices, the grid of "
            f"{grid.voxel_size:g} mm is cropped to {x1 - x0} x {y1 - y0}."
        )
    return slice(x0, x1), slice(y0, y1)
