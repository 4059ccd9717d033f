"""Thresholds from healthy subjects: the smallest with at most 1, 5, 10 % false positives.

No lesion label is used: whatever is detected in a healthy brain is false. A voxel is detected when
`residual > t`; the voxels are those with an observed intensity above 0.

    exact    the smallest t with share(residual > t) <= target, by order statistics (paper,
             section 2.4). t is one of the residuals, or 0. It never exceeds the target; the next
             smaller residual would.
    golden   the released code's golden section search on |FPR(t) - target|. It may exceed the
             target, and on a plateau it returns the same wrong value for every target. Unlike the
             released search it ends when all residuals are 0 (with t = 0).

The baselines of `eval.scores` get thresholds from the same voxels by the exact method.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tf_lesion import __version__
from tf_lesion.cli.command import HelpFormatter, command
from tf_lesion.config import SOLVERS
from tf_lesion.detection.postprocessing import HEALTHY_FILE, Postprocessing
from tf_lesion.evaluation.metrics import rounded_down
from tf_lesion.evaluation.scores import Cohort, read_counts
from tf_lesion.files import InputError, refuse_existing, written_whole

TARGETS = (0.01, 0.05, 0.10)  # the paper's limits on the false positive rate: DSC1, DSC5, DSC10
METHODS = ("exact", "golden")
GOLDEN_SHARE = (3 - math.sqrt(5)) / 2  # of the wider part of the bracket, 0.382
GOLDEN_TOLERANCE = 1e-8  # width of the last bracket over the sum of its two inner points
HALF_BITS = 16  # streaming counts the upper, then the lower half of the 32-bit pattern
UNKNOWN_MODEL = "unknown"
DECISIVE = (
    "tv_weight",
    "steps",
    "solver",
    "seeds",
    "flip",
    "postprocessing",
)  # settings of a restoration that move the thresholds

EXAMPLE = """example:
  python -m eval.thresholds --model runs/gmvae --cache healthy.h5 --out thresholds.json \\
      --tv-weight auto
"""


def allowed_positives(total, target_fpr):
    """How many of `total` voxels may be detected: the largest n with n / total <= target."""
    if not 0 <= target_fpr < 1:
        raise InputError(f"Expected a false positive rate in [0, 1), got {target_fpr}.")
    number = math.floor(target_fpr * total)
    if (number + 1) / total <= target_fpr:  # the product was rounded down
        return number + 1
    return number - 1 if number / total > target_fpr else number


def smallest_threshold(residuals, target_fpr):
    """The smallest t >= 0 with share(residual > t) <= target: one of the residuals.

    Args:
        residuals: any shape, >= 0, not empty.
        target_fpr: largest share of detected voxels, a fraction below 1.
    """
    residuals = _checked(residuals)
    rank = residuals.size - 1 - allowed_positives(residuals.size, target_fpr)
    return float(np.partition(residuals, rank)[rank])


def streamed_thresholds(chunks, targets_fpr):
    """`smallest_threshold` for float32 residuals too many to hold.

    Two passes: the first counts the upper halves of the 32-bit patterns (ordered as the values),
    which gives each target's bin and its rank inside; the second counts the lower halves there.
    Memory: one chunk and 0.5 MB per target.

    Args:
        chunks: a function that returns an iterator over float32 arrays >= 0, the same each time.
        targets_fpr: the targets, fractions below 1.

    Returns:
        ([(threshold, rate)] per target, number of voxels); rate = share(residual > threshold).
    """
    upper = np.zeros(1 << HALF_BITS, dtype=np.int64)
    for pattern in map(_pattern, chunks()):
        upper += np.bincount(pattern >> HALF_BITS, minlength=upper.size)
    total = int(upper.sum())
    _require_voxels(total)
    ranks = [allowed_positives(total, target) for target in targets_fpr]
    places = [_place(upper, rank) for rank in ranks]
    lower = {bin_: np.zeros_like(upper) for bin_, _ in places}
    for pattern in map(_pattern, chunks()):
        for bin_, counts in lower.items():
            low = pattern[pattern >> HALF_BITS == bin_] & (1 << HALF_BITS) - 1
            counts += np.bincount(low, minlength=counts.size)
    found = []
    for (bin_, above), rank in zip(places, ranks, strict=True):
        low, above_low = _place(lower[bin_], rank - above)
        value = np.uint32(bin_ << HALF_BITS | low).view(np.float32)
        found.append((float(value), (above + above_low) / total))
    return found, total


def _place(counts, rank):
    """(bin that holds the value of this rank, values in higher bins); rank 0 is the largest."""
    above = counts[::-1].cumsum()[::-1]
    bin_ = int(np.flatnonzero(above > rank)[-1])
    return bin_, int(above[bin_] - counts[bin_])


def _pattern(residuals):
    residuals = np.asarray(residuals, dtype=np.float32).ravel() + np.float32(0)  # -0 becomes 0
    if residuals.size and not (residuals.min() >= 0 and np.isfinite(residuals.max())):
        raise InputError("Expected finite residuals of at least 0.")
    return residuals.view(np.uint32).astype(np.int64)


def _checked(residuals):
    residuals = np.asarray(residuals).ravel()
    _require_voxels(residuals.size)
    if not (residuals.min() >= 0 and np.isfinite(residuals.max())):
        raise InputError("Expected finite residuals of at least 0.")
    return residuals


def _require_voxels(number):
    if number == 0:
        raise InputError("Expected residuals of healthy brain voxels, got none.")


def golden_section_threshold(residuals, target_fpr, *, tolerance=GOLDEN_TOLERANCE):
    """The released search: golden section for the t that minimizes |share(residual > t) - target|.

    Starts from the smallest, mean and largest residual. Each step puts a point into the wider part
    of the bracket, at 0.382 of it, and keeps the side of the strictly smaller value. Ends when the
    bracket is narrower than `tolerance` times the sum of its inner points, or has no width (the
    released search goes on for ever there), and answers with its middle.

    The function is a staircase with plateaus, so the answer can be a local minimum.

    Args:
        residuals: any shape, >= 0; sorted and held in memory.
        target_fpr: the rate to come near to, a fraction.
        tolerance: relative width at the end.

    Source: Kiefer (1953); You et al., MIDL 2019, section 2.4.
    """
    ordered = np.sort(_checked(residuals))
    low, middle, high = float(ordered[0]), float(ordered.mean(dtype=np.float64)), float(ordered[-1])

    def distance(threshold):
        return abs(share_above(ordered, threshold) - target_fpr)

    while high > low:
        upper_is_wider = high - middle > middle - low
        part = (high if upper_is_wider else low) - middle
        point = middle + GOLDEN_SHARE * part
        if abs(high - low) < tolerance * (abs(middle) + abs(point)):
            break
        better = distance(point) < distance(middle)
        if upper_is_wider:
            low, middle, high = (middle, point, high) if better else (low, middle, point)
        else:
            low, middle, high = (low, point, middle) if better else (point, middle, high)
    return (low + high) / 2


def share_above(ordered, threshold):
    """Share of ascending values that are > threshold (a float64), exactly, without a copy."""
    edge = rounded_down(np.float64(threshold), ordered.dtype)
    return (ordered.size - np.searchsorted(ordered, edge, side="right")) / ordered.size


# The file of thresholds -----------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """One threshold and the false positive rate it has on the healthy cohort."""

    target_fpr: float
    threshold: float
    fpr: float

    @property
    def name(self):
        """The paper's name of the Dice at this threshold: dsc1 for 1 % false positives."""
        return f"dsc{100 * self.target_fpr:g}"


