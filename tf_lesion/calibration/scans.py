"""Calibrating on healthy scans of one's own scanner, prepared exactly as a patient's will be."""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_lesion.caches.slices import CacheWriter
from tf_lesion.calibration.file import Calibration
from tf_lesion.calibration.make import calibrate
from tf_lesion.config import AUTO
from tf_lesion.detection.facts import warnings_of
from tf_lesion.detection.maps import Detector
from tf_lesion.detection.settings import crop_of
from tf_lesion.files import InputError
from tf_lesion.scans.discovery import Subject

FEWEST = 5  # below it the range of left-out rates says next to nothing
OF_MODEL = ("tv_weight", "postprocessing")  # what a calibration may take over from the model's


def calibrate_scans(
    prior: Any,
    subjects: Sequence[Subject],
    *,
    align: str | None = None,
    postprocess: str = "",
    chosen_by: dict[str, str] | None = None,
    **options: Any,
) -> Calibration:
    """Thresholds and healthy maps for a prior from healthy scans of any scanner.

    The scans are prepared by `Detector.prepare` and written to a temporary cache, one at a time;
    then `calibrate` goes on. The interval of each rate is the range over left-out subjects.

    Args:
        prior: `Prior`; what is not given is as in its own calibration, lambda too.
        subjects: scans, of each participant of a BIDS dataset the first; one that cannot be used
            is told and left out, as with patients.
        align: as of `Detector`.
        postprocess: steps that make the `score`, "none" for none; the calibration's by default.
        chosen_by: as of `calibrate`.
        options: of `calibrate`, but for `cache` and `restored`.

    Raises:
        InputError: if fewer than 5 scans can be used, or a value makes no sense.
    """
    if options.get("tv_weight") == AUTO:
        raise InputError("Expected tv_weight as a number: auto chooses it on a cache.")
    own, reasons = prior.calibration, {}
    if own is not None:
        settings = {**own.restoration, "tv_weight": own.tv_weight}
        given = {"tv_weight": options.get("tv_weight"), "postprocessing": postprocess}
        reasons = {name: own.chosen_by.get(name) for name in OF_MODEL if not given[name]}
        for name in prior.uses:
            options[name] = settings.get(name) if options.get(name) is None else options[name]
        postprocess = postprocess or own.postprocessing
    reasons = {name: reason for name, reason in reasons.items() if reason} | (chosen_by or {})
    detector = Detector(prior, postprocess="none", align=align)
    with tempfile.TemporaryDirectory() as folder:
        cache, restored = Path(folder) / "healthy.h5", Path(folder) / "restored.h5"
        chosen = first_of_each(subjects)
        taken = write_cache(detector, chosen, cache)
        made = calibrate(
            prior, cache, restored=restored, postprocess=postprocess, chosen_by=reasons, **options
        )
    scans = os.path.commonpath([subject.scan for subject in subjects])
    told = {"cache": None, "scans": scans, "scans_failed": len(chosen) - taken}
    told["scan_settings"] = detector.scan_settings.decisive()
    return dataclasses.replace(made, cohort={**made.cohort, **told})


def first_of_each(subjects: Sequence[Subject]) -> list[Subject]:
    """The first scan of each participant of a BIDS dataset; scans of other names all differ."""
    found: dict[str, Subject] = {}
    for subject in subjects:
        bids = subject.name.startswith("sub-")
        found.setdefault(subject.name.split("_")[0] if bids else subject.name, subject)
    return list(found.values())


def write_cache(detector: Detector, subjects: Sequence[Subject], path: str | Path) -> int:
    """Write the slices with brain that `detector` would restore as `Test` of a cache.

    Args:
        detector: `Detector`, set up as for patients.
        subjects: one scan of each; one that cannot be used is told on standard error, and what is
            to be known of the others.
        path: the file to make.

    Returns:
        Number of scans in it.

    Raises:
        InputError: if there are fewer than 5; no file is left then.
    """
    _require(len(subjects), f"{len(subjects)}")
    prior, grid = detector.prior, detector.scan_settings.grid
    x, y = crop_of(prior, grid)
    taken = 0
    with CacheWriter(
        path,
        slice_shape=grid.slice_shape,
        crop=(x.start, x.stop, y.start, y.stop),
        grid_affine=grid.affine,
        settings={"scan": detector.scan_settings.decisive()},
    ) as writer:
        if prior.reference is not None:
            writer.set_reference(prior.reference)
        for number, subject in enumerate(subjects, start=1):
            print(f"[{number}/{len(subjects)}] {subject.name}", flush=True)
            try:
                _append(writer, detector, subject, (x, y))
            except (InputError, OSError) as error:
                print(f"error: {subject.name}: {error}", file=sys.stderr)
            else:
                taken += 1
        _require(taken, f"{taken} of {len(subjects)} that could be used")
    return taken


def _append(writer, detector, subject, window):
    if subject.problem:
        raise InputError(subject.problem)
    prepared = detector.prepare(subject.scan, mask=subject.mask)
    inside = prepared.mask[window]
    for warning in warnings_of(prepared, inside.sum() / prepared.mask.sum(), matched=True):
        print(f"warning: {subject.name}: {warning}", file=sys.stderr)
    slices = np.flatnonzero(inside.any(axis=(0, 1)))
    if slices.size == 0:
        raise InputError("expected brain inside the model's window, found none.")
    image, mask = (np.moveaxis(v[..., slices], 2, 0) for v in (prepared.image, prepared.mask))
    writer.append(
        "Test",
        image,
        subject_id=subject.name,
        slice_index=slices,
        scan_from_grid=prepared.scan_from_grid,
        source=subject.scan,
        mask=mask,
    )


def _require(number, told):
    if number < FEWEST:
        raise InputError(
            f"Expected {FEWEST} or more healthy scans, each of another subject, got {told}."
        )
