"""The other methods of Table 1, a file each; every file in this folder is imported here."""

import importlib
import pkgutil

from tf_lesion import models  # noqa: F401  registers GMVAE and VAE, first in the order
from tf_lesion.methods import METHODS

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS"]
