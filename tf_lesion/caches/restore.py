"""Restoring a cache into an HDF5 file: batch by batch, resumable, in shards if asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tf_lesion.caches.restored import RestoredReader, RestoredWriter, shard_path
from tf_lesion.caches.slices import SliceCache
from tf_lesion.config import RestorationConfig
from tf_lesion.files import InputError
from tf_lesion.restoration import Restorer, detect, restore, trajectory_steps

COMPARED = (
    *("model_identity", "precision", "seed", "steps", "step_sizes", "gradient_clip"),
    *("tv_weight", "solver", "seeds", "flip", "crop", "cache_identity"),
)


def restore_to_file(
    prior: Any,
    cache_path: Path | str,
    out: Path | str,
    *,
    restoration: RestorationConfig | None = None,
    seed: int = 0,
    batch_size: int = 16,
    max_slices: int | None = None,
    save_every: int | None = None,
    thresholds: dict[str, float] | None = None,
    crop: Sequence[int] | None = None,
    shard: tuple[int, int] | None = None,
    force: bool = False,
) -> int:
    """Restore `Test` of a cache, of patients or of healthy subjects, into an HDF5 file.

    Args:
        prior: `Prior`.
        out: the file to make (see `caches.restored`); a partial one is gone on with.
        restoration: the model's own by default.
        seed: of the noise, and of the subset.
        batch_size: slices at once; it changes speed and memory, not the images.
        max_slices: restore a random subset of so many.
        save_every: keep the trajectory every so many steps.
        thresholds: {name: residual}; lesion maps at these are written too.
        crop: (x0, x1, y0, y1) in place of the cache's own.
        shard: (i, n): only the i-th of n parts, into a file of its own (`shard_path`).

    Returns:
        Number of slices in the file.

    Raises:
        FileExistsError, InputError: if `out` exists, the cache's slices are not of the size the
            model was trained on, or the model has no trajectory to keep.
    """
    restoration = restoration or prior.config.restoration
    kept = trajectory_steps(restoration.steps, save_every)
    if not set(kept) <= set(prior.model.stops(restoration.steps, save_every)):
        raise InputError(
            f"Expected no save_every, since {prior.path} ({prior.config.network.model}) does not "
            f"restore step by step; leave it out."
        )
    with SliceCache(cache_path, "Test", crop=crop) as cache:
        prior.check_size(cache)
        rows = chosen_rows(len(cache), max_slices, seed=seed)
        settings = _settings(prior, cache, restoration, seed)
        if shard is not None:
            rows, settings["shard"] = rows[shard[0] - 1 :: shard[1]], list(shard)
            out = shard_path(out, shard)
        extras = {"trajectory_steps": kept, "thresholds": thresholds}
        with RestoredWriter(
            out, rows=rows, shape=cache.shape, settings=settings, force=force, **extras
        ) as writer:
            restorer = Restorer(prior.model, restoration, seed=seed)
            _restore_missing(restorer, cache, writer, batch_size, save_every)
    return len(rows)


def _restore_missing(restorer, cache, writer, batch_size, save_every):
    """Restore the slices that `writer` still misses; their rows in the cache seed the noise."""
    missing, settings = writer.missing, restorer.restoration
    total = len(missing) * settings.steps * settings.repeats
    with tqdm(total=total, desc="restoring", unit="slice-step") as progress:
        for start in range(0, len(missing), batch_size):
            positions = missing[start : start + batch_size]
            rows = writer.rows[positions]
            observed, mask = cache.read(rows), cache.mask(rows)
            images, _, trajectory = restore(
                restorer, observed, mask, rows, save_every=save_every, on_progress=progress.update
            )
            extras = {f"Trajectory/{step}": kept for step, kept in trajectory.items()}
            for name, threshold in writer.thresholds.items():
                extras[f"Detection/{name}"] = detect(observed, images, mask, threshold)
            writer.write(positions, images, extras)


def chosen_rows(count: int, max_slices: int | None, *, seed: int) -> NDArray:
    """All rows of `count`, or a random subset of `max_slices`; ascending."""
    if max_slices is None or max_slices >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, max_slices, replace=False))


def _settings(prior, cache, restoration, seed):
    origin = {"cache": str(cache.path), "cache_identity": cache.identity, "crop": list(cache.crop)}
    return prior.describe(restoration, seed=seed) | origin


def check_restored(
    path: Path | str,
    prior: Any,
    cache_path: Path | str,
    *,
    restoration: RestorationConfig,
    seed: int,
    max_slices: int | None = None,
    crop: Sequence[int] | None = None,
) -> None:
    """Raise `InputError` unless `restore_to_file` would make the file as it is there."""
    with SliceCache(cache_path, "Test", crop=crop) as cache, RestoredReader(path) as reader:
        rows = chosen_rows(len(cache), max_slices, seed=seed)
        wanted = _settings(prior, cache, restoration, seed)
    for name in COMPARED:
        theirs, ours = reader.settings.get(name), wanted.get(name)
        if theirs != ours:
            raise InputError(
                f"{path} was restored with {name} {theirs}, not {ours}; choose another file, or "
                f"force, which restores it again."
            )
    if not np.array_equal(np.sort(reader.rows), rows):
        raise InputError(
            f"{path} holds {len(reader)} slices that are not the {len(rows)} asked for; choose "
            f"another file, or force, which restores it again."
        )
