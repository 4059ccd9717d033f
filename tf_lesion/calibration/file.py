"""The one file of a calibration, `calibration.h5`, and its one reader.

attribute `calibration`    JSON: everything below but the maps
attribute `sha256`         of that JSON: a damaged number is no other threshold
healthy/{change,size,power} float16, blocks of `HealthyMaps` in MNI space; may be missing
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tf_lesion.caches.hdf5 import DAMAGED, new_hdf5, open_hdf5, text
from tf_lesion.detection.postprocessing import HealthyMaps, Postprocessing
from tf_lesion.files import InputError, written_whole
from tf_lesion.provenance import MADE_BY, stamp

FILE_NAME = "calibration.h5"  # in the folder of a run
CONTENT, CHECKSUM, MAPS = "calibration", "sha256", "healthy"
HEALTHY_SLICES = "healthy slices"  # what is chosen without a label says so
# Settings of a restoration that move its thresholds.
DECISIVE = ("tv_weight", "steps", "solver", "seeds", "flip")


@dataclass(frozen=True)
class Threshold:
    """One threshold, and the false positive rates of the healthy cohort.

    Attributes:
        target_fpr: the largest rate allowed, a fraction.
        threshold: in the unit of the score.
        fpr: rate of all voxels that it was made from: in sample.
        left_out_fpr: mean over subjects of the rate of each above the threshold that the others
            make, see `thresholds.left_out`; None where it is not known, as are the next two.
        left_out_smallest, left_out_largest: of these rates.
    """

    target_fpr: float
    threshold: float
    fpr: float
    left_out_fpr: float | None = None
    left_out_smallest: float | None = None
    left_out_largest: float | None = None

    @property
    def name(self) -> str:
        """The paper's name of the Dice at this threshold: dsc1 for 1 % false positives."""
        return f"dsc{100 * self.target_fpr:g}"

    @property
    def key(self) -> str:
        """Its name in files: fpr_0.01."""
        return f"fpr_{self.target_fpr:g}"

    def known(self) -> dict[str, float]:
        """{field: value} of what is known, JSON-serializable."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}

    def left_out(self) -> dict[str, float]:
        """Those of `known` that say how subjects fared that were left out; {} in sample."""
        return {name: value for name, value in self.known().items() if name.startswith("left_out")}


@dataclass(frozen=True)
class Calibration:
    """What was chosen for one model.

    Attributes:
        model_identity: of the weights; with others nothing of it holds.
        restoration: how the healthy slices were restored, as of `Prior.describe`.
        points: {score: thresholds by ascending rate}, of the residual, of the post-processed
            `score`, and of the baselines.
        tv_weight: lambda, or None for methods without one.
        curve: [{tv_weight, change_per_subject, ...}] that lambda was chosen from, or [].
        postprocessing: steps of the `score`, as text.
        healthy: `HealthyMaps` in blocks, or None.
        method: of the thresholds, "exact" or "golden".
        cache_identity: of the healthy cache, or None if it is not known.
        cohort: subjects, slices and voxels of it; under `tv_weight` what lambda was chosen on.
        chosen_by: {what was chosen: "healthy slices" or "labels of ..."}.
        made_with: `provenance.stamp`.
    """

    model_identity: str
    restoration: dict[str, Any]
    points: dict[str, tuple[Threshold, ...]] = field(default_factory=dict)
    tv_weight: float | None = None
    curve: tuple[dict[str, float], ...] = ()
    postprocessing: str = ""
    healthy: HealthyMaps | None = field(default=None, repr=False)
    method: str = "exact"
    cache_identity: str | None = None
    cohort: dict[str, Any] = field(default_factory=dict)
    chosen_by: dict[str, str] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)

    def thresholds(
        self, score: str, *, restoration: dict[str, Any], postprocessing: str = ""
    ) -> tuple[Threshold, ...]:
        """Thresholds of a score, for images restored and post-processed in this way.

        Args:
            score: key of `points`.
            restoration: settings of the images, as of `Prior.describe`.
            postprocessing: steps that make the `score`.

        Raises:
            InputError: if there are none, or they were made in another way: their rates hold only
                there.
        """
        made, used = dict(self.restoration), dict(restoration)
        if score == "score":
            made["postprocessing"], used["postprocessing"] = self.postprocessing, postprocessing
        for name in (*DECISIVE, "postprocessing"):
            theirs, ours = made.get(name), used.get(name)
            if None not in (theirs, ours) and theirs != ours:
                raise InputError(
                    f"The calibration was made with {name} {theirs}, not {ours}; its false "
                    f"positive rates hold only there. Calibrate with {ours}."
                )
        if score not in self.points:
            raise InputError(
                f"The calibration has no thresholds of the {score}; it has those of "
                f"{', '.join(self.points) or 'nothing'}."
            )
        return self.points[score]

    def steps(self) -> Postprocessing:
        """The steps of the score."""
        return Postprocessing.parse(self.postprocessing)

    def check_model(self, identity: str, *, where: Any) -> "Calibration":
        """Raise `InputError` unless it was made for these weights; returns itself."""
        if self.model_identity != identity:
            raise InputError(
                f"{where} belongs to model {self.model_identity}, not to {identity}; calibrate "
                f"this model."
            )
        return self

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the file, whole or not at all."""
        fields = {f.name for f in dataclasses.fields(self)} - {"healthy"}
        content = {name: getattr(self, name) for name in sorted(fields)}
        content["points"] = {
            score: [point.known() for point in points] for score, points in self.points.items()
        }
        with written_whole(path, force=force) as temporary, new_hdf5(temporary) as file:
            file.attrs[CONTENT] = told = text(json.dumps(content))
            file.attrs[CHECKSUM] = text(_checksum(told))
            file.attrs[MADE_BY] = text(json.dumps(stamp()))
            for name, blocks in vars(self.healthy).items() if self.healthy else ():
                file.create_dataset(
                    f"{MAPS}/{name}", data=blocks.astype(np.float16), compression="gzip"
                )

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a file of `save`.

        Raises:
            FileNotFoundError, InputError: if there is none, or it is another file.
        """
        try:
            with open_hdf5(path, what="calibration", made_by="tf-lesion calibrate") as file:
                told = file.attrs[CONTENT]
                if CHECKSUM in file.attrs and file.attrs[CHECKSUM].decode() != _checksum(told):
                    raise ValueError("its content has changed since it was written")
                content = json.loads(told)
                healthy = None
                if MAPS in file:
                    names = [f.name for f in dataclasses.fields(HealthyMaps)]
                    blocks = (file[f"{MAPS}/{name}"][:].astype(np.float32) for name in names)
                    healthy = HealthyMaps(*blocks)
            content["points"] = {
                score: tuple(Threshold(**point) for point in points)
                for score, points in content["points"].items()
            }
            return cls(**{**content, "curve": tuple(content["curve"]), "healthy": healthy})
        except (InputError, FileNotFoundError, PermissionError):
            raise
        except DAMAGED as error:
            raise InputError(
                f"Expected a calibration of tf-lesion calibrate in {path} ({error!r})."
            ) from error


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
