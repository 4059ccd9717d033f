"""What a method of Table 1 must provide to be trained, to detect and to be exported.

A method is a `Method` with a name: `@register("name")` makes it a `--model` of every command. A
file in `tf_lesion/baselines/` is imported by itself, so that one file adds a method.
"""

from typing import ClassVar

import keras
import tensorflow as tf

from tf_lesion.caches.slices import check_slice_shape

METHODS = {}  # name -> class; complete once `tf_lesion.baselines` is imported


def register(name):
    """Decorator of a `Method`: its name on the command line, in runs and in configurations."""

    def keep(method):
        METHODS[name] = method
        return method

    return keep


class Method(keras.Model):
    """Base of all methods; a subclass gives what is marked.

    Trained by `update`: by default one Adam on all weights, on the objective that `objectives`
    makes of `terms`. Detects by `restored`; a method with `has_lambda` gives `restoration_terms`
    instead, which `tf_lesion.restoration` ascends. All weights have names of their own, because
    checkpoints go by name.

    Args:
        network: `NetworkConfig`.
        objective_config: `ObjectiveConfig`.

    Shapes: images and masks [B, H, W, 1]; `noise` [B, *shape] standard normal by name.
    """

    title = "a method"  # for people
    settings: ClassVar[
        dict
    ] = {}  # {preset: {section of `Config`: fields that differ from the GMVAE's}}
    has_lambda = False  # restored by ascent with a total variation
    has_clusters = False  # a mixture with K clusters
    has_steps = False  # detection is a search, whose steps can be chosen
    grid = (1, 1)  # latent positions (h, w)

    def __init__(self, network, objective_config, *, name):
        check_slice_shape((network.height, network.width), where="the network configuration")
        super().__init__(name=name)
        self.network, self.objective_config = network, objective_config

    # What a method gives ------------------------------------------------------------------------

    @property
    def noise_shapes(self):
        """{name: shape} of the noise that one image needs in one training step."""
        raise NotImplementedError

    def terms(self, images, noise, *, training=False):
        """What is logged, by name, each [B]; the first two are shown in the progress bar."""
        raise NotImplementedError

    def objectives(self, terms, *, kl_weight):
        """{optimizer: scalar that it minimizes} from `terms`; the keys are those of `trained`."""
        raise NotImplementedError

    def reconstruct(self, images, noise):
        """Images [B, H, W, 1] for the pictures of a run."""
        raise NotImplementedError

    def restored(self, observed, mask, *, slices, seed, steps, tv_weight):
        """Healthy images [B, H, W, 1]; outside the mask the observed ones.

        Args:
            observed, mask: [B, H, W, 1] float32.
            slices: [B] integers that identify the slices, for noise of their own.
            seed, steps, tv_weight: scalars, also as tensors; unused where they mean nothing.
        """
        raise NotImplementedError

    # What may be changed ------------------------------------------------------------------------

    @property
    def trained(self):
        """{optimizer: the weights that it changes}."""
        return {"adam": self.trainable_variables}

    def update(self, images, noise, *, step, kl_weight, descend, **options):
        """One training step.

        Args:
            images, noise: of the batch.
            step: scalar, 0-based.
            kl_weight: scalar weight of the KL terms, where there are any.
            descend: (tape, {optimizer: objective}) -> {name: gradient norm}; changes the weights.
            options: for `terms`.

        Returns:
            {name: scalar} to be logged.
        """
        del step
        with tf.GradientTape(persistent=True) as tape:
            terms = self.terms(images, noise, training=True, **options)
            objectives = self.objectives(terms, kl_weight=kl_weight)
        norms = descend(tape, objectives)
        return {name: tf.reduce_mean(values) for name, values in terms.items()} | norms

    def build_weights(self):
        """Create every weight, so that a checkpoint can be read or written; returns the model."""
        kind, size = self.variable_dtype, (self.network.height, self.network.width)
        noise = {name: tf.zeros([1, *shape], kind) for name, shape in self.noise_shapes.items()}
        self.terms(tf.zeros([1, *size, 1], kind), noise)
        return self


def make_model(config):
    """The method that a `Config` describes, with its weights created."""
    return METHODS[config.network.model](config.network, config.objective).build_weights()
