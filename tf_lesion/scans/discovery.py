"""Which files belong to which subject: scans by glob, their names, masks and segmentations.

Nothing that a glob names is left out in silence: a link whose content is not here, a subject's
folder without a scan, a folder that cannot be read are subjects with a problem. Linked folders are
followed, and `.NII.GZ` is `.nii.gz`. Hidden files, and the folders of a BIDS dataset that hold no
subjects of its own, count only where the glob names them.
"""

import fnmatch
import functools
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tf_lesion.files import InputError, readable

# T2 suffix -> segmentation suffix: BRATS 2017 to 2021, BraTS 2023.
SUFFIXES = {"_t2": "_seg", "-t2w": "-seg"}
ENDINGS = (".nii.gz", ".nii")
ENDING = re.compile(r"(\.nii)?(\.gz)?$", re.IGNORECASE)
FILE_SUFFIX = re.compile(r"\.[A-Za-z]{1,4}")  # of files; folders are called p1.v2 or Patient.001
ANNEX = "/annex/objects/"  # in links of git-annex, which are all to files
BIDS_SUBJECT = re.compile(r"\b(sub-[A-Za-z0-9+]+)")
CONTRASTS = ("t2", "t2w")  # such a file is called after its folder
NO_SUBJECTS = ("derivatives", "sourcedata", "code")  # folders of a BIDS dataset


@dataclass(frozen=True)
class Subject:
    """A subject's files: the scan, and if there are any its brain mask and segmentation.

    `problem` says why the subject must be skipped, if a file that should be there is not. Of DICOM
    `scan` is a folder or zip, and `series` the `scans.dicom.series.Series` that was chosen in it.
    """

    name: str
    scan: Path
    mask: Path | None = None
    label: Path | None = None
    problem: str = ""
    series: Any = None

    @property
    def source(self) -> Any:
        """The scan as `load_scan` takes it."""
        return self.scan if self.series is None else self.series


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
    folder, keep = Path(folder), keep or bool
    scans = list(filter(keep, find_scans(folder, patterns)))
    scans = sorted([*scans, *filter(keep, _without_scans(folder, scans, patterns))])
    found = {}
    files = [scan for scan in scans if not (scan.is_dir() or _is_lost_folder(scan))]
    names = dict(zip(files, scan_names(files, folder, suffixes=suffixes), strict=True))
    for scan in scans:
        name = names.get(scan) or _name_of_folder(scan.relative_to(folder))
        if rename is not None:
            name = rename(scan, name)
        if name in found:
            raise InputError(
                f"Two scans of {name}: {found[name]} and {scan}; narrow the pattern to one scan "
                "per subject."
            )
        found[name] = scan
    others = {"mask_pattern": mask_pattern, "seg_pattern": seg_pattern}
    subjects = [subject_with_files(name, scan, folder, **others) for name, scan in found.items()]
    return [replace(subject, name=readable(subject.name)) for subject in subjects]


def find_scans(folder: str | Path, patterns: Sequence[str]) -> list[Path]:
    """As `find_files`; none at all is an `InputError`."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"No such folder of scans: {folder}")
    found = find_files(folder, patterns)
    if not found:
        raise InputError(
            f"No scans found in {folder}: nothing matches {' or '.join(patterns)}; "
            "give the right folder, or another pattern."
        )
    return found


def find_files(folder: str | Path, patterns: Sequence[str]) -> list[Path]:
    """Sorted files under `folder` that match one of the globs, and what may hide some.

    Of a folder that is linked to more than once, one path is taken. What has a `problem_of` is
    among them: whoever reads it will say so.
    """
    folder = Path(folder)
    found = {path for pattern in patterns for path in _glob(folder, pattern)}
    root, once = folder.resolve(), {}
    for path in sorted(found):
        place = path.parent.resolve()
        direct = place == root / path.parent.relative_to(folder)
        if direct or (place, path.name) not in once:
            once[place, path.name] = path
    return sorted(once.values())


def _without_scans(folder, scans, patterns):
    """Folders that are called as those of subjects which have scans, and have none themselves."""
    holding, looks, named = set(), set(), set()
    for scan in scans:
        local = scan.relative_to(folder)
        named.update(BIDS_SUBJECT.findall(local.as_posix()))
        for place in local.parents[-2::-1]:
            holding.add((folder / place).resolve())
            looks.add((place.parent, _look(place.name)))
            if BIDS_SUBJECT.fullmatch(place.name):
                break  # sessions of a subject need not have a scan each
    children = ((look, child) for up, look in looks for child in _children(folder / up, "*"))
    return [
        child
        for look, child in children
        if _look(child.name) == look
        and child.is_dir()
        and not (child.resolve() in holding or child.name in named or child in scans)
        and any(_may_hold(child.relative_to(folder), pattern) for pattern in patterns)
    ]


def _look(name):
    """What the names of subjects' folders have in common: "sub-", or all but the digits."""
    return "sub-" if re.fullmatch(r"sub-[^_]+", name) else re.sub(r"\d+", "0", name)


def _may_hold(place, pattern):
    """Whether what matches a glob may lie in a folder."""
    parts = itertools.takewhile("**".__ne__, Path(os.path.normpath(pattern)).parts)
    return all(map(fnmatch.fnmatch, place.parts, parts))


