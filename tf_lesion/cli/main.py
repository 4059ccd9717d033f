"""`tf-lesion COMMAND`: every job of the library, by name.

tf-lesion detect patient_t2.nii.gz maps
tf-lesion COMMAND --help
"""

import importlib
import sys
from collections.abc import Sequence

from tf_lesion import __version__
from tf_lesion.cli.command import EXIT_BAD_INPUT

COMMANDS = {  # in the order of use; each is `main(argv)` of the module `tf_lesion.cli.NAME`
    "detect": "lesion maps of a scan, a folder of scans or a BIDS dataset",
    "train": "a prior from a cache of healthy slices",
    "calibrate": "lambda and thresholds of a prior, from healthy slices",
    "export": "a prior as a SavedModel, or as a run to be shipped",
    "report": "an HTML page for every restored scan",
    "evaluate": "how well lesions are found, where there are segmentations",
}


def usage() -> str:
    """What there is, a line a command."""
    lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tf-lesion [--version] [--help] COMMAND ...",
            "",
            "Find lesions in brain MRI without ever having seen one.",
            "",
            *lines,
            "",
            "tf-lesion COMMAND --help says more.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ("",)
    if name in COMMANDS:
        return importlib.import_module(f"tf_lesion.cli.{name}").main(rest)
    if name == "--version":
        print(f"tf-lesion {__version__}")
    elif name in ("--help", "-h", ""):
        print(usage())
    else:
        print(f"error: Expected one of {', '.join(COMMANDS)}, got {name}.", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0 if name else EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
