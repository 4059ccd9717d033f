"""The finder's weights in one small file: kernels of 8 bits, with a scale for each filter."""

import functools
from pathlib import Path

import keras
import numpy as np

from tf_lesion.scans.finder.networks import build_network

FILE = Path(__file__).with_name("finder.npz")
STEPS = 127


def pack(path: str | Path, network: keras.Model, **facts: str) -> None:
    """Write the network to `path`; kernels lose the bits beyond 8."""
    arrays = {}
    for number, value in enumerate(network.get_weights()):
        key = f"weight_{number:03d}"
        if value.ndim > 1:  # a kernel
            scale = np.abs(value).max(axis=tuple(range(value.ndim - 1))) / STEPS + 1e-12
            arrays[f"{key}_scale"] = scale.astype(np.float32)
            value = np.rint(value / scale).astype(np.int8)
        arrays[key] = value
    np.savez_compressed(path, **arrays, **{f"fact_{k}": np.array(v) for k, v in facts.items()})


@functools.lru_cache(maxsize=1)
def load(path: str | Path = FILE) -> keras.Model:
    """The network of a file that `pack` wrote."""
    network = build_network()
    with np.load(path) as file:
        values = []
        for number in range(len(network.get_weights())):
            key = f"weight_{number:03d}"
            value = file[key].astype(np.float32)
            values.append(value * file.get(f"{key}_scale", np.float32(1)))
    network.set_weights(values)
    return network
