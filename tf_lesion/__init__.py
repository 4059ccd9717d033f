"""Unsupervised lesion detection via image restoration with a normative prior (TensorFlow 2)."""

import os

__version__ = "0.1.0"

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only, before TensorFlow is imported
