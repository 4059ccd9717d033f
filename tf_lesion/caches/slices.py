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
`settings` (JSON) and `tf_lesion_version`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from tf_lesion import __version__
from tf_lesion.files import InputError, require_space, written_whole

RELEASED_SLICE_SHAPE = (197, 233)
RELEASED_CROP = (22, 180, 17, 215)  # x0, x1, y0, y1, applied when a released slice is read
SMALLEST_SIZE = 34
SIZE_STEP = 4
# Min-max per subject (You et al., MIDL 2019), made robust: vessels, fat in the rim of an atlas mask
# and spikes are the brightest 0.1 % of a brain (about 1.5 ml), and are clipped.
LOWEST_PERCENTILE, HIGHEST_PERCENTILE = 0.1, 99.9
BRAIN_FLOOR = 1e-3  # least intensity inside the brain, so that `observed > 0` is the brain


def is_legal_size(pixels):
    """Whether the network maps a length of `pixels` onto itself: 30 + 4k, at least 34."""
    return pixels >= SMALLEST_SIZE and (pixels - SMALLEST_SIZE) % SIZE_STEP == 0


def check_slice_shape(shape, *, where):
    """Raise `InputError` unless both lengths of `shape` are 30 + 4k pixels."""
    if not all(is_legal_size(pixels) for pixels in shape):
        raise InputError(
            f"Expected slices of 30 + 4k pixels (34, 38, ... 158, ... 198), got "
            f"{shape[0]} x {shape[1]} in {where}; crop with --crop."
        )


