"""Training on several devices or machines: the global batch stays, each replica takes its part.

    none          one device
    mirrored      all GPUs of this machine (`tf.distribute.MirroredStrategy`)
    multi-worker  a process per machine or device (`tf.distribute.MultiWorkerMirroredStrategy`),
                  which find each other by the variable TF_CONFIG, or by SLURM's own variables

Batches and noise are functions of (seed, step, row), so that the loss curve is that of one device
up to rounding.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tf_lesion.files import InputError

KINDS = ("none", "mirrored", "multi-worker")
# What a collective raises when another worker is gone.
WORKER_ERRORS = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)
# Each job, and each step of one, has ports of its own: two may share a machine.
FIRST_PORT, PORTS, PORTS_OF_A_STEP = 10_000, 20_000, 16


@dataclass(frozen=True)
class Placement:
    """Where a training runs: which devices, and the number of this process and of all."""

    strategy: tf.distribute.Strategy
    worker: int = 0
    workers: int = 1

    @property
    def chief(self) -> bool:
        """Whether this process writes the run."""
        return self.worker == 0

    @property
    def replicas(self) -> int:
        """Number of devices."""
        return self.strategy.num_replicas_in_sync

    def local(self, rows: np.ndarray) -> np.ndarray:
        """The part of a global batch [B] that this process reads."""
        return np.split(rows, self.workers)[self.worker]

    def spread(self, values: tf.Tensor) -> Any:
        """A batch of this process, split over its devices."""
        parts = tf.split(values, self.replicas // self.workers)
        first = self.worker * len(parts)
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group - first]
        )


def make_placement(kind: str = "none") -> Placement:
    """The `Placement` of a kind; call it before anything else of TensorFlow.

    Raises:
        InputError: if the other workers are not told, or are no workers.
    """
    if kind == "none":
        return Placement(tf.distribute.get_strategy())
    if kind == "mirrored":
        return Placement(tf.distribute.MirroredStrategy())
    if "TF_CONFIG" not in os.environ:
        if "SLURM_STEP_NODELIST" not in os.environ:
            raise InputError(
                "Expected the addresses of the workers in TF_CONFIG, or a job of SLURM (srun), got "
                "neither; on one machine the kind is mirrored."
            )
        os.environ["TF_CONFIG"] = json.dumps(_slurm_config())
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    number, workers = _number(resolver)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    return Placement(strategy, number, workers)


def _number(resolver):
    """(number of this process, of all); the chief, if TF_CONFIG has one, is 0."""
    try:
        cluster = resolver.cluster_spec().as_dict()
        kind, index = resolver.task_type, resolver.task_id
        chiefs, workers = (len(cluster.get(name, ())) for name in ("chief", "worker"))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"Expected TF_CONFIG as TensorFlow reads it: {error}.") from error
    if cluster.keys() - {"chief", "worker"} or kind not in cluster or chiefs > 1:
        raise InputError(
            f"Expected workers, and a chief at most, in TF_CONFIG, and this process to be one; got "
            f"{', '.join(cluster) or 'none'} and {kind}."
        )
    if index not in range(len(cluster[kind])):
        raise InputError(
            f"Expected the index in TF_CONFIG from 0 to {len(cluster[kind]) - 1}, there are "
            f"{len(cluster[kind])} of {kind}; got {index}."
        )
    return index + (chiefs if kind == "worker" else 0), chiefs + workers


def _slurm_port():
    job, step = (int(os.environ.get(f"SLURM_{name}_ID", 0)) for name in ("JOB", "STEP"))
    return FIRST_PORT + (job + step) * PORTS_OF_A_STEP % PORTS


def _slurm_config():
    """The workers of this step of a SLURM job in the form of TF_CONFIG.

    The resolver fails on nodes without GPUs, and would set CUDA_VISIBLE_DEVICES, which srun does:
    it is told of one device per task and used for the addresses only.
    """
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=_slurm_port(),
        gpus_per_node=int(os.environ["SLURM_STEP_NUM_TASKS"]),
        gpus_per_task=1,
        auto_set_gpu=False,
    )
    cluster = resolver.cluster_spec().as_dict()
    return {"cluster": cluster, "task": {"type": resolver.task_type, "index": resolver.task_id}}
