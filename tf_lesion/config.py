"""Settings as data: frozen dataclasses, to and from JSON. No TensorFlow."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from tf_lesion import __version__
from tf_lesion.files import InputError

PRESET_NAMES = ("released", "paper", "practical", "denoising")  # see `tf_lesion.presets`
DETECTOR = "pretrained-denoiser"  # model of `tf-lesion detect` and `tf_lesion.load`
RELEASED_PRECISION_OFFSET = 1e-6  # released code: added to the prior's precision in KL(z)
RELEASED_KL_C_FLOOR = 0.5  # nats per latent position (`c_lambda`); not in the paper


@dataclass(frozen=True)
class NetworkConfig:
    """Table 3 of the paper and what it leaves open."""

    model: str = "gmvae"
    height: int = 158  # pixels
    width: int = 198  # pixels
    num_clusters: int = 6  # K; unused by the VAE
    square: int | None = None  # pixels; side that the baselines resample slices to
    dim_z: int = 1
    dim_omega: int = 1
    num_filters: int = 64
    initializer: str = "truncated_normal"  # or "he_normal", "dcgan"
    precision: str = "float32"  # of the convolutions; or "bfloat16", "float64"
    # Where the clusters of the GMVAE start: means evenly from -spread to spread, and their standard
    # deviation. None: all nearly at 0, as released; from there they tend to stay together.
    cluster_start: tuple | None = None


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which form of the ELBO terms (see `tf_lesion.objective`)."""

    responsibilities: str = "released"  # or "bayes"
    kl_c_floor: float = RELEASED_KL_C_FLOOR  # nats per latent position
    precision_offset: float = RELEASED_PRECISION_OFFSET


