"""GMVAE and VAE: the networks wired together. Noise is passed in, never drawn here."""

from typing import Any, ClassVar

import tensorflow as tf

from tf_lesion import objective, restoration
from tf_lesion.config import NetworkConfig, ObjectiveConfig
from tf_lesion.methods import AscentMethod, register
from tf_lesion.networks import Decoder, Encoder, PriorNetwork, latent_size
from tf_lesion.noise import Tensors


def sample(mean: tf.Tensor, logvar: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
    """A sample of N(mean, exp(logvar)) from standard normal noise."""
    return mean + tf.exp(0.5 * logvar) * noise


class _VariationalModel(AscentMethod):
    """What GMVAE and VAE share. Subclasses give `latents` and `kl_terms`."""

    drawn = ("omega", "z")  # the latents, in the order in which they draw their noise

    def __init__(
        self, network: NetworkConfig, objective_config: ObjectiveConfig, *, name: str | None = None
    ):
        super().__init__(network, objective_config, name=name or type(self).__name__.lower())
        self.encoder, self.decoder = Encoder(network, latents=self.drawn), Decoder(network)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        return latent_size(self.network.height), latent_size(self.network.width)

    @property
    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """{latent: (h, w, channels)} of the noise that one image needs."""
        sizes = {latent: getattr(self.network, f"dim_{latent}") for latent in self.drawn}
        return {latent: (*self.grid, channels) for latent, channels in sizes.items()}

    def call(self, image: tf.Tensor, noise: Tensors) -> Tensors:
        """Every quantity of the model for `image` [B, H, W, 1], as a dict by glossary name."""
        outputs = self.latents(image, noise)
        return {**outputs, **self.decoder(outputs["z"])}

    def elbo_terms(
        self, image: tf.Tensor, noise: Tensors, *, shown: tf.Tensor | None = None
    ) -> Tensors:
        """The terms of the ELBO by name, each [B], nats: log_likelihood, kl_z, and so on.

        `shown` is what the encoder sees in place of the image: the denoising criterion.
        """
        outputs = self(image if shown is None else shown, noise)
        log_likelihood = objective.log_likelihood(
            image, y_mean=outputs["y_mean"], y_log_precision=outputs["y_log_precision"]
        )
        return {"log_likelihood": log_likelihood, **self.kl_terms(outputs)}

    def terms(
        self,
        images: tf.Tensor,
        noise: Tensors,
        *,
        training: bool = False,
        shown: tf.Tensor | None = None,
    ) -> Tensors:
        """`nelbo` and the terms of the ELBO, each [B], nats."""
        del training
        terms = self.elbo_terms(images, noise, shown=shown)
        return {"nelbo": -objective.elbo(terms), **terms}

    def objectives(self, terms: Tensors, *, kl_weight: Any) -> Tensors:
        """The negative ELBO with weighted KL terms, mean over the batch."""
        return {"adam": -tf.reduce_mean(objective.elbo(terms, kl_weight=kl_weight))}

    def reconstruct(self, images: tf.Tensor, noise: Tensors) -> tf.Tensor:
        """The mean of p(x | z) for one sample of z."""
        return self(images, noise)["y_mean"]

    def restoration_terms(self, image: tf.Tensor, noise: Tensors) -> Tensors:
        """As `elbo_terms`, with the sigma of p(x | z) fixed at 1/sqrt(2) (paper, section 2.2)."""
        outputs = self.latents(image, noise)
        log_likelihood = objective.fixed_sigma_log_likelihood(
            image, y_mean=self.decoder.mean(outputs["z"])
        )
        return {"log_likelihood": log_likelihood, **self.kl_terms(outputs)}

    def log_prior_gradient(self, image: tf.Tensor, noise: Tensors) -> tuple[tf.Tensor, tf.Tensor]:
        """The ELBO [B] of images [B, H, W, 1], and its gradient."""
        return restoration.elbo_gradient(self, image, noise)


@register("gmvae")
class GMVAE(_VariationalModel):
    """Gaussian-mixture variational autoencoder (You et al., MIDL 2019, section 2.1).

    Shapes of `call`, with h x w the latent grid and K clusters: z, z_mean, z_logvar [B, h, w, D];
    omega, omega_mean, omega_logvar [B, h, w, dim_omega]; prior_mean, prior_log_precision
    [B, h, w, D, K]; cluster_probs [B, h, w, K]; y_mean, y_log_precision [B, H, W, 1].

    `noise` holds `omega` [B, h, w, dim_omega] and `z` [B, h, w, D], standard normal.
    """

    title = "GMVAE(TV)"
    network_settings = frozenset({"num_clusters"})

    def __init__(
        self, network: NetworkConfig, objective_config: ObjectiveConfig, *, name: str | None = None
    ):
        super().__init__(network, objective_config, name=name)
        self.prior_network = PriorNetwork(network)

    def latents(self, image: tf.Tensor, noise: Tensors) -> Tensors:
        """Posterior moments, one sample of each latent, the prior's moments, responsibilities."""
        outputs = self.encoder(image)
        outputs["omega"] = sample(outputs["omega_mean"], outputs["omega_logvar"], noise["omega"])
        outputs["z"] = sample(outputs["z_mean"], outputs["z_logvar"], noise["z"])
        outputs |= self.prior_network(outputs["omega"])
        outputs["cluster_probs"] = objective.cluster_probs(
            outputs["z"],
            prior_mean=outputs["prior_mean"],
            prior_log_precision=outputs["prior_log_precision"],
            responsibilities=self.objective_config.responsibilities,
        )
        return outputs

    def kl_terms(self, outputs: Tensors) -> Tensors:
        """kl_z, kl_omega, kl_c from the outputs of `latents`, each [B], nats."""
        moments = ("z_mean", "z_logvar", "prior_mean", "prior_log_precision", "cluster_probs")
        return {
            "kl_z": objective.kl_z(
                **{name: outputs[name] for name in moments},
                precision_offset=self.objective_config.precision_offset,
            ),
            "kl_omega": objective.kl_standard_normal(
                outputs["omega_mean"], outputs["omega_logvar"]
            ),
            "kl_c": objective.kl_c(
                outputs["cluster_probs"], floor=self.objective_config.kl_c_floor
            ),
        }


@register("vae")
class VAE(_VariationalModel):
    """The same trunk and decoder with a standard normal prior on z: VAE(TV) of the paper.

    `noise` holds `z` [B, h, w, D], standard normal. Shapes as in `GMVAE`, without omega and prior.
    """

    title = "VAE(TV)"
    drawn = ("z",)
    # The released code restores with a VAE at lambda 2.2 and gradients clipped at 50 (GMVAE: 1.8
    # and 100); the other presets take over its lambda.
    settings: ClassVar[dict] = {
        "released": {"restoration": {"gradient_clip": 50.0, "tv_weight": 2.2}},
        "practical": {"restoration": {"gradient_clip": 50.0, "tv_weight": 2.2}},
        "denoising": {"restoration": {"gradient_clip": 50.0, "tv_weight": 2.2}},
        "paper": {"restoration": {"tv_weight": 2.2}},
    }

    def latents(self, image: tf.Tensor, noise: Tensors) -> Tensors:
        """Posterior moments and one sample of z."""
        outputs = self.encoder(image)
        outputs["z"] = sample(outputs["z_mean"], outputs["z_logvar"], noise["z"])
        return outputs

    def kl_terms(self, outputs: Tensors) -> Tensors:
        """kl_z from the outputs of `latents`, [B], nats."""
        return {"kl_z": objective.kl_standard_normal(outputs["z_mean"], outputs["z_logvar"])}
