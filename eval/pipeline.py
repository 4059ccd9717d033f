"""The way of one method through the experiment, by the functions behind the commands.

train -> choose lambda -> restore healthy slices -> thresholds -> restore patients -> evaluate
                                                                       -> AUC by step (Fig. 3)
      -> AUC by lambda on a subset of the patients (Fig. 2 a)
"""

import contextlib
import functools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval import select_lambda, sweep
from eval.experiment import Sizes
from eval.healthy import restored_healthy
from eval.parts import NO_WORK, Part, Work, fingerprint
from eval.thresholds import find_thresholds, load_thresholds, model_id
from tf_lesion import tf1
from tf_lesion.caches.restore import restore_to_file
from tf_lesion.caches.restored import RestoredReader
from tf_lesion.caches.slices import SliceCache
from tf_lesion.evaluation.evaluate import evaluate, write_results
from tf_lesion.files import InputError, write_json
from tf_lesion.restoration import Restorer
from tf_lesion.training import runs
from tf_lesion.training.trainer import NonFiniteLossError, Trainer

RESTORED_HEALTHY = "healthy.h5"
THRESHOLDS = "thresholds.json"


class StoppedError(RuntimeError):
    """Training was stopped by a signal and has saved its state."""

    def __init__(self, signal):
        super().__init__(f"stopped by signal {signal}; the same command goes on")
        self.signal = signal


