"""Images put together to series, and what is known of a series: contrast, plane, spacing, gaps."""

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tf_lesion.files import IDENTITY_DIGITS
from tf_lesion.scans import MOST_VOXELS
from tf_lesion.scans.dicom.convert import converter, to_nifti
from tf_lesion.scans.dicom.files import Files
from tf_lesion.scans.dicom.headers import Image

# Of spin echoes at 1.5 and 3 T: T1 and proton density have shorter echoes, T1 a shorter repetition.
SHORTEST_ECHO, SHORTEST_REPETITION = 60.0, 1500.0  # ms
AXIAL = 0.7  # cosine of the slices' normal with the body's axis: 45 degrees
THIN = 1.6  # mm between slices; such a stack is 3-D, whatever its plane
LEAST_COVERED = 80.0  # mm across the slices; less is no brain
SAME_PLACE, UNEVEN = 0.01, 0.1  # mm; share of the spacing: dcm2niix bends at 0.1 too
SAME_ANGLE = 1e-3  # of cosines
FEWEST = 4  # slices, as of any scan
# Whole words in a description, a protocol or an image type, _ and digits being no letters.
OTHERS = {
    "a localizer": r"locali[sz]er[a-z]*|scout[a-z]*|survey[a-z]*|loc|aahead[a-z]*",
    "FLAIR or another inversion recovery": r"[a-z]*flair|dark.?fluid|tirm|stir",
    "diffusion": r"adc|dwi|dti|diff[a-z]*|tracew?|hardi|ivim",
    "angiography": r"mra|tof|angio[a-z]*|venc|pca|mip|mrv",
    "T2* or susceptibility": r"swi|swan|swip|t2.?star|hemo|gre|medic|ffe",
    "functional or perfusion": r"bold|fmri|perf[a-z]*|asl|dsc|pwi|rcbv|rcbf",
    "a map or a reformation": r"[a-z]*map|mpr|reformat[a-z]*|projection",
}
T2_STAR = re.compile(r"t2\W?\*")
T2 = re.compile(r"(?<![a-rt-z0-9])t2w?i?(?![a-z0-9*])")  # T2, t2_tse, sT2W
SPINE = re.compile(r"spine|cspine|tspine|lspine", re.I)


