"""Where a result comes from: commit and versions."""

import subprocess
from pathlib import Path


def commit():
    """Commit of the checkout the package runs from, or None outside one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
