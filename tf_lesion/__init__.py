"""Unsupervised lesion detection via image restoration with a normative prior (TensorFlow 2)."""

__version__ = "0.1.0"
