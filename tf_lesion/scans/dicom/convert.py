"""A series as NIfTI, by dcm2niix, in a temporary folder that goes at once."""

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from tf_lesion.files import InputError
from tf_lesion.scans.dicom.files import Files
from tf_lesion.scans.dicom.headers import EXTRA

# No sidecar, no compression, no settings of the user's: what is read depends on the files alone.
OPTIONS = ("-b", "n", "-z", "n", "-f", "scan", "-g", "i")
TEXTS = ("descrip", "aux_file", "intent_name", "db_name")  # may hold comments on the patient


def to_nifti(files: Files, names: Sequence[str], *, called: str) -> nib.Nifti1Image:
    """The image that dcm2niix makes of a series, without a text from the header.

    Args:
        files: where they are.
        names: of the series' files.
        called: what an error calls the series.

    Raises:
        InputError: if dcm2niix is not there, or does not make one volume of the series.
    """
    with tempfile.TemporaryDirectory(prefix="tf_lesion-") as folder:
        given, made = Path(folder) / "given", Path(folder) / "made"
        given.mkdir()
        made.mkdir()
        _copy(files, names, given)
        run = subprocess.run(
            [_binary(), *OPTIONS, "-o", str(made), str(given)],
            capture_output=True,
            text=True,
            errors="replace",
        )
        found = sorted(made.glob("*.nii"))
        if len(found) != 1:
            said = [line for line in (run.stdout + run.stderr).splitlines() if "rror" in line]
            raise InputError(
                f"{called}: expected one volume, dcm2niix made {len(found)} "
                f"({'; '.join(said) or 'no reason given'}); convert it by hand, and give the NIfTI "
                "file."
            )
        return _without_texts(nib.load(found[0]))


@functools.cache
def converter() -> str:
    """Name and version of what converts."""
    try:
        return f"dcm2niix {metadata.version('dcm2niix')}"
    except metadata.PackageNotFoundError:
        return "dcm2niix"


def _binary():
    """The program of the package, or one that is installed otherwise."""
    try:
        import dcm2niix

        return dcm2niix.bin
    except ImportError as error:
        if found := shutil.which("dcm2niix"):
            return found
        raise InputError(f"Expected dcm2niix to be installed: {EXTRA}.") from error


def _copy(files, names, folder):
    """Copy the files of a series, under names of our own."""
    with files.reader() as reader:
        for number, name in enumerate(names):
            with reader.open(name) as file, (folder / f"{number:06}.dcm").open("wb") as copy:
                shutil.copyfileobj(file, copy)


def _without_texts(image: nib.Nifti1Image) -> Any:
    values, header = np.asanyarray(image.dataobj), image.header.copy()
    for name in TEXTS:
        header[name] = b""
    header.extensions.clear()
    if values.dtype == np.float64:  # scaled
        values = values.astype(np.float32)
    header.set_data_dtype(values.dtype)
    header.set_slope_inter(1, 0)
    return nib.Nifti1Image(values, None, header)
