"""GMVAE and VAE: the networks wired together. Noise is passed in, never drawn here."""

import keras
import tensorflow as tf

from tf_lesion import objective
from tf_lesion.networks import Decoder, Encoder, PriorNetwork, latent_size
from tf_lesion.slices import check_slice_shape


def _sample(mean, logvar, noise):
    return mean + tf.exp(0.5 * logvar) * noise


class _VariationalModel(keras.Model):
    """What GMVAE and VAE share. Subclasses give `latents` and `kl_terms`.

    Args:
        network: `NetworkConfig` (slice size, clusters, latent channels, initializer, precision).
        objective_config: `ObjectiveConfig` (which form of the terms).
    """

    has_lambda = True  # restored by ascent with a total variation

    def __init__(self, network, objective_config, *, dim_omega, name):
        check_slice_shape((network.height, network.width), where="the network configuration")
        super().__init__(name=name)
        self.network, self.objective_config = network, objective_config
        options = {
            "num_filters": network.num_filters,
            "initializer": network.initializer,
            "precision": network.precision,
        }
        self._options = options
        self.encoder = Encoder(dim_z=network.dim_z, dim_omega=dim_omega, **options)
        self.decoder = Decoder(**options)

    @property
    def grid(self):
        """(h, w) of the latents."""
        return latent_size(self.network.height), latent_size(self.network.width)

    def build_weights(self):
        """Create every weight, so that a checkpoint can be read or written; returns the model."""
        noise = {name: tf.zeros([1, *shape]) for name, shape in self.noise_shapes.items()}
        self(tf.zeros([1, self.network.height, self.network.width, 1]), noise)
        return self

    def call(self, image, noise):
        """Every quantity of the model for `image` [B, H, W, 1], as a dict by glossary name."""
        outputs = self.latents(image, noise)
        return {**outputs, **self.decoder(outputs["z"])}

    def elbo_terms(self, image, noise):
        """The terms of the ELBO by name, each [B], nats: log_likelihood, kl_z, and so on."""
        outputs = self(image, noise)
        log_likelihood = objective.log_likelihood(
            image, y_mean=outputs["y_mean"], y_log_precision=outputs["y_log_precision"]
        )
        return {"log_likelihood": log_likelihood, **self.kl_terms(outputs)}

    def restoration_terms(self, image, noise):
        """As `elbo_terms`, with the sigma of p(x | z) fixed at 1/sqrt(2) (paper, section 2.2)."""
        outputs = self.latents(image, noise)
        log_likelihood = objective.fixed_sigma_log_likelihood(
            image, y_mean=self.decoder.mean(outputs["z"])
        )
        return {"log_likelihood": log_likelihood, **self.kl_terms(outputs)}


class GMVAE(_VariationalModel):
    """Gaussian-mixture variational autoencoder (You et al., MIDL 2019, section 2.1).

    Shapes of `call`, with h x w the latent grid and K clusters: z, z_mean, z_logvar [B, h, w, D];
    omega, omega_mean, omega_logvar [B, h, w, dim_omega]; prior_mean, prior_log_precision
    [B, h, w, D, K]; cluster_probs [B, h, w, K]; y_mean, y_log_precision [B, H, W, 1].

    `noise` holds `omega` [B, h, w, dim_omega] and `z` [B, h, w, D], standard normal.
    """

    def __init__(self, network, objective_config, *, name="gmvae"):
        super().__init__(network, objective_config, dim_omega=network.dim_omega, name=name)
        self.prior_network = PriorNetwork(
            num_clusters=network.num_clusters, dim_z=network.dim_z, **self._options
        )

    @property
    def noise_shapes(self):
        """{latent: (h, w, channels)} of the noise that one image needs; omega draws first."""
        return {
            "omega": (*self.grid, self.network.dim_omega),
            "z": (*self.grid, self.network.dim_z),
        }

    def latents(self, image, noise):
        """Posterior moments, one sample of each latent, the prior's moments, responsibilities."""
        outputs = self.encoder(image)
        outputs["omega"] = _sample(outputs["omega_mean"], outputs["omega_logvar"], noise["omega"])
        outputs["z"] = _sample(outputs["z_mean"], outputs["z_logvar"], noise["z"])
        outputs |= self.prior_network(outputs["omega"])
        outputs["cluster_probs"] = objective.cluster_probs(
            outputs["z"],
            prior_mean=outputs["prior_mean"],
            prior_log_precision=outputs["prior_log_precision"],
            responsibilities=self.objective_config.responsibilities,
        )
        return outputs

    def kl_terms(self, outputs):
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


class VAE(_VariationalModel):
    """The same trunk and decoder with a standard normal prior on z: VAE(TV) of the paper.

    `noise` holds `z` [B, h, w, D], standard normal. Shapes as in `GMVAE`, without omega and prior.
    """

    def __init__(self, network, objective_config, *, name="vae"):
        super().__init__(network, objective_config, dim_omega=None, name=name)

    @property
    def noise_shapes(self):
        """{latent: (h, w, channels)} of the noise that one image needs."""
        return {"z": (*self.grid, self.network.dim_z)}

    def latents(self, image, noise):
        """Posterior moments and one sample of z."""
        outputs = self.encoder(image)
        outputs["z"] = _sample(outputs["z_mean"], outputs["z_logvar"], noise["z"])
        return outputs

    def kl_terms(self, outputs):
        """kl_z from the outputs of `latents`, [B], nats."""
        return {"kl_z": objective.kl_standard_normal(outputs["z_mean"], outputs["z_logvar"])}


MODELS = {"gmvae": GMVAE, "vae": VAE}


def make_model(config):
    """The model that a `Config` describes, with its weights created."""
    return MODELS[config.network.model](config.network, config.objective).build_weights()


def elbo(terms, *, kl_weight=1.0):
    """ELBO [B] from named terms: log_likelihood - kl_weight * (sum of the KL terms)."""
    divergence = tf.add_n([term for name, term in terms.items() if name.startswith("kl_")])
    return terms["log_likelihood"] - kl_weight * divergence