def problem_of(path: Path) -> str:
    """Why a path is no file that can be read; "" if it is one."""
    if path.is_symlink() and not path.exists():
        return (
            f"{path}: its content is not here, it is a link to {os.readlink(path)}; fetch it "
            "(git annex get, datalad get) or remove the link."
        )
    if path.is_dir():
        missing = "fetch or convert it, or leave the folder out by a narrower pattern."
        return _problem_of_folder(path) or f"{path}: no scan found in this folder; {missing}"
    if not path.exists():
        return f"No such file: {path}"
    return "" if path.is_file() else f"{path}: expected a file, got a device or a pipe."


def _problem_of_folder(folder):
    try:
        if os.listdir(folder) or not BIDS_SUBJECT.fullmatch(folder.name):
            return ""
    except OSError as error:
        return f"{folder}: cannot be read ({error.strerror}); mend its permissions."
    return f"{folder}: an empty folder; fetch its content (datalad get) or remove it."


def _glob(folder, pattern):
    """Paths under a folder that match a glob, as `find_scans` finds them."""
    parts, place = Path(os.path.normpath(pattern)).parts, folder
    while parts[:1] == ("..",):
        place, parts = place / "..", parts[1:]
    if not parts or Path(pattern).is_absolute():
        raise InputError(f"Expected a glob relative to {folder}, got {pattern!r}.")
    return set(_matches(place, parts))


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Files below a folder for the parts of a glob, and folders on the way that hide theirs."""
    first, *rest = parts
    if first == "**":
        for place in _folders_below(folder):
            yield from [place] if _is_lost_folder(place) else _matches(place, rest or ["*"])
        return
    for child in _children(folder, first):
        if rest and _is_lost_folder(child):
            yield child
        elif rest and child.is_dir():
            yield from _matches(child, rest)
        elif not rest and not child.is_dir():
            yield child


def _folders_below(root: Path) -> Iterator[Path]:
    """A folder and all below, each once: first without links, then what links alone lead to."""
    seen, waiting, linked = set(), [root], []
    while waiting or linked:
        folder = (waiting or linked).pop()
        if _is_lost_folder(folder):
            yield folder
        elif (real := folder.resolve()) not in seen:
            seen.add(real)
            yield folder
            for child in _children(folder, "*"):
                if child.is_dir() or _is_lost_folder(child):
                    (linked if child.is_symlink() else waiting).append(child)


def _children(folder, pattern):
    if not glob.has_magic(pattern):
        return [folder / pattern] if os.path.lexists(folder / pattern) else []
    hidden = pattern.startswith(".")
    names = [n for n in sorted(os.listdir(folder)) if fnmatch.filter({n, _lowered(n)}, pattern)]
    return [folder / n for n in names if n not in NO_SUBJECTS and (hidden or n[0] != ".")]


def _lowered(name):
    return ENDING.sub(lambda ending: ending[0].lower(), name)


def _is_lost_folder(path):
    """Whether it is a folder with a problem; a link to nothing is one, unless it was to a file."""
    if path.is_symlink() and not path.exists():
        a_file = FILE_SUFFIX.fullmatch(path.suffix) or ANNEX in os.readlink(path)
        return not (path.suffix and a_file)
    return path.is_dir() and bool(_problem_of_folder(path))


def scan_names(
    scans: Sequence[Path], folder: str | Path, *, suffixes: Iterable[str] = ()
) -> list[str]:
    """One name for each scan: its BIDS subject, or its file without ending and suffix.

    Where all files have the same name, or say nothing but T2 (`patient07/T2.nii.gz`), the folders
    tell them apart.
    """
    stems = [ENDING.sub("", scan.name) for scan in scans]
    names = [functools.reduce(str.removesuffix, suffixes, stem) or stem for stem in stems]
    same = len(set(names)) == 1 < len(names)
    if same or {*map(str.lower, stems)} <= {*CONTRASTS}:
        folders = [scan.parent.relative_to(folder).as_posix() for scan in scans]
        names = [Path(folder).resolve().name if name == "." else name for name in folders]
    entities = [BIDS_SUBJECT.search(scan.relative_to(folder).as_posix()) for scan in scans]
    return [bids[1] if bids else name for bids, name in zip(entities, names, strict=True)]


def _name_of_folder(local):
    return next(filter(BIDS_SUBJECT.fullmatch, local.parts), local.as_posix())


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
    if problem := problem_of(scan):
        return Subject(name, scan, problem=problem)
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
    if problem := problem_of(found[0]):
        raise InputError(problem)
    return found[0]


def segmentation_beside(scan: Path) -> Path | None:
    """The segmentation named after a scan (CASE_t2: CASE_seg), its content here or not; or None."""
    case = ENDING.sub("", scan.name)
    named = (
        scan.with_name(case.removesuffix(suffix) + seg_suffix + ending)
        for suffix, seg_suffix in SUFFIXES.items()
        for ending in (*ENDINGS, *map(str.upper, ENDINGS))
        if case.endswith(suffix)
    )
    return next((path for path in named if path.is_file() or path.is_symlink()), None)
