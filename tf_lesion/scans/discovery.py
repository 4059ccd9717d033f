"""Which files belong to which subject: scans by glob, their names, masks and segmentations."""

import functools
import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tf_lesion.files import InputError

# T2 suffix -> segmentation suffix: BRATS 2017 to 2021, BraTS 2023.
SUFFIXES = {"_t2": "_seg", "-t2w": "-seg"}
ENDINGS = (".nii.gz", ".nii")
BIDS_SUBJECT = re.compile(r"\b(sub-[A-Za-z0-9]+)")


@dataclass(frozen=True)
class Subject:
    """A subject's files: the scan, and if there are any its brain mask and segmentation.

    `problem` says why the subject must be skipped, if a file that should be there is not.
    """

    name: str
    scan: Path
    mask: Path | None = None
    label: Path | None = None
    problem: str = ""


def find_subjects(
    folder: str | Path,
    patterns: Sequence[str],
    *,
    suffixes: Iterable[str] = (),
    keep: Callable[[Path], bool] | None = None,
    rename: Callable[[Path, str], str] | None = None,
    mask_pattern: str | None = None,
    seg_pattern: str | None = None,
) -> list[Subject]:
    """The subjects of a folder, possibly none, sorted by path of the scan.

    Args:
        suffixes: what to leave out of a file's name to get the subject's.
        keep: which of the scans found are wanted; by default all.
        rename: (scan, its name by `scan_names`) -> the name of its subject.
        mask_pattern, seg_pattern: as in `subject_with_files`.

    Raises:
        FileNotFoundError, InputError: without a folder or scans, or with two scans of a subject.
    """
    scans = [scan for scan in find_scans(folder, patterns) if keep is None or keep(scan)]
    found = {}
    for scan, name in zip(scans, scan_names(scans, folder, suffixes=suffixes), strict=True):
        if rename is not None:
            name = rename(scan, name)
        if name in found:
            raise InputError(
                f"Two scans of {name}: {found[name]} and {scan}; narrow the pattern to one scan "
                "per subject."
            )
        found[name] = scan
    others = {"mask_pattern": mask_pattern, "seg_pattern": seg_pattern}
    return [subject_with_files(name, scan, folder, **others) for name, scan in found.items()]


def find_scans(folder: str | Path, patterns: Sequence[str]) -> list[Path]:
    """Sorted files under `folder` that match one of the globs; none is an `InputError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No such folder of scans: {folder}")
    found = sorted({path for pattern in patterns for path in _glob(folder, pattern)})
    if not found:
        raise InputError(
            f"No scans found in {folder}: nothing matches {' or '.join(patterns)}; "
            "give the right folder, or another pattern."
        )
    return found


def _glob(folder, pattern):
    try:  # files that begin with a dot are temporary, or resource forks
        return [path for path in folder.glob(pattern) if path.is_file() and path.name[0] != "."]
    except (ValueError, NotImplementedError) as error:
        text = f"Expected a glob relative to {folder}, got {pattern!r} ({error})."
        raise InputError(text) from error


def scan_names(
    scans: Sequence[Path], folder: str | Path, *, suffixes: Iterable[str] = ()
) -> list[str]:
    """One name for each scan: its BIDS subject, or its file without ending and suffix.

    Where all files have the same name (`patient07/T2.nii.gz`), the folders tell them apart.
    """
    names = [functools.reduce(str.removesuffix, suffixes, _stem(scan)) for scan in scans]
    if len(names) > 1 and len(set(names)) == 1:
        names = [scan.parent.relative_to(folder).as_posix() for scan in scans]
    entities = [BIDS_SUBJECT.search(scan.relative_to(folder).as_posix()) for scan in scans]
    return [bids[1] if bids else name for bids, name in zip(entities, names, strict=True)]


def _stem(scan):
    return scan.name.removesuffix(".gz").removesuffix(".nii")


def subject_with_files(
    name: str,
    scan: Path,
    folder: str | Path,
    *,
    mask_pattern: str | None = None,
    seg_pattern: str | None = None,
) -> Subject:
    """A `Subject` with the mask and segmentation that the patterns name.

    Patterns are globs relative to `folder`, with {subject} and {folder}; without exactly one file
    for one, the subject has a `problem`.
    """
    try:
        mask = _companion("mask_pattern", mask_pattern, name, scan, Path(folder))
        label = _companion("seg_pattern", seg_pattern, name, scan, Path(folder))
    except InputError as error:
        return Subject(name, scan, problem=str(error))
    return Subject(name, scan, mask=mask, label=label)


def _companion(argument, pattern, name, scan, folder):
    """The one file of a scan by a glob with {subject} and {folder}; None without a glob."""
    if not pattern:
        return None
    local = os.path.relpath(scan.parent, folder)
    # Names of files are no patterns, even with a bracket in them.
    wanted = pattern.replace("{subject}", glob.escape(name)).replace("{folder}", glob.escape(local))
    found = [path for path in sorted(_glob(folder, wanted)) if path != scan]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"expected one file for {argument} {wanted}, found {names}")
    return found[0]


def segmentation_beside(scan: Path) -> Path | None:
    """The segmentation named after a scan (CASE_t2: CASE_seg), or None."""
    case = _stem(scan)
    named = (
        scan.with_name(case.removesuffix(suffix) + seg_suffix + ending)
        for suffix, seg_suffix in SUFFIXES.items()
        for ending in ENDINGS
        if case.endswith(suffix)
    )
    return next(filter(Path.is_file, named), None)
