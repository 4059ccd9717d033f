"""MAP restoration: pull a slice towards the healthy prior (You et al., MIDL 2019, Algorithm 1).

Maximizes ELBO(x) - tv_weight * TV(observed - x) over x, started at the observed slice, with the
sigma of p(x | z) fixed at 1/sqrt(2). Every image follows the gradient of its own sum, so the result
does not depend on the batch.

From top to bottom: the objective and its gradient, the steps, the loop, what compiles it, and the
restoration of a batch of NumPy slices.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_lesion.config import RestorationConfig, Solver
from tf_lesion.files import InputError
from tf_lesion.noise import slice_noise
from tf_lesion.objective import (
    differences,
    differences_adjoint,
    elbo,
    total_variation,
    total_variation_gradient,
)

HUBER_BELOW = 0.02  # intensity: |d| is d^2 / (2 * HUBER_BELOW) + const below it
LEAST_WEIGHT = 1e-4  # lambda of a proximal step: less has no effect, and 0 no inverse
# Most a pixel's gradient may be, nats per unit intensity: few pass 1. Where the encoder is steep, a
# long step overshoots, and the overshoot grows until the clipping at 100 holds it.
HUBER_CLIP = 2.0
DUAL_ITERATIONS = 10
DIFFERENCE_NORM = 8.0  # upper bound of the squared norm of the differences of an image
VECTOR_LENGTH = 16  # float32 numbers in the widest CPU vector (AVX-512)
STEPS_PER_CALL = 25  # between two updates of the progress bar


# The objective and its gradient -----------------------------------------------------------------


def map_objective(
    model: Any, image: tf.Tensor, *, observed: tf.Tensor, noise: dict, tv_weight: Any
) -> tf.Tensor:
    """ELBO(image) - tv_weight * TV(observed - image), [B], for one draw of the noise."""
    prior = elbo(model.restoration_terms(image, noise))
    return prior - tv_weight * total_variation(observed - image)


def elbo_gradient(model: Any, image: tf.Tensor, noise: dict) -> tuple[tf.Tensor, tf.Tensor]:
    """The ELBO [B] and its gradient [B, H, W, 1] with respect to the image."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(image)
        values = elbo(model.restoration_terms(image, noise))
    return values, tape.gradient(values, image)


def map_gradient(
    image: tf.Tensor, gradient: tf.Tensor, *, observed: tf.Tensor, tv_weight: Any
) -> tf.Tensor:
    """Gradient of the MAP objective [B, H, W, 1], from that of the ELBO."""
    return gradient + tv_weight * total_variation_gradient(observed - image)


# The steps --------------------------------------------------------------------------------------


def restoration_step(
    image: tf.Tensor,
    gradient: tf.Tensor,
    *,
    mask: tf.Tensor,
    step_size: Any,
    gradient_clip: float | None,
) -> tf.Tensor:
    """One step of ascent inside the brain: image + step_size * clip(gradient) * mask."""
    if gradient_clip is not None:
        gradient = tf.clip_by_value(gradient, -gradient_clip, gradient_clip)
    return image + step_size * gradient * mask


def ascent_step(
    image: tf.Tensor,
    gradient: tf.Tensor,
    *,
    observed: tf.Tensor,
    mask: tf.Tensor,
    tv_weight: Any,
    step_size: Any,
    gradient_clip: float | None,
) -> tf.Tensor:
    """The released step: along the gradient of the ELBO [B, H, W, 1] and a subgradient of the TV.

    Where neighboring residuals are alike, the sign of their difference flips at every step, so a
    jitter remains, which costs objective and forbids longer steps.
    """
    whole = map_gradient(image, gradient, observed=observed, tv_weight=tv_weight)
    return restoration_step(
        image, whole, mask=mask, step_size=step_size, gradient_clip=gradient_clip
    )


