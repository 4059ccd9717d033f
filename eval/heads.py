"""The brain finder on painted heads: where a scan lies and what its brain is are known.

    python -m eval.heads --input phantoms/heads --out heads.csv --jobs 2

Takes the heads of `preprocessing.phantom --heads` through what every scan goes through, and
measures pose and mask against the truth that is written beside them.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.files import InputError, refuse_existing, write_text

GRID_MM = 2.0  # of the shipped detector
PATTERN = "**/head-*.json"
SUFFIXES = ("T2w", "mask", "seg")  # beside the JSON
POSE, LANDMARKS = "mni_from_scan", "landmarks_mm"  # in it
# A head that ought to be refused.
MOST_MM, LEAST_DICE = 10.0, 0.85
KEPT = 0.95  # of a lesion's volume within the mask
LESION_ML = (1.0, 80.0)


def measure_head(truth: str | Path) -> dict[str, Any]:
    """One painted head, prepared as `tf-lesion detect` does, against its truth.

    Args:
        truth: its JSON.

    Returns:
        `head`; `accepted`; `doubts`, why not; `stripped`, as it was taken; `covered`, share of the
        brain in the field of view; `mm`, mean distance of 20 landmarks between the true pose and
        the one found; `dice` of the mask; `lesion_ml`; `kept`, share of the lesions in the mask.
        NaN where nothing was found or where there is no lesion.

    Raises:
        InputError, OSError: if a file of the head lacks or cannot be read.
    """
    from preprocessing.phantom.heads.write import landmark_errors
    from tf_lesion.scans.brain_mask import STRIPPED
    from tf_lesion.scans.prepare import PoorAlignmentError, ScanSettings, prepare_scan
    from tf_lesion.scans.volumes import load_mask, load_scan

    truth = Path(truth)
    scan, mask, lesions = (truth.with_name(f"{truth.stem}_{suffix}.nii.gz") for suffix in SUFFIXES)
    drawn = _read(truth)
    original = load_scan(scan)
    brain, lesion = load_mask(mask, original), load_mask(lesions, original)
    inside = np.count_nonzero(lesion)
    row = {"head": truth.stem, "accepted": True, "doubts": "", "stripped": None}
    row |= dict.fromkeys(("covered", "mm", "dice", "kept"), math.nan)
    row["lesion_ml"] = inside * math.prod(original.voxel_sizes) / 1e3
    try:
        prepared = prepare_scan(scan, settings=ScanSettings(voxel_size=GRID_MM))
    except PoorAlignmentError as error:
        prepared = error.prepared
        row |= {"accepted": False, "doubts": "; ".join(error.doubts)}
    except InputError as error:
        return row | {"accepted": False, "doubts": str(error)}
    found = prepared.scan_mask
    return row | {
        "stripped": prepared.brain_kind == STRIPPED,
        "covered": prepared.confidence.covered,
        "mm": float(landmark_errors(**drawn, scan_from_mni=prepared.scan_from_grid).mean()),
        "dice": 2 * np.count_nonzero(found & brain) / (found.sum() + brain.sum()),
        "kept": np.count_nonzero(lesion & found) / inside if inside else math.nan,
    }


def _read(truth):
    try:
        drawn = json.loads(truth.read_text(encoding="utf-8"))
        pose, landmarks = (np.array(drawn[name], float) for name in (POSE, LANDMARKS))
        return {"mni_from_scan": pose, "landmarks": landmarks}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"Expected what preprocessing.phantom writes of a head in {truth}, got {error!r}."
        ) from error


def _measured(truth):
    """(row, None) or (None, reason)."""
    try:
        return measure_head(truth), None
    except (InputError, OSError) as error:
        return None, f"{truth.stem} is not measured: {error}"


def summary(table: Any) -> str:
    """What `scans/finder/README.md` states, of a table (pandas) of `measure_head`."""
    accepted = table[table["accepted"]]
    wrong = (table["mm"] > MOST_MM) | (table["dice"] < LEAST_DICE)
    lesions = accepted[accepted["lesion_ml"] > 0]
    sized = lesions[lesions["lesion_ml"].between(*LESION_ML)]
    spread = accepted[["mm", "dice", "kept"]].astype(float)
    return "\n".join(
        [
            f"{len(table)} heads, {len(accepted)} accepted",
            f"beyond {MOST_MM:.0f} mm or below a Dice of {LEAST_DICE}: "
            f"{int((wrong & table['accepted']).sum())} accepted, "
            f"{int((wrong & ~table['accepted']).sum())} refused",
            f"lesions that keep {KEPT:.0%} of their volume: "
            f"{int((lesions['kept'] >= KEPT).sum())} of {len(lesions)}, "
            f"{int((sized['kept'] >= KEPT).sum())} of the {len(sized)} "
            f"of {LESION_ML[0]:.0f} to {LESION_ML[1]:.0f} ml",
            "accepted ones:",
            spread.describe(percentiles=[0.05, 0.5, 0.95]).round(3).to_string(),
        ]
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if some heads could not be measured."""
    parser = parser_for("python -m eval.heads", __doc__)
    add(parser, "--input", required=True, help="folder of heads of preprocessing.phantom")
    add(parser, "--jobs", "--force")
    add(parser, "--out", help="CSV with a row per head")
    options = parser.parse_args(argv)
    check_effect(parser, options, {"--force": ("--out", bool(options.out))})
    if options.out:
        refuse_existing(options.out, force=options.force)
    import pandas as pd
    from tqdm import tqdm

    from preprocessing.cohort import in_processes

    heads = sorted(Path(options.input).glob(PATTERN))
    if not heads:
        raise InputError(
            f"Expected heads of preprocessing.phantom ({PATTERN}) in {options.input}, found none."
        )
    measured = in_processes(_measured, [(head,) for head in heads], options.jobs)
    results = list(tqdm(measured, total=len(heads), desc="heads", unit="head"))
    rows = [row for row, _ in results if row]
    reasons = [reason for _, reason in results if reason]
    for reason in reasons:
        print(f"error: {reason}", file=sys.stderr)
    if not rows:
        return 1
    table = pd.DataFrame(rows)
    if options.out:
        write_text(options.out, table.to_csv(index=False), force=options.force)
    print(summary(table))
    return int(bool(reasons))


if __name__ == "__main__":
    raise SystemExit(main())
