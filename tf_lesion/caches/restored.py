"""The file of restored slices: `Restore` [N, H, W], as the released code writes it, and more.

    Restore     [N, H, W] float32   restored slices, cropped
    rows        [N] int64           row of each in the cache's `Test`
    Trajectory  group               datasets named by the step: images after that many steps
    Detection   group               lesion maps [N, H, W] uint8, named by the healthy false
                                    positive rate that their threshold was made for: fpr_0.05

    done        [N] uint8           1 for slices that are there; all of them in a finished file

The attribute `settings` is JSON: model, lambda, steps, seed, the cache's path and identity. While
it is being made the file is called `NAME.partial`, and an interrupted restoration goes on where it
stopped. Nothing is added to it or taken away until the end, not even `done`: a kill at any moment
leaves a file that can be read.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from tf_lesion.caches.hdf5 import intact, new_hdf5, open_hdf5, text
from tf_lesion.caches.slices import SliceCache
from tf_lesion.files import InputError, refuse_existing, require_space, written_whole
from tf_lesion.provenance import MADE_BY, stamp

IDENTITY, DONE = "cache_identity", "done"
BEGUN = {"what": "file of restored slices", "made_by": "--force, which starts over"}


def different_settings(first: dict, second: dict) -> list[str]:
    """Names of settings that differ; where a cache lies does not matter if its content is known."""
    known = IDENTITY in first and IDENTITY in second
    return [
        name
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name) and not (known and name == "cache")
    ]


class RestoredWriter:
    """Writes restored slices batch by batch, and resumes.

    Args:
        rows: [N] rows of the cache that will be restored.
        shape: (H, W) in pixels.
        settings: JSON-serialisable, with `cache` and `cache_identity`; a partial file made with
            other settings is refused.
        trajectory_steps: steps after which the images are kept too.
        thresholds: {name: residual} of the lesion maps that are kept too.
        force: overwrite `path` and start over.

    Attributes:
        rows, thresholds: as given.
        extras: names of the datasets beside `Restore`.

    Raises:
        FileExistsError: if `path` exists and `force` is false.
        InputError: if a partial file belongs to other settings or to another cache.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        rows: ArrayLike,
        shape: Sequence[int],
        settings: dict,
        trajectory_steps: Iterable[int] = (),
        thresholds: dict[str, float] | None = None,
        force: bool = False,
    ) -> None:
        self.path = Path(path)
        refuse_existing(path, force=force)
        self._partial = self.path.with_name(self.path.name + ".partial")
        if force:
            self._partial.unlink(missing_ok=True)
        self.rows = np.asarray(rows, dtype=np.int64)
        self.thresholds = dict(thresholds or {})
        steps = [f"Trajectory/{step}" for step in trajectory_steps]
        maps = [f"Detection/{name}" for name in self.thresholds]
        self.extras = [*steps, *maps]
        self._kinds = dict.fromkeys(["Restore", *steps], "f4") | dict.fromkeys(maps, "u1")
        self._shape = (len(self.rows), *shape)
        self._settings = settings | ({"thresholds": self.thresholds} if maps else {})

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._reopened() if self._partial.exists() else self._new()
        return self

    def _new(self):
        pixels = int(np.prod(self._shape, dtype=np.int64))
        size = pixels * sum(np.dtype(kind).itemsize for kind in self._kinds.values())
        require_space(self.path.parent, size + self.rows.nbytes)
        with written_whole(self._partial) as temporary, new_hdf5(temporary) as file:
            for name, kind in self._kinds.items():
                file.create_dataset(name, self._shape, kind, dcpl=_early())
            file.create_dataset(DONE, self._shape[:1], "u1", dcpl=_early())
            file["rows"] = self.rows
            file.attrs["settings"] = text(json.dumps(self._settings))
            file.attrs[MADE_BY] = text(json.dumps(stamp()))
        return open_hdf5(self._partial, **BEGUN, mode="r+")

    def _reopened(self):
        file = open_hdf5(self._partial, **BEGUN, mode="r+")
        with intact(self._partial):
            begun = json.loads(file.attrs.get("settings", "{}"))
            differing = different_settings(begun, self._settings)
            same_rows = "rows" in file and np.array_equal(file["rows"][:], self.rows)
            if not differing and same_rows and all(name in file for name in (*self._kinds, DONE)):
                return file
        file.close()
        known = IDENTITY in begun and IDENTITY in differing
        what = "on another cache" if known else "with other settings"
        raise InputError(
            f"{self._partial} was begun {what} ({', '.join(differing) or 'other slices'}); give "
            f"the same to go on, or start over with --force."
        )

    @property
    def missing(self) -> NDArray:
        """Positions that are not restored yet, ascending."""
        with intact(self._partial):
            return np.flatnonzero(self._file[DONE][:] == 0)

    def write(
        self,
        positions: Sequence[int],
        images: ArrayLike,
        extras: dict[str, ArrayLike] | None = None,
    ) -> None:
        """Store restored slices [n, H, W, 1], and those of each of `extras`, at n positions."""
        for name, kept in {"Restore": images, **(extras or {})}.items():
            for position, image in zip(positions, np.asarray(kept)[..., 0], strict=True):
                self._file[name][int(position)] = image
        self._file.flush()
        for position in positions:
            self._file[DONE][int(position)] = 1
        self._file.flush()

    def __exit__(self, *failure: Any) -> None:
        complete = failure[0] is None and len(self.missing) == 0
        self._file.close()
        if complete:
            os.replace(self._partial, self.path)


def _early():
    """A dataset takes all of its space when it is made: a kill cannot leave it inconsistent."""
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    return options


