"""Files: errors for people, outputs written whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What NumPy raises, by where in the file the damage is.
UNREADABLE_ARRAY = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, MemoryError)
IDENTITY_DIGITS = 12  # of a hash that tells contents apart


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and what to do."""


def readable(path: str | Path) -> str:
    """A name as text that every encoder takes: where it is no UTF-8, it is read as Latin-1."""
    raw = os.fsencode(path)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def content_identity(path: str | Path) -> str:
    """Short hash of a file's content: what it was is told from what has taken its name."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:IDENTITY_DIGITS]


def read_array(path: str | Path, *, what: str) -> Any:
    """The array of a `.npy` file; what is damaged or of another kind is an `InputError`."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except UNREADABLE_ARRAY as error:
        raise InputError(f"Expected {what} (.npy) in {path}: {error}") from error


def refuse_existing(path: str | Path, *, force: bool) -> None:
    """Raise `FileExistsError` if `path` exists and `force` is false."""
    if Path(path).exists() and not force:
        raise FileExistsError(f"Output {path} exists; choose another name or pass --force.")


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise `OSError` unless `folder` has room for a file of `num_bytes`.

    Asked before HDF5 writes: the library cannot close a file that it could not write.
    """
    if num_bytes == 0:
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as scratch:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(scratch.fileno(), 0, num_bytes)
            elif shutil.disk_usage(folder).free < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        megabytes = num_bytes / 1e6
        raise OSError(
            error.errno, f"{error.strerror}: {megabytes:.1f} MB are needed in {folder}"
        ) from error


def refuse_other_folder(path: str | Path, marker: str) -> None:
    """Raise `InputError` if something else is there than a folder with the file `marker`.

    Without a marker, a file is expected. What is replaced with --force is a result of the same
    kind, never somebody's folder.
    """
    path = Path(path)
    empty = path.is_dir() and not any(path.iterdir())
    other = not (path / marker).exists() if marker else path.is_dir()
    if path.exists() and other and not empty:
        what = f"a folder with {marker} to replace" if marker else "a file to replace"
        raise InputError(f"Expected {what} at {path}, found something else; choose another name.")


@contextlib.contextmanager
def set_aside(folder: Path) -> Iterator[Callable[[], None]]:
    """Rename a folder, if it is there; it is put back at the end, in place of what is new.

    Yields a function that deletes it instead: to be called when the new one is known to work.
    """
    aside = folder.with_name(f".replaced-{os.getpid()}-{folder.name}")
    if folder.exists():
        folder.rename(aside)
    try:
        yield lambda: shutil.rmtree(aside, ignore_errors=True)
    finally:
        if aside.exists():
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)


@contextlib.contextmanager
def written_whole(path: str | Path, *, force: bool = True, marker: str = "") -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it on success, delete it on any failure.

    The temporary name keeps the suffix of `path` (".nii.gz" included), because writers choose the
    format by it. Works for files, and for folders, which hold a file called `marker`.

    Raises:
        FileExistsError: if `path` exists and `force` is false (checked before anything is written).
        InputError: if it is a folder, but not such a one; likewise.
    """
    path = Path(path)
    refuse_existing(path, force=force)
    refuse_other_folder(path, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield temporary
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, values: Any) -> None:
    """Write `values` as indented JSON, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")