class MethodParts:
    """The parts of one method.

    Args:
        experiment: `Experiment`.
        method: `MethodSettings`.

    Attributes:
        training: part, or None when an existing run is given.
        choice: part with `lambda.json`, or None when lambda is given or there is none.
        thresholds, patients, evaluation: parts.
        steps: part with the AUC by step, or None without `save_every`.
        sweep: part with the AUC by lambda, or None without a grid.
    """

    def __init__(self, experiment, method):
        self.experiment, self.method = experiment, method
        self._sizes = Sizes(experiment)
        self.training = None if method.run else self._training()
        chooses = method.has_lambda and method.tv_weight is None
        self.choice = self._choice() if chooses else None
        self.thresholds = self._thresholds()
        self.patients = self._patients()
        self.evaluation = self._evaluation()
        self.steps = self._steps() if self._save_every else None
        self.sweep = self._sweep() if experiment.sweep and method.has_lambda else None

    @property
    def for_tables(self):
        """The parts that the tables show."""
        return [self.evaluation]

    @property
    def for_figures(self):
        """The parts that the figures show."""
        parts = (self.choice, self.evaluation, self.steps, self.sweep)
        return [part for part in parts if part is not None]

    @property
    def model_path(self):
        """The run."""
        return self.method.run or self.training.folder / "run"

    def result(self, part, name):
        """The JSON file `name` of a finished part."""
        return json.loads((part.folder / name).read_text())

    @functools.cached_property
    def clusters(self):
        """K of the mixture, None for methods without."""
        if not self.method.kind.has_clusters:
            return None
        config = read_config(self.method.run) if self.method.run else self._config
        return config.network.num_clusters

    @functools.cached_property
    def _config(self):
        return self.experiment.training_config(self.method, self._sizes.shape)

    @functools.cached_property
    def tv_weight(self):
        """Lambda: given, chosen, or None for methods without; the choice must be finished."""
        if self.choice is None:
            return self.method.tv_weight
        return self.result(self.choice, select_lambda.FILE_NAME)["tv_weight"]

    @property
    def metrics(self):
        """What `eval.evaluate` measured; the evaluation must be finished."""
        return self.result(self.evaluation, "metrics.json")

    @property
    def used_lambda(self):
        """Lambda that the patients were restored with, None for methods without."""
        if not self.method.has_lambda:
            return None
        return self.metrics["settings"]["restoration"].get("tv_weight")

    # What the parts are made from ---------------------------------------------------------------

    def _part(self, name, settings, make, *needs, work=NO_WORK):
        return Part(
            root=Path(self.experiment.out) / "parts",
            name=f"{name}-{self.method.name}",
            settings=json.loads(json.dumps(settings, default=str)),
            make=make,
            needs=tuple(need for need in needs if need is not None),
            work=work,
        )

    @functools.cached_property
    def _model_settings(self):
        """What tells this model from others, for parts that are made with it."""
        run = self.method.run
        if run is None:
            return {}
        states = [*run.glob("config.json"), *run.glob("checkpoints/*.index"), *run.glob("*.index")]
        if not states:
            raise InputError(
                f"Expected a run of train_gmvae.py, or a TF1 checkpoint, got {run}; leave run out "
                f"to train."
            )
        return {"run": sorted(fingerprint(path) for path in states)}

    @property
    def _restoring(self):
        """Settings shared by every part that restores; the batch size does not change images."""
        restoration = self.experiment.restoration
        return {
            "seed": self.experiment.seed,
            "steps": self._steps_given,
            "precision": restoration.precision,
            **self._model_settings,
        }

    @property
    def _steps_given(self):
        """Steps of the restoration, None for the preset's; methods in one pass take none."""
        return self.experiment.restoration.steps if self.method.kind.has_steps else None

    @property
    def _save_every(self):
        return self.experiment.restoration.save_every if self.method.has_lambda else None

    def _restoration_work(self, slices, lambdas=1):
        restoration = self.experiment.restoration
        steps = self._steps_given
        if steps is None:
            steps = self._config.restoration.steps
        kind = "restoration in bfloat16" * (restoration.precision == "bfloat16") or "restoration"
        return self._work(kind, slices * steps * lambdas)

    def _work(self, kind, slice_steps):
        """`Work` at a rate of its own for each baseline, in pixels of what it sees."""
        if not self.method.kind.has_lambda:
            kind = f"{kind} {self.method.method}"
        square = self._config.network.square
        return Work(kind, slice_steps, square**2 if square else self._sizes.pixels)

    # The parts ----------------------------------------------------------------------------------

    def _training(self):
        config, training = self._config, self._config.training
        return self._part(
            "training",
            {"config": config.to_dict(), "cache": fingerprint(self.experiment.healthy.cache)},
            lambda folder: train(config, self.experiment.healthy.cache, folder / "run"),
            work=self._work("training", training.steps * training.batch_size),
        )

    def _choice(self):
        choice, healthy = self.experiment.choice, self.experiment.healthy
        slices = self._sizes.healthy(choice.max_slices)
        return self._part(
            "lambda",
            {**asdict(choice), **self._restoring, "cache": fingerprint(healthy.cache)},
            self._choose,
            self.training,
            work=self._restoration_work(slices, len(choice.grid)),
        )

    def _choose(self, folder):
        experiment = self.experiment
        result = select_lambda.select(
            self._load(),
            experiment.healthy.cache,
            experiment.choice.grid,
            partial=folder / "partial.json",
            steps=experiment.restoration.steps,
            max_slices=experiment.choice.max_slices,
            seed=experiment.seed,
            batch_size=experiment.restoration.batch_size,
            counts=experiment.healthy.arguments["counts"],
        )
        write_json(folder / select_lambda.FILE_NAME, result)
        (folder / "partial.json").unlink()

    def _thresholds(self):
        slices = self._sizes.healthy(self.experiment.thresholds.max_slices)
        return self._part(
            "thresholds",
            {
                **asdict(self.experiment.thresholds),
                **self._restoring,
                "tv_weight": self.method.tv_weight,
                "cache": fingerprint(self.experiment.healthy.cache),
            },
            self._find_thresholds,
            self.training,
            self.choice,
            work=self._restoration_work(slices),
        )

    def _find_thresholds(self, folder):
        experiment, loaded = self.experiment, self._load()
        restored_healthy(
            loaded,
            experiment.healthy.cache,
            folder / RESTORED_HEALTHY,
            restoration=self._restoration(loaded),
            seed=experiment.seed,
            batch_size=experiment.restoration.batch_size,
            max_slices=experiment.thresholds.max_slices,
        )
        cohort = experiment.healthy.cohort(folder / RESTORED_HEALTHY)
        find_thresholds(cohort).save(folder / THRESHOLDS, force=True)

    def _patients(self):
        caches = self.experiment.patients
        return self._part(
            "patients",
            {
                **self._restoring,
                "tv_weight": self.method.tv_weight,
                "save_every": self._save_every,
                "caches": {name: fingerprint(files.cache) for name, files in caches.items()},
            },
            self._restore_patients,
            self.training,
            self.choice,
            work=self._restoration_work(sum(self._sizes.patients())),
        )

    def _restore_patients(self, folder):
        loaded = self._load()
        for name, files in self.experiment.patients.items():
            out = folder / f"{name}.h5"
            if out.exists():  # a killed run has finished it
                continue
            restore_to_file(
                loaded,
                files.cache,
                out,
                restoration=self._restoration(loaded),
                seed=self.experiment.seed,
                batch_size=self.experiment.restoration.batch_size,
                save_every=self._save_every,
            )

    def _evaluation(self):
        files = [
            fingerprint(path)
            for patients in self.experiment.patients.values()
            for path in (patients.labels, patients.subjects)
            if path is not None
        ]
        return self._part(
            "evaluation",
            {"seed": self.experiment.seed, "files": files, "cases": self.experiment.figures.cases},
            self._evaluate,
            self.patients,
            self.thresholds,
        )

    def cohorts(self, **options):
        """[`Cohort`] of the restored patients."""
        return [
            files.cohort(self.patients.folder / f"{name}.h5", **options)
            for name, files in self.experiment.patients.items()
        ]

    def _evaluate(self, folder):
        cohorts = self.cohorts()
        settings = cohorts[0].settings
        thresholds = load_thresholds(
            self.thresholds.folder / THRESHOLDS,
            model_id=model_id(settings),
            restoration=settings,
        )
        results, panel = evaluate(
            cohorts,
            thresholds=thresholds,
            seed=self.experiment.seed,
            panel_slices=self.experiment.figures.cases,
        )
        write_results({"settings": {"restoration": settings}, **results}, folder, force=True)
        np.savez_compressed(folder / "panel.npz", **panel.arrays())

    def _steps(self):
        return self._part("steps", {}, self._measure_steps, self.patients)

    def _measure_steps(self, folder):
        with RestoredReader(self.cohorts()[0].restored) as reader:
            steps = reader.trajectory_steps
        curve = [
            {"step": step, "pooled_auc": sweep.pooled_auc(self.cohorts(step=step))}
            for step in tqdm(steps, "AUC by step", unit="step")
        ]
        write_json(folder / "steps.json", curve)

    def _sweep(self):
        settings, caches = self.experiment.sweep, self.experiment.patients
        slices = sum(self._sizes.patients(settings.max_slices))
        return self._part(
            "sweep",
            {
                **asdict(settings),
                **self._restoring,
                "caches": {name: fingerprint(files.cache) for name, files in caches.items()},
            },
            self._measure_sweep,
            self.training,
            work=self._restoration_work(slices, len(settings.grid)),
        )

    def _measure_sweep(self, folder):
        settings, loaded = self.experiment.sweep, self._load()
        restoration = select_lambda.restoration_of(
            loaded, tv_weight=settings.grid[0], steps=self.experiment.restoration.steps
        )
        areas = sweep.auc_by_lambda(
            Restorer(loaded.model, restoration, seed=self.experiment.seed),
            [files.arguments for files in self.experiment.patients.values()],
            settings.grid,
            max_slices=settings.max_slices,
            seed=self.experiment.seed,
            batch_size=self.experiment.restoration.batch_size,
            kept=sweep.Kept(folder / "partial.json", {}),
        )
        pairs = zip(settings.grid, areas, strict=True)
        curve = [{"tv_weight": weight, "pooled_auc": area} for weight, area in pairs]
        write_json(folder / "sweep.json", curve)
        (folder / "partial.json").unlink()

    def _load(self):
        return runs.load(self.model_path, precision=self.experiment.restoration.precision)

    def _restoration(self, loaded):
        return select_lambda.restoration_of(
            loaded, tv_weight=self.tv_weight, steps=self._steps_given
        )


def train(config, cache_path, folder):
    """Train a model in the run `folder`, going on from its newest checkpoint if there is one.

    Raises:
        StoppedError: on Ctrl-C or SIGTERM, after saving.
        InputError: if a loss is not finite.
    """
    run = runs.Run(folder)
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


def read_config(run):
    """`Config` of a run or of a TF1 checkpoint."""
    is_tf1 = run.is_dir() and tf1.is_checkpoint(run)
    return tf1.read_config(run)[1] if is_tf1 else runs.Run(run).read()[0]
