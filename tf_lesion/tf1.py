"""Load a checkpoint of the released TensorFlow 1 code into the networks.

Its kernels have the layouts of ours: [kh, kw, in, out], and [kh, kw, out, in] where transposed.
"""

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tf_lesion.baselines import make_model
from tf_lesion.config import Config
from tf_lesion.files import InputError
from tf_lesion.presets import preset
from tf_lesion.training.runs import intact_checkpoint, newest_checkpoint

_TRUNK = "q_wz_x/3x3convlayer"
_VAE_MARK = "q_zx/z_mean/kernel/Variable"
_PRIOR_MEAN = "p_z_wc/z_wc_mean/kernel/Variable"


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a folder with a TF1 checkpoint (an `.index` file and no run beside it)."""
    path = Path(path)
    return path.is_dir() and not (path / "config.json").exists() and _newest(path) is not None


def _newest(folder):
    """Prefix of the newest checkpoint in the folder or its `model` subfolder, or None."""
    return newest_checkpoint(folder) or newest_checkpoint(folder / "model")


def _conv(scope, kernel="kernel", bias="convbiases"):
    return [f"{scope}/{kernel}/Variable", f"{scope}/{bias}/Variable"]


def _decoder_layers(decoder, scope):
    yield decoder.input_layer, _conv(f"{scope}/1x1convlayer")
    for number, layer in zip((1, 2, 4, 5), (*decoder.low, *decoder.high), strict=True):
        yield layer, _conv(f"{scope}/3x3upconvlayer{number}", "upkernel", "upconvbiases")
    yield decoder.middle, _conv(f"{scope}/3x3upconvlayer3")
    yield decoder.mean_head, _conv(f"{scope}/y_mean")
    yield decoder.log_precision_head, _conv(f"{scope}/y_logvarinv")


def _layers(model):
    """Pairs of a layer and the names of its kernel and bias in the released code."""
    is_vae = model.network.model == "vae"
    for position, layer in enumerate(model.encoder.trunk):
        yield layer, _conv(_TRUNK + (str(position) if position else ""))
    for name, head in model.encoder.heads.items():
        scope = "q_zx" if is_vae else "q_wz_x"
        yield head, _conv(f"{scope}/{name.replace('omega', 'w')}")
    if not is_vae:
        prior = model.prior_network
        yield prior.hidden, _conv("p_z_wc/1x1convlayer")
        yield prior.mean_head, _conv("p_z_wc/z_wc_mean")
        yield prior.log_precision_head, _conv("p_z_wc/z_wc_logvarinv")
    yield from _decoder_layers(model.decoder, "p_xz" if is_vae else "p_x_z")


def variable_names(model: keras.Model) -> dict[str, keras.Variable]:
    """{name in the released code: variable of ours} for every weight of the model."""
    return {
        name: variable
        for layer, names in _layers(model)
        for name, variable in zip(names, (layer.kernel, layer.bias), strict=True)
    }


def read_config(folder: str | Path) -> tuple[str, Config]:
    """(prefix, `released` config) of a checkpoint: model, K, latent channels from its shapes.

    Raises:
        InputError: if there is no checkpoint, or not one of the released GMVAE or VAE.
    """
    prefix = _newest(Path(folder))
    if prefix is None:
        raise InputError(f"Expected a TF1 checkpoint (model.ckpt-STEP.index) in {folder}.")
    with intact_checkpoint(prefix):
        shapes = tf.train.load_checkpoint(prefix).get_variable_to_shape_map()
    if _VAE_MARK in shapes:
        network = {"dim_z": shapes[_VAE_MARK][-1]}
        return prefix, preset("released", "vae").replace(network=network)
    if _PRIOR_MEAN not in shapes:
        raise InputError(
            f"{prefix}: neither {_PRIOR_MEAN} nor {_VAE_MARK} is in it; this is not a checkpoint "
            f"of the released GMVAE or VAE."
        )
    dim_z = shapes["q_wz_x/z_mean/kernel/Variable"][-1]
    network = {
        "dim_z": dim_z,
        "dim_omega": shapes["q_wz_x/w_mean/kernel/Variable"][-1],
        "num_clusters": shapes[_PRIOR_MEAN][-1] // dim_z,
    }
    return prefix, preset("released", "gmvae").replace(network=network)


def load(folder: str | Path, *, config: Config | None = None) -> tuple[keras.Model, Config]:
    """Model with the weights of a TF1 checkpoint, and its config.

    Args:
        folder: the checkpoint's folder, or one with a `model` subfolder as the released code makes.
        config: use this instead of the one read from the checkpoint; its model and K must agree.

    Raises:
        InputError: if a weight is missing or has another shape (another K or model).
    """
    prefix, found = read_config(folder)
    if len(list(Path(prefix).parent.glob("*.index"))) > 1:
        print(f"Of several checkpoints: {prefix}", file=sys.stderr)
    config = config or found
    model = make_model(config)
    with intact_checkpoint(prefix):
        reader = tf.train.load_checkpoint(prefix)
    for name, variable in variable_names(model).items():
        if not reader.has_tensor(name):
            raise InputError(f"{prefix}: no variable {name}; it is no {config.network.model}.")
        with intact_checkpoint(prefix):
            value = reader.get_tensor(name)
        if value.shape != tuple(variable.shape):
            raise InputError(
                f"{prefix}: {name} has shape {value.shape}, expected {tuple(variable.shape)}; "
                f"is it a checkpoint of another number of clusters?"
            )
        variable.assign(value.astype(np.float32))
    return model, config
