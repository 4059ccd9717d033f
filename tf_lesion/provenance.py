"""Where a result comes from: commit, versions, device."""

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from tf_lesion import __version__, devices

PACKAGES = ("tensorflow", "keras", "numpy", "scipy", "nibabel", "SimpleITK", "nilearn")
SUBJECTS = ("test_subjects", "brains", "skipped", "reference")  # settings of a cache that name some
MADE_BY = "made_by"  # attribute of HDF5 files: the stamp as JSON


@cache
def checkout() -> dict[str, Any]:
    """{commit, changed} of the checkout the package runs from; None for both outside one.

    It is changed if a Python file differs from the commit, or is not in it.
    """
    root = Path(__file__).resolve().parents[1]
    try:
        top, head = _git("rev-parse", "--show-toplevel", "HEAD", root=root).splitlines()
        ours = _git("ls-files", "--", Path(__file__).name, root=Path(__file__).parent)
        changes = _git("status", "--porcelain", "--", "*.py", root=root)
    except (OSError, subprocess.CalledProcessError):
        top = ours = ""
    # An environment inside somebody's repository is no checkout of ours.
    if not ours or Path(top).resolve() != root:
        return {"commit": None, "changed": None}
    return {"commit": head, "changed": bool(changes)}


def _git(*command, root):
    """What git says; it writes nothing: on a full disk `status` would leave its lock behind."""
    return subprocess.check_output(
        ["git", "--no-optional-locks", *command], cwd=root, text=True, stderr=subprocess.DEVNULL
    )


@cache
def versions() -> dict[str, str]:
    """{package: version} of what results depend on."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def stamp() -> dict[str, Any]:
    """What every output says of how it was made, JSON-serialisable."""
    return {
        "tf_lesion_version": __version__,
        **checkout(),
        "versions": versions(),
        "device": devices.describe(),
    }


def anonymous(value: Any) -> Any:
    """JSON to be handed on: of a path its last part, of subjects how many they are."""
    if isinstance(value, dict):
        return {
            key: _counted(inner) if key in SUBJECTS else anonymous(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [anonymous(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and os.sep in value else value


def _counted(subjects):
    """How many are named; None for the name of one."""
    if isinstance(subjects, str):
        return None
    return len(subjects) if isinstance(subjects, list | dict) else subjects
