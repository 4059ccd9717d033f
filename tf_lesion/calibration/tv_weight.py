"""Lambda, the weight of the total variation, chosen without a lesion label.

Healthy subjects need no change. So the held-out healthy slices are restored at every lambda of a
grid, and the lambda that changes them least is chosen:

    eps(lambda) = 1/M * sum over M subjects of |observed - restored|_1

Source: You et al., MIDL 2019, section 2.3. The paper finds 1.8 for the GMVAE on 52 subjects of
Cam-CAN. A sweep keeps what is finished in a small JSON file, so that a killed one goes on.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tf_lesion.caches.restore import chosen_rows
from tf_lesion.caches.slices import SliceCache
from tf_lesion.files import InputError, write_json
from tf_lesion.restoration import Restorer, restore

GRID_SLACK = 1e-9  # of a step: rounding must not add a point at the end of the grid
GRID_DIGITS = 10  # 0.2 * 9 is 1.8, not 1.8000000000000003


def parse_grid(text: str) -> list[float]:
    """Lambdas of "start:stop:step" (without the stop, as in Python) or of "0.6,1.8,3".

    Raises:
        InputError: if the text is neither, or holds no lambda, a negative one, or one twice.
    """
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            count = math.ceil((stop - start) / step - GRID_SLACK)
            grid = [round(start + number * step, GRID_DIGITS) for number in range(count)]
        else:
            grid = [float(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"Expected a grid like 0:4:0.2 or 0.6,1.8,3, got {text!r}.") from error
    if not grid or not all(math.isfinite(weight) and weight >= 0 for weight in grid):
        raise InputError(f"Expected a grid of lambdas of 0 or more, got {text!r}.")
    if len(set(grid)) < len(grid):
        raise InputError(f"Expected different lambdas, got {text!r}.")
    return grid


class Kept:
    """Results by name in a JSON file that is rewritten after each; gone on with after a kill.

    Args:
        path: the file, deleted by `discard` when all is done.
        settings: JSON-serializable; results kept with other settings are refused.
        hint: what to do then, the end of the error message.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], *, hint: str = "start over"):
        self.path = Path(path)
        self._settings = json.loads(json.dumps(settings))
        self.results = {}
        if not self.path.exists():
            return
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            settings, self.results = stored["settings"], dict(stored["results"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} holds no unfinished results; {hint}.") from error
        if settings != self._settings:
            raise InputError(f"{self.path} was begun with other settings; {hint}.")

    def add(self, name: str, result: Any) -> None:
        """Keep one result."""
        self.results[name] = result
        write_json(self.path, {"settings": self._settings, "results": self.results})

    def discard(self) -> None:
        """Delete the file: the results are elsewhere now."""
        self.path.unlink(missing_ok=True)


def restored_batches(
    restorer: Restorer,
    cache: SliceCache,
    rows: np.ndarray,
    *,
    tv_weight: float,
    batch_size: int,
    on_progress: Callable[[int], Any] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Restore rows of a cache batch by batch.

    Args:
        restorer: `Restorer`.
        cache: open `SliceCache`.
        rows: [n] rows of the cache; they seed the noise.
        tv_weight: lambda.
        batch_size: slices at once.
        on_progress: called with the number of slice-steps just taken.

    Yields:
        (rows [B], observed [B, H, W], restored [B, H, W], brain mask [B, H, W] bool).
    """
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        observed, mask = cache.read(batch), cache.mask(batch)
        restored = restore(
            restorer, observed, mask, batch, tv_weight=tv_weight, on_progress=on_progress
        )
        yield batch, observed[..., 0], restored.images[..., 0], mask[..., 0]


def select(
    prior: Any,
    cache_path: str | Path,
    grid: Sequence[float],
    *,
    partial: str | Path,
    steps: int | None = None,
    max_slices: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    counts: np.ndarray | None = None,
    crop: tuple[int, ...] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure eps(lambda) on `Test` of a healthy cache and choose its minimum.

    Args:
        prior: `Prior`.
        cache_path: the healthy cache.
        grid: [lambda], per unit intensity.
        partial: file that keeps each finished lambda; the caller deletes it when all is saved.
        steps: of the restoration; the model's own by default.
        max_slices: use a random subset of so many slices.
        seed: of the noise, and of the subset.
        batch_size: slices at once.
        counts: slices per subject, when the cache does not say.
        crop: (x0, x1, y0, y1) in place of the cache's own.
        progress: show a progress bar.

    Returns:
        `tv_weight`, the smallest lambda of those with the least change per subject,
        `at_end_of_grid`, `curve` with a row per lambda, `cohort`, and how it was restored.

    Raises:
        InputError: if the cache does not fit the model, or `partial` belongs to other settings.
    """
    # With long steps the change only lessens as lambda grows: there is no minimum to find.
    schedule = prior.config.restoration.solver.schedule
    restoration = prior.restoration(tv_weight=grid[0], steps=steps, solver=schedule)
    settings = prior.describe(restoration, seed=seed)
    del settings["tv_weight"]
    with SliceCache(cache_path, "Test", counts=counts, crop=crop) as cache:
        prior.check_size(cache)
        rows = chosen_rows(len(cache), max_slices, seed=seed)
        cohort = {
            "cache": str(cache_path),
            "cache_identity": cache.identity,
            "subjects": len(np.unique(cache.index.subject[rows])),
            "slices": len(rows),
            "of_slices": len(cache),
        }
        kept = Kept(partial, {**settings, "cohort": cohort, "grid": list(grid)})
        missing = [weight for weight in grid if f"{weight:g}" not in kept.results]
        restorer = Restorer(prior.model, restoration, seed=seed)
        total = len(missing) * len(rows) * restoration.steps
        with tqdm(total=total, desc="lambda", unit="slice-step", disable=not progress) as bar:
            for weight in missing:
                batches = restored_batches(
                    restorer,
                    cache,
                    rows,
                    tv_weight=weight,
                    batch_size=batch_size,
                    on_progress=bar.update,
                )
                kept.add(f"{weight:g}", measure_change(batches, cache.index.subject))
    curve = [{"tv_weight": weight, **kept.results[f"{weight:g}"]} for weight in grid]
    return {**chosen(curve), **settings, "cohort": cohort, "curve": curve}


def measure_change(batches: Iterable[tuple], subject_of_row: np.ndarray) -> dict[str, float]:
    """The l1 change of restored slices, over subjects and over voxels.

    Args:
        batches: as yielded by `restored_batches`.
        subject_of_row: [N] subject of every row of the cache.

    Returns:
        `change_per_subject` (eps: mean over subjects of the sum over their brain voxels, intensity
        times voxels), `std_per_subject` (ddof 0) and `change_per_voxel` (mean over all brain
        voxels, intensity).
    """
    change, voxels = {}, 0
    for rows, observed, restored, mask in batches:
        sums = (np.abs(observed - restored) * mask).sum(axis=(1, 2), dtype=np.float64)
        voxels += int(mask.sum())
        for subject, value in zip(subject_of_row[rows], sums, strict=True):
            change[subject] = change.get(subject, 0.0) + value
    if not voxels:
        raise InputError("Expected healthy brain voxels, but the brain mask is empty.")
    values = np.array(list(change.values()))
    return {
        "change_per_subject": float(values.mean()),
        "std_per_subject": float(values.std()),
        "change_per_voxel": float(values.sum() / voxels),
    }


def chosen(curve: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The lambda of the smallest change per subject, and whether it is an end of the grid."""
    curve = sorted(curve, key=lambda row: row["tv_weight"])
    best = int(np.argmin([row["change_per_subject"] for row in curve]))
    return {
        "tv_weight": curve[best]["tv_weight"],
        "at_end_of_grid": len(curve) > 1 and best in (0, len(curve) - 1),
    }


def table(curve: Sequence[dict[str, float]], tv_weight: float) -> list[str]:
    """The curve as lines of text, the choice marked."""
    lines = [f"{'lambda':>7}  {'change per subject':>18}  {'change per voxel':>16}"]
    for row in curve:
        mark = "  <- smallest" if row["tv_weight"] == tv_weight else ""
        lines.append(
            f"{row['tv_weight']:7.2f}  {row['change_per_subject']:18.2f}  "
            f"{row['change_per_voxel']:16.5f}{mark}"
        )
    if chosen(curve)["at_end_of_grid"]:
        lines.append("The smallest change is at an end of the grid; try a wider one.")
    return lines