def proximal_step(
    image: tf.Tensor,
    gradient: tf.Tensor,
    *,
    observed: tf.Tensor,
    mask: tf.Tensor,
    tv_weight: Any,
    step_size: Any,
    gradient_clip: float | None,
) -> tf.Tensor:
    """A long step, closer to the total variation that was meant than the released one.

    The ELBO gets a step of gradient ascent, clipped at `HUBER_CLIP`, and the total variation,
    rounded off below `HUBER_BELOW`, a proximal step, which is stable for any length
    (forward-backward splitting, Combettes and Wajs 2005; rounded as by Huber 1964). An exact one
    holds residuals at 0 that the released jitter lets move.
    """
    del gradient_clip
    image = restoration_step(
        image, gradient, mask=mask, step_size=step_size, gradient_clip=HUBER_CLIP
    )
    weight = tf.maximum(tv_weight, LEAST_WEIGHT) * step_size
    return observed - smoothed_residual(observed - image, mask=mask, weight=weight)


STEPS = {"ascent": ascent_step, "proximal": proximal_step}  # `Solver.step` -> function


def smoothed_residual(
    residual: tf.Tensor, *, mask: tf.Tensor, weight: Any, below: float = HUBER_BELOW
) -> tf.Tensor:
    """Proximal step of weight * (rounded total variation), kept at 0 outside the mask.

    Minimises |u - residual|^2 / 2 + weight * sum h(differences of u) with h the rounded absolute
    value, by projected gradient ascent on the dual (Chambolle 2004, Beck and Teboulle 2009),
    started at the dual of `residual` itself.

    Args:
        residual: [B, H, W, 1], observed - image.
        mask: [B, H, W, 1], 1 inside the brain.
        weight: tv_weight * step_size, intensity, above 0.
        below: intensity; |d| is d^2 / (2 * below) + const below it.

    Returns:
        u, [B, H, W, 1].
    """
    step = 1.0 / (DIFFERENCE_NORM * weight)
    duals = [tf.clip_by_value(d / below, -1.0, 1.0) for d in differences(residual)]
    for _ in range(DUAL_ITERATIONS):
        ascended = differences(mask * (residual - weight * differences_adjoint(*duals)))
        duals = [
            tf.clip_by_value((dual + step * d) / (1.0 + step * below), -1.0, 1.0)
            for dual, d in zip(duals, ascended, strict=True)
        ]
    return mask * (residual - weight * differences_adjoint(*duals))


# The loop -----------------------------------------------------------------------------------------


def step_size_at(solver: Solver, step: tf.Tensor) -> tf.Tensor:
    """Step size at a tensor `step`, as `Solver.step_size`: defined for any step."""
    starts, sizes = zip(*solver.step_sizes, strict=True)
    place = tf.reduce_sum(tf.cast(step >= tf.constant(starts), tf.int32)) - 1
    return tf.constant(sizes, tf.float32)[place]


