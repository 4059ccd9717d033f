"""Settings as data: frozen dataclasses, four presets, to and from JSON."""

import dataclasses
from dataclasses import dataclass, field

from tf_lesion import __version__
from tf_lesion.baselines import METHODS
from tf_lesion.files import InputError
from tf_lesion.objective import RELEASED_KL_C_FLOOR, RELEASED_PRECISION_OFFSET

SQUARE_STEP = 16  # the baselines halve their square four times


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
    precision: str = "float32"  # of the convolutions; or "bfloat16"
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
    """Adam and its schedules; fractions are of `steps`."""

    steps: int = 1_600_000
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
    # The gradient is scaled down to this global norm, and left out if it is not finite.
    gradient_norm_limit: float | None = None
    # Standard deviations of noise on the slices, and pixels: see `tf_lesion.augmentation`.
    image_noise: float = 0.0
    coarse_noise: float = 0.0
    coarse_noise_width: tuple = (6.0, 24.0)
    log_every: int = 50  # steps
    test_every: int = 500
    checkpoint_every: int = 5_000
    picture_every: int = 10_000
    checkpoints_kept: int = 30
    num_pictures: int = 16  # test slices

    def kl_weight(self, step):
        """Weight of the KL terms at `step` (0-based)."""
        start, end = (fraction * self.steps for fraction in self.kl_ramp)
        if step >= end:
            return self.kl_weight_end
        risen = max(0.0, (step - start) / (end - start))
        return self.kl_weight_start + risen * (self.kl_weight_end - self.kl_weight_start)

    def learning_rate_at(self, step):
        """Learning rate at `step` (0-based)."""
        dropped = step >= self.drop_at * self.steps
        return self.learning_rate * (self.learning_rate_drop if dropped else 1.0)


SOLVERS = {  # name -> schedule
    "released": {
        "steps": 500,
        "steps_per_gradient": 1,
        "step_sizes": ((0, 5e-3), (100, 2e-3)),
    },
    # The last of its 500 small steps is half as long: it settles half of the jitter.
    "multirate": {
        "steps": 100,
        "steps_per_gradient": 5,
        "step_sizes": ((0, 5e-3), (100, 2e-3), (499, 1e-3)),
    },
    "huber": {"steps": 50, "steps_per_gradient": 1, "step_sizes": ((0, 0.026),)},
}


@dataclass(frozen=True)
class RestorationConfig:
    """Gradient ascent on ELBO(x) - tv_weight * TV(observed - x)."""

    steps: int = 500  # gradients of the ELBO
    steps_per_gradient: int = 1  # small ones, each with a total variation of its own
    step_sizes: tuple = ((0, 5e-3), (100, 2e-3))  # (from this small step on, step size)
    gradient_clip: float | None = 100.0  # None: no clipping; `huber` has its own
    tv_weight: float = 1.8  # lambda, per unit intensity
    solver: str = "released"  # or another of SOLVERS, see `tf_lesion.solvers`
    seeds: int = 1  # restorations with noise of their own, averaged
    flip: bool = False  # average with the restorations of the mirrored slices

    @property
    def repeats(self):
        """How many restorations of a slice are averaged."""
        return self.seeds * (1 + self.flip)

    def with_solver(self, name):
        """A copy that follows the schedule of another solver.

        The steps of each add up to the 1.3 of the released one, but for a settling last.
        """
        if name == self.solver:
            return self
        return dataclasses.replace(self, solver=name, **SOLVERS[name])

    def step_size(self, step):
        """Size of a small step (0-based)."""
        return [size for start, size in self.step_sizes if step >= start][-1]


