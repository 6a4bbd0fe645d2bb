"""Backward pass and update, one layer at a time; see ``step``."""

from lowrank_optax.layerwise.step import formats as formats
from lowrank_optax.layerwise.step import train_step as train_step
