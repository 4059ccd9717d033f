"""The files of a folder or of a zip, by name; what could harm is refused before it is unpacked."""

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tf_lesion.files import InputError

MAGIC, MAGIC_AT = b"DICM", 128  # bytes; what every DICOM file has after its preamble
NIFTI, ZIP = (".nii", ".nii.gz"), ".zip"
# Of a zip, as its directory tells them. Python reads no more of a file than that says.
MOST_BYTES = 16 * 2**30  # together, unpacked; an exam has 0.1 to 2 GB
MOST_FILES = 200_000
LARGEST_RATIO = 200  # times, unpacked to packed; exams have 2 to 5, black images up to 30
SMALL_ZIP = 2**24  # bytes unpacked; below, any ratio will do
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Files:
    """The files of a folder, or of a zip.

    Attributes:
        path: of the folder or zip.
        left_out: a folder in it that does not belong to it, that of the results.
    """

    path: Path
    left_out: Path | None = None

    @property
    def is_zip(self) -> bool:
        """Whether it is a zip."""
        return not self.path.is_dir()

    def names(self, *, every: bool = True) -> list[str]:
        """Sorted names relative to `path`, with slashes, hidden files left out.

        Args:
            every: a folder that cannot be read is an error.

        Raises:
            InputError: for a zip that is damaged, too large, or names places outside of it.
        """
        found = self._in_zip() if self.is_zip else self._in_folder(every)
        return sorted(name for name in found if not _is_hidden(name))

    @contextlib.contextmanager
    def reader(self) -> Iterator["Reader"]:
        """A `Reader`, with the zip open."""
        if not self.is_zip:
            yield Reader(self.path, None)
            return
        with _opened(self.path) as archive:
            yield Reader(self.path, archive)

    def _in_folder(self, every):
        def failed(error):
            if every:
                raise error

        seen = {self.left_out and self.left_out.resolve()}
        for folder, below, names in os.walk(self.path, onerror=failed, followlinks=True):
            place = Path(folder)
            seen.add(place.resolve())  # a link may lead back, or to what was read
            below[:] = [name for name in sorted(below) if (place / name).resolve() not in seen]
            local = PurePosixPath(place.relative_to(self.path).as_posix())
            for name in names:  # a link that leads nowhere is not left out in silence
                if (place / name).is_file() or (place / name).is_symlink():
                    yield str(local / name)

    def _in_zip(self):
        with _opened(self.path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
        _check(self.path, members)
        return [member.filename for member in members]


@dataclass(frozen=True)
class Reader:
    """Opens files by the names of `Files`."""

    path: Path
    archive: zipfile.ZipFile | None

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file to read; damage is an `InputError` that names it."""
        try:
            if self.archive is None:
                with (self.path / name).open("rb") as file:
                    yield file
            else:
                with self.archive.open(name) as file:
                    yield file
        except DAMAGED as error:
            if isinstance(error, InputError) or self.archive is None:
                raise
            raise _unreadable(self.path, f"{name}: {error}") from error

    def is_dicom(self, name: str) -> bool:
        """Whether a file is DICOM, by its first bytes."""
        with self.open(name) as file:
            return file.read(MAGIC_AT + len(MAGIC))[MAGIC_AT:] == MAGIC

    def size(self, name: str) -> int:
        """Bytes of a file, unpacked."""
        if self.archive is None:
            return (self.path / name).stat().st_size
        return self.archive.getinfo(name).file_size


def is_zip(path: Path) -> bool:
    """Whether a file is called a zip."""
    return path.suffix.lower() == ZIP and path.is_file()


def is_exam(path: str | Path, *, left_out: Path | None = None) -> bool:
    """Whether a path is to be read as DICOM: a zip, or a folder with DICOM and without NIfTI."""
    path = Path(path)
    if not path.is_dir():
        return is_zip(path)
    files = Files(path, left_out)
    names = files.names(every=False)
    if any(name.lower().endswith(NIFTI) for name in names):
        return False
    with files.reader() as reader:
        return any(_is_dicom(reader, name) or is_zip(path / name) for name in names)


def _is_dicom(reader, name):
    try:
        return reader.is_dicom(name)
    except OSError:  # not ours to read
        return False


def _is_hidden(name):
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


@contextlib.contextmanager
def _opened(path):
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        raise _unreadable(path, error) from error
    with archive:
        yield archive


def _check(path, members):
    """Refuse a zip by its directory, before anything of it takes memory or disk."""
    total, packed = sum(one.file_size for one in members), path.stat().st_size
    ratio = total / max(packed, 1)
    for what, got, most in (
        ("files", len(members), MOST_FILES),
        ("bytes unpacked", total, MOST_BYTES),
        ("times its size unpacked", round(ratio), LARGEST_RATIO if total > SMALL_ZIP else ratio),
    ):
        if got > most:
            raise InputError(
                f"{path}: expected a zip of DICOM with at most {most:,} {what}, got {got:,}; if "
                "it is what it should be, unpack it and give the folder."
            )
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
            raise InputError(
                f"{path}: expected names inside of the zip, got {member.filename!r}; it was made "
                "to write elsewhere, do not unpack it."
            )
        if member.flag_bits & 1:
            raise InputError(f"{path}: it needs a password; unpack it and give the folder.")


def _unreadable(path, error):
    return InputError(f"{path}: expected a zip of DICOM, but it cannot be read: {error}.")
