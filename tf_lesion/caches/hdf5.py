"""HDF5 files: the one way to make them, to open those that others wrote, and to call their damage.

Ours have the format of HDF5 1.8, in which headers carry checksums: of a damaged file in the format
before, which h5py writes by default, the library may read one header for ever. That of 1.10 has a
mark of files being written, and does not open them again after a kill. Texts have a fixed length:
those of any length lie in a heap without a checksum, which the library may read for ever too.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from tf_lesion.files import InputError

# What h5py and the readers of JSON in attributes raise, by where in the file the damage is.
DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, MemoryError)
FORMAT = ("v108", "v108")


def new_hdf5(path: Path | str) -> h5py.File:
    """A new file, to be written."""
    return h5py.File(path, "w", libver=FORMAT)


def text(value: str) -> np.bytes_:
    """A text as an attribute of fixed length; it is read as bytes, which `json` takes."""
    return np.bytes_(value.encode())


def texts(values: Sequence[str]) -> NDArray:
    """Texts as a dataset of one fixed length."""
    coded = [value.encode() for value in values]
    return np.array(coded, h5py.string_dtype("utf-8", max(map(len, [b" ", *coded]))))


def open_hdf5(path: Path | str, *, what: str, made_by: str, mode: str = "r") -> h5py.File:
    """The file, opened; the errors say what was expected and which command makes it."""
    if not Path(path).exists():
        raise FileNotFoundError(f"No {what} at {path}; make one with {made_by}.")
    try:
        return h5py.File(path, mode)
    except BlockingIOError as error:
        raise InputError(
            f"{path} is in use by another process, which writes it; wait until that is done."
        ) from error
    except PermissionError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"Expected an HDF5 {what}, got {path} ({error}); make one with {made_by}."
        ) from error


@contextlib.contextmanager
def intact(path: Path | str) -> Iterator[None]:
    """Whatever HDF5 raises on reading a damaged file becomes an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(
            f"{path} is damaged, or was not written to its end ({error}); make it again."
        ) from error
