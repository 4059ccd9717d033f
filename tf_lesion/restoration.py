"""MAP restoration: pull a slice towards the healthy prior by gradient ascent.

Maximises ELBO(x) - tv_weight * TV(observed - x) over x, started at the observed slice, with the
sigma of p(x | z) fixed at 1/sqrt(2) (You et al., MIDL 2019, Algorithm 1). Every image follows the
gradient of its own sum, so the result does not depend on the batch.
"""

import dataclasses
import math
from functools import partial

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from tf_lesion.caches.restored import RestoredWriter, shard_path
from tf_lesion.caches.slices import SliceCache
from tf_lesion.files import InputError
from tf_lesion.models import elbo
from tf_lesion.noise import slice_noise
from tf_lesion.objective import total_variation, total_variation_gradient
from tf_lesion.solvers import HUBER_CLIP, LEAST_WEIGHT, smoothed_residual

VECTOR_LENGTH = 16  # float32 numbers in the widest CPU vector (AVX-512)
STEPS_PER_CALL = 25  # between two updates of the progress bar


def map_objective(model, image, *, observed, noise, tv_weight):
    """ELBO(image) - tv_weight * TV(observed - image), [B], for one draw of the noise."""
    prior = elbo(model.restoration_terms(image, noise))
    return prior - tv_weight * total_variation(observed - image)


def elbo_gradient(model, image, noise):
    """The ELBO [B] and its gradient [B, H, W, 1] with respect to the image."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(image)
        values = elbo(model.restoration_terms(image, noise))
    return values, tape.gradient(values, image)


def map_gradient(image, gradient, *, observed, tv_weight):
    """Gradient of the MAP objective [B, H, W, 1], from that of the ELBO."""
    return gradient + tv_weight * total_variation_gradient(observed - image)


def restoration_step(image, gradient, *, mask, step_size, gradient_clip):
    """One step of ascent inside the brain: image + step_size * clip(gradient) * mask."""
    if gradient_clip is not None:
        gradient = tf.clip_by_value(gradient, -gradient_clip, gradient_clip)
    return image + step_size * gradient * mask


def step_size_at(restoration, step):
    """Step size at a tensor `step`, as `RestorationConfig.step_size`: defined for any step."""
    starts, sizes = zip(*restoration.step_sizes, strict=True)
    place = tf.reduce_sum(tf.cast(step >= tf.constant(starts), tf.int32)) - 1
    return tf.constant(sizes, tf.float32)[place]


def ascend(model, restoration, image, *, observed, mask, slices, start, stop, tv_weight, seed):
    """The loop: steps `start` to `stop` from `image`, of a batch that `padded` has filled up.

    The ELBO takes nearly all of the time and changes slowly; the total variation takes little and
    changes at every step. So a gradient of the ELBO may serve for several steps (multiple time
    stepping: Tuckerman, Berne and Martyna 1992).

    Args:
        model: a GMVAE or VAE.
        restoration: `RestorationConfig`: solver, step sizes and clipping are used.
        image, observed, mask: [B, H, W, 1] float32.
        slices: [B] int64 identities, which seed the noise.
        start, stop, seed: scalar integers.
        tv_weight: scalar, per unit intensity.

    Returns:
        (image after the last step [B, H, W, 1], the objective before it [B]).
    """
    values = tf.zeros(tf.shape(image)[:1], image.dtype)
    take = partial(restoration_step, mask=mask, gradient_clip=restoration.gradient_clip)
    for step in tf.range(start, stop):
        noise = slice_noise(
            model.noise_shapes, seed=seed, step=step, slices=slices, stream="restoration"
        )
        values, gradient = elbo_gradient(model, image, noise)
        values -= tv_weight * total_variation(observed - image)
        for small in range(restoration.steps_per_gradient):
            step_size = step_size_at(restoration, step * restoration.steps_per_gradient + small)
            if restoration.solver == "huber":
                image = take(image, gradient, step_size=step_size, gradient_clip=HUBER_CLIP)
                weight = tf.maximum(tv_weight, LEAST_WEIGHT) * step_size
                image = observed - smoothed_residual(observed - image, mask=mask, weight=weight)
            else:
                whole = map_gradient(image, gradient, observed=observed, tv_weight=tv_weight)
                image = take(image, whole, step_size=step_size)
    return image, values


def compiled_restoration(model, restoration):
    """Steps `start` to `stop` for a batch of any size, as a `tf.function` of tensors.

    A method without lambda is asked for its restored images, which do not depend on `start`.

    Returns:
        A function of image, observed, mask [B, H, W, 1] float32, slices [B] int64, start, stop
        int32, tv_weight float32 and seed int64, with the results of `ascend`.
    """
    images = tf.TensorSpec([None, model.network.height, model.network.width, 1], tf.float32)
    slices, step = tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int32)
    weight, seed = tf.TensorSpec([], tf.float32), tf.TensorSpec([], tf.int64)

    @tf.function(input_signature=[images, images, images, slices, step, step, weight, seed])
    def stretch(image, observed, mask, slices, start, stop, tv_weight, seed):
        count = tf.shape(image)[0]
        image, observed, mask, slices = padded([image, observed, mask, slices], model.grid)
        options = {"slices": slices, "tv_weight": tv_weight, "seed": seed}
        if model.has_lambda:
            options |= {"observed": observed, "mask": mask, "start": start, "stop": stop}
            image, values = ascend(model, restoration, image, **options)
        else:
            image = model.restored(observed, mask, steps=stop, **options)
            values = tf.zeros(tf.shape(image)[:1], image.dtype)
        return image[:count], values[:count]

    return stretch


def padded(tensors, grid):
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


class Restorer:
    """The restoration of one model, compiled: no trip to the host between steps.

    Models without lambda make the restored images themselves, from start to stop.

    Args:
        model: a GMVAE or VAE, or an `exported.ExportedModel`, which comes with its loop.
        restoration: `RestorationConfig` (steps, step sizes, clipping, tv_weight).
        seed: of the noise; with the step and the slice's number it fixes every draw.
    """

    def __init__(self, model, restoration, *, seed=0):
        self.model, self.restoration, self.seed = model, restoration, seed
        make = getattr(model, "compiled_restoration", None) or partial(compiled_restoration, model)
        self._loop = make(restoration)

    def __call__(
        self, image, *, observed, mask, slices, start=0, stop=None, tv_weight=None, seed=None
    ):
        """Take the steps `start` to `stop` from `image`.

        Args:
            image: [B, H, W, 1] float32, where to go on; the observed slices at step 0.
            observed: [B, H, W, 1] float32.
            mask: [B, H, W, 1], brain; nothing outside it moves.
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


