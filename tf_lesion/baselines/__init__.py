"""The other methods of Table 1, a file each; every file in this folder is imported here."""

import importlib
import pkgutil

from tf_lesion import models  # noqa: F401  registers GMVAE and VAE, first in the order
from tf_lesion.config import Config
from tf_lesion.files import InputError
from tf_lesion.methods import METHODS, Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "make_model"]


def make_model(config: Config) -> Method:
    """The method that a `Config` describes, with its weights created.

    Raises:
        InputError: if there is no such method.
    """
    name = config.network.model
    if name not in METHODS:
        raise InputError(f"Expected a model of {', '.join(METHODS)}, got {name}.")
    return METHODS[name](config.network, config.objective).build_weights()
