"""NumPy volumes to SimpleITK images, and ITK on one thread."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import SimpleITK as sitk  # noqa: N813, the usual name


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run ITK on one thread: sums in one order give the same result each time.

    `SetNumberOfThreads` of a registration is not enough, its metric asks for the global number.
    """
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def to_image(values: np.ndarray, *, spacing: Sequence[float]) -> sitk.Image:
    """ITK image of values [X, Y, Z]; `spacing` [3] in mm."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
    image.SetSpacing([float(step) for step in spacing])
    return image
