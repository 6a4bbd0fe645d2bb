"""``predict``: bytes, time and error of a stack of layers under a given policy."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_optax import _checks
from lowrank_optax.activations.checkpoint.actions import Action, Recompute
from lowrank_optax.activations.checkpoint.policy import TRANSFORMER_TAGS, Policy
from lowrank_optax.activations.planner import milp, probes
from lowrank_optax.activations.planner.costs import BlockCost, block_cost
from lowrank_optax.activations.planner.hardware import hardware_profile
from lowrank_optax.activations.planner.milp import Tables
from lowrank_optax.activations.planner.plan import (
    ActivationPlan,
    Choice,
    Prediction,
    Segment,
)


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

    The count is that of ``plan_activations`` for the policies that it compares; see
    there how it is made.

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
    args = check_args(example_args)
    costs = block_cost(block, args, profile.fuses)
    check_tags("The policy", settled, costs)
    # Recomputation is among them always, for the tags that the policy leaves out.
    actions = tuple(dict.fromkeys([Recompute(), *settled.values()]))
    errors, probed = probes.errors_of(
        block, args, n_layers, costs, actions, roles, errors, cotangent
    )
    tables = milp.build(costs, actions, (n_layers,), profile, errors, {})
    chosen = [actions.index(settled.get(tag.tag, Recompute())) for tag in costs.tags]
    assignment = np.asarray([chosen], int).reshape(1, len(chosen))
    plan = plan_of(assignment, tables, costs, actions, 0, profile.name, probed)
    return plan.predicted


def check_args(args: Any) -> tuple[Any, ...]:
    """Returns the example arguments as a tuple."""
    if not isinstance(args, list | tuple) or len(args) < 2:
        raise ValueError(
            "`example_args` must be a tuple of what the block is called with: the "
            "parameters of one layer, its input, and the rest if there is any."
        )
    return tuple(args)


def check_tags(whose: str, listed: Iterable[str], costs: BlockCost):
    """Raises if a tag is listed that the block does not have."""
    names = [tag.tag for tag in costs.tags]
    for tag in listed:
        if tag not in names:
            raise ValueError(
                f"{whose} lists '{tag}', which the block does not tag where it can "
                "be kept. It tags " + ", ".join(f"'{name}'" for name in names) + "."
            )


def plan_of(
    assignment: np.ndarray,
    tables: Tables,
    costs: BlockCost,
    actions: Sequence[Action],
    budget_bytes: int,
    hardware: str,
    probed: bool,
) -> ActivationPlan:
    """Returns the plan of ``[groups, tags]`` indices of actions."""
    n_layers = sum(tables.layers)

    def predicted(nbytes: Any, time: Any, error2: Any) -> Prediction:
        inputs = n_layers * costs.input_bytes
        error = math.sqrt(error2)
        return Prediction(int(nbytes), inputs, costs.working_bytes, float(time), error)

    segments: list[Segment] = []
    for layers, chosen in zip(tables.layers, assignment.tolist(), strict=True):
        times = tables.times(np.asarray(chosen))
        choices = tuple(
            Choice(
                tag=tag.tag,
                action=actions[a],
                nbytes=int(tables.nbytes[t, a]),
                saved_bytes=tag.nbytes,
                time_ms=times[t],
                error=math.sqrt(tables.error2[t, a]),
            )
            for t, (tag, a) in enumerate(zip(costs.tags, chosen, strict=True))
        )
        # Neighbors with equal policies are one loop, not two compiled ones.
        if segments and segments[-1].choices == choices:
            layers += segments.pop().layers
        segments.append(Segment(layers, choices))
    everything = n_layers * sum(tag.nbytes for tag in costs.tags)
    return ActivationPlan(
        segments=tuple(segments),
        predicted=predicted(*tables.total(assignment)),
        full_save=predicted(everything, 0.0, 0.0),
        full_recompute=predicted(
            0, n_layers * tables.again(np.ones(len(costs.tags), bool)), 0.0
        ),
        budget_bytes=budget_bytes,
        hardware=hardware,
        probed=probed,
    )
