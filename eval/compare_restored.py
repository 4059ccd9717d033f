"""Compare restored slices of this port with those of a run of the released TensorFlow 1 code.

    python -m eval.compare_tf1 --restored restored.h5 --tf1-restored LGG/1.8/ --cache lgg.h5

Two correct runs draw different noise and part by rounding, so nothing passes or fails here: the
table says how far apart they are, slice by slice, and what that does to AUC and Dice.

--tf1-restored is `restored_images.hdf5`, or a folder of `restored_images{k}.npy`. The released code
restores batches of 60 in order and, for the LGG subjects, begins the last batch one slice too
early: that slice is there twice, and the second one is left out. In the same folder, or in
--tf1-statistics, `LGsta.npy` or `HGsta.npy` (counts per subject) and `fprthresholds.npy` (three
thresholds) are used when they are there.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from tf_lesion import __version__
from tf_lesion.caches.restored import RestoredReader
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.evaluation import metrics
from tf_lesion.evaluation.scores import Cohort, read_counts
from tf_lesion.files import InputError, refuse_existing, write_json

RELEASED_BATCH = 60  # slices
RESTORED = "restored_images.hdf5"
STATISTICS = ("LGsta.npy", "HGsta.npy")
THRESHOLDS = "fprthresholds.npy"
CHUNK = 64  # slices compared at a time
QUANTILES = {"median": 50, "95 %": 95, "largest": 100}  # percentiles over slices


@dataclass(frozen=True)
class ReleasedSlices:
    """Restored slices of the released code, with the position of each row of its cache.

    Attributes:
        sources: one dataset or memory-mapped array [n, H, W, ...] per batch file.
        batch: slices of a full batch.
    """

    sources: list
    batch: int = RELEASED_BATCH

    @classmethod
    def open(cls, path):
        """From a `restored_images.hdf5`, or a folder with that or with `restored_images{k}.npy`."""
        path = Path(path)
        if path.is_dir():
            batches = _batch_files(path)
            if batches:
                sources = [_array(file) for file in batches]
                return cls([source for source in sources if len(source)], len(sources[0]))
            path = path / RESTORED
        if not path.exists():
            raise FileNotFoundError(
                f"No restored slices of the released code at {path}: expected {RESTORED}, or a "
                f"folder of restored_images0.npy, restored_images1.npy ..."
            )
        with RestoredReader(path):  # its errors name what is missing
            pass
        return cls([h5py.File(path, "r")["Restore"]])

    @property
    def shape(self):
        """(H, W) in pixels."""
        return tuple(self.sources[0].shape[1:3])

    def __len__(self):
        return sum(map(len, self.sources))

    def positions(self, count):
        """[count] place of each row of a cache of `count` slices; a repeated slice is left out.

        Raises:
            InputError: if there are not as many slices, or one more.
        """
        if len(self) == count:
            return np.arange(count)
        if len(self) == count + 1:
            return np.delete(np.arange(count + 1), self.batch * (count // self.batch))
        raise InputError(
            f"Expected {count} slices of the released code (or {count + 1}, one of them twice), "
            f"got {len(self)}; were both made from the same cache? Give it with --cache."
        )

    def read(self, positions):
        """Slices [n, H, W] float32; of several kept intervals, the last."""
        ends = np.cumsum([len(source) for source in self.sources])
        found = []
        for position in positions:
            number = int(np.searchsorted(ends, position, side="right"))
            source = self.sources[number]
            image = np.asarray(source[int(position - ends[number] + len(source))])
            found.append(image[..., -1] if image.ndim == 3 else image)
        return np.stack(found).astype(np.float32)


def _batch_files(folder):
    numbered = [
        (int(match[1]), path)
        for path in folder.glob("restored_images*.npy")
        if (match := re.fullmatch(r"restored_images(\d+)\.npy", path.name))
    ]
    numbers = sorted(number for number, _ in numbered)
    if numbers != list(range(len(numbers))):
        missing = sorted(set(range(numbers[-1])) - set(numbers))
        raise InputError(f"{folder}: restored_images{missing[0]}.npy is missing.")
    return [path for _, path in sorted(numbered)]


def _array(path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        try:  # an empty array cannot be mapped: the last batch of the HGG subjects
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError):
            raise InputError(f"Expected an array in {path}: {error}") from error
    if array.ndim not in (3, 4):
        raise InputError(f"{path}: expected slices [n, H, W, 1], got shape {array.shape}.")
    return array


# Slices ---------------------------------------------------------------------------------------


def compare_slices(restored, released, count, *, progress=True):
    """Largest and mean absolute difference of each slice.

    Args:
        restored: path of ours.
        released: `ReleasedSlices`.
        count: slices of the cache that both were made from.
        progress: show a progress bar.

    Returns:
        {"largest_difference": [N], "mean_difference": [N]}, intensity, in the order of our file.
    """
    places = released.positions(count)
    largest, mean = [], []
    with RestoredReader(restored) as reader:
        if reader.shape != released.shape:
            raise InputError(
                f"{restored} holds slices of {reader.shape[0]} x {reader.shape[1]} pixels, the "
                f"released run {released.shape[0]} x {released.shape[1]}."
            )
        starts = range(0, len(reader), CHUNK)
        for start in tqdm(starts, "slices", disable=not progress):
            positions = np.arange(start, min(start + CHUNK, len(reader)))
            theirs = released.read(places[reader.rows[positions]])
            difference = np.abs(reader.read(positions)[..., 0] - theirs)
            largest += [difference.max(axis=(1, 2))]
            mean += [difference.mean(axis=(1, 2))]
    return {
        "largest_difference": np.concatenate(largest),
        "mean_difference": np.concatenate(mean),
    }


# Residuals, AUC, Dice ---------------------------------------------------------------------------


def compare_residuals(cohort, released, count, *, thresholds=(), progress=True):
    """Residual correlation, and with labels AUC and Dice of both, by the released protocol.

    Args:
        cohort: `Cohort` of our slices.
        released: `ReleasedSlices`.
        count: slices of the cache.
        thresholds: residuals at which Dice is compared too (`fprthresholds.npy`).
        progress: show a progress bar.

    Returns:
        (numbers: {name: (ours, theirs)} and {"residual_correlation": float}, our counts
        [subject, 4, 401]); counts and pairs only where the cache has labels.
    """
    places = released.positions(count)
    with cohort.open_cache() as cache:
        labelled = cache.has_label
    grid = metrics.released_thresholds()
    chosen = np.sort(thresholds) if len(thresholds) else grid[:1]
    counters = (metrics.ThresholdCounter(grid), metrics.ThresholdCounter(chosen))
    moments, counts = np.zeros(6), {(who, at): [] for who in (0, 1) for at in (0, 1)}
    subjects = cohort.subjects(with_truth=labelled)
    for subject in tqdm(subjects, "subjects", disable=not progress):
        theirs = np.abs(subject.observed - released.read(places[subject.rows]))[subject.mask]
        ours = subject.score("residual")[subject.mask]
        moments += _moments(ours, theirs)
        if labelled:
            truth = subject.truth[subject.mask]
            for who, residual in enumerate((ours, theirs)):
                for at, counter in enumerate(counters):
                    counts[who, at].append(counter.count(residual, truth))
    numbers = {"residual_correlation": _correlation(moments)}
    if not labelled:
        return numbers, None
    stacked = {key: np.stack(value) for key, value in counts.items()}
    ours, theirs = (_measures(stacked[who, 0]) for who in (0, 1))
    numbers |= {name: (ours[name], theirs[name]) for name in ours}
    for column, threshold in enumerate(np.sort(thresholds)):
        pair = (metrics.dice(stacked[who, 1])[:, column].mean() for who in (0, 1))
        numbers[f"mean_subject_dice_at_{threshold:.4f}"] = tuple(pair)
    return numbers, stacked[0, 0]


def _moments(first, second):
    first, second = first.astype(np.float64), second.astype(np.float64)
    sums = (first.sum(), second.sum(), first @ first, second @ second, first @ second)
    return np.array([first.size, *sums])


def _correlation(moments):
    """Pearson's r from (n, sum x, sum y, sum x^2, sum y^2, sum xy); NaN if one does not vary."""
    n, x, y, xx, yy, xy = moments
    spread = np.sqrt(max(n * xx - x * x, 0.0)) * np.sqrt(max(n * yy - y * y, 0.0))
    return float((n * xy - x * y) / spread) if spread else float("nan")


