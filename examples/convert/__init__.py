"""Weights of Hugging Face's transformers into these examples' models, and back."""

from examples.convert.folder import read_model, write_model

__all__ = ["read_model", "write_model"]
