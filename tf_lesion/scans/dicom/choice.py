"""Which studies a folder or zip holds, and which series of a study is the T2-weighted one."""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tf_lesion.files import InputError, readable
from tf_lesion.scans.dicom.files import Files, is_zip
from tf_lesion.scans.dicom.headers import read_images
from tf_lesion.scans.dicom.series import Series, group
from tf_lesion.scans.discovery import Subject

STUDY_DIGITS = 6  # of the hash that tells studies of one folder apart


def find_series(path: str | Path, wanted: str | None = None) -> Series:
    """The T2-weighted series of one exam, or the one `wanted`.

    Args:
        path: a folder of DICOM, or a zip of one.
        wanted: number of the series, or text of its description.

    Raises:
        FileNotFoundError, InputError: without DICOM; with several studies; if not one fits.
    """
    studies = list(_studies(Files(Path(path))))
    if len(studies) > 1:
        raise InputError(
            f"{path}: expected one exam, got {len(studies)} studies; give the folder of one."
        )
    return choose(path, studies[0][1], wanted)


def find_exams(
    path: str | Path, wanted: str | None = None, *, left_out: Path | None = None
) -> list[Subject]:
    """A `Subject` for each study of a folder or zip, and of the zips in it; each has its series.

    A study is called after the folder that holds nothing else, one that shares its folder with
    others by a hash of its UID as well: nothing is called after a patient. Of several, one without
    the series has a `problem`.

    Args:
        path: a folder of DICOM, a zip of one, or a folder of such folders and zips.
        wanted: as in `find_series`.
        left_out: a folder below it that is not read.

    Raises:
        FileNotFoundError, InputError: without DICOM; of a single study, if not one series fits.
    """
    files = Files(Path(path), left_out)
    found = list(_studies(files, empty=True))
    for name in [] if files.is_zip else files.names():
        if is_zip(files.path / name):
            own = Files(files.path / name)
            at = PurePosixPath(name).with_suffix("")
            found += [(at / local, series) for local, series in _studies(own, empty=True)]
    if not found:
        raise _nothing(path)
    if len(found) == 1:
        series = choose(path, found[0][1], wanted)
        return [Subject(readable(_called(files)), files.path, series=series)]
    found.sort(key=lambda study: study[0])
    return [_subject(files.path, local, series, wanted) for local, series in found]


def choose(path: str | Path, series: Sequence[Series], wanted: str | None = None) -> Series:
    """The series to take: the one wanted, or of those that fit the one with the most slices.

    Raises:
        InputError: if none or several would do, with what there is.
    """
    able = [one for one in series if not any(one.flaws())]
    if wanted is not None:
        asked = [one for one in series if wanted.strip() == str(one.first.number)]
        asked = asked or [one for one in series if wanted.lower() in one.first.description.lower()]
        fit = [one for one in asked if one in able]
        fit = [one for one in fit if not any(one.misfits())] or fit
        told = f"expected one series {wanted!r} that is a volume"
    else:
        fit = [one for one in able if not any(one.misfits())]
        told = "expected one T2-weighted series, axial or 3-D"
    most = max((one.count for one in fit), default=0)
    best = [one for one in fit if one.count == most]
    if len(best) == 1:
        return best[0]
    raise InputError(
        f"{path}: {told}, found {len(best) or 'none'}; choose one by its number or description "
        f"(--series). There is:\n{table(series)}"
    )


def table(series: Sequence[Series]) -> str:
    """What there is, a line a series: number, description, slices, spacing, why not."""
    lines = []
    for one in series:
        number = "-" if one.first.number is None else one.first.number
        spacing = " x ".join(f"{mm:.3g}" for mm in one.spacing)
        why = "; ".join(dict.fromkeys([*one.flaws(), *one.misfits()])) or "fits"
        what = one.first.description or "(no description)"
        lines.append(f"  {number:>4}  {what}, {one.count} slices, {spacing} mm: {why}")
    return "\n".join(lines)


def _studies(files, *, empty=False):
    """(where in `files`, its series) of each study."""
    images = sorted(read_images(files), key=lambda image: image.study)
    if not images and not empty:
        raise _nothing(files.path)
    studies = {study: list(own) for study, own in itertools.groupby(images, lambda i: i.study)}
    for study, own in studies.items():
        others = [other for name, other in studies.items() if name != study]
        local = _place(own, [image for other in others for image in other])
        place = files.path if files.is_zip else files.path / (local or _common(own))
        if local is None:  # in one folder with others
            digest = hashlib.sha256(study.encode()).hexdigest()[:STUDY_DIGITS]
            local = _common(own) / f"study-{digest}"
        yield local, group(files, place, own)


def _place(own, others):
    """The highest folder that holds only `own`, relative; None if there is none."""
    common, elsewhere = _common(own), [PurePosixPath(image.name) for image in others]
    places = [*reversed(common.parents), common]
    return next(
        (at for at in places if not any(name.is_relative_to(at) for name in elsewhere)), None
    )


def _common(images):
    parts = [PurePosixPath(image.name).parent.parts for image in images]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return PurePosixPath(*(names[0] for names in same))


def _subject(root, local, series, wanted):
    path = root / local
    try:
        chosen, problem = choose(path, series, wanted), ""
    except InputError as error:
        chosen, problem = None, str(error)
    return Subject(readable(local.as_posix()), path, series=chosen, problem=problem)


def _called(files):
    path = files.path.resolve()
    return path.stem if files.is_zip else path.name


def _nothing(path):
    return InputError(
        f"{path}: expected DICOM files, or NIfTI scans, found none; nested zips in a "
        "zip are not looked at."
    )
