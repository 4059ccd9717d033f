"""One training step of any method: gradients, their limit, optimizers; on one device or many."""

import contextlib
from typing import Any

import keras
import tensorflow as tf

from tf_lesion import augmentation
from tf_lesion.baselines import make_model
from tf_lesion.config import Config
from tf_lesion.files import InputError
from tf_lesion.noise import slice_noise
from tf_lesion.training.distribution import Placement

GRADIENT_NORM = "gradient_norm"
STOPPING = "stopping"  # among the losses: above 0 if a process was asked to stop
MOVING_MEAN = "moving_mean"  # weight of a batch normalization


def _adam(name, training, variables):
    """Adam for some weights; named, so that the checkpoint's names do not depend on others."""
    with contextlib.ExitStack() as after:  # Keras keeps the learning rate in its global type
        after.callback(keras.config.set_floatx, keras.config.floatx())
        keras.config.set_floatx("float32")
        optimizer = keras.optimizers.Adam(
            training.learning_rate, training.beta_1, training.beta_2, training.epsilon, name=name
        )
        optimizer.build(variables)
    return optimizer


def _limited(gradients, norm, limit):
    """Gradients scaled down to the norm `limit`; zero if they are not finite.

    At sigmas of 1e-8 single batches overflow; without them the training goes on.
    """
    usable = tf.math.is_finite(norm)
    scaled, _ = tf.clip_by_global_norm(gradients, limit, use_norm=norm)
    return [tf.where(usable, gradient, tf.zeros_like(gradient)) for gradient in scaled]


class Updater:
    """A model, its optimizers and its step counter.

    Attributes:
        model: the `methods.Method`.
        optimizers: {name: Adam}.
        step: tf.Variable, steps taken.
    """

    def __init__(self, config: Config, placement: Placement):
        size = config.training.batch_size
        if size % placement.replicas:
            raise InputError(
                f"Expected a batch_size that {placement.replicas} devices share evenly, got {size}."
            )
        self.config, self.placement = config, placement
        keras.utils.set_random_seed(config.seed)
        with placement.strategy.scope():
            self.model = make_model(config)
            self.optimizers = {
                name: _adam(name, config.training, variables)
                for name, variables in self.model.trained.items()
            }
            self.step = tf.Variable(0, dtype=tf.int64, name="step")
        names = {weight.name for weight in self.model.non_trainable_weights}
        if placement.replicas > 1 and MOVING_MEAN in names:
            raise InputError(
                f"Expected one device for {config.network.model}, got {placement.replicas}: its "
                f"batch normalization would see a part of the batch only, which is another "
                f"training; leave distribute out."
            )
        self._compiled = tf.function(self._everywhere)

    def __call__(
        self, images: tf.Tensor, rows: tf.Tensor, *, stopping: bool = False
    ) -> dict[str, tf.Tensor]:
        """Take one step.

        Args:
            images: [B, H, W, 1], the batch of this process.
            rows: [B] integers that identify the slices, for their noise.
            stopping: whether this process was asked to stop: all are told of it.

        Returns:
            {name: scalar} losses before the step, means over the global batch, and `STOPPING`.
        """
        training, step = self.config.training, int(self.step.numpy())
        for optimizer in self.optimizers.values():
            optimizer.learning_rate.assign(training.learning_rate_at(step))
        if self.placement.replicas > 1:
            images, rows = self.placement.spread(images), self.placement.spread(rows)
        scalars = [tf.constant(float(x)) for x in (training.kl_weight(step), stopping)]
        losses = self._compiled(images, rows, *scalars)
        return {name: float(value) for name, value in losses.items()}

    def noise(
        self, rows: tf.Tensor, step: Any, stream: str, *, extra: dict | None = None
    ) -> dict[str, tf.Tensor]:
        """Noise of the model for some slices, and of `extra` shapes."""
        shapes = {**self.model.noise_shapes, **(extra or {})}
        return slice_noise(shapes, seed=self.config.seed, step=step, slices=rows, stream=stream)

    def _everywhere(self, images, rows, kl_weight, stopping):
        inputs, strategy = (images, rows, kl_weight, stopping), self.placement.strategy
        if self.placement.replicas == 1:
            losses = self._losses(*inputs)
        else:
            mean, found = tf.distribute.ReduceOp.MEAN, strategy.run(self._losses, args=inputs)
            losses = {name: strategy.reduce(mean, part, axis=None) for name, part in found.items()}
        self.step.assign_add(1)
        return losses

    def _losses(self, images, rows, kl_weight, stopping):
        images, noise, options = self.augmented(images, rows, self.step, "training")
        losses = self.model.update(
            images, noise, step=self.step, kl_weight=kl_weight, descend=self.descend, **options
        )
        return losses | {STOPPING: stopping}

    def augmented(
        self, images: tf.Tensor, rows: tf.Tensor, step: Any, stream: str
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        """Images to reproduce, noise of the model, and what its networks see: `shown`, or {}."""
        training = self.config.training
        shapes = augmentation.noise_shapes(training, images.shape[1:3])
        noise = self.noise(rows, step, stream, extra=shapes)
        images, shown, noise = augmentation.augment(images, noise, training)
        return images, noise, {"shown": shown} if training.shows_others else {}

    def descend(self, tape: tf.GradientTape, objectives: dict) -> dict[str, tf.Tensor]:
        """One step of each optimizer that has an objective; all gradients are taken before."""
        gradients, norms = {}, {}
        replicas, limit = self.placement.replicas, self.config.training.gradient_norm_limit
        for name, objective in objectives.items():
            found = tape.gradient(objective, self.model.trained[name])
            if replicas > 1:
                context = tf.distribute.get_replica_context()
                found = context.all_reduce(tf.distribute.ReduceOp.MEAN, found)
            norm = tf.linalg.global_norm(found)
            gradients[name] = found if limit is None else _limited(found, norm, limit)
            norms[f"{GRADIENT_NORM}_{name}" if len(self.optimizers) > 1 else GRADIENT_NORM] = norm
        for name, found in gradients.items():
            if replicas > 1:  # Keras sums over the replicas, which all hold the mean
                found = [gradient / replicas for gradient in found]
            pairs = zip(found, self.model.trained[name], strict=True)
            self.optimizers[name].apply_gradients(pairs)
        return norms
