"""Activation memory: each tagged tensor kept, in few bits, or computed again.

Two rooms, and imports point downward: ``checkpoint`` runs one function under a policy
(actions, codecs, replay), and ``planner`` above it chooses policies for a stack of
layers (costs, errors, an integer program, plans that follow the training).
"""

from lowrank_optax.activations.checkpoint.actions import Action as Action
from lowrank_optax.activations.checkpoint.actions import Offload as Offload
from lowrank_optax.activations.checkpoint.actions import Quantize as Quantize
from lowrank_optax.activations.checkpoint.actions import Recompute as Recompute
from lowrank_optax.activations.checkpoint.actions import Save as Save
from lowrank_optax.activations.checkpoint.actions import parse_action as parse_action
from lowrank_optax.activations.checkpoint.codecs import Compressed as Compressed
from lowrank_optax.activations.checkpoint.policy import Policy as Policy
from lowrank_optax.activations.checkpoint.policy import (
    transformer_policy as transformer_policy,
)
from lowrank_optax.activations.checkpoint.program import TaggedValue as TaggedValue
from lowrank_optax.activations.checkpoint.replay import (
    compressed_checkpoint as compressed_checkpoint,
)
from lowrank_optax.activations.checkpoint.replay import tagged_values as tagged_values
from lowrank_optax.activations.planner.adaptive import (
    AdaptivePlanner as AdaptivePlanner,
)
from lowrank_optax.activations.planner.audit import Audit as Audit
from lowrank_optax.activations.planner.audit import audit as audit
from lowrank_optax.activations.planner.choose import (
    plan_activations as plan_activations,
)
from lowrank_optax.activations.planner.costs import BlockCost as BlockCost
from lowrank_optax.activations.planner.costs import TagCost as TagCost
from lowrank_optax.activations.planner.costs import block_cost as block_cost
from lowrank_optax.activations.planner.hardware import Hardware as Hardware
from lowrank_optax.activations.planner.hardware import calibrate as calibrate
from lowrank_optax.activations.planner.hardware import (
    hardware_profile as hardware_profile,
)
from lowrank_optax.activations.planner.plan import ActivationPlan as ActivationPlan
from lowrank_optax.activations.planner.plan import Choice as Choice
from lowrank_optax.activations.planner.plan import Prediction as Prediction
from lowrank_optax.activations.planner.plan import Segment as Segment
from lowrank_optax.activations.planner.plan import apply_plan as apply_plan
from lowrank_optax.activations.planner.plan import scan_layers as scan_layers
from lowrank_optax.activations.planner.predict import predict as predict
from lowrank_optax.activations.planner.probes import probe_errors as probe_errors
