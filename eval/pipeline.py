"""The way of one method through the experiment, by the functions behind the commands.

train -> calibrate (lambda, thresholds, on healthy slices) -> restore patients -> evaluate
                                                                  -> AUC by step (Fig. 3)
      -> AUC by lambda on a subset of the patients (Fig. 2 a)
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from eval.experiment import Experiment, MethodSettings, Sizes
from eval.parts import Part, StoppedError, written_by_us
from tf_lesion import tf1
from tf_lesion.caches.restore import chosen_rows, restore_to_file
from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import SliceCache
from tf_lesion.calibration import Calibration
from tf_lesion.calibration.make import calibrate
from tf_lesion.calibration.tv_weight import Kept, restored_batches
from tf_lesion.config import AUTO, Config
from tf_lesion.evaluation import metrics
from tf_lesion.evaluation.measure import measure, read_groups
from tf_lesion.evaluation.scans import Cohort, from_cache, largest_lesions
from tf_lesion.files import InputError, content_identity, write_json, write_text
from tf_lesion.prior import Prior, load
from tf_lesion.restoration import Restorer
from tf_lesion.training.runs import Run
from tf_lesion.training.trainer import NonFiniteLossError, Trainer

CALIBRATION = "calibration.h5"


class MethodParts:
    """The parts of one method.

    Args:
        experiment: the whole.
        method: the one.

    Attributes:
        training: part, or None when an existing run is given.
        calibration, patients, evaluation: parts.
        steps: part with the AUC by step, or None without `save_every`.
        sweep: part with the AUC by lambda, or None without a grid.
    """

    def __init__(self, experiment: Experiment, method: MethodSettings):
        self.experiment, self.method = experiment, method
        self._sizes = Sizes(experiment)
        self._config = experiment.training_config(method, self._sizes.shape)
        self.training = None if method.run else self._training()
        self.calibration = self._calibration()
        self.patients = self._patients()
        self.evaluation = self._evaluation()
        self.steps = self._steps() if self._save_every else None
        self.sweep = self._sweep() if experiment.sweep and method.has_lambda else None

    @property
    def for_tables(self) -> list[Part]:
        """The parts that the tables show."""
        return [self.evaluation]

    @property
    def for_figures(self) -> list[Part]:
        """The parts that the figures show."""
        return [part for part in (self.evaluation, self.steps, self.sweep) if part is not None]

    def result(self, part: Part, name: str) -> Any:
        """The JSON file `name` of a finished part."""
        path = part.folder / name
        with written_by_us(path, f"remove {part.folder}, which is then made again"):
            return json.loads(path.read_text(encoding="utf-8"))

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured, as `Measured.as_json`; the evaluation must be finished."""
        return self.result(self.evaluation, "metrics.json")

    @property
    def scans(self) -> pd.DataFrame:
        """The numbers of each scan and score; the evaluation must be finished."""
        return pd.read_csv(self.evaluation.folder / "scans.csv")

    @functools.cached_property
    def calibrated(self) -> Calibration:
        """Lambda and thresholds; that part must be finished."""
        return Calibration.load(self.calibration.folder / CALIBRATION)

    @property
    def used_lambda(self) -> float | None:
        """Lambda that the patients were restored with, None for methods without."""
        return self.calibrated.tv_weight

    @functools.cached_property
    def clusters(self) -> int | None:
        """K of the mixture, None for methods without."""
        if "num_clusters" not in self.method.kind.network_settings:
            return None
        config = read_config(self.method.run) if self.method.run else self._config
        return config.network.num_clusters

    # What the parts are made from ---------------------------------------------------------------

    def _part(
        self, name: str, settings: dict, make: Callable, *needs: Part | None, **options: Any
    ) -> Part:
        return Part(
            root=Path(self.experiment.out) / "parts",
            name=f"{name}-{self.method.name}",
            settings=json.loads(json.dumps(settings, default=str)),
            make=make,
            needs=tuple(need for need in needs if need is not None),
            **options,
        )

    @functools.cached_property
    def _restoring(self):
        """Settings of every part that restores; the batch size does not change images."""
        settings = {
            "seed": self.experiment.seed,
            "steps": self._steps_given,
            "precision": self.experiment.restoration.precision,
        }
        run = self.method.run
        if run is None:
            return settings
        # An index knows the checksums of the weights; `checkpoint` says which is the newest.
        states = [*run.glob("config.json"), *run.rglob("*.index"), *run.rglob("checkpoint")]
        if not states:
            raise InputError(
                f"Expected a run of train_gmvae.py, or a TF1 checkpoint, got {run}; leave run out "
                f"to train."
            )
        return {**settings, "run": sorted(map(content_identity, states))}

    @property
    def _lambda_settings(self):
        """What decides lambda."""
        healthy = self.experiment.healthy.identities
        choice = asdict(self.experiment.choice) if self.method.chooses else {}
        return {"tv_weight": self.method.tv_weight, "choice": choice, "healthy": healthy}

    @property
    def _steps_given(self):
        """Steps of the restoration, None for the preset's; methods in one pass take none."""
        uses = self.method.kind.restoration_settings
        return self.experiment.restoration.steps if "steps" in uses else None

    @property
    def _save_every(self):
        return self.experiment.restoration.save_every if self.method.has_lambda else None

    def _work(self, kind, slices, steps):
        """Arguments of `Part`; each baseline has a rate of its own."""
        kind += "" if self.method.has_lambda else f" {self.method.method}"
        return {"kind": kind, "slice_steps": slices * steps}

    def _restoration_work(self, slices):
        steps = self._steps_given
        steps = self._config.restoration.steps if steps is None else steps
        bfloat16 = self.experiment.restoration.precision == "bfloat16"
        return self._work("restoration" + " in bfloat16" * bfloat16, slices, steps)

    # The parts ----------------------------------------------------------------------------------

    def _training(self):
        config, healthy = self._config, self.experiment.healthy
        return self._part(
            "training",
            {"config": config.to_dict(), "cache": healthy.identities["cache"]},
            lambda folder: train(config, healthy.cache, folder / "run"),
            **self._work("training", config.training.batch_size, config.training.steps),
        )

    def _calibration(self):
        choice, thresholds = self.experiment.choice, self.experiment.thresholds
        slices = self._sizes.healthy(thresholds.max_slices)
        if self.method.chooses:
            slices += self._sizes.healthy(choice.max_slices) * len(choice.grid)
        return self._part(
            "calibration",
            {**asdict(thresholds), **self._restoring, **self._lambda_settings},
            self._calibrate,
            self.training,
            **self._restoration_work(slices),
        )

    def _calibrate(self, folder):
        experiment, healthy = self.experiment, self.experiment.healthy
        restored = folder / "healthy.h5"
        calibrate(
            self._load(),
            healthy.cache,
            restored=restored,
            tv_weight=AUTO if self.method.chooses else self.method.tv_weight,
            grid=experiment.choice.grid,
            grid_steps=self._steps_given,
            grid_slices=experiment.choice.max_slices,
            steps=self._steps_given,
            max_slices=experiment.thresholds.max_slices,
            counts=healthy.counts,
            seed=experiment.seed,
            batch_size=experiment.restoration.batch_size,
        ).save(folder / CALIBRATION, force=True)

    def _patients(self):
        caches = self.experiment.patients
        return self._part(
            "patients",
            {
                **self._restoring,
                **self._lambda_settings,
                "save_every": self._save_every,
                "caches": {name: files.identities["cache"] for name, files in caches.items()},
            },
            self._restore_patients,
            self.training,
            after=(self.calibration,) if self.method.chooses else (),
            **self._restoration_work(self._sizes.patients()),
        )

    def _restore_patients(self, folder):
        prior = self._load()
        weight = self.used_lambda if self.method.chooses else self.method.tv_weight
        restoration = prior.restoration(tv_weight=weight, steps=self._steps_given)
        for name, files in self.experiment.patients.items():
            out = folder / f"{name}.h5"
            if not out.exists():  # else a killed run has finished it
                restore_to_file(
                    prior,
                    files.cache,
                    out,
                    restoration=restoration,
                    seed=self.experiment.seed,
                    batch_size=self.experiment.restoration.batch_size,
                    save_every=self._save_every,
                )

    def cohorts(self, **options: Any) -> list[Cohort]:
        """[`Cohort`] of the restored patients."""
        return [
            Cohort(
                self.patients.folder / f"{name}.h5",
                files.cache,
                files.labels,
                files.counts,
                **options,
            )
            for name, files in self.experiment.patients.items()
        ]

    def _evaluation(self):
        groups = self.experiment.groups
        files = [patients.identities for patients in self.experiment.patients.values()]
        return self._part(
            "evaluation",
            {
                "seed": self.experiment.seed,
                "files": files,
                "cases": self.experiment.figures.cases,
                "groups": groups and content_identity(groups),
            },
            self._evaluate,
            self.patients,
            self.calibration,
        )

    def _evaluate(self, folder):
        cohorts, calibration = self.cohorts(), self.calibrated
        settings = cohorts[0].settings
        calibration.check_model(settings["model_identity"], where=self.calibration.folder)
        points = {
            score: calibration.thresholds(score, restoration=settings)
            for score in calibration.points
        }
        measured = measure(
            from_cache(cohorts, points=points),
            seed=self.experiment.seed,
            groups=self.experiment.groups and read_groups(self.experiment.groups),
            progress=functools.partial(tqdm, unit="subject"),
        )
        content = {"settings": {"restoration": settings}, **measured.as_json()}
        write_json(folder / "metrics.json", content)
        write_text(folder / "scans.csv", measured.scans.to_csv(index=False))
        cases = largest_lesions(cohorts, self.experiment.figures.cases)
        np.savez_compressed(folder / "panel.npz", **cases)

    def _steps(self):
        return self._part("steps", {}, self._measure_steps, self.patients)

    def _measure_steps(self, folder):
        with RestoredReader(self.cohorts()[0].restored) as reader:
            steps = reader.trajectory_steps
        curve = [
            {"step": step, "pooled_auc": pooled_area(_residuals(self.cohorts(step=step)))}
            for step in tqdm(steps, "AUC by step", unit="step")
        ]
        write_json(folder / "steps.json", curve)

    def _sweep(self):
        settings, caches = self.experiment.sweep, self.experiment.patients
        slices = self._sizes.patients(settings.max_slices)
        return self._part(
            "sweep",
            {
                **asdict(settings),
                **self._restoring,
                "caches": {name: files.identities for name, files in caches.items()},
            },
            self._measure_sweep,
            self.training,
            **self._restoration_work(slices * len(settings.grid)),
        )

    def _measure_sweep(self, folder):
        settings, prior, kept = self.experiment.sweep, self._load(), Kept(folder / "kept.json", {})
        restoration = prior.restoration(tv_weight=settings.grid[0], steps=self._steps_given)
        restorer = Restorer(prior.model, restoration, seed=self.experiment.seed)
        missing = [weight for weight in settings.grid if f"{weight:g}" not in kept.results]
        for weight in tqdm(missing, "AUC by lambda", unit="lambda"):
            kept.add(f"{weight:g}", pooled_area(self._restored_residuals(restorer, weight)))
        curve = [{"tv_weight": w, "pooled_auc": kept.results[f"{w:g}"]} for w in settings.grid]
        write_json(folder / "sweep.json", curve)
        kept.discard()

    def _restored_residuals(self, restorer, weight):
        """(residuals [V], lesion [V]) of the sweep's slices at one lambda; no image is written."""
        experiment = self.experiment
        given = {"tv_weight": weight, "batch_size": experiment.restoration.batch_size}
        for files in experiment.patients.values():
            with SliceCache(**files.arguments) as cache:
                subset = experiment.sweep.max_slices
                rows = chosen_rows(len(cache), subset, seed=experiment.seed)
                for batch, observed, images, mask in restored_batches(
                    restorer, cache, rows, **given
                ):
                    yield np.abs(observed - images)[mask], cache.label(batch)[..., 0][mask]

    def _load(self) -> Prior:
        path = self.method.run or self.training.folder / "run"
        return load(path, precision=self.experiment.restoration.precision)


