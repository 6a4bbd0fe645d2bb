"""Activation memory: what is kept of each tagged tensor for the backward pass."""

from lowrank_optax.activations._interpret import TaggedValue as TaggedValue
from lowrank_optax.activations.actions import Action as Action
from lowrank_optax.activations.actions import Offload as Offload
from lowrank_optax.activations.actions import Policy as Policy
from lowrank_optax.activations.actions import Quantize as Quantize
from lowrank_optax.activations.actions import Recompute as Recompute
from lowrank_optax.activations.actions import Save as Save
from lowrank_optax.activations.actions import parse_action as parse_action
from lowrank_optax.activations.audit import Audit as Audit
from lowrank_optax.activations.audit import audit as audit
from lowrank_optax.activations.checkpoint import (
    compressed_checkpoint as compressed_checkpoint,
)
from lowrank_optax.activations.checkpoint import tagged_values as tagged_values
from lowrank_optax.activations.compress import Compressed as Compressed
from lowrank_optax.activations.roles import transformer_policy as transformer_policy