class RestoredReader:
    """Reads a file of restored slices, ours or the released code's (`Restore` alone).

    Attributes:
        rows: [N] row in the cache's `Test` of each slice.
        settings: how it was made; {} for a released file.
        shape: (H, W) in pixels.

    Raises:
        FileNotFoundError, InputError: if the file is missing or holds no `Restore` [N, H, W].
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file = open_hdf5(path, what="file of restored slices", made_by="restore_brats.py")
        with intact(path):
            self._read_layout()

    def _read_layout(self):
        stored = self._file.get("Restore")
        if not isinstance(stored, h5py.Dataset) or stored.ndim != 3:
            found = ", ".join(sorted(self._file)) or "nothing"
            raise InputError(f"{self.path}: expected a dataset Restore [N, H, W]; it has {found}.")
        self.settings = json.loads(self._file.attrs.get("settings", "{}"))
        self.shape = tuple(stored.shape[1:])
        self.rows = self._file["rows"][:] if "rows" in self._file else np.arange(len(stored))
        missing = np.count_nonzero(self._file[DONE][:] == 0) if DONE in self._file else 0
        if missing:
            raise InputError(
                f"{self.path}: {missing} of {len(stored)} slices are not restored yet; give the "
                f"same command again to go on."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check_cache(self, cache: SliceCache) -> None:
        """Raise `InputError` unless these slices were restored from this cache, cropped as it is.

        A file that does not say from which (the released code's) is compared by sizes and rows.
        """
        stored, crop = self.settings.get(IDENTITY), self.settings.get("crop")
        if stored not in (None, cache.identity):
            problem = (
                f"was restored from {self.settings.get('cache')} of the identity {stored}, not "
                f"from {cache.path} of the identity {cache.identity}; restore that, or give the "
                f"cache it came from"
            )
        elif self.shape != cache.shape or (stored and crop not in (None, list(cache.crop))):
            problem = (
                f"holds slices of {self.shape[0]} x {self.shape[1]} pixels (crop {crop}), "
                f"{cache.path} of {cache.shape[0]} x {cache.shape[1]} (crop {list(cache.crop)}); "
                f"they do not belong together"
            )
        elif not len(self) or self.rows.min() < 0 or self.rows.max() >= len(cache):
            problem = (
                f"names rows outside the {len(cache)} slices of {cache.path}; was it made from "
                f"another cache?"
            )
        elif len(np.unique(self.rows)) != len(self):
            problem = "holds some slices twice; restore them again"
        else:
            return
        raise InputError(f"{self.path} {problem}.")

    @property
    def trajectory_steps(self) -> list[int]:
        """Steps of which the images were kept, ascending."""
        with intact(self.path):
            return sorted(int(step) for step in self._file.get("Trajectory", ()))

    def read(self, positions: Iterable[int], name: str = "Restore") -> NDArray:
        """Slices [n, H, W, 1] float32 at the given positions, of `Restore` or another dataset."""
        with intact(self.path):
            stored = self._file[name]
            return np.stack([stored[int(p)] for p in positions]).astype(np.float32)[..., None]


def shard_path(path: Path | str, shard: tuple[int, int]) -> Path:
    """Where shard (i, n) of the file `path` is written: restored.shard-1-of-3.h5."""
    path = Path(path)
    number, count = shard
    return path.with_name(f"{path.stem}.shard-{number}-of-{count}{path.suffix}")


def merge_shards(path: Path | str, *, force: bool = False) -> int:
    """Put the shards beside `path` together into `path`; they are kept.

    Returns:
        Number of slices.

    Raises:
        FileExistsError, InputError: if `path` exists, or shards are missing, unfinished or were
            made with different settings.
    """
    refuse_existing(path, force=force)
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(RestoredReader(file)) for file in _shard_files(Path(path))]
        settings = _shared_settings(shards)
        rows = np.concatenate([shard.rows for shard in shards])
        order = np.argsort(rows)
        places = np.split(np.argsort(order), np.cumsum([len(shard) for shard in shards])[:-1])
        kept = {"trajectory_steps": shards[0].trajectory_steps}
        kept["thresholds"] = settings.pop("thresholds", None)
        writer = RestoredWriter(
            path, rows=rows[order], shape=shards[0].shape, settings=settings, force=force, **kept
        )
        stack.enter_context(writer)
        for shard, destinations in zip(shards, places, strict=True):
            for position, destination in enumerate(destinations):
                extras = {name: shard.read([position], name) for name in writer.extras}
                writer.write([destination], shard.read([position]), extras)
    return len(rows)


def _shard_files(path):
    """All shards of `path`, which must be complete."""
    shard = re.compile(rf"{re.escape(path.stem)}\.shard-[0-9]+-of-([0-9]+){re.escape(path.suffix)}")
    found = [shard.fullmatch(name) for name in os.listdir(path.parent)]
    counts = {match[1] for match in found if match}
    if len(counts) != 1:
        what = f"shards of {len(counts)} different divisions" if counts else "none"
        raise InputError(
            f"Expected the shards of {path} beside it, made with --shard i/n, got {what}."
        )
    count = int(counts.pop())
    wanted = [shard_path(path, (number, count)) for number in range(1, count + 1)]
    missing = [str(file) for file in wanted if not file.exists()]
    if missing:
        raise InputError(f"Not restored yet: {', '.join(missing)}; run their --shard first.")
    return wanted


def _shared_settings(shards):
    """The settings of all shards, without their numbers."""
    first, *others = [{k: v for k, v in shard.settings.items() if k != "shard"} for shard in shards]
    for shard, theirs in zip(shards[1:], others, strict=True):
        if differing := different_settings(first, theirs):
            what = "from another cache" if IDENTITY in differing else "with other settings"
            raise InputError(
                f"{shard.path} was restored {what} than {shards[0].path} "
                f"({', '.join(differing)}); restore it again with --force."
            )
    return first