@dataclass(frozen=True)
class Thresholds:
    """Content of a file of thresholds.

    Attributes:
        method: "exact" or "golden".
        model_id: the model that restored the healthy slices.
        restoration: the settings of that restoration.
        cohort: where the healthy voxels came from, and how many.
        points: {score: [`Threshold`]} for the residual and the baselines.
    """

    method: str
    model_id: str
    restoration: dict
    cohort: dict
    points: dict

    def save(self, path, *, force=False):
        """Write as JSON."""
        with written_whole(path, force=force) as temporary:
            content = {"tf_lesion_version": __version__, **asdict(self)}
            temporary.write_text(json.dumps(content, indent=2) + "\n")


def model_id(settings):
    """What identifies the model in the settings of a restored file, "unknown" if they do not say.

    The identity of its weights where it is given (it stays when a run is moved), else the path.
    """
    return str(settings.get("model_identity") or settings.get("model_path") or UNKNOWN_MODEL)


def load_thresholds(path, *, model_id=None, restoration=None):
    """Read a file of thresholds.

    Args:
        path: made by `eval.thresholds`.
        model_id: the model about to use them; None to skip the check.
        restoration: the settings about to be used; lambda and the number of steps must be those
            that the healthy slices were restored with. None to skip the check.

    Raises:
        InputError: if the file is no such file, or belongs to another model or restoration.
    """
    try:
        content = json.loads(Path(path).read_text())
        points = {
            score: [Threshold(**point) for point in points]
            for score, points in content["points"].items()
        }
        fields = [content[name] for name in ("method", "model_id", "restoration", "cohort")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"Expected thresholds written by eval.thresholds in {path} ({error!r})."
        ) from error
    thresholds = Thresholds(*fields, points)
    if model_id is not None and thresholds.model_id != model_id:
        raise InputError(
            f"{path} belongs to model {thresholds.model_id}, not to {model_id}; make thresholds "
            f"for this model with eval.thresholds."
        )
    for name in DECISIVE:
        theirs, ours = thresholds.restoration.get(name), (restoration or {}).get(name)
        if None not in (theirs, ours) and theirs != ours:
            raise InputError(
                f"{path} was made with {name} {theirs}, not {ours}; the false positive rates hold "
                f"only there. Restore the healthy slices with {ours} and run eval.thresholds."
            )
    return thresholds


def find_thresholds(cohort, *, targets=TARGETS, method="exact", progress=True):
    """`Thresholds` of a healthy `Cohort` of restored slices; reads one subject at a time.

    Raises:
        InputError: on an unknown method, a target outside [0, 1), or no healthy voxel.
    """
    if method not in METHODS:
        raise InputError(f"Expected a method of {', '.join(METHODS)}, got {method!r}.")
    points = {
        score: _points(cohort, score, targets, method if score == "residual" else "exact", progress)
        for score in cohort.scores
    }
    settings = cohort.settings
    return Thresholds(method, model_id(settings), settings, _described(cohort), points)


