"""Objective and AUC against the number of steps: the released schedule and other solvers."""

import time

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from tf_lesion.caches.restore import chosen_rows
from tf_lesion.caches.slices import SliceCache
from tf_lesion.config import SOLVERS
from tf_lesion.evaluation import metrics
from tf_lesion.noise import slice_noise
from tf_lesion.prior import load
from tf_lesion.restoration import Restorer, map_objective, restore

DRAWS = 8  # of the noise, for the objective of an image; the same for all images
KEPT = 5  # points of each curve
AUC_LIMIT = 0.005  # by which the fast ways may miss the released schedule in float32
STREAM = "test"  # no noise of the restoration: its images are fitted to that
REFERENCE = "released float32"
WAYS = [
    (solver, kind) for solver in SOLVERS if solver != "paper" for kind in ("float32", "bfloat16")
]


def benchmark_solver(model_path, cache_path, *, max_slices, batch_size, tv_weight, seed):
    """Restore patients with every solver and precision.

    Args:
        model_path: run of `train_gmvae.py`.
        cache_path: patients' cache, with labels.
        max_slices: a random subset of so many slices.
        batch_size: slices at once.
        tv_weight: lambda; None takes the preset's.
        seed: of the noise and of the subset.

    Returns:
        JSON-serialisable dict: a row per way and kept step, and `passed`.
    """
    loaded = load(model_path)
    with SliceCache(cache_path, "Test") as cache:
        loaded.check_size(cache)
        rows = chosen_rows(len(cache), max_slices, seed=seed)
        patients = _Patients(loaded.model, cache, rows, tv_weight or _released(loaded).tv_weight)
        curves = {}
        for solver, kind in WAYS:
            other = load(model_path, precision=kind)
            settings = _released(other).with_solver(solver)
            restorer = Restorer(other.model, settings, seed=seed)
            name = f"{solver} {kind}"
            curves[name] = patients.curve(restorer, name, batch_size=batch_size)
    reference = curves[REFERENCE][-1]
    last = {name: curve[-1] for name, curve in curves.items()}
    reached = [
        last[name]["objective"] >= reference["objective"] for name in last if "released" not in name
    ]
    near = [  # huber is not meant to be
        abs(last[name]["AUC"] - reference["AUC"]) <= AUC_LIMIT
        for name in last
        if "huber" not in name
    ]
    return {
        "what": f"{len(rows)} slices of {cache_path}, lambda {patients.tv_weight:g}",
        "rows": [row for curve in curves.values() for row in curve],
        "passed": bool(all(reached) and all(near)),
    }


def _released(loaded):
    return loaded.config.restoration.with_solver("released")


class _Patients:
    """Slices of patients, and how good images of them are."""

    def __init__(self, model, cache, rows, tv_weight):
        self.model, self.rows, self.tv_weight = model, rows, tv_weight
        self.observed, self.mask = cache.read(rows), cache.mask(rows)
        self.label = cache.label(rows)
        self._objective = tf.function(self._one_objective)

    def curve(self, restorer, name, *, batch_size):
        """[row of a table] at some steps."""
        steps = restorer.restoration.steps
        every, kept, seconds = max(1, steps // KEPT), {}, 0.0
        with tqdm(total=steps * len(self.rows), desc=name, unit="slice-step") as progress:
            for start in range(0, len(self.rows), batch_size):
                part = slice(start, start + batch_size)
                options = {"save_every": every, "tv_weight": self.tv_weight}
                batch = self.observed[part], self.mask[part].astype(np.float32), self.rows[part]
                started = time.perf_counter()
                _, images = restore(restorer, *batch, on_progress=progress.update, **options)
                seconds += time.perf_counter() - started
                for step, found in images.items():
                    kept.setdefault(step, []).append(found)
        return [
            {
                "way": name,
                "step": f"{step}",
                "objective": self.objective(np.concatenate(images), batch_size=batch_size),
                "AUC": self.auc(np.concatenate(images)),
                "seconds per slice": seconds * step / steps / len(self.rows),
            }
            for step, images in kept.items()
        ]

    def auc(self, images):
        """Pooled AUC of the residual."""
        pooled = metrics.PooledScores()
        pooled.add(np.abs(self.observed - images)[self.mask], self.label[self.mask])
        return float(metrics.area(pooled.curve()))

    def objective(self, images, *, batch_size):
        """Mean MAP objective over slices and draws of the noise, float32, nats."""
        values = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            given = images[part], self.observed[part], self.rows[part]
            values += [self._objective(*given, draw) for draw in map(tf.constant, range(DRAWS))]
        return float(np.concatenate(values).mean())

    def _one_objective(self, images, observed, rows, draw):
        noise = slice_noise(self.model.noise_shapes, seed=0, step=draw, slices=rows, stream=STREAM)
        return map_objective(
            self.model, images, observed=observed, noise=noise, tv_weight=self.tv_weight
        )