def restore(restorer, observed, mask, slices, *, save_every=None, on_progress=None, tv_weight=None):
    """Restore a batch from the observed slices to the last step.

    Where the restorer's config says so, several times, with other noise or mirrored; what is
    returned is then the mean.

    Args:
        restorer: `Restorer`.
        observed, mask: [B, H, W, 1], H from left to right.
        slices: [B] integers that identify the slices.
        save_every: keep the images after every so many steps.
        on_progress: called with the number of slice-steps just taken.
        tv_weight: lambda; that of the restorer's config by default.

    Returns:
        (restored [B, H, W, 1] float32, {step: images} of the trajectory).

    Raises:
        InputError: if the ascent diverges.
    """
    settings = restorer.restoration
    options = {"save_every": save_every, "on_progress": on_progress, "tv_weight": tv_weight}
    total, trajectory = 0, {}
    for seed in range(restorer.seed, restorer.seed + settings.seeds):
        for way in (1, -1) if settings.flip else (1,):
            turned = (np.asarray(images)[:, ::way] for images in (observed, mask))
            image, kept = _restore_once(restorer, *turned, slices, seed=seed, **options)
            total = total + image[:, ::way] / settings.repeats
            for step, images in kept.items():
                trajectory[step] = trajectory.get(step, 0) + images[:, ::way] / settings.repeats
    return total, trajectory


def _restore_once(restorer, observed, mask, slices, *, seed, save_every, on_progress, tv_weight):
    image, step, trajectory = observed, 0, {}
    steps = restorer.restoration.steps
    stops = _stops(steps, save_every) if restorer.model.has_lambda else [steps]
    for stop in stops:
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
                f"--preset practical, whose restoration clips the gradient."
            )
        if save_every and step % save_every == 0:
            trajectory[step] = np.asarray(image)
    return np.asarray(image), trajectory


def trajectory_steps(steps, save_every):
    """Steps after which `restore` keeps the images."""
    return list(range(save_every, steps + 1, save_every)) if save_every else []


def _stops(steps, save_every):
    """Where the loop returns to the host: for the progress bar and for the trajectory."""
    stops = {*range(STEPS_PER_CALL, steps, STEPS_PER_CALL), *trajectory_steps(steps, save_every)}
    return sorted({stop for stop in stops if stop <= steps} | ({steps} if steps else set()))


def detect(observed, restored, mask, threshold):
    """Lesion map, bool: |observed - restored| > threshold inside the brain mask."""
    residual = np.abs(np.asarray(observed) - np.asarray(restored))
    # A float64 threshold, so that it is not rounded to the residual's float32.
    return (residual > np.float64(threshold)) & (np.asarray(mask) > 0)


