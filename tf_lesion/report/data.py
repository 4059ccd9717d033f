"""What a report shows of one restored scan: its volumes, its lesions, how they fit the truth."""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from tf_lesion.detection.layout import FACTS_ENDINGS, FAILED, SUMMARY, read_facts
from tf_lesion.detection.lesions import find_lesions, lesion_counts
from tf_lesion.evaluation import metrics
from tf_lesion.files import InputError
from tf_lesion.scans.volumes import load_labels, load_scan


@dataclass(frozen=True)
class Result:
    """One restored scan.

    Attributes:
        facts_path: its JSON.
        facts: what that says.
        scan_path: the scan it was made of.
        truth_path: a segmentation, lesion > 0, or None.
        point: name of the threshold that the pictures show, or None without thresholds.
    """

    facts_path: Path
    facts: dict
    scan_path: Path
    truth_path: Path | None
    point: str | None

    @classmethod
    def read(cls, facts_path, *, scan=None, truth=None, target_fpr=0.05):
        """The result of a JSON of restore_brats.py.

        Args:
            facts_path: the JSON; the maps are beside it.
            scan: the scan, if it has moved.
            truth: a segmentation; by default the one noted when the scan was restored.
            target_fpr: the threshold to show is that nearest to this rate.

        Raises:
            FileNotFoundError, InputError: if a file is missing, or is none of restore_brats.py.
        """
        facts_path = Path(facts_path)
        facts = read_facts(facts_path)
        scan_path = Path(scan or facts["input"])
        if not scan_path.exists():
            raise FileNotFoundError(
                f"No scan at {scan_path}, from which {facts_path} was made; give it with --scan."
            )
        noted = facts.get("truth")
        truth_path = truth or (noted if noted and Path(noted).exists() else None)
        rates = {name: at["target_fpr"] for name, at in facts["lesions"].items()}
        point = min(rates, key=lambda name: abs(rates[name] - target_fpr), default=None)
        return cls(facts_path, facts, scan_path, truth_path and Path(truth_path), point)

    @functools.cached_property
    def scan(self):
        """The `Scan`; all volumes below are on the voxels of `scan.data`."""
        return load_scan(self.scan_path)

    def volume(self, name):
        """[X, Y, Z] float32 in RAS of `restored` or `residual`, or uint8 of a threshold's mask."""
        path = self.facts_path.parent / self.facts["files"][name]
        if not path.exists():
            raise FileNotFoundError(f"No {path}, which {self.facts_path} names.")
        if name in self.facts["lesions"]:
            return load_labels(path, self.scan)
        image = nib.as_closest_canonical(nib.load(path))
        volume = image.get_fdata(dtype=np.float32)
        if volume.size != self.scan.data.size:
            raise InputError(f"{path}: expected the grid of {self.scan_path}.")
        return volume.reshape(self.scan.data.shape)

    @functools.cached_property
    def residual(self):
        """[X, Y, Z] float32, normalized intensity."""
        return self.volume("residual")

    @functools.cached_property
    def restored(self):
        """[X, Y, Z] float32, normalized intensity, 0 outside the brain."""
        return self.volume("restored")

    @functools.cached_property
    def brain(self):
        """[X, Y, Z] bool."""
        brain = self.restored != 0
        return brain if brain.any() else np.ones_like(brain)

    @functools.cached_property
    def mask(self):
        """[X, Y, Z] bool, the detection at `point`; empty without thresholds."""
        return self.volume(self.point) > 0 if self.point else np.zeros(self.brain.shape, bool)

    @functools.cached_property
    def truth(self):
        """[X, Y, Z] bool, or None."""
        return None if self.truth_path is None else load_labels(self.truth_path, self.scan) > 0

    @functools.cached_property
    def lesions(self):
        """The `Lesion`s at `point`, largest first."""
        return find_lesions(self.mask, self.residual, self.scan.affine)

    def lesion_overlaps(self):
        """Share of each of the `lesions` that is truth; zeros without a truth."""
        if self.truth is None:
            return [0.0] * len(self.lesions)
        inside = find_lesions(self.mask, self.truth.astype(np.float32), self.scan.affine)
        return [lesion.mean_residual for lesion in inside]

    @functools.cached_property
    def curve(self):
        """`metrics.Curve` of the residual in the brain, or None without a truth."""
        if self.truth is None:
            return None
        return metrics.Curve.from_scores(self.residual[self.brain], self.truth[self.brain])

    def against_truth(self):
        """{auc, best_dice, points: {name: dice, tpr, fpr, lesions, found, false_positives}}."""
        if self.truth is None:
            return None
        best, threshold = metrics.largest_dice(self.curve)
        return {
            "auc": metrics.area(self.curve),
            "best_dice": best,
            "best_threshold": threshold,
            "points": {name: self._at(name) for name in self.facts["lesions"]},
        }

    def _at(self, name):
        detected = self.volume(name) > 0
        tp = np.count_nonzero(detected & self.truth)
        fp = np.count_nonzero(detected) - tp
        lesion, brain = np.count_nonzero(self.truth), np.count_nonzero(self.brain | self.truth)
        return {
            "dice": 2 * tp / (tp + fp + lesion) if tp + fp + lesion else 1.0,
            "tpr": tp / lesion if lesion else float("nan"),
            "fpr": fp / (brain - lesion),
            **asdict(lesion_counts(detected, self.truth)),
        }


def find_results(folder):
    """Sorted JSON files of restored scans in a folder, at any depth.

    Raises:
        FileNotFoundError, InputError: without the folder, or if there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder of results at {folder}.")
    found = sorted(path for end in FACTS_ENDINGS for path in folder.glob(f"**/*{end}"))
    if not found:
        raise InputError(
            f"Expected maps of restore_brats.py --input in {folder}, found no "
            f"*{' or *'.join(FACTS_ENDINGS)}."
        )
    return found


def failures(folder):
    """[(name, reason)] of the scans that failed, from the summary of a cohort; [] without one."""
    path = Path(folder) / SUMMARY
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["scans"]
        return [(row["name"], row["reason"]) for row in rows if row["status"] == FAILED]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"Expected {path} as restore_brats.py writes it ({error!r}).") from error


def read_evaluation(folder):
    """What `eval.evaluate` measured: `metrics.json` of its folder.

    Raises:
        FileNotFoundError, InputError: if it is not there, or is something else.
    """
    path = Path(folder) / "metrics.json"
    if not path.exists():
        raise FileNotFoundError(f"No {path}; make it with eval.evaluate.")
    try:
        content = json.loads(path.read_text())
        content["scores"]["residual"]["roc"], content["cohort"]["subjects"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"Expected {path} as eval.evaluate writes it ({error!r}).") from error
    return content
