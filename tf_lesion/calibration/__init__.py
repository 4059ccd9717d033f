"""What was chosen for a model, and on what: lambda, thresholds, post-processing, healthy maps."""

from tf_lesion.calibration.file import Calibration, Threshold

__all__ = ["Calibration", "Threshold"]
