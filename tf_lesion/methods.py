"""What a method of Table 1 must provide to be trained, to detect and to be exported.

A method is a `Method` with a name: `@register("name")` makes it a `--model` of every command. A
file in `tf_lesion/baselines/` is imported by itself, so that one file adds a method.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import keras
import tensorflow as tf

from tf_lesion import restoration
from tf_lesion.caches.slices import check_slice_shape
from tf_lesion.config import NetworkConfig, ObjectiveConfig
from tf_lesion.networks import weight_type
from tf_lesion.noise import Tensors

# Name -> class; complete once `tf_lesion.baselines` is imported.
METHODS: dict[str, type["Method"]] = {}


def register(name: str) -> Callable[[type["Method"]], type["Method"]]:
    """Decorator of a `Method`: its name on the command line, in runs and in configurations."""

    def keep(method):
        METHODS[name] = method
        return method

    return keep


class Method(keras.Model):
    """Base of all methods; a subclass gives what is marked.

    Trained by `update`: by default one Adam on all weights, on the objective that `objectives`
    makes of `terms`. Detects by `restored`, in one call; a method that restores step by step
    overrides `stretch` and `stops` instead. All weights have names of their own, because
    checkpoints go by name.

    Shapes: images and masks [B, H, W, 1]; `noise` [B, *shape] standard normal by name.
    """

    title = "a method"  # for people
    # {preset: {section of `Config`: fields that differ from the GMVAE's}}
    settings: ClassVar[dict[str, dict]] = {}
    # Fields of the sections of `Config` that mean something to it, of those that not all share.
    network_settings: ClassVar[frozenset] = frozenset()  # of num_clusters
    training_settings: ClassVar[frozenset] = frozenset()  # shown: corrupted slices
    restoration_settings: ClassVar[frozenset] = frozenset()  # of tv_weight, steps, solver
    grid = (1, 1)  # latent positions (h, w)

    def __init__(self, network: NetworkConfig, objective_config: ObjectiveConfig, *, name: str):
        check_slice_shape((network.height, network.width), where="the network configuration")
        super().__init__(name=name, dtype=weight_type(network.precision))
        self.network, self.objective_config = network, objective_config

    # What a method gives ------------------------------------------------------------------------

    @property
    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the noise that one image needs in one training step."""
        raise NotImplementedError

    def terms(self, images: tf.Tensor, noise: Tensors, *, training: bool = False) -> Tensors:
        """What is logged, by name, each [B]; the first two are shown in the progress bar."""
        raise NotImplementedError

    def objectives(self, terms: Tensors, *, kl_weight: tf.Tensor) -> Tensors:
        """{optimizer: scalar that it minimizes} from `terms`; the keys are those of `trained`."""
        raise NotImplementedError

    def reconstruct(self, images: tf.Tensor, noise: Tensors) -> tf.Tensor:
        """Images [B, H, W, 1] for the pictures of a run."""
        raise NotImplementedError

    def restored(
        self,
        observed: tf.Tensor,
        mask: tf.Tensor,
        *,
        slices: tf.Tensor,
        seed: tf.Tensor,
        steps: tf.Tensor,
        tv_weight: tf.Tensor,
    ) -> tf.Tensor:
        """Healthy images [B, H, W, 1]; outside the mask the observed ones.

        Args:
            slices: [B] integers that identify the slices, for noise of their own.
            seed, steps, tv_weight: scalars, also as tensors; unused where they mean nothing.
        """
        raise NotImplementedError

    # What may be changed ------------------------------------------------------------------------

    def stretch(self, solver: Any, image: tf.Tensor, **inputs: tf.Tensor) -> tuple:
        """Restore a batch from step `start` to `stop`: here in one go, whatever `start` and solver.

        Args:
            image: [B, H, W, 1], where to go on.
            inputs: observed, mask [B, H, W, 1], slices [B], scalars start, stop, tv_weight, seed.

        Returns:
            (images [B, H, W, 1], the objective before the last step [B], 0 without one).
        """
        del solver
        inputs.pop("start")
        restored = self.restored(steps=inputs.pop("stop"), **inputs)
        return restored, tf.zeros(tf.shape(image)[:1], image.dtype)

    def compiled_restoration(self, solver: Any) -> Callable:
        """`stretch` for a batch of any size; see `restoration.compiled`."""
        return restoration.compiled(self, solver)

    def stops(self, steps: int, every: int | None = None) -> list[int]:
        """Steps after which a restoration comes back to the host; the last is `steps`."""
        del every
        return [steps]

    @property
    def trained(self) -> dict[str, list]:
        """{optimizer: the weights that it changes}."""
        return {"adam": self.trainable_variables}

    def update(
        self,
        images: tf.Tensor,
        noise: Tensors,
        *,
        step: tf.Tensor,
        kl_weight: tf.Tensor,
        descend: Callable,
        **options: Any,
    ) -> Tensors:
        """One training step (0-based); {name: scalar} to be logged.

        `descend`, (tape, {optimizer: objective}) -> {name: gradient norm}, changes the weights;
        `kl_weight` is for the KL terms, where there are any, and `options` are for `terms`.
        """
        del step
        with tf.GradientTape(persistent=True) as tape:
            terms = self.terms(images, noise, training=True, **options)
            objectives = self.objectives(terms, kl_weight=kl_weight)
        norms = descend(tape, objectives)
        return {name: tf.reduce_mean(values) for name, values in terms.items()} | norms

    def build_weights(self) -> "Method":
        """Create every weight, so that a checkpoint can be read or written; returns the model."""
        kind, size = self.variable_dtype, (self.network.height, self.network.width)
        noise = {name: tf.zeros([1, *shape], kind) for name, shape in self.noise_shapes.items()}
        self.terms(tf.zeros([1, *size, 1], kind), noise)
        return self


class AscentMethod(Method):
    """A method that restores by the steps of Algorithm 1; a subclass gives `log_prior_gradient`.

    Its `terms` take `shown`, what its networks see in place of the images.
    """

    training_settings = frozenset({"shown"})
    restoration_settings = frozenset({"tv_weight", "steps", "solver"})

    def log_prior_gradient(self, image: tf.Tensor, noise: Tensors) -> tuple[tf.Tensor, tf.Tensor]:
        """The log-prior [B] of images [B, H, W, 1] up to a constant, and its gradient."""
        raise NotImplementedError

    def stretch(self, solver: Any, image: tf.Tensor, **inputs: tf.Tensor) -> tuple:
        """Steps `start` to `stop` of Algorithm 1."""
        return restoration.ascend(self, solver, image, **inputs)

    def stops(self, steps: int, every: int | None = None) -> list[int]:
        """For the progress bar, and for a trajectory of every so many steps."""
        return restoration.stops(steps, every)