def _measures(counts):
    """Pooled AUC and Dice at the Youden threshold from counts [subject, 4, 401]."""
    curve = metrics.Curve.from_counts(counts.sum(axis=0), metrics.released_thresholds())
    threshold = metrics.youden_threshold(curve)
    dice = np.nan
    if not np.isnan(threshold):
        column = int(np.searchsorted(metrics.released_thresholds(), threshold))
        dice = metrics.dice(counts)[:, column].mean()
    return {"pooled_auc": metrics.area(curve), "mean_subject_dsc_auc": float(dice)}


def compare_statistics(counts, path):
    """Our counts [subject, 4, 401] against a `LGsta.npy`: AUC and Dice, and whether they agree.

    Raises:
        InputError: if the file holds counts of other subjects or thresholds.
    """
    stored = np.load(path, allow_pickle=False)
    if stored.shape != counts.shape:
        raise InputError(
            f"{path}: expected counts {counts.shape} (subject; TP, TN, FP, FN; threshold), got "
            f"{stored.shape}; are they of the same subjects?"
        )
    ours, theirs = _measures(counts), _measures(stored.astype(np.int64))
    numbers = {f"{Path(path).name}: {name}": (ours[name], theirs[name]) for name in ours}
    different = np.abs(counts - stored).sum() / 2 / counts[:, :, 0].sum() / counts.shape[2]
    return numbers | {f"{Path(path).name}: share_of_voxels_counted_otherwise": float(different)}


