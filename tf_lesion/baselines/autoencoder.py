"""VAE-128 and VAE-256: a dense latent; what the reconstruction leaves out is the lesion map."""

from typing import Any

import tensorflow as tf

from tf_lesion.baselines.blocks import OnePass, ResidualDecoder, ResidualEncoder, squared_error
from tf_lesion.config import NetworkConfig, ObjectiveConfig
from tf_lesion.methods import register
from tf_lesion.models import sample
from tf_lesion.noise import Tensors
from tf_lesion.objective import kl_standard_normal

DIM_Z = 128
FILTERS = 16
NETWORK = {"dim_z": DIM_Z, "num_filters": FILTERS, "initializer": "he_normal"}
PRACTICAL = {  # a reconstruction is not restored at another sigma: no higher KL weight at the end
    "steps": 2_000,
    "batch_size": 8,
    "learning_rate": 5e-4,
    "kl_weight_end": 1.0,
    "checkpoints_kept": 3,
}


def presets(
    square: int, *, training: dict | None = None, practical: dict | None = None
) -> dict[str, dict]:
    """The `settings` of a method with this encoder and decoder."""
    common = {
        "network": {**NETWORK, "square": square},
        "training": {"checkpoints_kept": PRACTICAL["checkpoints_kept"], **(training or {})},
        "restoration": {"steps": 1},
    }
    quick = {**common["training"], **PRACTICAL, **(practical or {})}
    return {
        "released": common,
        "paper": common,
        "practical": {**common, "training": quick},
    }


class _DenseVAE(OnePass):
    """Variational autoencoder with a dense latent of 128; loss: squared error + KL, nats.

    Source: see `tf_lesion.baselines.blocks`; loss and latent are the description's. We chose: the
    mean of q(z | x) to detect, and where no setting is described, the released GMVAE's.

    `noise` holds `z` [B, dim_z]. The reconstruction is the restored slice.
    """

    def __init__(
        self, network: NetworkConfig, objective_config: ObjectiveConfig, *, name: str = "dense_vae"
    ):
        super().__init__(network, objective_config, name=name)
        self.encoder = ResidualEncoder(network, heads=("z_mean", "z_logvar"))
        self.decoder = ResidualDecoder(network)

    def terms(self, images: tf.Tensor, noise: Tensors, *, training: bool = False) -> Tensors:
        """`loss`, `squared_error` and `kl_z`, each [B], nats."""
        squares = self.to_square(images)
        moments = self.encoder(squares, training=training)
        z = sample(moments["z_mean"], moments["z_logvar"], noise["z"])
        error = squared_error(squares, self.decoder(z, training=training))
        divergence = kl_standard_normal(moments["z_mean"], moments["z_logvar"])
        return {"loss": error + divergence, "squared_error": error, "kl_z": divergence}

    def objectives(self, terms: Tensors, *, kl_weight: Any) -> Tensors:
        """Squared error + weighted KL."""
        return {"adam": tf.reduce_mean(terms["squared_error"] + kl_weight * terms["kl_z"])}

    def reconstructed(self, squares: tf.Tensor) -> tf.Tensor:
        """Decoded means of q(z | x)."""
        return self.decoder(self.encoder(squares)["z_mean"])


@register("vae-256")
class VAE256(_DenseVAE):
    """The VAE on squares of 256."""

    title = "VAE-256"
    settings = presets(256, practical={"learning_rate": 1e-4})  # 1e-3 diverges at once


@register("vae-128")
class VAE128(_DenseVAE):
    """The VAE on squares of 128."""

    title = "VAE-128"
    settings = presets(128)