@dataclass(frozen=True)
class Config:
    """Everything a run is determined by, but for its data."""

    preset: str = "released"
    seed: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    restoration: RestorationConfig = field(default_factory=RestorationConfig)

    def replace(self, **sections):
        """A copy; a dict given for a section replaces single fields of it."""
        return dataclasses.replace(
            self,
            **{
                name: dataclasses.replace(getattr(self, name), **value)
                if isinstance(value, dict)
                else value
                for name, value in sections.items()
            },
        )

    def to_dict(self):
        """JSON-serialisable form, with the version of the package."""
        return {"tf_lesion_version": __version__, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values):
        """Inverse of `to_dict`."""
        network, training, restoration = (
            dict(values[section]) for section in ("network", "training", "restoration")
        )
        if network.get("cluster_start"):
            network["cluster_start"] = tuple(network["cluster_start"])
        for name in ("kl_ramp", "coarse_noise_width"):
            training[name] = tuple(training.get(name, getattr(TrainingConfig, name)))
        restoration["step_sizes"] = tuple(tuple(pair) for pair in restoration["step_sizes"])
        return cls(
            preset=values["preset"],
            seed=values["seed"],
            network=NetworkConfig(**network),
            objective=ObjectiveConfig(**values["objective"]),
            training=TrainingConfig(**training),
            restoration=RestorationConfig(**restoration),
        )


_EXACT = ObjectiveConfig(responsibilities="bayes", kl_c_floor=0.0, precision_offset=0.0)
_PRESETS = {
    "released": Config(preset="released"),
    "paper": Config(
        preset="paper",
        network=NetworkConfig(num_clusters=9),
        objective=_EXACT,
        restoration=RestorationConfig(step_sizes=((0, 1e-3),), gradient_clip=None),
    ),
    # Budgets of minutes to hours: with the released initialization and learning rate the posterior
    # collapses before anything is learned. The KL weight ends above 1 because the restoration fixes
    # sigma at 1/sqrt(2), far above what is learned: there, at weight 1, the KL terms outweigh the
    # likelihood, and all of the brain darkens. Gradient norms are heavy-tailed without the limit.
    "practical": Config(
        preset="practical",
        network=NetworkConfig(num_clusters=9, initializer="he_normal", precision="bfloat16"),
        objective=_EXACT,
        training=TrainingConfig(
            steps=5_000,
            batch_size=8,
            learning_rate=5e-4,
            kl_weight_start=1.0,
            kl_weight_end=10.0,
            kl_ramp=(0.4, 0.7),
            learning_rate_drop=0.2,
            drop_at=0.7,
            gradient_norm_limit=5e3,
            checkpoint_every=500,
            picture_every=1_000,
        ),
    ),
}
# The shipped prior: clusters that start apart, and noise to be removed (`tf_lesion.augmentation`).
_PRESETS["denoising"] = _PRESETS["practical"].replace(
    preset="denoising",
    network={"cluster_start": (3.0, 0.3)},
    training={
        "steps": 2_000,
        "kl_weight_end": 1.0,
        "image_noise": 0.03,
        "coarse_noise": 0.3,
    },
)
PRESET_NAMES = tuple(_PRESETS)


def preset(name, model="gmvae"):
    """The preset `name` for the method `model`: "released", "paper", "practical" or "denoising"."""
    config = _PRESETS[name].replace(network={"model": model})
    return config.replace(**METHODS[model].settings.get(name, {}))


def check(config):
    """Raise `InputError` for values that cannot be trained or restored with; returns the config."""
    network, training, restoration = config.network, config.training, config.restoration
    rules = [
        (network.num_clusters >= 1, f"--clusters 1 or more, got {network.num_clusters}"),
        (network.dim_z >= 1 and network.dim_omega >= 1, "latents of 1 channel or more"),
        (
            network.square is None or (network.square > 0 and network.square % SQUARE_STEP == 0),
            f"a square of {SQUARE_STEP} pixels or a multiple, got {network.square}",
        ),
        (training.steps >= 1, f"--steps 1 or more, got {training.steps}"),
        (training.batch_size >= 1, f"--batch-size 1 or more, got {training.batch_size}"),
        (training.learning_rate > 0, f"--learning-rate above 0, got {training.learning_rate}"),
        (restoration.steps >= 0, f"--steps 0 or more, got {restoration.steps}"),
        (restoration.seeds >= 1, f"seeds of 1 or more, got {restoration.seeds}"),
        (restoration.tv_weight >= 0, f"--tv-weight 0 or more, got {restoration.tv_weight}"),
        (
            not training.coarse_noise or METHODS[network.model].has_lambda,
            f"--preset denoising for gmvae or vae alone, got {network.model}",
        ),
        (config.seed >= 0, f"--seed 0 or more, got {config.seed}"),
    ]
    for holds, expected in rules:
        if not holds:
            raise InputError(f"Expected {expected}.")
    return config
