"""Where a result comes from: commit, versions, device."""

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tf_lesion import __version__, devices

PACKAGES = ("tensorflow", "keras", "numpy", "scipy", "nibabel", "SimpleITK", "nilearn")
MADE_BY = "made_by"  # attribute of HDF5 files: the stamp as JSON


@cache
def commit() -> str | None:
    """Commit of the checkout the package runs from, or None outside one."""
    root = Path(__file__).resolve().parents[1]
    ask = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        found = subprocess.check_output(ask, cwd=root, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    top, head = found.splitlines()
    # An environment inside somebody's repository is no checkout of ours.
    return head if Path(top).resolve() == root else None


@cache
def versions() -> dict[str, str]:
    """{package: version} of what results depend on."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def stamp() -> dict[str, Any]:
    """What every output says of how it was made, JSON-serialisable."""
    return {
        "tf_lesion_version": __version__,
        "commit": commit(),
        "versions": versions(),
        "device": devices.describe(),
    }
