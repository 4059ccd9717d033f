"""The stages of training the brain finder: painted heads, one network, one file of weights."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # five times as fast in 3-D on older processors
import keras
import numpy as np
import tensorflow as tf

from preprocessing.cohort import in_processes
from preprocessing.finder.examples import batches
from preprocessing.finder.examples import source as heads_of
from preprocessing.finder.shards import SHARD, Shards, write_shard
from preprocessing.phantom.sources import find_label_maps
from tf_lesion.scans.finder.canonical import BIN_MM, BINS
from tf_lesion.scans.finder.networks import build_network
from tf_lesion.scans.finder.weights import pack
from tf_lesion.training.runs import intact_checkpoint

LEARNING_RATE, WARM_UP, DECAY = 1.5e-3, 100, 0.4
SOFT = 0.15  # 1.5 mm, of the soft mask
PLACES = 0.3  # weight of the coordinates
CLIP_NORM = 1.0
SAVE_SECONDS, LOG_STEPS = 120, 50
HEADS, NAME = "heads", "finder"  # in the working folder


@keras.saving.register_keras_serializable("tf_lesion")
class Trapezoid(keras.optimizers.schedules.LearningRateSchedule):
    """Linear rise over WARM_UP steps, `top`, linear fall to 0 over the last DECAY of the steps."""

    def __init__(self, top, steps):
        self.top, self.steps = top, steps

    def __call__(self, step):
        """Learning rate of a step."""
        step = tf.cast(step, tf.float32)
        rise = (step + 1) / WARM_UP
        fall = (self.steps - step) / (DECAY * self.steps)
        return self.top * tf.maximum(tf.minimum(tf.minimum(rise, fall), 1.0), 0.0)

    def get_config(self):
        """What `__init__` takes."""
        return {"top": self.top, "steps": self.steps}


def losses(outputs, batch):
    """{name: [B]}: of coordinates at 12 and 24 mm; distance from the surface, 10 mm; soft mask."""
    places, weight = batch["coordinates"], batch["coordinates_weight"]
    coarse, coarse_weight = _mean_of_cubes(places, weight)
    outside, true = outputs["outside"], batch["outside"]
    inside = tf.cast(batch["outside_weight"] > 0, tf.float32)
    soft, true_soft = (tf.sigmoid(-x / SOFT) * inside for x in (outside, true))

    def total(values):
        return tf.reduce_sum(values, (1, 2, 3, 4))

    dice = (2 * total(soft * true_soft) + 1) / (total(soft) + total(true_soft) + 1)
    return {
        "coordinates": PLACES * coordinate_loss(outputs["coordinates"], places, weight),
        "coarse": PLACES * coordinate_loss(outputs["coarse"], coarse, coarse_weight),
        "outside": _mean(tf.abs(outside - true), batch["outside_weight"]),
        "dice": 1 - dice,
    }


def coordinate_loss(logits, places, weight):
    """[B], mean over weighted places of KL(true bins || found), nats, summed over the axes.

    The true distribution lies on the two bins around a place, so that its mean is the place.
    """
    loss = 0.0
    parts = tf.split(logits, [len(bins) for bins in BINS], axis=-1)
    for part, bins, place in zip(parts, BINS, tf.unstack(100 * places, axis=-1), strict=True):
        place = tf.clip_by_value(place, bins[0], bins[-1])[..., None]
        true = tf.maximum(1 - tf.abs(place - tf.constant(bins, tf.float32)) / BIN_MM, 0)
        entropy = -tf.reduce_sum(true * tf.math.log(true + 1e-9), -1)
        loss += tf.nn.softmax_cross_entropy_with_logits(true, part) - entropy
    return _mean(loss, weight)


def _mean(values, weight):
    axes = tuple(range(1, len(weight.shape)))
    return tf.reduce_sum(values * weight, axes) / (tf.reduce_sum(weight, axes) + 1.0)


def _mean_of_cubes(places, weight):
    """Places [B, 2x, 2y, 2z, 3] and weights [B, 2x, 2y, 2z] at half the resolution."""
    return tf.nn.avg_pool3d(places, 2, 2, "VALID"), tf.nn.avg_pool3d(
        weight[..., None], 2, 2, "VALID"
    )[..., 0]


def train(folder: str | Path, *, steps: int, batch_size: int, seed: int) -> None:
    """Train the network; weights at `folder`/finder.weights.h5."""
    folder = Path(folder)
    shards, network = Shards(folder / HEADS), build_network()
    optimizer = keras.optimizers.Adam(Trapezoid(LEARNING_RATE, steps), clipnorm=CLIP_NORM)
    optimizer.build(network.trainable_variables)
    done = tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(network=network, optimizer=optimizer, done=done)
    manager = tf.train.CheckpointManager(checkpoint, str(folder / NAME), max_to_keep=2)
    with intact_checkpoint(folder / NAME):
        checkpoint.restore(manager.latest_checkpoint)

    @tf.function(reduce_retracing=True)
    def gradient_of(example):
        with tf.GradientTape() as tape:
            terms = losses(network(example["volume"], training=True), example)
            total = tf.reduce_mean(sum(terms.values()))
        terms = {name: tf.reduce_mean(value) for name, value in terms.items()}
        return tape.gradient(total, network.trainable_variables), terms

    @tf.function
    def apply_gradients(gradients):
        optimizer.apply_gradients(zip(gradients, network.trainable_variables, strict=True))

    saved, began, logged = time.time(), time.time(), []
    source = batches(shards, heads_of(shards), batch=batch_size, seed=[seed, int(done)])
    while int(done) < steps:
        total = None
        for example in next(source):
            one = {name: tf.constant(value[None]) for name, value in example.items()}
            gradients, terms = gradient_of(one)
            logged.append({name: float(value) for name, value in terms.items()})
            total = gradients if total is None else list(map(tf.add, total, gradients))
        apply_gradients([g / batch_size for g in total])
        done.assign_add(1)
        step = int(done)
        if step % LOG_STEPS == 0:
            means = {n: round(float(np.mean([t[n] for t in logged])), 4) for n in logged[0]}
            pace = (time.time() - began) / LOG_STEPS
            line = {"step": step, **means, "s": round(pace, 2), "heads": len(shards)}
            print(json.dumps(line), flush=True)
            began, logged = time.time(), []
        if time.time() - saved > SAVE_SECONDS or step == steps:
            manager.save()
            network.save_weights(folder / f"{NAME}.weights.h5")
            saved = time.time()


def paint(
    label_maps: str | Path, folder: str | Path, *, held_out: int, seed: int, heads: int, jobs: int
) -> Iterator[int]:
    """Write shards of painted heads, of all label maps but the last `held_out` by name.

    Shards that are there are kept. Yields the number of heads of each shard, once it is there.
    """
    maps = find_label_maps(label_maps)
    paths = maps[: len(maps) - held_out]
    folder = Path(folder)
    tasks = [(folder / HEADS, paths, seed, shard) for shard in range(-(-heads // SHARD))]
    for _ in in_processes(write_shard, tasks, jobs):
        yield SHARD


def pack_weights(folder: str | Path, out: str | Path, **facts: Any) -> None:
    """The trained network of a folder as the one file of the package."""
    folder, network = Path(folder), build_network()
    network.load_weights(folder / f"{NAME}.weights.h5")
    pack(out, network, **facts)
