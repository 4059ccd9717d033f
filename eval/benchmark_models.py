"""One step of the restoration and of training, against the plain way to write it in TensorFlow 2.

Plain: convolutions after `tf.image.resize`, float32, one call per step; the restoration's gradient
goes to the host, which takes the step. Weights are untrained: they do not change the time.
"""

import keras
import numpy as np
import tensorflow as tf

from eval.benchmark_timing import as_rows, graph_gflop, interleaved, matrix_peak
from tf_lesion.baselines import make_model
from tf_lesion.noise import slice_noise
from tf_lesion.objective import elbo
from tf_lesion.presets import preset
from tf_lesion.restoration import Restorer
from tf_lesion.training.distribution import make_placement
from tf_lesion.training.update import Updater

STEPS_TIMED = 4
STEPS_COMPARED = 20  # later, the sign of TV parts any two correct runs
IMAGES_LIMIT, LOSS_LIMIT = 1e-4, 1e-5
RESTORE_LIMITS = {"float32": 1.25, "bfloat16": 2.0}
TRAIN_LIMITS = {"float32": 1.3, "bfloat16": 2.2}
RUN_LIMIT = 8.0  # a whole restoration, multirate bfloat16 against plain
BRAIN, TEXTURE = 0.5, 0.1  # of the made-up slices


def made_up_slices(count, shape, *, seed=0):
    """Ellipses with smooth noise in them, images and masks [count, H, W, 1] float32."""
    from scipy.ndimage import gaussian_filter

    x, y = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
    mask = np.broadcast_to((x / 0.85) ** 2 + (y / 0.9) ** 2 < 1, (count, *shape))
    noise = np.random.default_rng(seed).normal(size=(count, *shape))
    smooth = gaussian_filter(noise, (0, 3, 3))
    images = np.clip(BRAIN + TEXTURE * smooth / smooth.std(), 0.05, 1) * mask
    return images[..., None].astype(np.float32), mask[..., None].astype(np.float32)


def _config(shape, precision):
    network = {"height": shape[0], "width": shape[1], "precision": precision}
    return preset("released").replace(network=network)


def _model(shape, *, precision="float32", plain=False):
    keras.utils.set_random_seed(0)
    config = _config(shape, precision)
    model = make_model(config)
    model.decoder.fast = not plain
    return model, config


class PlainRestoration:
    """The restoration as a loop of Python: gradient to the host, step there."""

    def __init__(self, model, settings):
        self.model, self.settings = model, settings
        self._gradient = tf.function(self._one_gradient)

    def _one_gradient(self, image, observed, step, slices):
        noise = slice_noise(
            self.model.noise_shapes, seed=0, step=step, slices=slices, stream="restoration"
        )
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            prior = elbo(self.model.restoration_terms(image, noise))
            variation = tf.image.total_variation(observed - image)
            objective = prior - self.settings.tv_weight * variation
        return tape.gradient(objective, image)

    def __call__(self, observed, mask, steps):
        """Images [B, H, W, 1] after so many steps."""
        image, slices = observed.copy(), tf.range(len(observed), dtype=tf.int64)
        limit = self.settings.solver.gradient_clip
        for step in range(steps):
            gradient = self._gradient(
                tf.constant(image), tf.constant(observed), tf.constant(step), slices
            ).numpy()
            image += self.settings.solver.step_size(step) * np.clip(gradient, -limit, limit) * mask
        return image

    def gflop(self, observed):
        """Of one step for the batch."""
        image, slices = tf.constant(observed), tf.range(len(observed), dtype=tf.int64)
        step = tf.function(lambda: self._one_gradient(image, image, tf.constant(0), slices))
        return graph_gflop(step)


