"""Restored slices of this port against those of a run of the released TensorFlow 1 code.

The released code restores batches of 60 in order and, for the LGG subjects, begins the last batch
one slice too early: that slice is there twice, and the second one is left out.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from tf_lesion.caches.hdf5 import open_hdf5
from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import read_counts
from tf_lesion.evaluation import metrics
from tf_lesion.evaluation.scans import Cohort
from tf_lesion.files import InputError

RELEASED_BATCH = 60  # slices
RESTORED = "restored_images.hdf5"
BATCH_FILE = re.compile(r"restored_images(\d+)\.npy")
STATISTICS = ("LGsta.npy", "HGsta.npy")
THRESHOLDS = "fprthresholds.npy"
CHUNK = 64  # slices compared at a time
QUANTILES = {0.5: "median", 0.95: "95 %", 1: "largest"}  # over slices


class ReleasedSlices:
    """Restored slices of the released code, with the position of each row of its cache.

    Args:
        path: a `restored_images.hdf5`, or a folder with that or with `restored_images{k}.npy`.

    Raises:
        FileNotFoundError, InputError: if there are none, or a file is missing or broken.
    """

    def __init__(self, path: Path) -> None:
        files = {int(match[1]): file for file in path.glob("*") if (match := _numbered(file))}
        missing = sorted({*range(max(files, default=0))} - {*files})
        if missing:
            raise InputError(f"{path}: restored_images{missing[0]}.npy is missing.")
        arrays = [_array(files[number]) for number in sorted(files)] or [_dataset(path)]
        self._batch = len(arrays[0]) if files else RELEASED_BATCH
        self._slices = [(array, place) for array in arrays for place in range(len(array))]
        self.shape: tuple[int, int] = tuple(arrays[0].shape[1:3])  # pixels

    def __len__(self) -> int:
        return len(self._slices)

    def positions(self, count: int) -> np.ndarray:
        """[count] place of each row of a cache of `count` slices; a repeated slice is left out.

        Raises:
            InputError: if there are not as many slices, or one more.
        """
        if len(self) not in (count, count + 1):
            raise InputError(
                f"Expected {count} slices of the released code (or {count + 1}, one of them "
                f"twice), got {len(self)}; were both made from the same cache? Give it with "
                f"--cache."
            )
        repeated = [] if len(self) == count else self._batch * (count // self._batch)
        return np.delete(np.arange(len(self)), repeated)

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Slices [n, H, W] float32; of several kept intervals, the last."""
        found = [array[place] for array, place in (self._slices[p] for p in positions)]
        return np.stack(found).reshape(len(found), *self.shape, -1)[..., -1].astype(np.float32)


def _numbered(path):
    return BATCH_FILE.fullmatch(path.name)


def _array(path):
    try:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:  # an empty array cannot be mapped: the last batch of the HGG subjects
            array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"Expected an array in {path}: {error}") from error
    if array.ndim not in (3, 4):
        raise InputError(f"{path}: expected slices [n, H, W, 1], got shape {array.shape}.")
    return array


def _dataset(path):
    path = path / RESTORED if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(
            f"No restored slices of the released code at {path}: expected {RESTORED}, or a folder "
            f"of restored_images0.npy, restored_images1.npy ..."
        )
    with RestoredReader(path):  # its errors name what is missing
        pass
    return open_hdf5(path, what="file of restored slices", made_by="the released code")["Restore"]


def compare(options: argparse.Namespace) -> tuple[pd.DataFrame, float | None, pd.DataFrame]:
    """Everything that can be compared with these options of `eval.compare_tf1`.

    Returns:
        (differences of each slice, correlation of the residuals or None, table of summaries).
    """
    released = ReleasedSlices(options.tf1_restored)
    if not options.cache:
        with RestoredReader(options.restored) as reader:
            return compare_slices(reader, released, int(reader.rows.max()) + 1), None, _table([])
    counts = read_counts(options.subjects) if options.subjects else None
    cohort = Cohort(options.restored, options.cache, options.labels, counts, crop=options.crop)
    with cohort.open_cache() as cache, RestoredReader(options.restored) as reader:
        reader.check_cache(cache)
        places, labelled = released.positions(len(cache)), cache.has_label
        slices = compare_slices(reader, released, len(cache))
    folder = options.tf1_statistics or options.tf1_restored
    folder = folder if folder.is_dir() else folder.parent
    stored = folder / THRESHOLDS
    thresholds = np.sort(np.load(stored).ravel()) if stored.exists() else np.zeros(0)
    correlation, ours, theirs = count_both(cohort, released, places, thresholds, labelled)
    if not labelled:
        return slices, correlation, _table([])
    split = len(metrics.released_thresholds())
    dice = [metrics.dice(counts[..., split:]).mean(axis=0) for counts in (ours, theirs)]
    ours = ours[..., :split]
    rows = _summaries("", ours, theirs[..., :split])
    rows += zip([f"mean_subject_dice_at_{at:.4f}" for at in thresholds], *dice, strict=True)
    for path in _statistics(options.tf1_statistics, folder):
        rows += compare_statistics(ours, path)
    return slices, correlation, _table(rows)


