"""The HDF5 cache of preprocessed slices: schema, writing, reading, validation.

The datasets `Train`, `Test`, `Mask` and `Label`, all [N, X, Y], are those of the released code
(197 x 233 slices of a 1 mm MNI volume, cropped to 158 x 198 when read), so its caches work here and
ours work there. X runs from left to right, Y from posterior to anterior. Beside each of `Train` and
`Test` a group `Train_info` or `Test_info` holds what the released layout lacks:

    subject_ids     [S] str      names, in order of first appearance
    subject         [N] int32    row -> index into subject_ids
    slice_index     [N] int32    row -> axial index in the cache's grid
    scan_from_grid  [S, 4, 4]    mm in the cache's grid -> mm in the scan's own space
    source          [S] str      the file the slices came from

`Mask` and `Label` belong to `Test`. `Reference` [Q] holds quantiles of the brain intensities of the
subject to which others are histogram-matched. Attributes of the file: `crop`, `grid_affine`,
`settings` (JSON), `tf_lesion_version` and `identity`: a hash of all of the content but `source`,
the same whenever and wherever the cache is made. What is made of a cache carries its identity.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tf_lesion import __version__
from tf_lesion.caches.hdf5 import intact, new_hdf5, open_hdf5, text, texts
from tf_lesion.files import (
    IDENTITY_DIGITS,
    InputError,
    read_array,
    readable,
    require_space,
    written_whole,
)

RELEASED_SLICE_SHAPE = (197, 233)
RELEASED_CROP = (22, 180, 17, 215)  # x0, x1, y0, y1, applied when a released slice is read
SMALLEST_SIZE = 34
SIZE_STEP = 4
# Min-max per subject (You et al., MIDL 2019), made robust: vessels, fat in the rim of an atlas mask
# and spikes are the brightest 0.1 % of a brain (about 1.5 ml), and are clipped.
LOWEST_PERCENTILE, HIGHEST_PERCENTILE = 0.1, 99.9
BRAIN_FLOOR = 1e-3  # least intensity inside the brain, so that `observed > 0` is the brain
STORED_AS = {"Train": "<f4", "Test": "<f4", "Mask": "u1", "Label": "u1"}
CACHE = {"what": "slice cache", "made_by": "preprocessing.camcan"}
LARGEST_NORMALIZED = 10.0  # normalized slices end near 1; a scanner's units are far above
SAMPLED_SLICES = 64  # of each dataset, for the identity of a cache that does not say its own


def is_legal_size(pixels: int) -> bool:
    """Whether the network maps a length of `pixels` onto itself: 30 + 4k, at least 34."""
    return pixels >= SMALLEST_SIZE and (pixels - SMALLEST_SIZE) % SIZE_STEP == 0


def check_slice_shape(shape: Sequence[int], *, where: Path | str) -> None:
    """Raise `InputError` unless both lengths of `shape` are 30 + 4k pixels."""
    if not all(is_legal_size(pixels) for pixels in shape):
        raise InputError(
            f"Expected slices of 30 + 4k pixels (34, 38, ... 158, ... 198), got "
            f"{shape[0]} x {shape[1]} in {where}; give a crop (x0, x1, y0, y1), or put the axes in "
            f"order if they are not [N, X, Y]."
        )


def check_normalized(images: NDArray, *, where: str) -> None:
    """Raise `InputError` for slices in a scanner's units: whatever is made of them diverges."""
    largest = np.abs(images).max(initial=0)
    if largest > LARGEST_NORMALIZED:
        raise InputError(
            f"{where}: expected normalized intensities, about 0 to 1, got {largest:g}; normalize "
            f"each subject, as preprocessing.camcan and preprocessing.brats do."
        )


def _combined(parts: dict[str, Any]) -> str:
    """The identity of a cache from the hashes of its parts, by name."""
    told = "".join(f"{name} {parts[name].hexdigest()}\n" for name in sorted(parts))
    return hashlib.sha256(told.encode()).hexdigest()[:IDENTITY_DIGITS]