@dataclass(frozen=True)
class Series:
    """The images of one series and one echo; `load_scan` takes it for a scan.

    Attributes:
        files: where they are.
        path: what messages and results call the scan: the folder or zip, or a folder in it.
        images: in the order of their files.
    """

    files: Files
    path: Path
    images: tuple[Image, ...] = field(repr=False)

    @property
    def first(self) -> Image:
        """The first image, which speaks for all."""
        return self.images[0]

    @property
    def count(self) -> int:
        """Number of slices."""
        return sum(max(len(image.positions), 1) for image in self.images)

    @functools.cached_property
    def identity(self) -> str:
        """Short hash of the content of its files, whatever their names and order."""
        with self.files.reader() as reader:
            digests = []
            for image in self.images:
                with reader.open(image.name) as file:
                    digests.append(hashlib.file_digest(file, "sha256").digest())
        return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:IDENTITY_DIGITS]

    def image(self) -> Any:
        """The series as a nibabel image; see `convert.to_nifti`."""
        called = f"{self.path}: series {self.first.number}"
        return to_nifti(self.files, [image.name for image in self.images], called=called)

    def facts(self) -> dict[str, Any]:
        """What results say of it, JSON-serializable; nothing about the patient."""
        first = self.first
        return {
            "number": first.number,
            "description": first.description,
            "modality": first.modality,
            "slices": self.count,
            "spacing_mm": [_rounded(mm) for mm in self.spacing],
            "echo_time_ms": _rounded(first.echo_time),
            "repetition_time_ms": _rounded(first.repetition_time),
            "identity": self.identity,
            "converter": converter(),
        }

    # Geometry -----------------------------------------------------------------------------------

    @functools.cached_property
    def normal(self) -> np.ndarray | None:
        """[3] across the slices, or None where it is not known or not one."""
        planes = [image.orientation for image in self.images]
        if any(len(plane) != 6 for plane in planes):
            return None
        if np.ptp(planes, axis=0).max() > SAME_ANGLE:
            return None
        return np.cross(planes[0][:3], planes[0][3:])

    @functools.cached_property
    def heights(self) -> np.ndarray:
        """Sorted positions along the normal, mm; empty where they are not known."""
        places = [place for image in self.images for place in image.positions]
        if self.normal is None or len(places) != self.count:
            return np.zeros(0)
        return np.sort(np.array(places) @ self.normal)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between columns, rows and slices; NaN where not known."""
        rows, columns = self.first.spacing if len(self.first.spacing) == 2 else (math.nan,) * 2
        steps = np.diff(self.heights)
        between = float(np.median(steps)) if len(steps) else self.first.thickness
        return columns, rows, between

    @property
    def is_axial(self) -> bool:
        """Whether its slices are axial, or may be taken so, being 3-D."""
        thin = self.first.is_3d or self.spacing[2] <= THIN
        return thin or self.normal is None or abs(self.normal[2]) >= AXIAL

    # What speaks against it ---------------------------------------------------------------------

    def flaws(self) -> Iterator[str]:
        """Why it is no volume, which no choice by hand can help."""
        shapes, steps = {image.shape for image in self.images}, np.diff(self.heights)
        if len(shapes) > 1:
            yield "images of several sizes"
        if any(image.size < image.voxel_bytes for image in self.images):
            yield "a truncated file"
        if self.normal is None:
            yield "slices in several directions, or in none"
        elif not len(self.heights):
            yield "slices without a position"
        elif len(steps) and (steps < SAME_PLACE).any():
            yield "several images at one place: more than one volume"
        elif len(steps) and np.abs(steps - self.spacing[2]).max() > UNEVEN * self.spacing[2]:
            yield f"slices are missing: {steps.min():.3g} to {steps.max():.3g} mm between them"
        if self.count < FEWEST:
            yield f"only {self.count} slices"
        if math.prod(self.first.shape) * self.count > MOST_VOXELS:
            yield "too many voxels"

    def misfits(self) -> Iterator[str]:
        """Why it is not what detection takes by itself: T2-weighted, of a head, axial or 3-D."""
        first = self.first
        if first.modality != "MR":
            yield f"{first.modality}, not MR"
            return
        if first.derived:
            yield "derived from another"
        yield from self._other_contrast()
        if not self.is_axial:
            yield "neither axial nor 3-D"
        if SPINE.search(first.body_part):
            yield "of the spine"
        covered = self.count * self.spacing[2]
        if covered < LEAST_COVERED:
            yield f"only {covered:.0f} mm across its slices"

    def _other_contrast(self):
        first = self.first
        named = [what for what, words in OTHERS.items() if _has(first.words, words)]
        if T2_STAR.search(first.words):
            named.append("T2*")
        yield from named
        if first.inversion_time > 0 and not named:
            yield f"inversion recovery (TI {first.inversion_time:g} ms)"
        if first.b_value > 0 or ("EP" in first.sequence and "diffusion" not in named):
            yield "echo-planar"
        if named:
            return
        if math.isnan(first.echo_time) or math.isnan(first.repetition_time):
            if not T2.search(first.words):
                yield "nothing says T2: no echo and repetition time, and no T2 in its description"
        elif first.echo_time < SHORTEST_ECHO or first.repetition_time < SHORTEST_REPETITION:
            yield f"not T2 (TE {first.echo_time:.4g}, TR {first.repetition_time:.4g} ms)"


def group(files: Files, path: Path, images: Iterable[Image]) -> list[Series]:
    """The series of a study, one for each echo, sorted by number."""

    def key(image):
        return image.series, "" if math.isnan(image.echo_time) else f"{image.echo_time:09.1f}"

    parts = itertools.groupby(sorted(images, key=key), key=key)
    found = [Series(files, path, tuple(part)) for _, part in parts]
    return sorted(found, key=lambda one: (one.first.number is None, one.first.number or 0))


def _has(text, words):
    return re.search(rf"(?<![a-z])(?:{words})(?![a-z])", text) is not None


def _rounded(value):
    return None if math.isnan(value) else round(value, 4)
