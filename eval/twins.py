"""Synthetic patients against their healthy twins: what a restoration ought to give is known.

    python -m eval.twins --input cohort/patients --model pretrained-denoiser --out twins.csv

The twin of a patient of preprocessing.phantom is the same scan without its tumors, pushed alike.
Its intensities go through the patient's own map to normalized ones, so that the two differ in the
lesion alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_lesion.cli.command import check_effect, command
from tf_lesion.cli.options import add, parser_for
from tf_lesion.config import DETECTOR
from tf_lesion.files import InputError, refuse_existing, write_text
from tf_lesion.scans.discovery import find_subjects

SSIM_WINDOW = 7  # pixels of an axial slice
PATTERNS = ("**/*_t2.nii*",)
PARTS = ("seg", "twin")  # beside the scan
MOST_LEFT = 0.5  # of a lesion's contrast, in one that counts as removed


def twin_on_grid(prepared: Any, twin: str | Path) -> np.ndarray:
    """The twin of a `PreparedScan` [X, Y, Z] float32, with the patient's map of intensities."""
    from tf_lesion.scans.alignment import to_grid
    from tf_lesion.scans.prepare import brain_means
    from tf_lesion.scans.volumes import load_scan

    def resample(volume):
        return to_grid(volume, prepared.scan.affine, prepared.scan_from_grid, prepared.grid)

    def means(volume):
        return brain_means(volume, prepared.scan_mask, resample)[0][prepared.mask]

    raw = means(load_scan(prepared.scan.path).data)  # as in the file, like the twin's
    order = np.argsort(raw)
    image = np.zeros_like(prepared.image)
    image[prepared.mask] = np.interp(
        means(load_scan(twin).data), raw[order], prepared.image[prepared.mask][order]
    )
    return image


def against_twin(
    observed: np.ndarray,
    restored: np.ndarray,
    twin: np.ndarray,
    *,
    mask: np.ndarray,
    lesion: np.ndarray,
) -> dict[str, float]:
    """How near a restored volume [X, Y, Z] comes to the twin, normalized intensity.

    Returns:
        `outside`, `inside`: mean absolute error out of the lesion and in it; `contrast`: that of
        the observed scan in the lesion; `left`: share of it that is left; `ssim` of the brain.
    """
    from skimage.metrics import structural_similarity

    error, contrast = np.abs(restored - twin), np.abs(observed - twin)
    inside = mask & lesion
    slices = np.flatnonzero(mask.any(axis=(0, 1)))
    maps = [
        structural_similarity(
            twin[..., z], restored[..., z], win_size=SSIM_WINDOW, data_range=1.0, full=True
        )[1]
        for z in slices
    ]
    numbers = {
        "outside": error[mask & ~lesion].mean(),
        "inside": error[inside].mean(),
        "contrast": contrast[inside].mean(),
        "ssim": np.stack(maps, axis=2)[mask[..., slices]].mean(),
    }
    numbers["left"] = numbers["inside"] / numbers["contrast"]
    return {name: float(value) for name, value in numbers.items()}


def shift(
    observed: np.ndarray,
    twin: np.ndarray,
    *,
    mask: np.ndarray,
    lesion: np.ndarray,
    reference: np.ndarray | None,
) -> float:
    """How far a lesion moves what is healthy by its part in the histogram.

    The mean absolute difference out of the lesion, in normalized intensity, of the observed volume
    [X, Y, Z] from the twin when that is matched by itself; NaN without a reference.
    """
    from tf_lesion.scans.intensity import match_to_reference

    if reference is None:
        return float("nan")
    alone = match_to_reference(twin, mask, reference)
    return float(np.abs(observed - alone)[mask & ~lesion].mean())


def measure_twins(detector: Any, folder: str | Path) -> tuple[Any, dict[str, str]]:
    """(table, failed): pandas, a row of `against_twin` for each synthetic patient; {name: reason}.

    Raises:
        InputError: if there is no patient with a twin.
    """
    import pandas as pd
    from tqdm import tqdm

    rows, failed = [], {}
    subjects = find_subjects(folder, PATTERNS, suffixes=["_t2"])
    for subject in tqdm(subjects, desc="twins", unit="patient"):
        try:
            rows.append({"patient": subject.name, **_measured(detector, subject)})
        except (InputError, OSError) as error:
            failed[subject.name] = str(error)
    if not rows:
        raise InputError(
            f"Expected patients of preprocessing.phantom with *_twin.nii.gz in {folder}, got none; "
            f"the first: {next(iter(failed.values()))}"
        )
    return pd.DataFrame(rows), failed


def _measured(detector, subject):
    """`against_twin` of a patient."""
    if subject.problem:
        raise InputError(subject.problem)
    scan = subject.scan
    files = {part: scan.with_name(scan.name.replace("_t2", f"_{part}")) for part in PARTS}
    prepared = detector.prepare(scan, label=files["seg"])
    twin, lesion = twin_on_grid(prepared, files["twin"]), prepared.label > 0
    restored = detector.restore_volume(prepared).image
    where = {"mask": prepared.mask, "lesion": lesion}
    return {
        "ml": float(np.count_nonzero(lesion)) * prepared.grid.voxel_size**3 / 1e3,
        "shift": shift(prepared.image, twin, reference=detector.prior.reference, **where),
        **against_twin(prepared.image, restored, twin, **where),
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if some patients could not be measured."""
    parser = parser_for("python -m eval.twins", __doc__)
    add(parser, "--input", required=True, help="folder of patients of preprocessing.phantom")
    add(parser, "--model", default=DETECTOR)
    add(parser, "--align", default="none")
    add(parser, "--slice-step", "--batch-size", "--precision", "--force")
    add(parser, "--out", help="CSV with a row per patient")
    options = parser.parse_args(argv)
    check_effect(parser, options, {"--force": ("--out", bool(options.out))})
    if options.out:
        refuse_existing(options.out, force=options.force)
    from tf_lesion.detection.maps import Detector
    from tf_lesion.prior import load

    detector = Detector(
        load(options.model, precision=options.precision),
        align=options.align,
        slice_step=options.slice_step,
        batch_size=options.batch_size,
    )
    table, failed = measure_twins(detector, options.input)
    if options.out:
        write_text(options.out, table.to_csv(index=False), force=options.force)
    print(table.drop(columns="patient").describe(percentiles=[0.1, 0.5, 0.9]).round(4).to_string())
    print(f"lesions of which half is gone: {(table['left'] <= MOST_LEFT).mean():.0%}")
    for name, reason in failed.items():
        print(f"error: {name} is not measured: {reason}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