def _sampled_identity(file: h5py.File) -> str:
    """Identity of a cache that has none: shapes, and 64 evenly spaced slices of each dataset."""
    parts = {}
    for name, kind in STORED_AS.items():
        stored = file.get(name)
        if isinstance(stored, h5py.Dataset) and stored.ndim == 3:
            parts[name] = hashlib.sha256(repr(stored.shape).encode())
            last, ends = len(stored) - 1, SAMPLED_SLICES - 1
            for row in sorted({number * last // ends for number in range(SAMPLED_SLICES)}):
                parts[name].update(np.ascontiguousarray(stored[row], kind))
    return _combined(parts)


@dataclass(frozen=True)
class SliceIndex:
    """Which slice is which: subject and axial position of each row of a dataset."""

    subject_ids: list[str]  # S names
    subject: NDArray  # [N] index into subject_ids
    slice_index: NDArray  # [N] axial index in the cache's grid, -1 if unknown
    scan_from_grid: NDArray | None = None  # [S, 4, 4]
    source: list[str] | None = None  # S paths


class CacheWriter:
    """Writes a cache under a temporary name; it takes its own name when the `with` block ends well.

    Args:
        path: the file to make.
        slice_shape: (X, Y) of the stored slices, in pixels.
        crop: (x0, x1, y0, y1) to apply on reading; the result must be of a legal size.
        grid_affine: [4, 4], voxel (x, y, axial index) -> mm.
        settings: JSON-serialisable preprocessing settings.
        force: overwrite an existing file.

    Raises:
        FileExistsError: if `path` exists and `force` is false.
        InputError: if the crop is not of a legal size or lies outside the slice.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        slice_shape: Sequence[int] = RELEASED_SLICE_SHAPE,
        crop: Sequence[int] = RELEASED_CROP,
        grid_affine: ArrayLike | None = None,
        settings: dict | None = None,
        force: bool = False,
    ) -> None:
        _check_crop(crop, slice_shape, where=path)
        self._slice_shape = tuple(slice_shape)
        self._attributes = {
            "crop": np.asarray(crop, "<i4"),
            "grid_affine": np.asarray(np.eye(4) if grid_affine is None else grid_affine, "<f8"),
            "settings": text(json.dumps(settings or {})),
            "tf_lesion_version": text(__version__),
        }
        self._subjects, self._hashes = {}, {}
        self._context = self._opened(path, force)

    @contextlib.contextmanager
    def _opened(self, path, force):
        with written_whole(path, force=force) as temporary, new_hdf5(temporary) as self._file:
            self._file.attrs.update(self._attributes)
            for name in ("crop", "grid_affine"):
                self._hash(name, self._attributes[name].tobytes())
            yield
            self._finish()

    def __enter__(self) -> Self:
        self._context.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._context.__exit__(*failure)

    def append(
        self,
        dataset: str,
        slices: ArrayLike,
        *,
        subject_id: str,
        slice_index: Iterable[int],
        scan_from_grid: ArrayLike | None = None,
        source: Path | str = "",
        mask: ArrayLike | None = None,
        label: ArrayLike | None = None,
    ) -> None:
        """Add the slices of one subject to `Train` or `Test`.

        Args:
            dataset: "Train" or "Test".
            slices: [n, X, Y], normalised intensity.
            slice_index: [n] axial indices.
            scan_from_grid: [4, 4], mm in the cache's grid -> mm of the scan.
            mask: [n, X, Y], brain > 0; only for `Test`, and then for every subject.
            label: [n, X, Y], lesion > 0; likewise.
        """
        if dataset not in ("Train", "Test"):
            raise ValueError(f"Expected dataset 'Train' or 'Test', got {dataset!r}.")
        brain = None if mask is None else np.asarray(mask) > 0  # of fractions, none is lost
        for name, images in ((dataset, slices), ("Mask", brain), ("Label", label)):
            if images is not None:
                self._extend(name, np.asarray(images))
        rows = np.fromiter(slice_index, "<i4")
        transform = np.asarray(np.eye(4) if scan_from_grid is None else scan_from_grid, "<f8")
        subject = (str(subject_id), readable(source), transform, rows)
        self._subjects.setdefault(dataset, []).append(subject)

    def set_reference(self, quantiles: ArrayLike) -> None:
        """Store the reference brain intensities ([Q] quantiles) for histogram matching."""
        self._file["Reference"] = np.asarray(quantiles, "<f4")
        self._hash("Reference", self._file["Reference"][:].tobytes())

    def _hash(self, part, data):
        """Add bytes to the hash of a part of the cache; it is the same however they are divided."""
        self._hashes.setdefault(part, hashlib.sha256()).update(data)

    def _extend(self, name, slices):
        if slices.shape[1:] != self._slice_shape:
            raise ValueError(f"Expected {name} slices {self._slice_shape}, got {slices.shape[1:]}.")
        slices = slices.astype(STORED_AS[name])
        if name not in self._file:
            x, y = self._slice_shape
            packed = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
            self._file.create_dataset(
                name, (0, x, y), slices.dtype, maxshape=(None, x, y), chunks=(1, x, y), **packed
            )
        stored = self._file[name]
        require_space(Path(self._file.filename).parent, slices.nbytes)
        stored.resize(len(stored) + len(slices), axis=0)
        stored[len(stored) - len(slices) :] = slices
        self._hash(name, slices.tobytes())

    def _finish(self):
        for extra in {"Mask", "Label"} & set(self._file):
            if len(self._file[extra]) != len(self._file["Test"]):
                raise ValueError(f"{extra} was given for some subjects of Test only.")
        for dataset, subjects in self._subjects.items():
            names, sources, transforms, rows = zip(*subjects, strict=True)
            subject = np.arange(len(names), dtype="<i4")
            info = {
                "subject_ids": texts(names),
                "subject": np.repeat(subject, [len(own) for own in rows]),
                "slice_index": np.concatenate(rows),
                "scan_from_grid": np.stack(transforms),
                "source": texts(sources),
            }
            for part, values in info.items():
                self._file[f"{dataset}_info/{part}"] = values
            for part in ("subject", "slice_index", "scan_from_grid"):
                self._hash(f"{dataset}_{part}", info[part].tobytes())
            self._hash(f"{dataset}_subject_ids", json.dumps(names).encode())
        self._file.attrs["identity"] = text(_combined(self._hashes))


class SliceCache:
    """One dataset (`Train` or `Test`) of a cache, cropped, as float32 slices [n, H, W, 1].

    Args:
        path: a cache of ours or of the released code.
        dataset: "Train" or "Test".
        crop: (x0, x1, y0, y1); by default the crop stored in the file, the released crop for
            197 x 233 slices, and none for slices of a legal size.
        counts: slices per subject, for caches without `Test_info` (`BraTSLGGindeces.npy`).
        label_path: file with a dataset `Label`, when the cache has none (`BraTSLGG_label.hdf5`).

    Attributes:
        shape: (H, W) after the crop, in pixels.
        slice_shape: (X, Y) as stored, before the crop.
        index: the `SliceIndex`; one subject "unknown" if the file does not say.
        settings: of the preprocessing, {} for a released cache.
        grid_affine: [4, 4] voxel -> mm of the stored (uncropped) grid, None if the file is silent.
        reference: [Q] brain intensities for histogram matching, or None.
        has_label: whether lesion labels are at hand.

    Raises:
        FileNotFoundError, InputError: if the file is missing or is not such a cache.
    """

    def __init__(
        self,
        path: Path | str,
        dataset: str = "Test",
        *,
        crop: Sequence[int] | None = None,
        counts: ArrayLike | None = None,
        label_path: Path | str | None = None,
    ) -> None:
        self.path, self.dataset = Path(path), dataset
        self._file = self._label_file = open_hdf5(path, **CACHE)
        with intact(path):
            self._read_layout(crop, counts)
        if label_path:
            self._label_file = open_hdf5(label_path, **CACHE)
        with intact(self._label_file.filename):
            self.has_label = "Label" in self._label_file

    def _read_layout(self, crop, counts):
        self._slices = _dataset(self._file, self.dataset)
        self.slice_shape = self._slices.shape[1:]
        self.crop = tuple(int(edge) for edge in (crop or self._stored_crop()))
        _check_crop(self.crop, self.slice_shape, where=self.path)
        x0, x1, y0, y1 = self.crop
        self._window = (slice(x0, x1), slice(y0, y1))
        self.shape = (x1 - x0, y1 - y0)
        self.index = self._read_index(counts)
        self.settings = json.loads(self._file.attrs.get("settings", "{}"))
        affine = self._file.attrs.get("grid_affine")
        self.grid_affine = None if affine is None else np.asarray(affine, dtype=float)
        self.reference = self._file["Reference"][:] if "Reference" in self._file else None

    def __len__(self) -> int:
        return len(self._slices)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._label_file.close()
        self._file.close()

    @cached_property
    def identity(self) -> str:
        """12 hex digits of its content: as stored, or of shapes and 64 slices of each dataset.

        The latter for released caches, and those of before there were identities.
        """
        with intact(self.path):
            stored = self._file.attrs.get("identity")  # str in files of before
            stored = stored.decode() if isinstance(stored, bytes) else stored
            return stored or _sampled_identity(self._file)

    def read(self, rows: Iterable[int]) -> NDArray:
        """Slices [n, H, W, 1] float32 of the given rows.

        Raises:
            InputError: if there are non-finite values, or they are not normalized.
        """
        images = self._stack(self._slices, rows).astype(np.float32)
        bad = ~np.isfinite(images).all(axis=(1, 2, 3))
        if bad.any():
            row = np.asarray(rows)[bad][0]
            raise InputError(f"{self.path}: {self.dataset} row {row} holds NaN or infinite values.")
        check_normalized(images, where=f"{self.path}: {self.dataset}")
        return images

    def mask(self, rows: Iterable[int]) -> NDArray:
        """Brain mask [n, H, W, 1] bool: `Mask` > 0, or intensity > 0 where the file has no mask."""
        if self.dataset == "Test" and "Mask" in self._file:
            return self._aligned(self._file, "Mask", rows) > 0
        return self.read(rows) > 0

    def label(self, rows: Iterable[int]) -> NDArray:
        """Lesions [n, H, W, 1] bool: `Label` > 0."""
        return self._aligned(self._label_file, "Label", rows) > 0

    def _stack(self, stored, rows):
        with intact(stored.file.filename):
            return np.stack([stored[(int(row), *self._window)] for row in rows])[..., None]

    def _aligned(self, file, name, rows):
        with intact(file.filename):
            stored = _dataset(file, name)
        if stored.shape != self._slices.shape:
            raise InputError(
                f"{file.filename}: {name} has shape {stored.shape}, {self.dataset} has "
                f"{self._slices.shape}; they must be equal."
            )
        return self._stack(stored, rows)

    def _stored_crop(self):
        whole = (0, self.slice_shape[0], 0, self.slice_shape[1])
        usual = RELEASED_CROP if self.slice_shape == RELEASED_SLICE_SHAPE else whole
        return self._file.attrs.get("crop", usual)

    def _read_index(self, counts):
        if counts is not None:
            counts = np.asarray(counts, dtype=int).ravel()
            if counts.sum() != len(self):
                raise InputError(
                    f"{self.path}: {self.dataset} has {len(self)} slices, but the counts per "
                    f"subject add up to {counts.sum()}."
                )
            return SliceIndex(
                subject_ids=[f"subject-{number:03d}" for number in range(len(counts))],
                subject=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
                slice_index=np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
            )
        group = self._file.get(f"{self.dataset}_info")
        if group is None:
            return SliceIndex(["unknown"], np.zeros(len(self), np.int32), np.full(len(self), -1))
        return SliceIndex(
            subject_ids=list(group["subject_ids"].asstr()[:]),
            subject=group["subject"][:],
            slice_index=group["slice_index"][:],
            scan_from_grid=group["scan_from_grid"][:],
            source=list(group["source"].asstr()[:]),
        )


def read_counts(path: str | Path) -> np.ndarray:
    """Slices per subject from the released code's `BraTSLGGindeces.npy`."""
    counts = read_array(path, what="the number of slices of each subject")
    if counts.size == 0 or (counts < 1).any() or not np.equal(np.mod(counts, 1), 0).all():
        raise InputError(f"Expected positive whole numbers of slices in {path}, got {counts}.")
    return counts.astype(int).ravel()


def _dataset(file, name):
    path = file.filename
    if name not in file:
        found = ", ".join(sorted(file)) or "nothing"
        raise InputError(f"{path}: no dataset {name!r}; it has {found}. Is this the right cache?")
    stored = file[name]
    if not isinstance(stored, h5py.Dataset) or stored.ndim != 3 or len(stored) == 0:
        shape = getattr(stored, "shape", "a group")
        raise InputError(f"{path}: expected {name} as [N, X, Y] with N > 0, got {shape}.")
    return stored


def _check_crop(crop, slice_shape, *, where):
    x0, x1, y0, y1 = crop
    if not (0 <= x0 < x1 <= slice_shape[0] and 0 <= y0 < y1 <= slice_shape[1]):
        raise InputError(
            f"Crop [{x0}:{x1}, {y0}:{y1}] lies outside the {slice_shape[0]} x {slice_shape[1]} "
            f"slices of {where}; give another crop."
        )
    check_slice_shape((x1 - x0, y1 - y0), where=where)
