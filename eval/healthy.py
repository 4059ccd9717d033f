"""Restoring the held-out healthy slices, or reusing a file of them that fits."""

from pathlib import Path

import numpy as np

from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import SliceCache
from tf_lesion.files import InputError

COMPARED = (
    *("model_identity", "precision", "seed", "steps", "step_sizes", "gradient_clip"),
    *("tv_weight", "solver", "seeds", "flip", "crop"),
)


def restored_healthy(
    loaded,
    cache_path,
    out,
    *,
    restoration,
    seed=0,
    batch_size=16,
    max_slices=None,
    crop=None,
    force=False,
):
    """Restore `Test` of a healthy cache into `out`, unless `out` is just that already.

    Args:
        loaded: `runs.LoadedModel`.
        cache_path: the healthy cache.
        out: the file of restored slices.
        restoration: `RestorationConfig`.
        seed: of the noise, and of the subset.
        batch_size: slices at once.
        max_slices: a random subset of so many.
        crop: (x0, x1, y0, y1) in place of the cache's own.
        force: restore again, whatever is there.

    Returns:
        Whether an existing file was reused.

    Raises:
        InputError: if `out` exists and was restored in another way.
    """
    from tf_lesion.restoration import chosen_rows, describe, restore_to_file

    if not Path(out).exists() or force:
        restore_to_file(
            loaded,
            cache_path,
            out,
            restoration=restoration,
            seed=seed,
            batch_size=batch_size,
            max_slices=max_slices,
            crop=crop,
            force=force,
        )
        return False
    with SliceCache(cache_path, "Test", crop=crop) as cache:
        wanted = describe(loaded, restoration, seed=seed) | {"crop": list(cache.crop)}
        rows = chosen_rows(len(cache), max_slices, seed=seed)
    check_restored(out, wanted, rows)
    return True


def check_restored(path, wanted, rows):
    """Raise `InputError` unless the file holds these rows, restored with the wanted settings."""
    with RestoredReader(path) as reader:
        settings, found = reader.settings, reader.rows
    for name in COMPARED:
        theirs, ours = settings.get(name), wanted.get(name)
        if theirs != ours:
            raise InputError(
                f"{path} was restored with {name} {theirs}, not {ours}; choose another file with "
                f"--restored, or --force to restore it again."
            )
    if not np.array_equal(np.sort(found), rows):
        raise InputError(
            f"{path} holds {len(found)} slices that are not the {len(rows)} asked for; choose "
            f"another file with --restored, or --force to restore it again."
        )