@dataclass(frozen=True)
class TrainingConfig:
    """Adam and its schedules; fractions are of `length`."""

    steps: int = 1_600_000
    planned_steps: int | None = None  # of the run at first, if it goes on to another number
    batch_size: int = 16
    learning_rate: float = 5e-5
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    kl_weight_start: float = 1.0
    kl_weight_end: float = 1.0
    kl_ramp: tuple = (0.0, 0.0)  # the KL weight rises from start to end between these fractions
    learning_rate_drop: float = 1.0  # factor on the learning rate after `drop_at`
    drop_at: float = 1.0  # fraction
    learning_rate_cosine: bool = False  # it falls to 0 along half a cosine
    # The gradient is scaled down to this global norm, and left out if it is not finite.
    gradient_norm_limit: float | None = None
    # Standard deviations of noise on the slices, and pixels: see `tf_lesion.augmentation`.
    image_noise: float = 0.0
    coarse_noise: float = 0.0
    coarse_noise_width: tuple = (6.0, 24.0)
    corruption: bool = False  # see `tf_lesion.corruption`
    log_every: int = 50  # steps
    test_every: int = 500
    checkpoint_every: int = 5_000
    picture_every: int = 10_000
    checkpoints_kept: int = 30
    num_pictures: int = 16  # test slices

    @property
    def length(self) -> int:
        """Steps of the schedules: a run that is prolonged keeps those it began with."""
        return self.planned_steps or self.steps

    @property
    def shows_others(self) -> bool:
        """Whether networks see other slices than those they are to reproduce."""
        return self.coarse_noise > 0 or self.corruption

    def kl_weight(self, step: int) -> float:
        """Weight of the KL terms at `step` (0-based)."""
        start, end = (fraction * self.length for fraction in self.kl_ramp)
        if step >= end:
            return self.kl_weight_end
        risen = max(0.0, (step - start) / (end - start))
        return self.kl_weight_start + risen * (self.kl_weight_end - self.kl_weight_start)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate at `step` (0-based)."""
        factor = self.learning_rate_drop if step >= self.drop_at * self.length else 1.0
        if self.learning_rate_cosine:  # its end is that of the run, prolonged or not
            factor *= 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * factor


@dataclass(frozen=True)
class Solver:
    """How Algorithm 1 walks: a schedule and the step that it was made for.

    Attributes:
        name: key of `SOLVERS`.
        steps: gradients of the ELBO.
        step_sizes: ((from this small step on, step size), ...).
        steps_per_gradient: small steps, each with a total variation of its own.
        gradient_clip: None: no clipping; a proximal step has its own.
        step: "ascent", or "proximal" (see `tf_lesion.restoration.STEPS`).
        schedule: the one whose length it walks; it may take the place of that one alone.
    """

    name: str
    steps: int = 500
    step_sizes: tuple = ((0, 5e-3), (100, 2e-3))
    steps_per_gradient: int = 1
    gradient_clip: float | None = 100.0
    step: str = "ascent"
    schedule: str = "released"

    def step_size(self, step: int) -> float:
        """Size of a small step (0-based)."""
        return [size for start, size in self.step_sizes if step >= start][-1]


# The steps of those on the released schedule add up to its 1.3, but for a settling last.
SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("released"),
        Solver("paper", step_sizes=((0, 1e-3),), gradient_clip=None, schedule="paper"),
        # The last of its 500 small steps is half as long: it settles half of the jitter.
        Solver(
            "multirate",
            steps=100,
            steps_per_gradient=5,
            step_sizes=((0, 5e-3), (100, 2e-3), (499, 1e-3)),
        ),
        Solver("huber", steps=50, step_sizes=((0, 0.026),), step="proximal"),
        # One step to where a denoiser points.
        Solver(
            "denoiser",
            steps=1,
            step_sizes=((0, 1.0),),
            gradient_clip=None,
            schedule="denoiser",
        ),
        # Twice as far in half steps, each looked at anew, and with total variation.
        Solver("red", steps=4, step_sizes=((0, 0.5),), step="proximal", schedule="denoiser"),
    )
}
_SOLVER_FIELDS = ("steps", "steps_per_gradient", "step_sizes", "gradient_clip")
TARGETS = (0.01, 0.05, 0.10)  # the paper's limits on the false positive rate: DSC1, DSC5, DSC10
AUTO = "auto"  # in place of a value: what was chosen for the model
RELEASED_GRID = "0:4:0.2"  # lambdas 0, 0.2 ... 3.8


@dataclass(frozen=True)
class RestorationConfig:
    """Gradient ascent on ELBO(x) - tv_weight * TV(observed - x)."""

    solver: Solver = SOLVERS["released"]
    tv_weight: float = 1.8  # lambda, per unit intensity
    seeds: int = 1  # restorations with noise of their own, averaged
    flip: bool = False  # average with the restorations of the mirrored slices

    @property
    def steps(self) -> int:
        """Gradients of the ELBO."""
        return self.solver.steps

    @property
    def keeps_healthy(self) -> bool:
        """Whether healthy tissue stays as it is: a restored brain may stand for the healthy one."""
        return self.solver.schedule == "denoiser"

    @property
    def repeats(self) -> int:
        """How many restorations of a slice are averaged."""
        return self.seeds * (1 + self.flip)

    def changed(self, **fields: Any) -> "RestorationConfig":
        """A copy with other fields, those of the solver's schedule among them."""
        of_solver = {name: fields.pop(name) for name in _SOLVER_FIELDS if name in fields}
        solver = dataclasses.replace(fields.pop("solver", self.solver), **of_solver)
        return dataclasses.replace(self, solver=solver, **fields)

    def with_solver(self, name: str) -> "RestorationConfig":
        """A copy that takes the steps of another solver of the same schedule.

        Raises:
            InputError: if there is none of this name, or it was made for another schedule: it would
                walk another length.
        """
        if name == self.solver.name:
            return self
        if name not in SOLVERS:
            raise InputError(f"Expected a solver of {', '.join(SOLVERS)}, got {name!r}.")
        other = SOLVERS[name]
        if other.schedule != self.solver.schedule:
            raise InputError(
                f"Expected a solver of the {self.solver.schedule} schedule, got {name}, which "
                f"walks the length of the {other.schedule} one."
            )
        return self.changed(solver=other, gradient_clip=self.solver.gradient_clip)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable, flat."""
        solver = {name: getattr(self.solver, name) for name in _SOLVER_FIELDS}
        solver["step_sizes"] = [list(pair) for pair in self.solver.step_sizes]
        averages = {"tv_weight": self.tv_weight, "seeds": self.seeds, "flip": self.flip}
        return {**solver, "solver": self.solver.name, **averages}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RestorationConfig":
        """Inverse of `to_dict`."""
        values = {**values, "step_sizes": tuple(tuple(pair) for pair in values["step_sizes"])}
        return cls().changed(**{**values, "solver": SOLVERS[solver_name(values)]})


def solver_name(stored: dict[str, Any]) -> str:
    """The solver of stored settings; the paper's schedule was once called released, too."""
    name, sizes = stored.get("solver", "released"), stored.get("step_sizes", ())
    paper = tuple(map(tuple, sizes)) == SOLVERS["paper"].step_sizes
    return "paper" if paper and name == "released" else name


@dataclass(frozen=True)
class Config:
    """Everything a run is determined by, but for its data."""

    preset: str = "released"
    seed: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    restoration: RestorationConfig = field(default_factory=RestorationConfig)

    def replace(self, **sections: Any) -> "Config":
        """A copy; a dict given for a section replaces single fields of it."""
        changed = {}
        for name, value in sections.items():
            section = getattr(self, name)
            if isinstance(value, dict):
                change = getattr(section, "changed", None)
                value = change(**value) if change else dataclasses.replace(section, **value)
            changed[name] = value
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable form, with the version of the package."""
        values = {**dataclasses.asdict(self), "restoration": self.restoration.to_dict()}
        return {"tf_lesion_version": __version__, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Inverse of `to_dict`."""
        network, training = (dict(values[section]) for section in ("network", "training"))
        if network.get("cluster_start"):
            network["cluster_start"] = tuple(network["cluster_start"])
        for name in ("kl_ramp", "coarse_noise_width"):
            training[name] = tuple(training.get(name, getattr(TrainingConfig, name)))
        return cls(
            preset=values["preset"],
            seed=values["seed"],
            network=NetworkConfig(**network),
            objective=ObjectiveConfig(**values["objective"]),
            training=TrainingConfig(**training),
            restoration=RestorationConfig.from_dict(values["restoration"]),
        )
