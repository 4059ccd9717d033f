"""Scans and their maps as files: which scans, where the maps go, one scan after the other."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tf_lesion import __version__
from tf_lesion.detection.layout import (
    DONE,
    FAILED,
    SCAN_TABLE,
    SKIPPED,
    SUMMARY,
    Layout,
    is_map,
    layout_of,
    name_of,
    read_facts,
    read_summary,
    save_maps,
    told_of,
)
from tf_lesion.detection.maps import Detector
from tf_lesion.detection.progress import LOG, Progress
from tf_lesion.files import (
    PARTIAL,
    InputError,
    locked,
    refuse_existing,
    write_json,
    write_text,
    written_whole,
)
from tf_lesion.scans import discovery, picture
from tf_lesion.scans.discovery import Subject
from tf_lesion.scans.prepare import PoorAlignmentError

PATTERNS = ("**/*_T2w.nii*", *(f"**/*{suffix}.nii*" for suffix in discovery.SUFFIXES))
BIDS_VERSION = "1.10.0"
DESCRIPTION = "dataset_description.json"
NAME = "tf_lesion"  # of the data set's maker
BIDS_IGNORED = (SUMMARY, SCAN_TABLE, LOG, "*.html", "*_lesions.csv", "*_qc.png", f"*.{PARTIAL}")


# Which scans ------------------------------------------------------------------------------------


def find_scans(
    folder: str | Path,
    *,
    pattern: str | None = None,
    mask_pattern: str | None = None,
    seg_pattern: str | None = None,
    out: str | Path | None = None,
    labels: Sequence[str] = (),
) -> list[Subject]:
    """The `Subject`s of a folder or BIDS dataset, sorted by path.

    Args:
        folder: where to look, at any depth, see `scans.discovery`.
        pattern: glob of the scans; by default BIDS (`_T2w`) and BRATS (`_t2`, `-t2w`) names.
        mask_pattern: glob of the brain masks, with {subject} and {folder}.
        seg_pattern: the same for segmentations; by default those of the BRATS layout, if any.
        out: a folder of results, left out.
        labels: participants of a BIDS dataset, with or without "sub-"; all by default.

    Raises:
        FileNotFoundError, InputError: without a folder or scans, or with two scans of one name.
    """
    folder = Path(folder)
    subjects = discovery.find_subjects(
        folder,
        [pattern] if pattern else PATTERNS,
        suffixes=discovery.SUFFIXES,
        keep=lambda scan: not _is_result(scan, folder, out),
        rename=name_of,
        mask_pattern=mask_pattern,
        seg_pattern=seg_pattern,
    )
    if not subjects:
        raise InputError(f"No scans found in {folder}, only results; give the folder of the scans.")
    subjects = _participants(subjects, labels)
    return [
        replace(subject, label=subject.label or discovery.segmentation_beside(subject.scan))
        for subject in subjects
    ]


def _participants(subjects, labels):
    """Those of the BIDS participants `labels`, each of which must have a scan."""
    wanted = [f"sub-{label.removeprefix('sub-')}" for label in labels]
    chosen = [s for s in subjects if not wanted or s.name.split("_")[0] in wanted]
    missing = set(wanted) - {subject.name.split("_")[0] for subject in chosen}
    if missing:
        raise InputError(f"No scans of {', '.join(sorted(missing))}; are these its participants?")
    return chosen


def _is_result(scan, folder, out):
    """Whether it is a map, or lies in the folder of results `out` inside of `folder`."""
    place, out = Path(folder).resolve(), Path(out or folder).resolve()
    inside = place in out.parents and (scan.parent.resolve() / scan.name).is_relative_to(out)
    return inside or is_map(scan)


def refuse_other_dataset(out: str | Path, *, force: bool) -> None:
    """Raise `FileExistsError` if `out` is a data set that somebody else described."""
    path = Path(out) / DESCRIPTION
    if force or not path.exists():
        return
    try:
        made_by = json.loads(path.read_text(encoding="utf-8"))["GeneratedBy"][0]["Name"]
    except (ValueError, LookupError, TypeError):
        made_by = None
    if made_by != NAME:
        raise FileExistsError(
            f"{path} describes another data set; write to a folder of its own, such as "
            f"{Path(out) / 'derivatives' / NAME}, or pass --force, which replaces that file."
        )


def write_dataset_description(out: str | Path, source: str | Path) -> None:
    """Write `dataset_description.json` of BIDS derivatives, and add what validators must ignore."""
    write_json(
        Path(out) / DESCRIPTION,
        {
            "Name": "Restored scans and lesion masks",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": NAME, "Version": __version__}],
            "SourceDatasets": [{"URL": Path(source).resolve().as_uri()}],
        },
    )
    path = Path(out) / ".bidsignore"
    lines = path.read_bytes().splitlines() if path.exists() else []  # of any encoding
    lines += [line.encode() for line in BIDS_IGNORED if line.encode() not in lines]
    with written_whole(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in lines))


# One scan, many scans ---------------------------------------------------------------------------


def detect_one(
    detector: Detector,
    subject: Subject,
    layout: Layout,
    *,
    command: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Detect in a scan and write its files, the JSON last; returns the facts.

    Args:
        detector: `Detector`.
        subject: `Subject`; its segmentation is not looked at, only its path is noted.
        layout: `Layout`.
        command: the command line, for the facts.
        force: overwrite.
        progress: is told the stages, and the warnings.

    Raises:
        FileExistsError, InputError, OSError: before anything is written, if the scan cannot be
            used; or if a file is there. Of a scan that is not to be trusted a picture is written.
    """
    if subject.problem:
        raise InputError(subject.problem)
    layout.refuse_existing(detector.volume_names, subject, force=force)
    try:
        maps = detector.detect(subject.source, mask=subject.mask, progress=progress)
    except PoorAlignmentError as error:
        layout.begin()
        qc = {"verdict": FAILED, "reasons": error.doubts}
        picture.write_picture(layout.picture, error.prepared, qc)
        raise InputError(f"{error} Look at {layout.picture}") from error
    facts = save_maps(maps, subject, layout, command=command, force=force)
    if progress is not None:
        for warning in facts["warnings"]:
            progress.warn(warning)
        brain = f"brain ({facts['brain']['kind']}): {facts['brain_ml']:.0f} ml"
        progress.detail(f"{subject.name}: {brain}")
    return facts


