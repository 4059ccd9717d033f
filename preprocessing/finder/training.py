"""The stages of training the brain finder: painted heads, two networks, one file of weights."""

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
from scipy import ndimage

from preprocessing.cohort import in_processes
from preprocessing.finder.examples import batches, pose_source, surface_source
from preprocessing.finder.shards import SHARD, Shards, write_shard
from preprocessing.phantom.heads.anatomy import HeadAnatomy, load_head
from preprocessing.phantom.sources import find_label_maps
from tf_lesion.scans.finder.canonical import CANONICAL_SHAPE, canonical_affine
from tf_lesion.scans.finder.networks import (
    LARGEST_LOG_SCALE,
    LEAST_LOG_SCALE,
    build_pose_network,
    build_surface_network,
)
from tf_lesion.scans.finder.weights import pack

LEARNING_RATE, WARM_UP, DECAY = 1.5e-3, 50, 0.4
CLIP_NORM = 1.0
SAVE_SECONDS, LOG_STEPS = 120, 50
TEMPLATE, HEADS = "template.npy", "heads"  # in the working folder
TEMPLATE_RANGE = 2.5  # 10 mm


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


def pose_losses(outputs, batch):
    """{name: [B]}: mean distance of the places of the brain, 10 mm."""
    distance = tf.norm(outputs - batch["points"] + 1e-6, axis=-1)
    return {"points": 10 * tf.reduce_mean(distance, axis=-1)}


def surface_losses(outputs, batch):
    """{name: [B]}: mean weighted distances, 10 mm; and of the logarithm of their scale."""
    found, scale = outputs["coordinates"][..., :3], outputs["coordinates"][..., 3]
    weight = batch["coordinates_weight"]
    distance = 10 * tf.norm(found - batch["coordinates"] + 1e-6, axis=-1)  # mm
    scale = tf.clip_by_value(scale, LEAST_LOG_SCALE, LARGEST_LOG_SCALE)
    surprise = tf.stop_gradient(distance) * tf.exp(-scale) + scale
    outside = tf.abs(outputs["outside"] - batch["outside"])

    def mean(values, weight):
        axes = tuple(range(1, len(weight.shape)))
        return tf.reduce_sum(values * weight, axes) / (tf.reduce_sum(weight, axes) + 1.0)

    return {
        "coordinates": mean(distance, weight) / 10,
        "scale": 0.1 * mean(surprise, weight),
        "outside": mean(outside, batch["outside_weight"]),
    }


LOSSES = {"pose": pose_losses, "surface": surface_losses}


def train(kind: str, folder: str | Path, *, steps: int, batch_size: int, seed: int) -> None:
    """Train one network; weights at `folder`/KIND.weights.h5."""
    folder = Path(folder)
    shards, losses = Shards(folder / HEADS), LOSSES[kind]
    if kind == "pose":
        network, make = build_pose_network(), pose_source(shards)
    else:
        template = np.load(folder / TEMPLATE)
        network, make = build_surface_network(), surface_source(shards, template)
    schedule = Trapezoid(LEARNING_RATE, steps)
    optimizer = keras.optimizers.Adam(schedule, clipnorm=CLIP_NORM)
    optimizer.build(network.trainable_variables)
    done = tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(network=network, optimizer=optimizer, done=done)
    manager = tf.train.CheckpointManager(checkpoint, str(folder / kind), max_to_keep=2)
    checkpoint.restore(manager.latest_checkpoint)

    @tf.function
    def update(batch):
        with tf.GradientTape() as tape:
            terms = losses(network(batch["volume"], training=True), batch)
            total = tf.reduce_mean(sum(terms.values()))
        gradients = tape.gradient(total, network.trainable_variables)
        optimizer.apply_gradients(zip(gradients, network.trainable_variables, strict=True))
        return {name: tf.reduce_mean(value) for name, value in terms.items()}

    saved, logged = time.time(), []
    began = time.time()
    source = batches(shards, make, batch=batch_size, seed=[seed, int(done)])
    while int(done) < steps:
        terms = update({name: tf.constant(value) for name, value in next(source).items()})
        logged.append({name: float(value) for name, value in terms.items()})
        done.assign_add(1)
        step = int(done)
        if step % LOG_STEPS == 0:
            means = {n: round(float(np.mean([t[n] for t in logged])), 4) for n in logged[0]}
            pace = (time.time() - began) / LOG_STEPS
            print(
                json.dumps({"step": step, **means, "s": round(pace, 2), "heads": len(shards)}),
                flush=True,
            )
            began, logged = time.time(), []
        if time.time() - saved > SAVE_SECONDS or step == steps:
            manager.save()
            network.save_weights(folder / f"{kind}.weights.h5")
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
    if not (folder / TEMPLATE).exists():
        np.save(folder / TEMPLATE, mean_outside([load_head(path) for path in paths]))
    tasks = [(folder / HEADS, paths, seed, shard) for shard in range(-(-heads // SHARD))]
    for _ in in_processes(write_shard, tasks, jobs):
        yield SHARD


def mean_outside(anatomies: list[HeadAnatomy]) -> np.ndarray:
    """[X, Y, Z] float32 on the canonical grid: mean signed distance from the brain, 10 mm."""
    total = np.zeros(CANONICAL_SHAPE)
    for head in anatomies:
        from_mni = np.linalg.inv(head.mni_from_head @ head.outside_affine) @ canonical_affine()
        total += ndimage.affine_transform(
            head.outside, from_mni, output_shape=CANONICAL_SHAPE, order=1, mode="nearest"
        )
    return np.clip(total / len(anatomies) / 10, -TEMPLATE_RANGE, TEMPLATE_RANGE).astype(np.float32)


def pack_weights(folder: str | Path, out: str | Path, **facts: Any) -> None:
    """Both trained networks of a folder as the one file of the package."""
    folder = Path(folder)
    networks = {"pose": build_pose_network(), "surface": build_surface_network()}
    for name, network in networks.items():
        network.load_weights(folder / f"{name}.weights.h5")
    pack(out, networks, np.load(folder / TEMPLATE), **facts)
