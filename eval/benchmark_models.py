"""One step of the restoration and of training, against the plain way to write it in TensorFlow 2.

Plain: convolutions after `tf.image.resize`, float32, one call per step; the restoration's gradient
goes to the host, which takes the step. Weights are untrained: they do not change the time. And the
solvers, against the number of steps, on patients.
"""

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from tqdm import tqdm

from eval.benchmark_data import Found, interleaved, made_up_slices
from tf_lesion.baselines import make_model
from tf_lesion.caches.restore import chosen_rows
from tf_lesion.caches.slices import SliceCache
from tf_lesion.config import SOLVERS
from tf_lesion.evaluation import metrics
from tf_lesion.noise import slice_noise
from tf_lesion.objective import elbo
from tf_lesion.presets import preset
from tf_lesion.prior import load
from tf_lesion.restoration import Restorer, map_objective, restore
from tf_lesion.training.distribution import make_placement
from tf_lesion.training.update import Updater

PRECISIONS = ("float32", "bfloat16")
STEPS_TIMED = 4
STEPS_COMPARED = 20  # later, the sign of TV parts any two correct runs
IMAGES_LIMIT, LOSS_LIMIT = 1e-4, 1e-5
RESTORE_LIMITS = {"float32": 1.25, "bfloat16": 2.0}
TRAIN_LIMITS = {"float32": 1.3, "bfloat16": 2.2}
RUN_LIMIT = 8.0  # a whole restoration, multirate bfloat16 against plain

DRAWS = 8  # of the noise, for the objective of an image; the same for all images
KEPT = 5  # points of each curve
AUC_LIMIT = 0.005  # by which the fast ways may miss the released schedule in float32
STREAM = "test"  # no noise of the restoration: its images are fitted to that
COMPARED = [name for name, solver in SOLVERS.items() if solver.schedule == "released"]


def _keeps(table, limits):
    return all(table["times faster"][name] >= limit for name, limit in limits.items())


def _config(shape, precision):
    network = {"height": shape[0], "width": shape[1], "precision": precision}
    return preset("released").replace(network=network)


def plain_restoration(model: Any, restoration: Any) -> Callable:
    """(observed, mask, steps) -> images, as a loop of Python: gradient to the host, step there."""
    solver, shapes = restoration.solver, model.noise_shapes

    @tf.function
    def gradient_of(image, observed, step, slices):
        noise = slice_noise(shapes, seed=0, step=step, slices=slices, stream="restoration")
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            variation = restoration.tv_weight * tf.image.total_variation(observed - image)
            objective = elbo(model.restoration_terms(image, noise)) - variation
        return tape.gradient(objective, image)

    def restored(observed, mask, steps):
        image, slices = observed.copy(), tf.range(len(observed), dtype=tf.int64)
        for step in range(steps):
            gradient = gradient_of(*map(tf.constant, (image, observed, step)), slices)
            clipped = np.clip(gradient, -solver.gradient_clip, solver.gradient_clip)
            image += solver.step_size(step) * clipped * mask
        return image

    return restored


def benchmark_restore(*, size: tuple[int, int], batch_size: int, rounds: int) -> Found:
    """Steps and whole restorations."""
    observed, mask = made_up_slices(batch_size, size)
    given = {"observed": observed, "mask": mask, "slices": range(batch_size)}
    models, restorers = {}, {}
    for precision in ("plain", *PRECISIONS):
        keras.utils.set_random_seed(0)
        config = _config(size, precision.replace("plain", "float32"))
        models[precision] = make_model(config)
    models["plain"].decoder.fast = False
    restoration = config.restoration
    plain = plain_restoration(models["plain"], restoration)
    for solver, prefix in (("released", ""), ("multirate", "multirate ")):
        for precision in PRECISIONS:
            settings = restoration.with_solver(solver)
            restorers[prefix + precision] = Restorer(models[precision], settings)

    def timed(restorer):
        return lambda: restorer(observed, stop=STEPS_TIMED, **given)[0].numpy()

    ways = {"plain float32": lambda: plain(observed, mask, STEPS_TIMED)}
    ways |= {name: timed(restorer) for name, restorer in restorers.items()}
    table = interleaved(ways, rounds=rounds, unit="step", units=STEPS_TIMED)
    steps = [restoration.steps, *(each.restoration.steps for each in restorers.values())]
    table["seconds per slice"] = table["seconds per step"] * steps / batch_size
    found = restorers["float32"](observed, stop=STEPS_COMPARED, **given)[0].numpy()
    difference = float(np.abs(found - plain(observed, mask, STEPS_COMPARED)).max())
    whole = float(table["seconds per slice"].iloc[0] / table["seconds per slice"].iloc[-1])
    return table, {
        "what": f"restoration, batch of {batch_size}, {size[0]} x {size[1]} pixels",
        f"largest difference after {STEPS_COMPARED} steps, float32": difference,
        "whole run, multirate bfloat16, times faster": whole,
        "passed": _keeps(table, RESTORE_LIMITS)
        and difference <= IMAGES_LIMIT
        and whole >= RUN_LIMIT,
    }


