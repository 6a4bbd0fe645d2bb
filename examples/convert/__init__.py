"""Weights of Hugging Face's transformers into these examples' models, and back."""

from examples.convert.reading import read_model
from examples.convert.writing import write_model

__all__ = ["read_model", "write_model"]