def pooled_area(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """AUC of (scores [V], lesion [V]) taken together, NaN without lesions."""
    pooled = metrics.PooledScores()
    for scores, lesion in parts:
        pooled.add(scores, lesion)
    return float(metrics.area(pooled.curve()))


def _residuals(cohorts: Iterable[Cohort]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for cohort in cohorts:
        for subject in cohort.subjects():
            yield subject.score("residual")[subject.mask], subject.truth[subject.mask]


def train(config: Config, cache_path: Path, folder: Path) -> None:
    """Train a model in the run `folder`, going on from its newest checkpoint if there is one.

    Raises:
        StoppedError: on Ctrl-C or SIGTERM, after saving.
        InputError: if a loss is not finite.
    """
    run = Run(folder)
    with contextlib.ExitStack() as stack:
        training = stack.enter_context(SliceCache(cache_path, "Train"))
        test = stack.enter_context(SliceCache(cache_path, "Test"))
        run.write(config, training)
        resume = run.latest_checkpoint() is not None
        trainer = Trainer(run, config, train=training, test=test, resume=resume)
        try:
            signal = trainer.fit()
        except NonFiniteLossError as error:
            raise InputError(f"{folder}: {error}") from error
    if signal:
        raise StoppedError(signal)


def read_config(run: Path) -> Config:
    """`Config` of a run or of a TF1 checkpoint."""
    is_tf1 = run.is_dir() and tf1.is_checkpoint(run)
    return tf1.read_config(run)[1] if is_tf1 else Run(run).read()[0]
