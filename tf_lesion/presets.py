"""Four presets for every method, and what makes sense in a configuration."""

from tf_lesion.baselines import METHODS
from tf_lesion.config import (
    SOLVERS,
    Config,
    NetworkConfig,
    ObjectiveConfig,
    RestorationConfig,
    TrainingConfig,
)
from tf_lesion.files import InputError

SQUARE_STEP = 16  # the baselines halve their square four times
_EXACT = ObjectiveConfig(responsibilities="bayes", kl_c_floor=0.0, precision_offset=0.0)
_PRESETS = {
    "released": Config(preset="released"),
    "paper": Config(
        preset="paper",
        network=NetworkConfig(num_clusters=9),
        objective=_EXACT,
        restoration=RestorationConfig(solver=SOLVERS["paper"]),
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


def preset(name: str, model: str = "gmvae") -> Config:
    """The preset `name` for the method `model`: "released", "paper", "practical" or "denoising"."""
    config = _PRESETS[name].replace(network={"model": model})
    return config.replace(**METHODS[model].settings.get(name, {}))


def check(config: Config) -> Config:
    """Raise `InputError` for values that cannot be trained or restored with; returns the config."""
    network, training, restoration = config.network, config.training, config.restoration
    rules = [
        (network.num_clusters >= 1, f"num_clusters of 1 or more, got {network.num_clusters}"),
        (network.dim_z >= 1 and network.dim_omega >= 1, "latents of 1 channel or more"),
        (
            network.square is None or (network.square > 0 and network.square % SQUARE_STEP == 0),
            f"a square of {SQUARE_STEP} pixels or a multiple, got {network.square}",
        ),
        (training.steps >= 1, f"steps of 1 or more, got {training.steps}"),
        (training.batch_size >= 1, f"a batch_size of 1 or more, got {training.batch_size}"),
        (training.learning_rate > 0, f"a learning_rate above 0, got {training.learning_rate}"),
        (restoration.steps >= 0, f"steps of 0 or more, got {restoration.steps}"),
        (restoration.seeds >= 1, f"seeds of 1 or more, got {restoration.seeds}"),
        (restoration.tv_weight >= 0, f"a tv_weight of 0 or more, got {restoration.tv_weight}"),
        (
            not training.shows_others or "shown" in METHODS[network.model].training_settings,
            f"the preset denoising for gmvae or vae alone, got {network.model}",
        ),
        (config.seed >= 0, f"a seed of 0 or more, got {config.seed}"),
    ]
    for holds, expected in rules:
        if not holds:
            raise InputError(f"Expected {expected}.")
    return config
