"""Unsupervised lesion detection via image restoration with a normative prior (TensorFlow 2).

    import tf_lesion

    prior = tf_lesion.load()
    maps = prior.detect("patient_t2.nii.gz")
    maps.save("maps")

TensorFlow is imported when it is needed.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Calibration", "Prior", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("load", "Prior"):
        from tf_lesion import prior

        return getattr(prior, name)
    if name == "Calibration":
        from tf_lesion.calibration import Calibration

        return Calibration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
