"""The configuration of the whole experiment: a YAML file, checked, as frozen dataclasses.

`eval/experiment.yaml` shows every key. Paths are relative to the folder the command runs in.
"""

import dataclasses
import functools
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tf_lesion import presets as configuration
from tf_lesion.baselines import METHODS
from tf_lesion.caches.slices import SliceCache, read_counts
from tf_lesion.calibration.tv_weight import parse_grid
from tf_lesion.config import PRESET_NAMES, Config
from tf_lesion.files import InputError, content_identity
from tf_lesion.methods import Method

RELEASED_GRID = "0:4:0.2"
KEYS = {"choice": "lambda"}  # field: its key in the file, where Python has the word for itself


@dataclass(frozen=True)
class CacheFiles:
    """A cache, and what a released one lacks."""

    cache: Path
    labels: Path | None = None  # file with `Label`
    subjects: Path | None = None  # slices per subject, .npy

    @property
    def counts(self) -> np.ndarray | None:
        """Slices per subject, where `subjects` says it."""
        return None if self.subjects is None else read_counts(self.subjects)

    @functools.cached_property
    def identities(self) -> dict[str, str | None]:
        """{file: identity of its content}; caches are large, each is read once."""
        files = dataclasses.asdict(self).items()
        return {name: path and content_identity(path) for name, path in files}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `SliceCache`."""
        return {"path": self.cache, "label_path": self.labels, "counts": self.counts}


@dataclass(frozen=True)
class MethodSettings:
    """One row of Table 1."""

    method: str  # as --model of train_gmvae.py
    clusters: int | None = None  # K; the preset's if left out
    seed: int | None = None  # of training; the experiment's if left out
    run: Path | None = None  # an existing run or TF1 checkpoint: nothing is trained
    tv_weight: float | None = None  # a given lambda: none is chosen
    chosen_by: str | None = None  # "labels of ...", if the run or lambda was; marks the rows
    network: dict = field(default_factory=dict)  # fields that differ from the experiment's
    training: dict = field(default_factory=dict)

    @property
    def kind(self) -> type[Method]:
        """The class of the method: what it can do, and its title."""
        return METHODS[self.method]

    @property
    def has_lambda(self) -> bool:
        """Whether images are restored with a total variation, whose weight is to be chosen."""
        return "tv_weight" in self.kind.restoration_settings

    @property
    def chooses(self) -> bool:
        """Whether lambda is chosen on healthy slices."""
        return self.has_lambda and self.tv_weight is None

    @property
    def name(self) -> str:
        """Short name, of folders and messages."""
        named = {"k": self.clusters, "s": self.seed, "": self.run and self.run.name}
        extra = [f"{letter}{value}" for letter, value in named.items() if value is not None]
        return "-".join([self.method, *extra])

    @property
    def title(self) -> str:
        """Name for people."""
        named = {"K =": self.clusters, "seed": self.seed}
        extra = [f"{word} {value}" for word, value in named.items() if value is not None]
        return ", ".join([self.kind.title, *extra])


@dataclass(frozen=True)
class RestorationSettings:
    """How slices are restored, the same for all methods."""

    steps: int | None = None  # the preset's if left out
    batch_size: int = 16
    precision: str = "float32"
    save_every: int | None = None  # steps; keeps the trajectory of the patients for Figure 3


@dataclass(frozen=True)
class Subset:
    """A random subset of slices, None for all."""

    max_slices: int | None = None


@dataclass(frozen=True)
class LambdaSettings:
    """The grid of lambdas and the random subset of slices it is measured on."""

    grid: tuple
    max_slices: int | None = None


@dataclass(frozen=True)
class FigureSettings:
    """What the figures show."""

    method: str | None = None  # name, of Figures 1 and 4-6; the first method if left out
    cases: int = 7


@dataclass(frozen=True)
class Experiment:
    """All settings of `eval.tables` and `eval.figures`.

    Attributes:
        out: folder of the parts, tables and figures.
        healthy: cache to train on (`Train`) and to choose lambda and thresholds on (`Test`).
        patients: {name: cache}, pooled in this order.
        methods: [`MethodSettings`].
        seed: of weights, batches, noise, subsets and bootstrap.
        preset: of `train_gmvae.py`.
        network, training: fields that differ from the preset.
        restoration: `RestorationSettings`.
        choice: `LambdaSettings` of the choice of lambda.
        sweep: `LambdaSettings` of Figure 2 (a), measured on patients; None leaves it out.
        groups: CSV of the scans that intervals draw together; see `measure`.
        thresholds: the healthy slices that they come from.
        figures: `FigureSettings`.
    """

    out: Path
    healthy: CacheFiles
    patients: dict[str, CacheFiles]
    methods: tuple[MethodSettings, ...]
    seed: int = 0
    preset: str = "practical"
    network: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    restoration: RestorationSettings = RestorationSettings()
    choice: LambdaSettings = LambdaSettings(tuple(parse_grid(RELEASED_GRID)))
    sweep: LambdaSettings | None = None
    groups: Path | None = None
    thresholds: Subset = Subset()
    figures: FigureSettings = FigureSettings()

    @property
    def shown(self) -> MethodSettings:
        """The method of Figures 1 and 4-6."""
        if self.figures.method is None:
            return self.methods[0]
        return next(m for m in self.methods if m.name == self.figures.method)

    def training_config(self, method: MethodSettings, shape: tuple[int, int]) -> Config:
        """`Config` of a method for slices of `shape`.

        Raises:
            InputError: on an unknown field or a value that makes no sense.
        """
        config = configuration.preset(self.preset, method.method)
        network = {**self.network, **method.network, "height": shape[0], "width": shape[1]}
        if method.clusters is not None:
            network["num_clusters"] = method.clusters
        seed = self.seed if method.seed is None else method.seed
        try:
            config = config.replace(
                seed=seed, network=network, training={**self.training, **method.training}
            )
        except TypeError as error:
            raise InputError(f"Unknown setting of training or network: {error}.") from error
        return configuration.check(config)


def read_experiment(path: str | Path, *, out: Path | None = None) -> Experiment:
    """Read and check a configuration file.

    Args:
        path: YAML, see `eval/experiment.yaml`.
        out: folder in place of the file's own.

    Raises:
        InputError: if the file is not YAML, or a key is unknown, missing or of the wrong kind.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No configuration at {path}; copy eval/experiment.yaml.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"Expected YAML in {path}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"Expected keys and values in {path}, got {type(values).__name__}.")
    values |= {} if out is None else {"out": str(out)}
    read = {
        key: READERS[key](value, f"{path}: {key}") if key in READERS else value
        for key, value in values.items()
    }
    return checked(_filled(Experiment, read, path), where=path)