# The command ----------------------------------------------------------------------------------


def parser():
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m eval.compare_tf1", description=__doc__, formatter_class=HelpFormatter
    )
    add = arguments.add_argument
    add("--restored", required=True, type=Path, help="ours, of restore_brats.py")
    add("--tf1-restored", required=True, type=Path, help="HDF5 file, or folder of .npy batches")
    add("--cache", type=Path, help="the cache of both: also compare residuals, AUC and Dice")
    add("--labels", type=Path, help="file with Label, for a cache without")
    add("--subjects", type=Path, help="slices per subject (.npy), for a released cache")
    add(
        "--crop",
        type=int,
        nargs=4,
        metavar=("X0", "X1", "Y0", "Y1"),
        help="window, pixels; default: the cache's",
    )
    add("--tf1-statistics", type=Path, help="LGsta.npy, HGsta.npy or the folder of one of them")
    add("--out", type=Path, help="also write the numbers as JSON")
    add("--force", action="store_true", help="overwrite --out")
    return arguments


@command
def main(argv=None):
    """Compare, print a table, write JSON if asked."""
    options = parser().parse_args(argv)
    if options.out:
        refuse_existing(options.out, force=options.force)
    released = ReleasedSlices.open(options.tf1_restored)
    counts = read_counts(options.subjects) if options.subjects else None
    cohort = Cohort(options.restored, options.cache, options.labels, counts, crop=options.crop)
    count = _cache_size(options, cohort)
    by_slice = compare_slices(options.restored, released, count)
    lines, content = _slice_lines(by_slice), {name: v.tolist() for name, v in by_slice.items()}
    if options.cache:
        folder = _folder(options)
        thresholds = _thresholds(folder)
        numbers, our_counts = compare_residuals(cohort, released, count, thresholds=thresholds)
        for path in _statistics(options, folder) if our_counts is not None else ():
            numbers |= compare_statistics(our_counts, path)
        lines += [_line(name, value) for name, value in numbers.items()]
        content |= numbers
    print("\n".join(lines))
    if options.out:
        write_json(options.out, {"tf_lesion_version": __version__, **content})
    return 0


def _cache_size(options, cohort):
    """Slices of the cache; without one, as many as our file names."""
    if options.cache:
        with cohort.open_cache() as cache:
            return len(cache)
    with RestoredReader(options.restored) as reader:
        return int(reader.rows.max()) + 1


def _folder(options):
    folder = options.tf1_statistics or options.tf1_restored
    return folder if folder.is_dir() else folder.parent


def _thresholds(folder):
    path = folder / THRESHOLDS
    return sorted(np.load(path, allow_pickle=False).ravel().tolist()) if path.exists() else []


def _statistics(options, folder):
    given = options.tf1_statistics
    if given and given.is_file():
        return [given]
    found = [folder / name for name in STATISTICS if (folder / name).exists()]
    if len(found) > 1:
        raise InputError(
            f"{folder} holds both of {', '.join(STATISTICS)}; say which with --tf1-statistics."
        )
    return found


def _slice_lines(by_slice):
    lines = [f"{len(by_slice['mean_difference'])} slices, absolute difference in intensity"]
    for name, values in by_slice.items():
        quantiles = (f"{key} {np.percentile(values, q):.2e}" for key, q in QUANTILES.items())
        lines.append(f"  {name.replace('_', ' ')} of a slice: {', '.join(quantiles)}")
    return lines


def _line(name, value):
    if isinstance(value, tuple):
        ours, theirs = value
        return f"{name:42} ours {ours:.4f}  released {theirs:.4f}  difference {ours - theirs:+.4f}"
    return f"{name:42} {value:.6f}"
