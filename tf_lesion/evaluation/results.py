"""Restored scans in a folder of maps: their volumes, their lesions, and as scans to be measured."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from tf_lesion.detection.layout import (
    FACTS_PATTERNS,
    FAILED,
    SUMMARY,
    read_facts,
    read_summary,
    scan_of,
)
from tf_lesion.detection.lesions import find_lesions
from tf_lesion.detection.table import COLUMNS
from tf_lesion.evaluation.scans import LabeledScan, Mask, Scans, equalized
from tf_lesion.files import InputError, content_identity
from tf_lesion.scans.discovery import NO_SUBJECTS, find_files, problem_of, subject_with_files
from tf_lesion.scans.volumes import Scan, load_labels, load_map, load_scan

SIGNED = ("restored", "normalized")  # maps that may be below 0
MOST_NUMBERS = np.iinfo(np.uint16).max  # of lesions; all beyond share the last
CENTER = ("center_x_mm", "center_y_mm", "center_z_mm")  # columns of a table of lesions


@dataclass(frozen=True)
class Result:
    """One restored scan; all volumes are [X, Y, Z] in RAS, on the voxels of `scan.data`.

    Attributes:
        facts_path: its JSON.
        facts: what that says.
        scan_path: the scan it was made of.
        truth_path: a segmentation, lesion > 0, or None.
        point: name of the threshold that the pictures show, or None without thresholds.
    """

    facts_path: Path
    facts: dict[str, Any]
    scan_path: Path
    truth_path: Path | None
    point: str | None

    @classmethod
    def read(
        cls,
        facts_path: Path,
        *,
        scan: Path | None = None,
        truth: Path | None = None,
        target_fpr: float = 0.01,
        whole: bool = False,
    ) -> "Result":
        """The result of a JSON of restore_brats.py.

        Args:
            facts_path: the JSON; the maps are beside it.
            scan: the scan, if it has moved.
            truth: a segmentation; by default the one noted when the scan was restored.
            target_fpr: the threshold to show is that nearest to this rate.
            whole: as of `read_facts`.

        Raises:
            FileNotFoundError, InputError: if a file is missing, or is none of restore_brats.py.
        """
        facts_path = Path(facts_path)
        facts = read_facts(facts_path, whole=whole)
        scan_path, made_of = scan_of(facts_path, facts)
        scan_path = Path(scan or scan_path)
        if not scan_path.exists():
            raise FileNotFoundError(
                f"No scan at {scan_path}, from which {facts_path} was made; say where that scan is."
            )
        if made_of and content_identity(scan_path) != made_of:
            raise InputError(
                f"{scan_path} is not what {facts_path} was made of: another file has taken its "
                f"name. Restore it again, or say where the old one is."
            )
        noted = facts.get("truth")
        truth_path = truth or (noted if noted and Path(noted).exists() else None)
        rates = {name: at["target_fpr"] for name, at in facts["lesions"].items()}
        point = min(rates, key=lambda name: abs(rates[name] - target_fpr), default=None)
        return cls(facts_path, facts, scan_path, truth_path and Path(truth_path), point)

    @property
    def made_from(self) -> str:
        """The map that the masks were made from: `score` where there is one, else `residual`."""
        return "score" if self.has("score") else "residual"

    @functools.cached_property
    def scan(self) -> Scan:
        """The scan itself."""
        return load_scan(self.scan_path)

    def has(self, name: str) -> bool:
        """Whether the maps have a volume of that name; older versions wrote fewer."""
        return name in self.facts["files"]

    def named(self, file_name: str) -> Path:
        """The file of that name beside the JSON.

        Raises:
            FileNotFoundError: if it is not there.
        """
        path = self.facts_path.parent / file_name
        if not path.is_file():
            raise FileNotFoundError(f"No {path}, which {self.facts_path} names.")
        return path

    def volume(self, name: str) -> np.ndarray:
        """Float32 of a volume of `facts["files"]`, or uint8 of a threshold's mask.

        Raises:
            FileNotFoundError, InputError: if there is none, or it is damaged or of another grid.
        """
        if not self.has(name):
            raise InputError(f"{self.facts_path} names no map {name!r}; make it again.")
        path = self.named(self.facts["files"][name])
        load = load_labels if name in self.facts["lesions"] else load_map
        try:
            volume = load(path, self.scan)
        except InputError as problem:
            raise InputError(f"{problem} Or make this map again.") from problem
        if name not in SIGNED and volume.min() < 0:
            raise InputError(f"{path}: expected values of 0 or more; make this map again.")
        return volume

    @functools.cached_property
    def residual(self) -> np.ndarray:
        """Normalized intensity."""
        return self.volume("residual")

    @property
    def unit(self) -> str:
        """Unit of that map."""
        points = self.facts["lesions"].values()
        return next((point["unit"] for point in points if "unit" in point), "")

    @functools.cached_property
    def thresholded(self) -> np.ndarray:
        """The map that the masks were made from, in `unit`."""
        return self.volume(self.made_from)

    @functools.cached_property
    def restored(self) -> np.ndarray:
        """Normalized intensity, 0 outside the brain."""
        return self.volume("restored")

    @functools.cached_property
    def brain(self) -> np.ndarray:
        """Bool."""
        brain = (self.volume("brain") if self.has("brain") else self.restored) != 0
        return brain if brain.any() else np.ones_like(brain)

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """Bool, the detection at `point`; empty without thresholds."""
        return self.volume(self.point) > 0 if self.point else np.zeros(self.brain.shape, bool)

    @functools.cached_property
    def truth(self) -> np.ndarray | None:
        """Bool, or None."""
        return None if self.truth_path is None else load_labels(self.truth_path, self.scan) > 0

    def mask_at(self, point: str) -> np.ndarray:
        """Bool, the detection at a threshold."""
        return self.mask if point == self.point else self.volume(point) > 0

    def numbers_at(self, point: str) -> np.ndarray | None:
        """Uint16, the number of its lesion at each voxel, 0 outside; None if no file holds it."""
        name = f"labels_{point}"
        if not self.has(name):
            return None
        return np.rint(np.minimum(self.volume(name), MOST_NUMBERS)).astype(np.uint16)

    def lesions_at(self, point: str) -> list[dict[str, Any]]:
        """The lesions at a threshold, one dict each, in the order of their numbers, largest first.

        They are those of the table beside the JSON, without what is not known of a lesion;
        without a table `lesion`, `volume_ml`, `center_{x,y,z}_mm` and `mean_residual` of the mask.
        """
        if self._lesion_table is not None:
            rate = self.facts["lesions"][point]["target_fpr"]
            rows = self._lesion_table[np.isclose(self._lesion_table["target_fpr"], rate)]
            rows = rows.sort_values("lesion").astype({"lesion": int}).to_dict("records")
            return [{k: v for k, v in row.items() if v == v and v != ""} for row in rows]
        found = find_lesions(self.mask_at(point), self.residual, self.scan.affine)
        return [_as_row(number, lesion) for number, lesion in enumerate(found, 1)]

    @functools.cached_property
    def _lesion_table(self):
        name = self.facts.get("tables", {}).get("lesions")
        if name is None:
            return None
        import pandas as pd

        path = self.named(name)
        needed = ["target_fpr", "lesion", "volume_ml", *CENTER]
        try:
            table = pd.read_csv(path)
            known = [name for name in COLUMNS if name in table and name != "region"]
            numbers = table[known].astype(float)
        except ValueError as error:
            raise InputError(f"{path}: expected a table of lesions ({error}).") from error
        if missing := set(needed) - set(table):
            raise InputError(
                f"{path}: expected a table of lesions with the columns {', '.join(sorted(missing))}"
                f", got {', '.join(map(str, table))}."
            )
        if np.isinf(numbers).any(axis=None) or numbers[needed].isna().any(axis=None):
            raise InputError(f"{path}: expected a number in {', '.join(needed)} of each lesion.")
        return table

    def true_shares_at(self, point: str) -> list[float]:
        """Share of each lesion of `lesions_at` that is truth; zeros without a truth."""
        numbers = self.numbers_at(point)
        if self.truth is None:
            return [0.0] * len(self.lesions_at(point))
        if numbers is None:
            truth = self.truth.astype(np.float32)
            found = find_lesions(self.mask_at(point), truth, self.scan.affine)
            return [lesion.mean_residual for lesion in found]
        order = [row["lesion"] for row in self.lesions_at(point)]
        return np.nan_to_num(ndimage.mean(self.truth, numbers, order)).tolist() if order else []

    def labeled(self, *, name: str | None = None, every: bool = True) -> LabeledScan:
        """The `LabeledScan`; it must have a truth.

        Args:
            name: in place of its own.
            every: measure all scores there are, not only that which the masks were made from.

        Raises:
            FileNotFoundError, InputError: if a file is missing, or on another grid than the scan.
        """
        scores = {self.made_from: self.volume(self.made_from)}
        if every:
            scores = {"residual": self.residual, **scores}
            scores["equalized"] = equalized(self.scan.data, self.brain)
        masks = [
            Mask(point, self.made_from, at["threshold"], self.volume(point) > 0)
            for point, at in self.facts["lesions"].items()
        ]
        name = name or self.facts["name"]
        return LabeledScan(name, self.scan.affine, self.brain, self.truth, scores, masks)


def _as_row(number, lesion):
    center = dict(zip(CENTER, lesion.center_mm, strict=True))
    known = {"volume_ml": lesion.volume_ml, "mean_residual": lesion.mean_residual}
    return {"lesion": number, **center, **known}


def from_maps(results: Mapping[str, Result]) -> Scans:
    """Restored scans that have a truth, {name: `Result`}, as `LabeledScan`s."""

    def read() -> Iterator[LabeledScan]:
        for name, result in results.items():
            yield replace(result).labeled(name=name)  # a copy forgets its volumes when it goes

    return Scans(len(results), read)


class Missing(NamedTuple):
    """A scan that is in no figure and on no page, and why; `damaged` if its files are."""

    name: str
    reason: str
    damaged: bool = False


def read_results(paths: Sequence[Path], **given: Any) -> tuple[list[Result], list[Missing]]:
    """The `Result`s of JSON files, read with what is `given`, and those that cannot be read.

    Raises:
        FileNotFoundError, InputError: if none can.
    """
    results, missing, first = [], [], None
    for path in paths:
        try:
            if problem := problem_of(path):
                raise InputError(problem)
            results.append(Result.read(path, **given))
        except (InputError, OSError) as problem:
            first = first or problem
            missing.append(Missing(path.name, str(problem), damaged=True))
    if first and not results:
        raise first
    return results, missing


def find_labeled(
    folders: Iterable[Path],
    *,
    seg: Path | None = None,
    seg_pattern: str | None = None,
    progress: Callable[..., Iterable] = lambda results, text: results,
) -> tuple[dict[str, Result], list[Missing]]:
    """{name: `Result`} of the restored scans that have a truth, and those that are missing.

    Everything that is measured of a scan is read once: what is damaged is known before the figures.

    Args:
        folders: of maps, at any depth.
        seg: segmentation of the one scan.
        seg_pattern: glob of the segmentations from the folder of each scan, with {subject}.
        progress: as of `measure`.

    Raises:
        FileNotFoundError, InputError: if there are no maps or no truth, or one scan twice; or if
            the only scan is damaged.
    """
    paths = [path for folder in folders for path in find_results(folder)]
    if seg and len(paths) > 1:
        raise InputError(f"Expected one scan for seg, found {len(paths)}; give a seg_pattern.")
    results, missing = read_results(paths, truth=seg)
    missing += [lost for folder in folders for lost in failures(folder)]
    scan, times = Counter(result.scan_path for result in results).most_common(1)[0]
    if times > 1:
        raise InputError(f"Expected each scan once, got {times} maps of {scan}.")
    found = {}
    for name, result in zip(_names_of(results), progress(results, "reading"), strict=True):
        labeled = None
        try:
            labeled = _with_truth(result, seg_pattern)
            _read_once(replace(labeled))
            found[name] = labeled
        except (InputError, OSError) as problem:
            if labeled and len(paths) == 1:
                raise
            missing.append(Missing(name, str(problem), damaged=labeled is not None))
    if not found:
        told = "".join(f"\n  {lost.name}: {lost.reason}" for lost in missing)
        raise InputError(f"Expected a segmentation of one scan at least; try a seg_pattern.{told}")
    return found, missing


def _read_once(result):
    return result.labeled(), result.restored


def _names_of(results):
    """One name for each scan; where names repeat, the folders of the maps go before them."""
    names = [result.facts["name"].replace("/", "_") for result in results]
    if len(set(names)) < len(names):
        names = [f"{r.facts_path.parent.name}_{n}" for r, n in zip(results, names, strict=True)]
    if len(set(names)) < len(names):
        raise InputError(f"Expected scans with different names, got {', '.join(sorted(names))}.")
    return names


def _with_truth(result, seg_pattern):
    if seg_pattern:
        scan, name = result.scan_path, result.facts["name"]
        subject = subject_with_files(name, scan, scan.parent, seg_pattern=seg_pattern)
        if subject.problem:
            raise InputError(subject.problem)
        return replace(result, truth_path=subject.label)
    if result.truth_path is None:
        noted = result.facts.get("truth")
        raise InputError(problem_of(Path(noted)) if noted else "no segmentation was noted.")
    return result


def find_results(folder: Path) -> list[Path]:
    """Sorted JSON files of restored scans in a folder, at any depth, and what may hide some.

    Raises:
        FileNotFoundError, InputError: without the folder, or if there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder of results at {folder}.")
    found = _below(folder, FACTS_PATTERNS)
    if not found:
        raise InputError(
            f"Expected maps of restore_brats.py in {folder}, found no "
            f"{' or '.join(FACTS_PATTERNS)}."
        )
    return found


def failures(folder: Path) -> list[Missing]:
    """The scans that failed, from the summaries of cohorts in a folder, at any depth."""
    places = [path.parent for path in _below(folder, [SUMMARY]) if path.name == SUMMARY]
    rows = [row for place in places for row in read_summary(place)]
    return [Missing(row["name"], row["reason"]) for row in rows if row["status"] == FAILED]


def _below(folder, names):
    """As `find_files` at any depth, also in the derivatives of a data set."""
    places = ("", *(f"**/{name}/" for name in NO_SUBJECTS))
    return find_files(folder, [f"{place}**/{name}" for place in places for name in names])