@dataclass(frozen=True)
class SliceIndex:
    """Which slice is which: subject and axial position of each row of a dataset."""

    subject_ids: list  # S names
    subject: np.ndarray  # [N] index into subject_ids
    slice_index: np.ndarray  # [N] axial index in the cache's grid, -1 if unknown
    scan_from_grid: np.ndarray | None = None  # [S, 4, 4]
    source: list | None = None  # S paths

    @classmethod
    def from_counts(cls, counts):
        """Index of a released cache, from the slices per subject (`BraTSLGGindeces.npy`)."""
        counts = np.asarray(counts, dtype=int).ravel()
        return cls(
            subject_ids=[f"subject-{number:03d}" for number in range(len(counts))],
            subject=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            slice_index=np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
        )


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
        path,
        *,
        slice_shape=RELEASED_SLICE_SHAPE,
        crop=RELEASED_CROP,
        grid_affine=None,
        settings=None,
        force=False,
    ):
        _check_crop(crop, slice_shape, where=path)
        self._slice_shape = tuple(slice_shape)
        self._attributes = {
            "crop": np.asarray(crop, dtype=np.int32),
            "grid_affine": np.eye(4) if grid_affine is None else np.asarray(grid_affine, float),
            "settings": json.dumps(settings or {}),
            "tf_lesion_version": __version__,
        }
        self._whole = written_whole(path, force=force)
        self._info = {}
        self._file = None

    def __enter__(self):
        self._file = h5py.File(self._whole.__enter__(), "w")
        self._file.attrs.update(self._attributes)
        return self

    def append(
        self,
        dataset,
        slices,
        *,
        subject_id,
        slice_index,
        scan_from_grid=None,
        source="",
        mask=None,
        label=None,
    ):
        """Add the slices of one subject to `Train` or `Test`.

        Args:
            dataset: "Train" or "Test".
            slices: [n, X, Y], normalised intensity.
            subject_id: name of the subject.
            slice_index: [n] axial indices.
            scan_from_grid: [4, 4], mm in the cache's grid -> mm of the scan.
            source: path of the scan.
            mask: [n, X, Y], brain > 0; only for `Test`, and then for every subject.
            label: [n, X, Y], lesion > 0; likewise.
        """
        if dataset not in ("Train", "Test"):
            raise ValueError(f"Expected dataset 'Train' or 'Test', got {dataset!r}.")
        self._extend(dataset, slices, np.float32)
        for name, extra in (("Mask", mask), ("Label", label)):
            if extra is not None:
                self._extend(name, extra, np.uint8)
        info = self._info.setdefault(dataset, {"subjects": [], "subject": [], "slice_index": []})
        transform = np.eye(4) if scan_from_grid is None else np.asarray(scan_from_grid, float)
        info["subject"] += [len(info["subjects"])] * len(slices)
        info["slice_index"] += [int(index) for index in slice_index]
        info["subjects"].append((str(subject_id), transform, str(source)))

    def set_reference(self, quantiles):
        """Store the reference brain intensities ([Q] quantiles) for histogram matching."""
        self._file["Reference"] = np.asarray(quantiles, dtype=np.float32)

    def _extend(self, name, slices, dtype):
        slices = np.asarray(slices)
        if slices.shape[1:] != self._slice_shape:
            raise ValueError(f"Expected {name} slices {self._slice_shape}, got {slices.shape[1:]}.")
        if name not in self._file:
            self._file.create_dataset(
                name,
                shape=(0, *self._slice_shape),
                maxshape=(None, *self._slice_shape),
                chunks=(1, *self._slice_shape),
                dtype=dtype,
                compression="gzip",
                compression_opts=1,
                shuffle=True,
            )
        stored = self._file[name]
        require_space(Path(self._file.filename).parent, slices.size * np.dtype(dtype).itemsize)
        stored.resize(len(stored) + len(slices), axis=0)
        stored[len(stored) - len(slices) :] = slices

    def _write_info(self):
        for dataset, info in self._info.items():
            names, transforms, sources = zip(*info["subjects"], strict=True)
            group = self._file.create_group(f"{dataset}_info")
            group["subject_ids"] = np.array(names, dtype=h5py.string_dtype())
            group["source"] = np.array(sources, dtype=h5py.string_dtype())
            group["scan_from_grid"] = np.stack(transforms)
            group["subject"] = np.array(info["subject"], dtype=np.int32)
            group["slice_index"] = np.array(info["slice_index"], dtype=np.int32)
        for extra in {"Mask", "Label"} & set(self._file):
            if len(self._file[extra]) != len(self._file["Test"]):
                raise ValueError(f"{extra} was given for some subjects of Test only.")

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self._write_info()
            self._file.close()
        except BaseException as failure:
            self._whole.__exit__(type(failure), failure, failure.__traceback__)
            raise
        return self._whole.__exit__(kind, error, trace)


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
        index: the `SliceIndex`; one subject "unknown" if the file does not say.

    Raises:
        FileNotFoundError, InputError: if the file is missing or is not such a cache.
    """

    def __init__(self, path, dataset="Test", *, crop=None, counts=None, label_path=None):
        self.path, self.dataset = Path(path), dataset
        self._file = _open(path)
        self._slices = _dataset(self._file, dataset, path)
        self.crop = tuple(int(edge) for edge in (crop or self._stored_crop()))
        _check_crop(self.crop, self._slices.shape[1:], where=path)
        x0, x1, y0, y1 = self.crop
        self._window = (slice(x0, x1), slice(y0, y1))
        self.shape = (x1 - x0, y1 - y0)
        self.index = self._read_index(counts)
        self._label_file = _open(label_path) if label_path else self._file
        self._labels_from = label_path or path

    def __len__(self):
        return len(self._slices)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the file or files behind the cache."""
        self._label_file.close()
        self._file.close()

    @property
    def settings(self):
        """Preprocessing settings stored with the cache, {} for a released one."""
        return json.loads(self._file.attrs.get("settings", "{}"))

    @property
    def identity(self):
        """Hash of the content, None if the file does not say."""
        return self._file.attrs.get("identity")

    @property
    def grid_affine(self):
        """[4, 4] voxel -> mm of the stored (uncropped) grid, or None if the file does not say."""
        stored = self._file.attrs.get("grid_affine")
        return None if stored is None else np.asarray(stored, dtype=float)

    @property
    def slice_shape(self):
        """(X, Y) of the stored slices before the crop."""
        return tuple(self._slices.shape[1:])

    @property
    def reference(self):
        """[Q] reference brain intensities for histogram matching, or None."""
        return self._file["Reference"][:] if "Reference" in self._file else None

    @property
    def has_label(self):
        """Whether lesion labels are at hand."""
        return "Label" in self._label_file

    def read(self, rows):
        """Slices [n, H, W, 1] float32 of the given rows; non-finite values are an `InputError`."""
        images = self._stack(self._slices, rows).astype(np.float32)
        bad = ~np.isfinite(images).all(axis=(1, 2))
        if bad.any():
            row = np.asarray(rows)[bad][0]
            raise InputError(f"{self.path}: {self.dataset} row {row} holds NaN or infinite values.")
        return images[..., None]

    def mask(self, rows):
        """Brain mask [n, H, W, 1] bool: `Mask` > 0, or intensity > 0 where the file has no mask."""
        if self.dataset == "Test" and "Mask" in self._file:
            return self._stack(self._aligned(self._file, "Mask", self.path), rows)[..., None] > 0
        return self.read(rows) > 0

    def label(self, rows):
        """Lesions [n, H, W, 1] bool: `Label` > 0."""
        stored = self._aligned(self._label_file, "Label", self._labels_from)
        return self._stack(stored, rows)[..., None] > 0

    def _stack(self, stored, rows):
        return np.stack([stored[(int(row), *self._window)] for row in rows])

    def _aligned(self, file, name, path):
        stored = _dataset(file, name, path)
        if stored.shape != self._slices.shape:
            raise InputError(
                f"{path}: {name} has shape {stored.shape}, {self.dataset} has "
                f"{self._slices.shape}; they must be equal."
            )
        return stored

    def _stored_crop(self):
        shape = self._slices.shape[1:]
        if "crop" in self._file.attrs:
            return self._file.attrs["crop"]
        return RELEASED_CROP if shape == RELEASED_SLICE_SHAPE else (0, shape[0], 0, shape[1])

    def _read_index(self, counts):
        group = self._file.get(f"{self.dataset}_info")
        if counts is not None:
            index = SliceIndex.from_counts(counts)
            if len(index.subject) != len(self):
                raise InputError(
                    f"{self.path}: {self.dataset} has {len(self)} slices, but the counts per "
                    f"subject add up to {len(index.subject)}."
                )
            return index
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
    try:
        counts = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(
            f"Expected the number of slices of each subject (.npy) in {path}: {error}"
        ) from error
    if counts.size == 0 or (counts < 1).any() or not np.equal(np.mod(counts, 1), 0).all():
        raise InputError(f"Expected positive whole numbers of slices in {path}, got {counts}.")
    return counts.astype(int).ravel()


def _open(path):
    if not Path(path).exists():
        raise FileNotFoundError(f"No slice cache at {path}; make one with preprocessing.camcan.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"Expected an HDF5 slice cache, got {path} ({error}).") from error


def _dataset(file, name, path):
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
            f"slices of {where}; give another --crop."
        )
    check_slice_shape((x1 - x0, y1 - y0), where=where)