def detect_many(
    detector: Detector,
    subjects: list[Subject],
    out: str | Path,
    *,
    bids: bool = False,
    command: str = "",
    force: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, str]]:
    """Scan after scan; one that fails does not stop the rest, one that is done is skipped.

    Writes `OUT/summary.json` after every scan, and `OUT/scans.csv`, a row a scan; what they say of
    other scans stays. A file that an unfinished run of ours left is replaced, any other only by
    `force`.

    Returns:
        [{name, input, status, reason, facts}], one per subject; `facts` relative to `out`.

    Raises:
        InputError: if two scans would get the same files.
        FileExistsError: if there is a `scans.csv` of somebody else.
    """
    layouts = [layout_of(subject, out, bids=bids, many=True) for subject in subjects]
    _check_different(subjects, layouts)
    rows = []
    known = read_summary(out)  # one that cannot be read is an error now, not after the first scan
    refuse_existing(Path(out) / SCAN_TABLE, force=force or bool(known))
    progress = progress or Progress(len(subjects))
    written = {"command": command, "force": force, "progress": progress}
    for subject, layout in zip(subjects, layouts, strict=True):
        with progress.scan(subject.name):
            status, reason = _attempt(detector, subject, layout, **written)
            progress.tell(status, reason)
        rows.append(
            {
                "name": subject.name,
                "input": str(subject.scan),
                "status": status,
                "reason": reason,
                "facts": os.path.relpath(layout.facts, out),
            }
        )
        _tell(Path(out), rows[-1], command)
    with locked(Path(out), wait=True):
        write_scan_table(out, read_summary(out))
    return rows


def _tell(out, row, command):
    """Put a row in the summary; other processes may do so with theirs."""
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, wait=True):
        told = {other["facts"]: other for other in read_summary(out)} | {row["facts"]: row}
        write_json(out / SUMMARY, {"command": command, "scans": list(told.values())})


def write_scan_table(out: str | Path, rows: Sequence[dict[str, str]]) -> None:
    """Write `OUT/scans.csv`: a row a scan of the summary, those worth a look first."""
    from tf_lesion.detection.table import scan_row, scan_table

    whole = []
    for row in rows:
        path, more = Path(out) / row["facts"], {"qc": FAILED, "qc_reasons": row["reason"]}
        if row["status"] != FAILED and not path.exists():
            more["qc_reasons"] = "no maps: interrupted while they were replaced, or deleted."
        elif row["status"] != FAILED:
            try:
                more = scan_row(read_facts(path, whole=True))
            except InputError as problem:
                more["qc_reasons"] = str(problem)
        whole.append({**{name: row.get(name) for name in ("name", "input", "status")}, **more})
    write_text(Path(out) / SCAN_TABLE, scan_table(whole).to_csv(index=False))


def _check_different(subjects, layouts):
    placed = {}
    for subject, layout in zip(subjects, layouts, strict=True):
        other = placed.setdefault(layout.facts, subject)
        if other is not subject:
            raise InputError(
                f"Expected names that differ in letters or digits: {other.scan} and "
                f"{subject.scan} would both become {layout.facts}; give a pattern of one."
            )


def _attempt(detector, subject, layout, *, command, force, progress):
    """(status, reason) of one scan among many."""
    try:
        if not (force or subject.problem) and is_done(detector, subject, layout):
            return SKIPPED, ""
        force = force or layout.facts.exists()  # ours, and a file is gone
        written = {"command": command, "force": force, "progress": progress}
        detect_one(detector, subject, layout, **written)
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, InputError | OSError):
            return FAILED, reason
        progress.note(f"{subject.name}: unexpected", error=error)
        return FAILED, f"{type(error).__name__}: {reason}"
    return DONE, ""


def is_done(detector: Detector, subject: Subject, layout: Layout) -> bool:
    """Whether a scan's files are there, made of the same content, model and settings.

    Raises:
        InputError: if they were made otherwise.
    """
    if not layout.facts.exists():
        return False
    facts = read_facts(layout.facts)
    now = {
        **json.loads(json.dumps(detector.described)),
        **told_of("input", subject.source),
        **told_of("brain_mask", subject.mask),
    }
    other = [name for name, value in now.items() if facts.get(name) != value]
    if other:
        raise InputError(
            f"{layout.facts} was made with another {', '.join(other)}; pass force, or choose "
            "another folder."
        )
    return all(path.exists() for path in layout.files(detector.volume_names, subject))