def _filled(kind, values, at):
    """A dataclass from a mapping; unknown and missing keys are an `InputError`."""
    if not isinstance(values, dict):
        raise InputError(f"{at}: expected keys and values, got {values!r}.")
    fields = {KEYS.get(f.name, f.name): f for f in dataclasses.fields(kind)}
    missing = {
        name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING
    } - set(values)
    wrong = {"unknown": set(values) - set(fields), "missing": missing}
    told = [
        f"{what} {', '.join(sorted(map(str, names)))}" for what, names in wrong.items() if names
    ]
    if told:
        raise InputError(f"{at}: {' and '.join(told)}; the keys are {', '.join(sorted(fields))}.")
    return kind(**{fields[name].name: value for name, value in values.items()})


def _cache_files(value, at):
    values = value if isinstance(value, dict) else {"cache": value}
    files = {key: Path(str(path)) for key, path in values.items() if path is not None}
    return _filled(CacheFiles, files, at)


def _patients(value, at):
    if not isinstance(value, dict) or not value:
        raise InputError(f"{at}: expected a name and a cache for each group, got {value!r}.")
    return {str(name): _cache_files(files, f"{at}: {name}") for name, files in value.items()}


def _methods(value, at):
    if not isinstance(value, list) or not value:
        raise InputError(f"{at}: expected a list of methods, got {value!r}.")
    methods = [_filled(MethodSettings, entry, at) for entry in value]
    return tuple(replace(method, run=method.run and Path(method.run)) for method in methods)


