"""Files: errors for people, outputs written whole or not at all."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import tokenize
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What NumPy raises, by where in the file the damage is.
UNREADABLE_ARRAY = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, MemoryError)
PAIR = (".hdr", ".img")  # of one scan
IDENTITY_DIGITS = 12  # of a hash that tells contents apart
PLACE_DIGITS = 8  # of a hash that tells machines apart
NUMBER = int | float  # in JSON
LARGEST = 1e300  # number in JSON; what is beyond was damaged, and has no float
UNDECODED = re.compile("[\udc80-\udcff]+")  # bytes in names of files, as Python keeps them
PARTIAL, REPLACED = "partial", "replaced"  # what hidden names of files and folders begin with


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and what to do."""


def readable(text: str | Path | bytes) -> str:
    """A text, such as a name, that every encoder takes: what is no UTF-8 is read as Latin-1."""
    text = text.decode(errors="surrogateescape") if isinstance(text, bytes) else str(text)
    return UNDECODED.sub(_decoded, text)


def _decoded(found):
    raw = found[0].encode(errors="surrogateescape")
    try:
        return raw.decode()  # the file system's encoding is another
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def file_name(text: str) -> str:
    """A text as the name of a file, in UTF-8 whatever the file system's encoding is."""
    return os.fsdecode(text.encode(errors="surrogateescape"))


def content_identity(path: str | Path) -> str:
    """Short hash of a file's content: what it was is told from what has taken its name.

    That of a header and an image in files of their own is of both.
    """
    path, digest = Path(path), hashlib.sha256()
    for part in [path.with_suffix(s) for s in PAIR] if path.suffix in PAIR else [path]:
        with part.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()[:IDENTITY_DIGITS]


def read_array(path: str | Path, *, what: str) -> Any:
    """The array of a `.npy` file; what is damaged or of another kind is an `InputError`."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except UNREADABLE_ARRAY as error:
        raise InputError(f"Expected {what} (.npy) in {path}: {error}") from error


def read_json(path: str | Path, form: Any, *, writer: str) -> Any:
    """What a JSON file holds; one that is damaged or not of the `form` is an `InputError`.

    A form is a type; [form] of a list; or {name: form} of a dict that has these names and may have
    others. A name that ends in "?" may be missing, and "*" stands for all there are. Numbers are
    finite.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        _check_form(content, form, "it")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"Expected {path} as {writer} writes it ({error}); make it again."
        ) from error
    return content


def _check_form(content, form, place):
    kind = form if isinstance(form, type | types.UnionType) else type(form)
    number = isinstance(content, NUMBER)
    if not isinstance(content, kind) or (number and not abs(content) <= LARGEST):
        raise ValueError(f"{place} is {str(content)[:20]}")
    if isinstance(form, list):
        for position, each in enumerate(content):
            _check_form(each, form[0], f"{place}[{position}]")
    for name, of_name in form.items() if isinstance(form, dict) else ():
        wanted = content if name == "*" else [name.removesuffix("?")]
        for each in wanted:
            if each in content:
                _check_form(content[each], of_name, f"{place}[{each!r}]")
            elif each == name:
                raise ValueError(f"{place} has no {name!r}")


def refuse_existing(path: str | Path, *, force: bool, marker: str = "") -> None:
    """Raise an error if `path` exists, unless `force` allows to replace it.

    What is replaced is a result of the same kind, never somebody's folder: a file, or with a
    `marker` a folder that has a file of that name, or nothing.

    Raises:
        FileExistsError: if it exists and `force` is false.
        InputError: if something else is there.
    """
    path = Path(path)
    if not path.exists():
        return
    if not force:
        raise FileExistsError(f"Output {path} exists; choose another name or pass --force.")
    ours = (path / marker).exists() or (path.is_dir() and not any(path.iterdir()))
    if not (ours if marker else path.is_file()):
        what = f"a folder with {marker} to replace" if marker else "a file to replace"
        raise InputError(f"Expected {what} at {path}, found something else; choose another name.")


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


# Processes that share a folder, or were killed in it ------------------------------------------


