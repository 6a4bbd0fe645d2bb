"""Activation memory: what is kept of each tagged tensor for the backward pass."""

from lowrank_optax.activations._interpret import TaggedValue as TaggedValue
from lowrank_optax.activations.actions import Action as Action
from lowrank_optax.activations.actions import Offload as Offload
from lowrank_optax.activations.actions import Policy as Policy
from lowrank_optax.activations.actions import Quantize as Quantize
from lowrank_optax.activations.actions import Recompute as Recompute
from lowrank_optax.activations.actions import Save as Save
from lowrank_optax.activations.actions import parse_action as parse_action
from lowrank_optax.activations.adaptive import AdaptivePlanner as AdaptivePlanner
from lowrank_optax.activations.audit import Audit as Audit
from lowrank_optax.activations.audit import audit as audit
from lowrank_optax.activations.checkpoint import (
    compressed_checkpoint as compressed_checkpoint,
)
from lowrank_optax.activations.checkpoint import tagged_values as tagged_values
from lowrank_optax.activations.compress import Compressed as Compressed
from lowrank_optax.activations.cost import BlockCost as BlockCost
from lowrank_optax.activations.cost import TagCost as TagCost
from lowrank_optax.activations.cost import block_cost as block_cost
from lowrank_optax.activations.hardware import Hardware as Hardware
from lowrank_optax.activations.hardware import calibrate as calibrate
from lowrank_optax.activations.hardware import hardware_profile as hardware_profile
from lowrank_optax.activations.plan import ActivationPlan as ActivationPlan
from lowrank_optax.activations.plan import Choice as Choice
from lowrank_optax.activations.plan import Prediction as Prediction
from lowrank_optax.activations.plan import Segment as Segment
from lowrank_optax.activations.planner import plan_activations as plan_activations
from lowrank_optax.activations.predict import predict as predict
from lowrank_optax.activations.probe import probe_errors as probe_errors
from lowrank_optax.activations.roles import transformer_policy as transformer_policy
from lowrank_optax.activations.stack import apply_plan as apply_plan
from lowrank_optax.activations.stack import scan_layers as scan_layers
