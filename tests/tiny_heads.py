"""A small label map of a whole head for the tests of painted heads and of the brain finder."""

from pathlib import Path

import nibabel as nib
import numpy as np

from preprocessing.phantom.tissues import FREESURFER
from tf_lesion.scans.finder.canonical import LANDMARKS

PAINTED_MM = 4.0


def write_label_map(path: Path) -> None:
    """A head of 1 mm made of shells and boxes, with every structure that the landmarks name."""
    x, y, z = np.meshgrid(*[np.arange(n) - n // 2 for n in (170, 190, 180)], indexing="ij")
    labels = np.zeros(x.shape, np.int16)
    radius = np.sqrt((x / 70) ** 2 + (y / 85) ** 2 + (z / 70) ** 2)
    for edge, left, right in ((1.15, 511, 511), (1.1, 507, 507), (1.05, 515, 515), (1, 24, 24),
                              (0.95, 3, 42), (0.8, 2, 41)):  # fmt: skip
        labels[radius < edge] = np.where(x < 0, left, right)[radius < edge]
    for name, center in LANDMARKS.items():
        if name in ("white", "cortex"):
            continue
        for number, side in zip(FREESURFER[name][:2], (-1, 1), strict=True):
            place = (side * center[0], center[1] + 18, center[2] - 6)
            near = np.maximum.reduce(
                [abs(axis - c) for axis, c in zip((x, y, z), place, strict=True)]
            )
            labels[near < 5] = number
    nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