def benchmark_restore(*, shape, batch_size, rounds):
    """Steps and whole runs; returns a JSON-serialisable dict with `passed`."""
    observed, mask = made_up_slices(batch_size, shape)
    model, config = _model(shape, plain=True)
    settings = config.restoration
    plain = PlainRestoration(model, settings)
    restorers = {"float32": Restorer(_model(shape)[0], settings)}
    restorers["bfloat16"] = Restorer(_model(shape, precision="bfloat16")[0], settings)
    for precision in ("float32", "bfloat16"):
        restorers[f"multirate {precision}"] = Restorer(
            restorers[precision].model, settings.with_solver("multirate")
        )

    def timed(restorer):
        options = {"observed": observed, "mask": mask, "slices": range(batch_size)}
        return lambda: restorer(observed, stop=STEPS_TIMED, **options)[0].numpy()

    run_steps = {name: restorer.restoration.steps for name, restorer in restorers.items()}
    ways = {"plain float32": lambda: plain(observed, mask, STEPS_TIMED)}
    ways |= {name: timed(restorer) for name, restorer in restorers.items()}
    per_step = plain.gflop(observed)
    found = interleaved(ways, rounds=rounds, units=STEPS_TIMED, work=dict.fromkeys(ways, per_step))
    peaks = {dtype: matrix_peak(dtype) for dtype in ("float32", "bfloat16")}
    rows = as_rows(found, unit="step", peaks=peaks)
    for row in rows:
        steps = run_steps.get(row["way"], settings.steps)
        row["seconds per slice"] = row["seconds per step"] * steps / batch_size
    difference = _difference(plain, restorers["float32"], observed, mask)
    ratios = {row["way"]: row["times faster"] for row in rows}
    run_ratio = rows[0]["seconds per slice"] / rows[-1]["seconds per slice"]
    passed = all(ratios[name] >= limit for name, limit in RESTORE_LIMITS.items())
    return {
        "what": f"restoration, batch of {batch_size}, {shape[0]} x {shape[1]} pixels",
        "rows": rows,
        "GFLOP per slice-step": per_step / batch_size,
        "matrix product GFLOP/s": peaks,
        f"largest difference after {STEPS_COMPARED} steps, float32": difference,
        "whole run, multirate bfloat16, times faster": run_ratio,
        "passed": bool(passed and difference <= IMAGES_LIMIT and run_ratio >= RUN_LIMIT),
    }


def _difference(plain, restorer, observed, mask):
    expected = plain(observed, mask, STEPS_COMPARED)
    options = {"observed": observed, "mask": mask, "slices": range(len(observed))}
    found = restorer(observed, stop=STEPS_COMPARED, **options)[0].numpy()
    return float(np.abs(found - expected).max())


def _training_step(images, *, precision="float32", plain=False):
    """A function that takes a step of Adam on the same batch and returns the loss before it."""
    config = _config(images.shape[1:3], precision)
    update = Updater(config.replace(training={"batch_size": len(images)}), make_placement())
    update.model.decoder.fast = not plain
    batch, rows = tf.constant(images), tf.range(len(images), dtype=tf.int64)
    return update, lambda: update(batch, rows)["nelbo"]


def benchmark_train(*, shape, batch_size, rounds):
    """Training steps; returns a JSON-serialisable dict with `passed`."""
    images, _ = made_up_slices(batch_size, shape)
    plain, plain_step = _training_step(images, plain=True)
    ways = {"plain float32": plain_step, "float32": _training_step(images)[1]}
    ways["bfloat16"] = _training_step(images, precision="bfloat16")[1]
    losses = {name: way() for name, way in ways.items()}
    per_step = graph_gflop(plain.graph(images))
    found = interleaved(ways, rounds=rounds, work=dict.fromkeys(ways, per_step))
    peaks = {dtype: matrix_peak(dtype) for dtype in ("float32", "bfloat16")}
    rows = as_rows(found, unit="step", peaks=peaks)
    difference = abs(losses["float32"] / losses["plain float32"] - 1)
    ratios = {row["way"]: row["times faster"] for row in rows}
    passed = all(ratios[name] >= limit for name, limit in TRAIN_LIMITS.items())
    return {
        "what": f"training, batch of {batch_size}, {shape[0]} x {shape[1]} pixels",
        "rows": rows,
        "GFLOP per slice-step": per_step / batch_size,
        "matrix product GFLOP/s": peaks,
        "relative difference of the first loss, float32": difference,
        "passed": bool(passed and difference <= LOSS_LIMIT),
    }
