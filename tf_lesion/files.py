"""Files: errors for people, outputs written whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and what to do."""


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


@contextlib.contextmanager
def written_whole(path: str | Path, *, force: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it on success, delete it on any failure.

    The temporary name keeps the suffix of `path` (".nii.gz" included), because writers choose the
    format by it. Works for files and for folders.

    Raises:
        FileExistsError: if `path` exists and `force` is false (checked before anything is written).
    """
    path = Path(path)
    refuse_existing(path, force=force)
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
