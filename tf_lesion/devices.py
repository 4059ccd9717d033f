"""The device that TensorFlow computes on."""

import os
from typing import Any


def start(*, device: str = "auto", threads: int | None = None, tf32: bool = False) -> None:
    """Start TensorFlow."""
    del device, threads, tf32
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def describe() -> dict[str, Any]:
    """What it computes on."""
    return {}
