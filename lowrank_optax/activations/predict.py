"""What a policy of one's own takes, by the planner's count."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lowrank_optax import _checks
from lowrank_optax.activations import _errors, _requests, _tables, cost
from lowrank_optax.activations.actions import Policy, Recompute
from lowrank_optax.activations.hardware import hardware_profile
from lowrank_optax.activations.plan import Prediction
from lowrank_optax.activations.roles import TRANSFORMER_TAGS


def predict(
    block: Callable,
    example_args: Any,
    n_layers: Any,
    policy: Any,
    *,
    hardware: Any = "cpu",
    roles: Mapping[str, str] = TRANSFORMER_TAGS,
    errors: Any = None,
    cotangent: Any = None,
) -> Prediction:
    """Predicts bytes, time and gradient error of a stack of layers under a policy.

    The same count as ``plan_activations`` makes for the policies that it compares; see
    there for what it is made of.

    Args:
      block: as in ``plan_activations``, like all that follows.
      example_args: real data, or ShapeDtypeStructs.
      n_layers: of the stack.
      policy: a ``Policy`` or a mapping of tags to actions. Other tags are computed
        again.
      hardware: a profile's name, or a ``Hardware``.
      roles: tag -> role, for errors without data.
      errors: (tag, action) -> error.
      cotangent: of the loss at this layer.

    Returns:
      The prediction.

    Raises:
      ValueError: if the policy lists a tag that the block does not have.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from lowrank_optax import activations
      >>> def layer(w, x):
      ...     return x + checkpoint_name(x @ w, "hidden") @ w.T
      >>> def shape(*axes):
      ...     return jax.ShapeDtypeStruct(axes, jnp.bfloat16)
      >>> args = shape(1024, 4096), shape(512, 1024)
      >>> whole, codes = (
      ...     activations.predict(layer, args, 12, {"hidden": action})
      ...     for action in ("save", "int4")
      ... )
      >>> codes.kept_bytes / whole.kept_bytes
      0.2578125
    """
    n_layers = _checks.positive_int("n_layers", n_layers)
    profile, settled = hardware_profile(hardware), Policy(policy)
    args = _requests.check_args(example_args)
    costs = cost.block_cost(block, args, profile.fuses)
    names = [tag.tag for tag in costs.tags]
    for tag in settled:
        if tag not in names:
            raise ValueError(
                f"The policy lists '{tag}', which the block does not tag where it can "
                "be kept. It tags " + ", ".join(f"'{name}'" for name in names) + "."
            )
    actions = tuple(dict.fromkeys([Recompute(), *settled.values()]))
    errors, probed = _errors.settle(
        block, args, n_layers, costs, actions, roles, errors, cotangent
    )
    tables = _tables.build(costs, actions, (n_layers,), profile, errors, {})
    chosen = [actions.index(settled.get(name, Recompute())) for name in names]
    assignment = np.asarray([chosen], int).reshape(1, len(names))
    plan = _tables.plan_of(assignment, tables, costs, actions, 0, profile.name, probed)
    return plan.predicted
