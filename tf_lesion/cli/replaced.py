"""Commands of earlier versions: they say what does their job now."""

import sys

from tf_lesion.cli.command import EXIT_BAD_INPUT

REPLACED = {
    "eval.select_lambda": "tf-lesion calibrate --tv-weight auto --grid START:STOP:STEP",
    "eval.thresholds": "tf-lesion calibrate",
    "eval.healthy_residual": "tf-lesion calibrate",
    "eval.score_scans": "tf-lesion evaluate --results MAPS",
    "eval.compare_postprocessing": "tf-lesion evaluate --compare STEPS",
    "tf_lesion.export": "tf-lesion export, with --calibration in place of --thresholds,",
    "tf_lesion.pack": "tf-lesion export --as run",
}


def main(name: str) -> int:
    """Say what replaced the command `name`; returns the exit status of bad input."""
    print(f"error: {name} is gone: {REPLACED[name]} does its job.", file=sys.stderr)
    return EXIT_BAD_INPUT
