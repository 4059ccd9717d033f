"""NIfTI files whose bytes depend on nothing but their content."""

import gzip
from pathlib import Path

import numpy as np

GZIP_LEVEL = 5


def write_nifti(path: str | Path, values: np.ndarray, affine: np.ndarray) -> None:
    """Write a .nii.gz without time and file name; folders are made."""
    import nibabel as nib

    image = nib.Nifti1Image(values, affine, dtype=values.dtype)
    image.header.set_xyzt_units("mm")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=GZIP_LEVEL, mtime=0))