def restore_cache(restorer, cache, writer, *, batch_size, save_every=None):
    """Restore the slices that `writer` still misses; a killed run goes on where it stopped.

    Args:
        restorer: `Restorer`.
        cache: `SliceCache` of the observed slices; their rows seed the noise.
        writer: open `RestoredWriter` with the rows to restore.
        batch_size: slices at once; it changes speed and memory, not the images.
        save_every: keep the trajectory every so many steps.
    """
    missing, settings = writer.missing, restorer.restoration
    total = len(missing) * settings.steps * settings.repeats
    with tqdm(total=total, desc="restoring", unit="slice-step") as progress:
        for start in range(0, len(missing), batch_size):
            positions = missing[start : start + batch_size]
            rows = writer.rows[positions]
            observed, mask = cache.read(rows), cache.mask(rows)
            images, trajectory = restore(
                restorer,
                observed,
                mask,
                rows,
                save_every=save_every,
                on_progress=progress.update,
            )
            detections = {
                name: detect(observed, images, mask, threshold)
                for name, threshold in writer.thresholds.items()
            }
            writer.write(positions, images, trajectory, detections)


def describe(loaded, restoration, *, seed):
    """How images are restored, JSON-serialisable: stored with every output."""
    settings = {
        "model": loaded.config.network.model,
        "model_path": loaded.path,
        "model_identity": loaded.identity,
        "preset": loaded.config.preset,
        "precision": loaded.config.network.precision,
        "seed": seed,
        **dataclasses.asdict(restoration),
        "step_sizes": [list(pair) for pair in restoration.step_sizes],
    }
    of_ascent = ("steps_per_gradient", "step_sizes", "gradient_clip", "tv_weight", "solver")
    unused = () if loaded.model.has_lambda else of_ascent
    return {name: value for name, value in settings.items() if name not in unused}


def restore_to_file(
    loaded,
    cache_path,
    out,
    *,
    restoration=None,
    seed=0,
    batch_size=16,
    max_slices=None,
    save_every=None,
    thresholds=None,
    crop=None,
    shard=None,
    force=False,
):
    """Restore `Test` of a cache, of patients or of healthy subjects, into an HDF5 file.

    Args:
        loaded: `runs.LoadedModel`.
        cache_path: the cache.
        out: the file to make (see `tf_lesion.restored`); a partial one is gone on with.
        restoration: `RestorationConfig`; the model's own by default.
        seed: of the noise, and of the subset.
        batch_size: slices at once.
        max_slices: restore a random subset of so many.
        save_every: keep the trajectory every so many steps.
        thresholds: {name: residual}; lesion maps at these are written too.
        crop: (x0, x1, y0, y1) in place of the cache's own.
        shard: (i, n): only the i-th of n parts, into a file of its own (`restored.shard_path`).
        force: overwrite `out`.

    Returns:
        Number of slices in the file.

    Raises:
        FileExistsError, InputError: if `out` exists, the cache's slices are not of the size the
            model was trained on, or the model has no trajectory to keep.
    """
    restoration = restoration or loaded.config.restoration
    network = loaded.config.network
    if save_every and not loaded.model.has_lambda:
        raise InputError(
            f"Expected no --save-every, since {loaded.path} ({network.model}) does not restore "
            f"step by step; leave it out."
        )
    with SliceCache(cache_path, "Test", crop=crop) as cache:
        if cache.shape != (network.height, network.width):
            raise InputError(
                f"{loaded.path} restores {network.height} x {network.width} slices, {cache_path} "
                f"has {cache.shape[0]} x {cache.shape[1]}; make the cache with the --voxel-size "
                f"of the training cache, or give --crop."
            )
        rows = chosen_rows(len(cache), max_slices, seed=seed)
        settings = {
            **describe(loaded, restoration, seed=seed),
            "cache": str(cache_path),
            "crop": list(cache.crop),
        }
        if shard is not None:
            rows, settings["shard"] = rows[shard[0] - 1 :: shard[1]], list(shard)
            out = shard_path(out, shard)
        writer = RestoredWriter(
            out,
            rows=rows,
            shape=cache.shape,
            settings=settings,
            trajectory_steps=trajectory_steps(restoration.steps, save_every),
            thresholds=thresholds,
            force=force,
        )
        with writer:
            restorer = Restorer(loaded.model, restoration, seed=seed)
            restore_cache(restorer, cache, writer, batch_size=batch_size, save_every=save_every)
    return len(writer.rows)


def chosen_rows(count, max_slices, *, seed):
    """All rows of `count`, or a random subset of `max_slices`; ascending."""
    if max_slices is None or max_slices >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, max_slices, replace=False))