def _lambdas(value, at):
    settings = _filled(LambdaSettings, value, at)
    grid = settings.grid
    text = ",".join(map(str, grid)) if isinstance(grid, list) else str(grid)
    return replace(settings, grid=tuple(parse_grid(text)))


READERS = {  # key: a function of its value and of where it stands
    "out": lambda value, at: Path(value),
    "healthy": _cache_files,
    "patients": _patients,
    "groups": lambda value, at: value and Path(value),
    "methods": _methods,
    "restoration": partial(_filled, RestorationSettings),
    "lambda": lambda value, at: _lambdas({"grid": RELEASED_GRID, **(value or {})}, at),
    "sweep": lambda value, at: None if value is None else _lambdas(value, at),
    "thresholds": partial(_filled, Subset),
    "figures": partial(_filled, FigureSettings),
}


def checked(experiment: Experiment, *, where: Any) -> Experiment:
    """Raise `InputError` for values that make no sense; returns the experiment."""
    restoration, names = experiment.restoration, [method.name for method in experiment.methods]
    counts = {
        "restoration: batch_size": restoration.batch_size,
        "restoration: save_every": restoration.save_every,
        "lambda: max_slices": experiment.choice.max_slices,
        "thresholds: max_slices": experiment.thresholds.max_slices,
        "sweep: max_slices": experiment.sweep and experiment.sweep.max_slices,
        "figures: cases": experiment.figures.cases,
    }
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{where}: {name}: expected a whole number above 0, got {value!r}.")
    unknown = [method.method for method in experiment.methods if method.method not in METHODS]
    rules = {
        f"preset {experiment.preset!r}": experiment.preset in PRESET_NAMES,
        "restoration: precision": restoration.precision in ("float32", "bfloat16"),
        f"seed {experiment.seed!r}": isinstance(experiment.seed, int) and experiment.seed >= 0,
        f"methods: {', '.join(names)} are not all different": len(set(names)) == len(names),
        f"figures: method, one of {names}": experiment.figures.method in (None, *names),
        f"method {', '.join(map(repr, unknown))}; known: {', '.join(METHODS)}": not unknown,
    }
    for method in () if unknown else experiment.methods:
        mixture = "num_clusters" in method.kind.network_settings
        rules[f"clusters of {method.method}, which has none"] = mixture or method.clusters is None
        weighted = method.has_lambda or method.tv_weight is None
        rules[f"tv_weight of {method.method}, which has none"] = weighted
    for what, holds in rules.items():
        if not holds:
            raise InputError(f"{where}: cannot use {what}.")
    return experiment


class Sizes:
    """Numbers of slices and their shape, read from the caches of an experiment."""

    def __init__(self, experiment: Experiment):
        with SliceCache(experiment.healthy.cache, "Test") as cache:
            self.shape, self._healthy = cache.shape, len(cache)
        self._patients = []
        for files in experiment.patients.values():
            with SliceCache(**files.arguments) as cache:
                self._patients.append(len(cache))
                if cache.shape != self.shape:
                    raise InputError(
                        f"{files.cache} has slices of {cache.shape[0]} x {cache.shape[1]} pixels, "
                        f"{experiment.healthy.cache} of {self.shape[0]} x {self.shape[1]}; make "
                        f"both with the same --voxel-size."
                    )

    def healthy(self, max_slices: int | None) -> int:
        """Slices of a random subset of the healthy ones."""
        return min(self._healthy, max_slices or self._healthy)

    def patients(self, max_slices: int | None = None) -> int:
        """Slices of a random subset of each patients' cache, in all."""
        return sum(min(count, max_slices or count) for count in self._patients)