@functools.cache
def _place() -> str:
    """Where a process number means something: this machine, in this container."""
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        container = ""
    told = f"{platform.node()} {container}"
    return hashlib.sha256(told.encode()).hexdigest()[:PLACE_DIGITS]


def _hidden(path, kind):
    """A name beside `path` that says who uses it; the suffix stays."""
    return path.with_name(f".{kind}-{_place()}-{os.getpid()}-{path.name}")


def _abandoned(folder, kind, name=None):
    """What processes of this place that are gone left in `folder`, of one name or of any."""
    pattern = re.compile(rf"\.{kind}-{_place()}-([0-9]+)-(.+)", re.DOTALL)
    for path in folder.glob(f".{kind}-{_place()}-*"):
        found = pattern.fullmatch(path.name)
        if found and name in (None, found[2]) and not _lives(int(found[1])):
            yield path


def _lives(process):
    """Whether there is such a process; where one cannot ask, it is taken to live."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes of this machine left half-written in a folder.

    What a living process writes stays, and what another machine wrote: nobody knows if it lives.
    """
    for path in _abandoned(folder, PARTIAL):
        _remove(path)


# Once is enough for each process: with every file of many it would be quadratic.
_remove_abandoned_once = functools.cache(remove_abandoned)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Have a folder for this process alone, as far as others ask for it too; none need be there.

    The lock is the system's, so that of a killed process is gone with it. Where there are no such
    locks (some network drives), nobody is kept out.

    Raises:
        InputError: if another process has it, unless this one is to `wait`.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, FileNotFoundError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise InputError(
                    f"{folder} is in use by another process, which writes it; wait until that is "
                    f"done."
                ) from error
            except OSError:
                pass
        yield


@contextlib.contextmanager
def set_aside(folder: Path) -> Iterator[Callable[[], None]]:
    """Rename a folder, if it is there; it is put back at the end, and what is new is deleted.

    Yields a function that does the opposite: to be called when the new one is known to work.
    After a kill, `put_back` does what was not done.
    """
    aside, rubbish = _hidden(folder, REPLACED), _hidden(folder, PARTIAL)
    given_up = False
    if folder.exists():
        folder.rename(aside)

    def give_up():
        nonlocal given_up
        given_up = True
        if aside.exists():
            aside.rename(rubbish)  # half of it deleted, it must not be put back
            shutil.rmtree(rubbish, ignore_errors=True)

    try:
        yield give_up
    finally:
        if not given_up:
            shutil.rmtree(folder, ignore_errors=True)
            if aside.exists():
                aside.rename(folder)


def put_back(folder: Path) -> bool:
    """Give a folder back that a killed process had `set_aside`; whether there was one."""
    for aside in _abandoned(folder.parent, REPLACED, folder.name):
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        return True
    return False


# Outputs ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_whole(path: str | Path, *, force: bool = True, marker: str = "") -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it on success, delete it on any failure.

    The temporary name keeps the suffix of `path` (".nii.gz" included), because writers choose the
    format by it. Works for files, and for folders, which hold a file called `marker`.

    What a killed process left of such names in the folder is removed.

    Raises:
        FileExistsError: if `path` exists and `force` is false (checked before anything is written,
            and at the end: another process may have made it).
        InputError: if it is a folder, but not such a one; likewise.
    """
    path = Path(path)
    refuse_existing(path, force=force, marker=marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_once(path.parent.resolve())
    temporary = _hidden(path, PARTIAL)
    _remove(temporary)  # of a process that had this one's number
    try:
        yield temporary
        refuse_existing(path, force=force, marker=marker)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def write_text(path: str | Path, text: str, *, force: bool = True) -> None:
    """Write a text as UTF-8, whole or not at all; names in it become `readable`."""
    with written_whole(path, force=force) as temporary:
        temporary.write_text(readable(text), encoding="utf-8")


def write_json(path: str | Path, values: Any, *, force: bool = True) -> None:
    """Write `values` as indented JSON, whole or not at all; names in it stay as they are."""
    write_text(path, json.dumps(values, indent=2) + "\n", force=force)
