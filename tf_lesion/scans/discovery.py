"""Which files belong to which subject: scans by glob, their names, masks and segmentations."""

import glob
import os
import re
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


def find_scans(folder, patterns):
    """Sorted files under `folder` that match one of the globs.

    Raises:
        FileNotFoundError: if there is no such folder.
        InputError: if nothing matches, with the patterns.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No such folder of scans: {folder}")
    found = sorted({path for pattern in patterns for path in _glob(folder, pattern)})
    if not found:
        raise InputError(
            f"No scans found in {folder}: nothing matches {' or '.join(patterns)}; "
            "give the right --input, or a --pattern."
        )
    return found


def _glob(folder, pattern):
    try:
        return [path for path in folder.glob(pattern) if path.is_file() and not _hidden(path)]
    except (ValueError, NotImplementedError) as error:
        raise InputError(
            f"Expected a glob relative to {folder}, got {pattern!r} ({error})."
        ) from error


def _hidden(path):
    return path.name.startswith(".")  # resource forks, temporary files


def scan_names(scans, folder, *, suffixes=()):
    """One name for each scan: its BIDS subject, or its file without ending and suffix.

    Where all files have the same name (`patient07/T2.nii.gz`), the folders tell them apart.
    """
    stems = [_stem(scan, suffixes) for scan in scans]
    if len(stems) > 1 and len(set(stems)) == 1:
        stems = [scan.parent.relative_to(folder).as_posix() for scan in scans]
    entities = [BIDS_SUBJECT.search(scan.relative_to(folder).as_posix()) for scan in scans]
    return [
        entity.group(1) if entity else stem for entity, stem in zip(entities, stems, strict=True)
    ]


def _stem(scan, suffixes):
    stem = scan.name.removesuffix(".gz").removesuffix(".nii")
    for suffix in suffixes:
        stem = stem.removesuffix(suffix)
    return stem


def subject_with_files(name, scan, folder, *, mask_pattern=None, seg_pattern=None):
    """A `Subject` with the mask and segmentation that the patterns name, or with a `problem`."""

    def one(pattern, flag):
        return pattern and _companion(pattern, name=name, scan=scan, folder=folder, flag=flag)

    try:
        mask, label = one(mask_pattern, "--mask-pattern"), one(seg_pattern, "--seg-pattern")
    except InputError as error:
        return Subject(name, scan, problem=str(error))
    return Subject(name, scan, mask=mask, label=label)


def _companion(pattern, *, name, scan, folder, flag):
    """The one file that belongs to a scan by a glob with {subject} and {folder}."""
    local = os.path.relpath(scan.parent, folder)
    # Names of files are no patterns, even with a bracket in them.
    wanted = pattern.replace("{subject}", glob.escape(name)).replace("{folder}", glob.escape(local))
    found = [path for path in sorted(_glob(folder, wanted)) if path != scan]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"expected one file for {flag} {pattern} (here {wanted}), found {names}")
    return found[0]


def check_unique(subjects):
    """Raise `InputError` if two scans have one name."""
    seen = {}
    for subject in subjects:
        if subject.name in seen:
            raise InputError(
                f"Two scans of {subject.name}: {seen[subject.name]} and {subject.scan}; "
                "narrow --pattern to one scan per subject."
            )
        seen[subject.name] = subject.scan


def segmentation_beside(scan):
    """The segmentation named after a scan (CASE_t2: CASE_seg), or None."""
    for suffix, seg_suffix in SUFFIXES.items():
        case = scan.name.removesuffix(".gz").removesuffix(".nii")
        if case.endswith(suffix):
            for ending in ENDINGS:
                path = scan.with_name(case.removesuffix(suffix) + seg_suffix + ending)
                if path.is_file():
                    return path
    return None