def _points(cohort, score, targets, method, progress):
    def chunks():
        subjects = cohort.subjects(with_truth=False)
        for subject in tqdm(subjects, f"healthy {score}", unit="subject", disable=not progress):
            yield subject.score(score)[subject.observed > 0]

    if method == "exact":
        found, _ = streamed_thresholds(chunks, targets)
    else:
        residuals = np.sort(np.concatenate(list(chunks())))
        values = [golden_section_threshold(residuals, target) for target in targets]
        found = [(value, share_above(residuals, value)) for value in values]
    return [Threshold(target, *pair) for target, pair in zip(targets, found, strict=True)]


def _described(cohort):
    counts = [
        (len(subject.rows), int((subject.observed > 0).sum()))
        for subject in cohort.subjects(with_truth=False)
    ]
    slices, voxels = zip(*counts, strict=True)
    return {
        "cache": str(cohort.cache),
        "restored": str(cohort.restored),
        "subjects": len(counts),
        "slices": sum(slices),
        "voxels": sum(voxels),
    }


def parser():
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m eval.thresholds",
        description="Thresholds with a known rate of false positives on healthy subjects.",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    add = arguments.add_argument
    add("--model", help="run, or TF1 checkpoint, to restore with; or give --restored alone")
    add("--cache", required=True, type=Path, help="healthy cache (dataset Test)")
    add("--out", required=True, type=Path, help="JSON file to write")
    add(
        "--restored",
        type=Path,
        help="its restored slices; with --model made if missing, else reused (default: beside "
        "--out, .healthy.h5)",
    )
    add("--tv-weight", help="lambda, or auto: that of eval.select_lambda; default: the preset's")
    add("--steps", type=int, help="of the restoration; default: the preset's")
    add(
        "--solver",
        choices=list(SOLVERS),
        help="as in restore_brats.py; default: the preset's",
    )
    add("--postprocess", help="thresholds of the residual after these steps too (restore_brats.py)")
    add("--max-slices", type=int, help="use a random subset, drawn with --seed")
    add("--batch-size", type=int, default=16, help="slices at once")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of convolutions")
    add("--seed", type=int, default=0, help="of the noise and of the subset")
    add("--targets", type=float, nargs="+", default=TARGETS, help="largest false positive rates")
    add("--method", choices=METHODS, default="exact", help="order statistics, or released search")
    add("--subjects", type=Path, help="slices per subject (.npy), for a released cache")
    add(
        "--crop",
        type=int,
        nargs=4,
        metavar=("X0", "X1", "Y0", "Y1"),
        help="window, pixels, as in the restoration",
    )
    add("--force", action="store_true", help="overwrite --out; with --model, restore again")
    return arguments


def _restored(options, steps):
    """Path of the restored healthy slices, made with --model if there is one."""
    if options.model is None:
        if options.restored is None:
            raise InputError("Expected --model to restore with, or --restored with the slices.")
        for name in ("tv_weight", "steps", "solver", "max_slices"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} needs --model to restore with.")
        return options.restored
    from eval.healthy import restored_healthy
    from eval.select_lambda import check_counts, restoration_of
    from tf_lesion.training.runs import load

    names = ("seed", "batch_size", "max_slices", "crop", "force")
    given = {name: getattr(options, name) for name in names}
    check_counts(batch_size=options.batch_size, max_slices=options.max_slices)
    path = options.restored or options.out.with_suffix(".healthy.h5")
    loaded = load(options.model, precision=options.precision)
    restoration = restoration_of(
        loaded, tv_weight=options.tv_weight, steps=options.steps, solver=options.solver
    )
    restoration = steps.restoration(restoration) if steps else restoration
    reused = restored_healthy(loaded, options.cache, path, restoration=restoration, **given)
    print(f"{'Reused' if reused else 'Restored'} healthy slices: {path}")
    return path


@command
def main(argv=None):
    """Find thresholds on restored healthy slices and write them as JSON."""
    options = parser().parse_args(argv)
    refuse_existing(options.out, force=options.force)
    counts = read_counts(options.subjects) if options.subjects else None
    steps = Postprocessing.parse(options.postprocess) if options.postprocess else None
    cohort = Cohort(
        _restored(options, steps),
        options.cache,
        counts=counts,
        crop=options.crop,
        postprocessing=steps,
        healthy=Path(options.model) / HEALTHY_FILE if options.model else None,
    )
    thresholds = find_thresholds(cohort, targets=options.targets, method=options.method)
    thresholds.save(options.out, force=options.force)
    print(f"{'score':10} {'target':>7} {'threshold':>10} {'FPR':>8}")
    for score, points in thresholds.points.items():
        for point in points:
            rate, value = f"{point.fpr:8.5f}", f"{point.threshold:10.6f}"
            print(f"{score:10} {point.target_fpr:7.2%} {value} {rate}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