def benchmark_train(*, size: tuple[int, int], batch_size: int, rounds: int) -> Found:
    """Training steps: Adam on the same batch."""
    images, _ = made_up_slices(batch_size, size)
    batch, rows = tf.constant(images), tf.range(batch_size, dtype=tf.int64)
    ways = {}
    for name in ("plain float32", *PRECISIONS):
        config = _config(size, name.removeprefix("plain "))
        update = Updater(config.replace(training={"batch_size": batch_size}), make_placement())
        update.model.decoder.fast = not name.startswith("plain")
        ways[name] = lambda update=update: float(update(batch, rows)["nelbo"])
    losses = {name: way() for name, way in ways.items()}
    table = interleaved(ways, rounds=rounds, unit="step")
    difference = abs(losses["float32"] / losses["plain float32"] - 1)
    return table, {
        "what": f"training, batch of {batch_size}, {size[0]} x {size[1]} pixels",
        "relative difference of the first loss, float32": difference,
        "passed": _keeps(table, TRAIN_LIMITS) and difference <= LOSS_LIMIT,
    }


# Solvers ----------------------------------------------------------------------------------------


def benchmark_solver(
    *,
    model: str,
    cache: str,
    max_slices: int | None,
    batch_size: int,
    tv_weight: float | None,
    seed: int,
) -> Found:
    """Objective and AUC of patients against the steps of every solver and precision."""
    prior = load(model)
    with SliceCache(cache, "Test") as patients:
        prior.check_size(patients)
        rows = chosen_rows(len(patients), max_slices, seed=seed)
        slices = {"observed": patients.read(rows), "mask": patients.mask(rows), "slices": rows}
        label = patients.label(rows)
    restoration = prior.config.restoration.with_solver("released")
    restoration = restoration.changed(tv_weight=tv_weight or restoration.tv_weight)
    objective, found = _objective(prior.model, slices, restoration.tv_weight, batch_size), []
    for solver in COMPARED:
        for precision in PRECISIONS:
            restorer = Restorer(
                load(model, precision=precision).model, restoration.with_solver(solver), seed=seed
            )
            way = f"{solver} {precision}"
            for step, images, seconds in _trajectory(restorer, slices, way, batch_size):
                pooled = metrics.PooledScores()
                residual = np.abs(slices["observed"] - images)
                pooled.add(residual[slices["mask"]], label[slices["mask"]])
                area = float(metrics.area(pooled.curve()))
                found.append((way, step, objective(images), area, seconds))
    columns = ["way", "step", "objective", "AUC", "seconds per slice"]
    table = pd.DataFrame(found, columns=columns).set_index("way")
    last = table.groupby(level="way").last()
    reference = last.loc["released float32"]
    reached = last.objective[~last.index.str.contains("released")] >= reference.objective
    near = (last.AUC - reference.AUC).abs()[~last.index.str.contains("huber")]  # it is another
    return table, {
        "what": f"{len(rows)} slices of {cache}, lambda {restoration.tv_weight:g}",
        "passed": bool(reached.all() and (near <= AUC_LIMIT).all()),
    }


def _trajectory(restorer, slices, name, batch_size):
    """[(step, images [n, H, W, 1], seconds per slice so far)] at some steps."""
    steps, count = restorer.restoration.steps, len(slices["slices"])
    kept, seconds = [], 0.0
    with tqdm(total=steps * count, desc=name, unit="slice-step") as progress:
        for part in _parts(count, batch_size):
            batch = {key: values[part] for key, values in slices.items()}
            options = {"save_every": max(1, steps // KEPT), "on_progress": progress.update}
            started = time.perf_counter()
            kept.append(restore(restorer, **batch, **options).trajectory)
            seconds += time.perf_counter() - started
    return [
        (step, np.concatenate([images[step] for images in kept]), seconds * step / steps / count)
        for step in kept[0]
    ]


def _parts(count, batch_size):
    return [slice(start, start + batch_size) for start in range(0, count, batch_size)]


def _objective(model, slices, tv_weight, batch_size):
    """Images -> mean MAP objective over slices and draws of the noise, float32, nats."""

    @tf.function
    def one(image, observed, rows, draw):
        noise = slice_noise(model.noise_shapes, seed=0, step=draw, slices=rows, stream=STREAM)
        return map_objective(model, image, observed=observed, noise=noise, tv_weight=tv_weight)

    def mean(images):
        values = [
            one(images[part], slices["observed"][part], slices["slices"][part], tf.constant(draw))
            for part in _parts(len(images), batch_size)
            for draw in range(DRAWS)
        ]
        return float(np.concatenate(values).mean())

    return mean