def _table(rows):
    return pd.DataFrame(rows, columns=["quantity", "ours", "released"]).set_index("quantity")


def compare_slices(reader: RestoredReader, released: ReleasedSlices, count: int) -> pd.DataFrame:
    """Largest and mean absolute difference of each slice, intensity, in the order of our file.

    Args:
        reader, released: ours and theirs.
        count: slices of the cache that both were made from.
    """
    places, found = released.positions(count), []
    if reader.shape != released.shape:
        raise InputError(
            f"{reader.path} holds slices of {reader.shape[0]} x {reader.shape[1]} pixels, the "
            f"released run {released.shape[0]} x {released.shape[1]}."
        )
    for start in tqdm(range(0, len(reader), CHUNK), "slices"):
        positions = np.arange(start, min(start + CHUNK, len(reader)))
        theirs = released.read(places[reader.rows[positions]])
        difference = np.abs(reader.read(positions)[..., 0] - theirs)
        found.append(np.stack([difference.max(axis=(1, 2)), difference.mean(axis=(1, 2))], axis=1))
    return pd.DataFrame(np.concatenate(found), columns=["largest_difference", "mean_difference"])


def count_both(
    cohort: Cohort,
    released: ReleasedSlices,
    places: np.ndarray,
    thresholds: np.ndarray,
    labelled: bool,
) -> tuple[float, np.ndarray | None, np.ndarray | None]:
    """Pearson's r of the residuals over all brain voxels, and with labels what is detected.

    Args:
        cohort, released: ours and theirs.
        places: as `ReleasedSlices.positions` gives them.
        thresholds: [T] residuals, counted after the 401 of the released protocol.
        labelled: whether there are labels.

    Returns:
        (r; counts [subject, 4, 401 + T] of ours and of theirs, or None).
    """
    gram, counts = np.zeros((3, 3)), []  # of (1, ours, theirs): too many voxels to hold them all
    counters = [
        metrics.ThresholdCounter(at)
        for at in (metrics.released_thresholds(), thresholds)
        if len(at)
    ]
    for subject in tqdm(cohort.subjects(with_truth=labelled), "subjects"):
        theirs = np.abs(subject.observed - released.read(places[subject.rows]))[subject.mask]
        pair, truth = (subject.score("residual")[subject.mask], theirs), subject.truth[subject.mask]
        moments = np.stack([np.ones(theirs.shape), *pair])
        gram += moments @ moments.T
        if labelled:
            counts.append([np.hstack([c.count(one, truth) for c in counters]) for one in pair])
    mean = gram[0, 1:] / gram[0, 0]
    covariance = gram[1:, 1:] / gram[0, 0] - np.outer(mean, mean)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))
    return (correlation, *(np.stack(counts, axis=1) if labelled else (None, None)))


def _summaries(prefix, *both):
    """Rows of a table from counts [subject, 4, 401]: pooled AUC, Dice at the Youden threshold."""
    found = []
    for counts in both:
        curve = metrics.Curve.from_counts(counts.sum(axis=0), metrics.released_thresholds())
        column = curve.threshold == metrics.youden_threshold(curve)  # none where that is NaN
        found.append((metrics.area(curve), metrics.dice(counts)[:, column].mean()))
    names = (f"{prefix}pooled_auc", f"{prefix}mean_subject_dsc_auc")
    return list(zip(names, *found, strict=True))


def compare_statistics(counts: np.ndarray, path: Path) -> list[tuple]:
    """Our counts [subject, 4, 401] against a `LGsta.npy`: AUC, Dice, share of other decisions.

    Raises:
        InputError: if the file holds counts of other subjects or thresholds.
    """
    stored = np.load(path, allow_pickle=False)
    if stored.shape != counts.shape:
        raise InputError(
            f"{path}: expected counts {counts.shape} (subject; TP, TN, FP, FN; threshold), got "
            f"{stored.shape}; are they of the same subjects?"
        )
    different = np.abs(counts - stored).sum() / 2 / counts[:, :, 0].sum() / counts.shape[2]
    rows = _summaries(f"{path.name}: ", counts, stored.astype(np.int64))
    return [*rows, (f"{path.name}: share_of_voxels_counted_otherwise", 0.0, different)]


def _statistics(given, folder):
    if given and given.is_file():
        return [given]
    found = [folder / name for name in STATISTICS if (folder / name).exists()]
    if len(found) > 1:
        raise InputError(
            f"{folder} holds both of {', '.join(STATISTICS)}; say which with --tf1-statistics."
        )
    return found
