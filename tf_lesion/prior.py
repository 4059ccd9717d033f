"""A trained model with all that belongs to it: networks, configuration, reference, calibration."""

import dataclasses
import functools
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tf_lesion import devices
from tf_lesion.caches.slices import check_normalized
from tf_lesion.calibration.file import FILE_NAME, Calibration
from tf_lesion.calibration.legacy import read_legacy
from tf_lesion.config import AUTO, DETECTOR, Config, RestorationConfig
from tf_lesion.files import (
    IDENTITY_DIGITS,
    InputError,
    read_array,
    refuse_existing,
    written_whole,
)
from tf_lesion.provenance import anonymous

PACKAGE = Path(__file__).parent / "pretrained"
PRETRAINED = {  # name -> folder in the package
    "pretrained": "gmvae",
    "pretrained-vae": "vae",
    "pretrained-denoiser": "denoiser",
}
RUN_MARKER = "config.json"
OF_ASCENT = ("steps_per_gradient", "step_sizes", "gradient_clip", "tv_weight", "solver")


@dataclass(frozen=True)
class Prior:
    """What healthy slices look like, and how scans are restored towards it.

    Attributes:
        model: a `methods.Method`, or an `exported.ExportedModel`.
        config: its `Config`.
        data: what `runs.Run.write` says of the training cache; {} for a TF1 checkpoint.
        reference: [Q] brain intensities that scans are histogram-matched to, or None.
        calibration: what was chosen for it, or None.
        path: where it was loaded from.
    """

    model: Any = field(repr=False)
    config: Config
    data: dict[str, Any] = field(repr=False)
    reference: np.ndarray | None = field(repr=False)
    calibration: Calibration | None = field(repr=False)
    path: str

    @functools.cached_property
    def identity(self) -> str:
        """Short hash of the weights: results made with one model are told from another's."""
        return getattr(self.model, "exported_identity", None) or _hash(self.model)

    @functools.cached_property
    def _restorers(self):
        return {}

    def restorer(self, restoration: RestorationConfig, *, seed: int = 0) -> Any:
        """The `restoration.Restorer` of these settings, compiled once."""
        from tf_lesion.restoration import Restorer

        key = restoration, seed
        if key not in self._restorers:
            self._restorers[key] = Restorer(self.model, restoration, seed=seed)
        return self._restorers[key]

    @property
    def uses(self) -> frozenset:
        """Which of tv_weight, steps and solver mean something to it."""
        return self.model.restoration_settings

    # Settings -----------------------------------------------------------------------------------

    def restoration(
        self,
        *,
        tv_weight: float | str | None = None,
        steps: int | None = None,
        solver: str | None = None,
    ) -> RestorationConfig:
        """How to restore: the configuration's own way with what is given.

        Args:
            tv_weight: a number or the text of one; "auto" takes the calibration's.
            steps: of the restoration or search.
            solver: key of `config.SOLVERS`.

        Raises:
            InputError: if a value makes no sense or means nothing to the model, or there is no
                calibration to take lambda from.
        """
        given = {"tv_weight": tv_weight, "steps": steps, "solver": solver}
        for name, value in given.items():
            if value is not None and name not in self.uses:
                raise InputError(
                    f"Expected no {name}, which means nothing to {self.path} "
                    f"({self.config.network.model}): it is not restored by such steps; leave it "
                    f"out."
                )
        if tv_weight == AUTO:
            tv_weight = self._chosen_tv_weight()
        try:
            tv_weight = None if tv_weight is None else float(tv_weight)
        except ValueError as error:
            raise InputError(
                f"Expected tv_weight as a number or auto, got {tv_weight!r}."
            ) from error
        from tf_lesion.presets import check  # imports TensorFlow

        restoration = self.config.restoration
        restoration = restoration if solver is None else restoration.with_solver(solver)
        values = {"tv_weight": tv_weight, "steps": steps}
        restoration = restoration.changed(**{k: v for k, v in values.items() if v is not None})
        return check(self.config.replace(restoration=restoration)).restoration

    def _chosen_tv_weight(self):
        if self.calibration is None or self.calibration.tv_weight is None:
            raise InputError(
                f"{self.path} has no calibration that says tv_weight; make one with tf-lesion "
                f"calibrate, or give a number."
            )
        return self.calibration.tv_weight

    def calibrated(self) -> RestorationConfig:
        """The restoration that the calibration was made with; without one the configuration's."""
        if self.calibration is None:
            return self.config.restoration
        made = {**self.calibration.restoration, "tv_weight": self.calibration.tv_weight}
        restoration = self.restoration(**{name: made.get(name) for name in self.uses})
        return restoration.changed(seeds=made.get("seeds", 1), flip=made.get("flip", False))

    def describe(self, restoration: RestorationConfig, *, seed: int = 0) -> dict[str, Any]:
        """How images are restored, JSON-serializable: stored with every output."""
        settings = {
            "model": self.config.network.model,
            "model_path": self.path,
            "model_identity": self.identity,
            "preset": self.config.preset,
            "precision": self.config.network.precision,
            "seed": seed,
            **restoration.to_dict(),
        }
        unused = () if "solver" in self.uses else OF_ASCENT
        return {name: value for name, value in settings.items() if name not in unused}

    def check_size(self, cache: Any) -> None:
        """Raise `InputError` unless it restores slices of the cache's size."""
        network = self.config.network
        size = (network.height, network.width)
        if cache.shape != size:
            advice = "make it with the voxel size of the training cache, or give a crop"
            if cache.shape == size[::-1]:
                advice = "its axes are exchanged: store [N, X, Y], X from left to right"
            raise InputError(
                f"{self.path} restores {size[0]} x {size[1]} slices, {cache.path} has "
                f"{cache.shape[0]} x {cache.shape[1]}; {advice}."
            )

    # Work ---------------------------------------------------------------------------------------

    def restore(
        self,
        observed: np.ndarray,
        mask: np.ndarray,
        *,
        slices: Any = None,
        restoration: RestorationConfig | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> np.ndarray:
        """Restore slices towards healthy.

        Args:
            observed: [n, H, W], normalized intensity, any n.
            mask: [n, H, W], brain where it is above 0; nothing else moves.
            slices: [n] integers that seed their noise; 0 to n - 1 by default.
            restoration: `RestorationConfig`; that of the calibration by default.
            seed: of the noise.
            batch_size: slices at once; it changes speed and memory, not the images.

        Returns:
            [n, H, W] float32.

        Raises:
            InputError: if shapes are not those, intensities not normalized, a number is below 1,
                or the restoration diverges.
        """
        from tf_lesion.restoration import restore

        observed, mask = np.asarray(observed, np.float32), np.asarray(mask)
        size = (self.config.network.height, self.config.network.width)
        if observed.ndim != 3 or observed.shape[1:] != size or mask.shape != observed.shape:
            raise InputError(
                f"Expected observed and mask of [n, {size[0]}, {size[1]}], got {observed.shape} "
                f"and {mask.shape}."
            )
        check_normalized(observed, where="observed")
        numbers = np.arange(len(observed)) if slices is None else np.asarray(slices)
        if len(numbers) != len(observed) or batch_size < 1:
            raise InputError(
                f"Expected {len(observed)} slices and a batch_size of 1 or more, got "
                f"{len(numbers)} and {batch_size}."
            )
        restorer = self.restorer(restoration or self.calibrated(), seed=seed)
        done = np.empty_like(observed)
        for start in range(0, len(observed), batch_size):
            part = slice(start, start + batch_size)
            restored = restore(
                restorer, observed[part, ..., None], mask[part, ..., None] > 0, numbers[part]
            )
            done[part] = restored.images[..., 0]
        return done

    def detect(self, scan: Any, *, mask: Any = None, **options: Any) -> Any:
        """Restore a scan and find what is not healthy.

        Args:
            scan: path of a T2 scan (NIfTI, any grid and orientation; a folder of DICOM or a zip
                of one), or a nibabel image.
            mask: its brain mask, on its grid; likewise.
            options: of `detection.maps.Detector`.

        Returns:
            `detection.maps.ScanMaps`: restored, residual, score, masks, facts; `save(folder)`.
        """
        from tf_lesion.detection.maps import Detector

        return Detector(self, **options).detect(scan, mask=mask)

    def save(self, folder: str | Path, *, align: str | None = None, force: bool = False) -> int:
        """Write what detection needs as a run: weights, configuration, reference, calibration.

        No optimizer, no folder of this machine, no name of a subject. The run's own restoration
        becomes the calibrated one.

        Args:
            folder: to make.
            align: how scans are brought to MNI space; as the training scans by default.
            force: replace it.

        Returns:
            Its size in bytes.

        Raises:
            FileExistsError: if `folder` exists.
        """
        from tf_lesion.training.runs import Run, save_weights

        refuse_existing(folder, force=force, marker=RUN_MARKER)
        stored, step = _stored(self.path), 0
        precision = stored.get("network", {}).get("precision", self.config.network.precision)
        config = self.config.replace(
            network={"precision": precision}, restoration=self.calibrated()
        )
        data = anonymous(self.data)
        if align is not None:
            data.setdefault("preprocessing", {}).setdefault("scan", {})["align"] = align
        with written_whole(folder, force=force, marker=RUN_MARKER) as temporary:
            target = Run(temporary)
            made = {name: stored.get(name) for name in ("commit", "changed")}
            content = {**config.to_dict(), **made, "data": data}
            target.write_content(content, self.reference)
            step = Run(Path(self.path)).step()
            save_weights(self.model, target, step=step)
            if self.calibration is not None:
                anonymous_calibration(self.calibration).save(temporary / FILE_NAME)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def load(path: str | Path = DETECTOR, *, precision: str = "float32", device: str = "auto") -> Prior:
    """Load a prior.

    Args:
        path: a run of `tf-lesion train`, a folder with a TF1 checkpoint, a SavedModel of
            `tf-lesion export`, or one of `PRETRAINED`.
        precision: of the convolutions, whatever the model was trained in: float32, bfloat16, or
            tf32 (float32 with TensorFloat-32 products on a GPU); a SavedModel has its own.
        device: cpu, gpu, gpu:N or auto; where TensorFlow has started already, its own.

    Raises:
        FileNotFoundError, InputError: if `path` is none of them, its checkpoint does not fit its
            configuration, or its precision is another. A calibration of other weights is left out,
            with a warning.
    """
    devices.start(device=device, tf32=precision == "tf32")
    precision = "float32" if precision == "tf32" else precision
    path = PACKAGE / PRETRAINED[str(path)] if is_shipped(path) else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No model at {path}; make one with tf-lesion train.")
    from tf_lesion import tf1
    from tf_lesion.saved_model import exported

    if exported.is_exported(path):
        model, config, data, reference = exported.load(path, precision=precision)
    elif tf1.is_checkpoint(path):
        _, config = tf1.read_config(path)
        config = config.replace(network={"precision": precision})
        model, _ = tf1.load(path, config=config)
        data, reference = {}, None
    else:
        model, config, data, reference = _load_run(path, precision)
    prior = Prior(model, config, data, reference, None, str(path))
    file = calibration_file(path)
    try:
        calibration = Calibration.load(file) if file.exists() else read_legacy(file.parent)
        checked = calibration and calibration.check_model(prior.identity, where=file)
    except InputError as error:  # the weights can do without, and be calibrated again
        print(f"warning: no calibration: {error}", file=sys.stderr)
        return prior
    return dataclasses.replace(prior, calibration=checked)


def is_shipped(path: str | Path) -> bool:
    """Whether `path` is the name of a shipped prior, which is read-only; a folder comes first."""
    return str(path) in PRETRAINED and not Path(path).exists()


def calibration_file(path: str | Path) -> Path:
    """Where the calibration of a run or SavedModel lies."""
    assets = Path(path) / "assets"  # of a SavedModel
    return (assets if assets.is_dir() else Path(path)) / FILE_NAME


def _load_run(path, precision):
    import tensorflow as tf

    from tf_lesion.baselines import make_model
    from tf_lesion.training.runs import Run, restore_weights

    run = Run(path)
    config, data = run.read()
    config = config.replace(network={"precision": precision})
    try:
        model = make_model(config)
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, tf.errors.OpError) as error:
        raise InputError(f"{run.config_path} describes no model: {error!r}.") from error
    restore_weights(model, run)
    there = run.reference_path.exists()
    reference = read_array(run.reference_path, what="a reference") if there else None
    return model, config, data, reference


def _hash(model):
    digest = hashlib.sha256()
    for weight in model.weights:
        digest.update(np.ascontiguousarray(weight.numpy()).tobytes())
    return digest.hexdigest()[:IDENTITY_DIGITS]


def _stored(path):
    file = Path(path) / RUN_MARKER
    if not file.exists():
        raise InputError(f"Expected a run of tf-lesion train, got {path}.")
    return json.loads(file.read_text(encoding="utf-8"))


def anonymous_calibration(calibration: Calibration) -> Calibration:
    """A calibration to be handed on, see `provenance.anonymous`."""
    told = {name: anonymous(getattr(calibration, name)) for name in ("restoration", "cohort")}
    return dataclasses.replace(calibration, **told)