def ascend(
    model: Any,
    solver: Solver,
    image: tf.Tensor,
    *,
    observed: tf.Tensor,
    mask: tf.Tensor,
    slices: tf.Tensor,
    start: tf.Tensor,
    stop: tf.Tensor,
    tv_weight: tf.Tensor,
    seed: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Algorithm 1: steps `start` to `stop` from `image`, of a batch that `padded` has filled up.

    The ELBO takes nearly all of the time and changes slowly; the total variation takes little and
    changes at every step. So a gradient of the ELBO may serve for several steps (multiple time
    stepping: Tuckerman, Berne and Martyna 1992).

    Args:
        model: gives `log_prior_gradient` and `noise_shapes`.
        solver: its schedule and step.
        image, observed, mask: [B, H, W, 1] float32.
        slices: [B] int64 identities, which seed the noise.
        start, stop, seed: scalar integers.
        tv_weight: scalar, per unit intensity.

    Returns:
        (image after the last step [B, H, W, 1], the objective before it [B]).
    """
    values = tf.zeros(tf.shape(image)[:1], image.dtype)
    for step in tf.range(start, stop):
        noise = slice_noise(
            model.noise_shapes, seed=seed, step=step, slices=slices, stream="restoration"
        )
        values, gradient = model.log_prior_gradient(image, noise)
        values -= tv_weight * total_variation(observed - image)
        for small in range(solver.steps_per_gradient):
            image = STEPS[solver.step](
                image,
                gradient,
                observed=observed,
                mask=mask,
                tv_weight=tv_weight,
                step_size=step_size_at(solver, step * solver.steps_per_gradient + small),
                gradient_clip=solver.gradient_clip,
            )
    return image, values


def compiled(model: Any, solver: Solver) -> Callable:
    """Steps `start` to `stop` of any method for a batch of any size, as a `tf.function` of tensors.

    Returns:
        A function of image, observed, mask [B, H, W, 1] float32 (brain is where mask > 0), slices
        [B] int64, start, stop int32, tv_weight float32 and seed int64, with the results of
        `Method.stretch`.
    """
    images = tf.TensorSpec([None, model.network.height, model.network.width, 1], tf.float32)
    slices, step = tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int32)
    weight, seed = tf.TensorSpec([], tf.float32), tf.TensorSpec([], tf.int64)

    @tf.function(input_signature=[images, images, images, slices, step, step, weight, seed])
    def stretch(image, observed, mask, slices, start, stop, tv_weight, seed):
        count = tf.shape(image)[0]
        mask = tf.cast(mask > 0, tf.float32)
        image, observed, mask, slices = padded([image, observed, mask, slices], model.grid)
        image, values = model.stretch(
            solver,
            image,
            observed=observed,
            mask=mask,
            slices=slices,
            start=start,
            stop=stop,
            tv_weight=tv_weight,
            seed=seed,
        )
        return image[:count], values[:count]

    return stretch


def padded(tensors: list[tf.Tensor], grid: tuple[int, int]) -> list[tf.Tensor]:
    """Repeat the last image until rounding no longer depends on where in the batch an image stands.

    CPU kernels round the last few numbers of a tensor otherwise than the rest, and oneDNN single
    images otherwise than batches. So the latents fill whole vectors, and there are two images.
    """
    count = tf.shape(tensors[0])[0]
    multiple = VECTOR_LENGTH // math.gcd(VECTOR_LENGTH, grid[0] * grid[1])
    extra = tf.maximum(2, -(-count // multiple) * multiple) - count
    return [
        tf.concat([tensor, tf.repeat(tensor[-1:], extra, axis=0)], axis=0) for tensor in tensors
    ]


# NumPy slices -----------------------------------------------------------------------------------


class Restorer:
    """The restoration of one model, compiled: no trip to the host between steps.

    Args:
        model: a `methods.Method`, or an `exported.ExportedModel`, which comes with its loop.
        restoration: `RestorationConfig` (solver, tv_weight, averages).
        seed: of the noise; with the step and the slice's number it fixes every draw.
    """

    def __init__(self, model: Any, restoration: RestorationConfig, *, seed: int = 0):
        self.model, self.restoration, self.seed = model, restoration, seed
        self._loop = model.compiled_restoration(restoration.solver)

    def __call__(
        self,
        image: Any,
        *,
        observed: Any,
        mask: Any,
        slices: Any,
        start: int = 0,
        stop: int | None = None,
        tv_weight: float | None = None,
        seed: int | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Take the steps `start` to `stop` from `image`.

        Args:
            image: [B, H, W, 1] float32, where to go on; the observed slices at step 0.
            observed: [B, H, W, 1] float32.
            mask: [B, H, W, 1], brain above 0; nothing outside it moves.
            slices: [B] integers that identify the slices (rows of the cache): they seed the noise.
            start, stop: first step and one past the last; all steps of the config by default.
            tv_weight: lambda; that of the config by default.
            seed: of the noise; the restorer's by default.

        Returns:
            (image after the last step [B, H, W, 1], the objective before it [B]).
        """
        settings = self.restoration
        stop = settings.steps if stop is None else stop
        tv_weight = settings.tv_weight if tv_weight is None else tv_weight
        return self._loop(
            image=tf.cast(image, tf.float32),
            observed=tf.cast(observed, tf.float32),
            mask=tf.cast(mask, tf.float32),
            slices=tf.cast(slices, tf.int64),
            start=tf.constant(start, tf.int32),
            stop=tf.constant(stop, tf.int32),
            tv_weight=tf.constant(tv_weight, tf.float32),
            seed=tf.constant(self.seed if seed is None else seed, tf.int64),
        )


class Restored(NamedTuple):
    """Restored slices.

    Attributes:
        images: [B, H, W, 1] float32, the mean over the restorations.
        spread: [B, H, W, 1] float32, their standard deviation; 0 if there was one.
        trajectory: {step: images}.
    """

    images: np.ndarray
    spread: np.ndarray
    trajectory: dict[int, np.ndarray]


def restore(
    restorer: Restorer,
    observed: np.ndarray,
    mask: np.ndarray,
    slices: Any,
    *,
    save_every: int | None = None,
    on_progress: Callable[[int], Any] | None = None,
    tv_weight: float | None = None,
) -> Restored:
    """Restore a batch from the observed slices to the last step.

    Where the restorer's config says so, several times, with other noise or mirrored.

    Args:
        restorer: `Restorer`.
        observed, mask: [B, H, W, 1], H from left to right.
        slices: [B] integers that identify the slices.
        save_every: keep the images after every so many steps.
        on_progress: called with the number of slice-steps just taken.
        tv_weight: lambda; that of the restorer's config by default.

    Raises:
        InputError: if the ascent diverges.
    """
    settings = restorer.restoration
    options = {"save_every": save_every, "on_progress": on_progress, "tv_weight": tv_weight}
    total, trajectory, repeats = 0, {}, []
    for seed in range(restorer.seed, restorer.seed + settings.seeds):
        for way in (1, -1) if settings.flip else (1,):
            turned = (np.asarray(images)[:, ::way] for images in (observed, mask))
            image, kept = _restore_once(restorer, *turned, slices, seed=seed, **options)
            total = total + image[:, ::way] / settings.repeats
            repeats.append(image[:, ::way])
            for step, images in kept.items():
                trajectory[step] = trajectory.get(step, 0) + images[:, ::way] / settings.repeats
    return Restored(total, np.std(repeats, axis=0), trajectory)


def _restore_once(restorer, observed, mask, slices, *, seed, save_every, on_progress, tv_weight):
    image, step, trajectory = observed, 0, {}
    for stop in restorer.model.stops(restorer.restoration.steps, save_every):
        image, _ = restorer(
            image,
            observed=observed,
            mask=mask,
            slices=slices,
            start=step,
            stop=stop,
            tv_weight=tv_weight,
            seed=seed,
        )
        if on_progress:
            on_progress((stop - step) * len(slices))
        step = stop
        if not np.isfinite(image).all():
            raise InputError(
                f"Expected a finite image after step {step}, the restoration of slices "
                f"{min(slices)} to {max(slices)} diverged; train the model for more steps, or with "
                f"a preset whose restoration clips the gradient (practical)."
            )
        if save_every and step % save_every == 0:
            trajectory[step] = np.asarray(image)
    return np.asarray(image), trajectory


def trajectory_steps(steps: int, save_every: int | None) -> list[int]:
    """Steps after which `restore` keeps the images."""
    return list(range(save_every, steps + 1, save_every)) if save_every else []


def stops(steps: int, save_every: int | None = None) -> list[int]:
    """Where the loop returns to the host: for the progress bar and for the trajectory."""
    stops = {*range(STEPS_PER_CALL, steps, STEPS_PER_CALL), *trajectory_steps(steps, save_every)}
    return sorted({stop for stop in stops if stop <= steps} | ({steps} if steps else set()))


def detect(
    observed: np.ndarray, restored: np.ndarray, mask: np.ndarray, threshold: float
) -> np.ndarray:
    """Lesion map, bool: |observed - restored| > threshold inside the brain mask."""
    residual = np.abs(np.asarray(observed) - np.asarray(restored))
    # A float64 threshold, so that it is not rounded to the residual's float32.
    return (residual > np.float64(threshold)) & (np.asarray(mask) > 0)
