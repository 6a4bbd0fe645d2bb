"""``plan_activations``: the cheapest way to keep activations within a budget."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank_optax import _checks
from lowrank_optax.activations.checkpoint.actions import Action, parse_actions
from lowrank_optax.activations.checkpoint.policy import (
    TRANSFORMER_ACTIONS,
    TRANSFORMER_TAGS,
)
from lowrank_optax.activations.checkpoint.replay import HOW_TO_TAG
from lowrank_optax.activations.planner import milp, predict, probes
from lowrank_optax.activations.planner.costs import BlockCost, block_cost
from lowrank_optax.activations.planner.hardware import hardware_profile
from lowrank_optax.activations.planner.milp import Tables
from lowrank_optax.activations.planner.plan import ActivationPlan

ACTIONS = ("save", "recompute", "int8", "int4", "int4+8")


def plan_activations(
    block: Callable,
    example_args: Any,
    n_layers: Any,
    *,
    budget_bytes: Any = None,
    budget_fraction: Any = None,
    error_budget: Any = None,
    hardware: Any = "cpu",
    actions: Any = ACTIONS,
    roles: Any = TRANSFORMER_TAGS,
    forbidden: Any = None,
    errors: Any = None,
    cotangent: Any = None,
    groups: Any = 1,
) -> ActivationPlan:
    r"""Chooses for every tagged value of a stack of layers whether and how it is kept.

    With one action ``a`` for each tag ``t`` in each group ``g`` of ``L_g`` of the L
    layers, ``x[g, t, a]`` in {0, 1} and the working set ``W``, it solves::

        min   sum_g L_g (sum_ta time[t, a] x[g, t, a] + again[g])
        with  sum_a x[g, t, a] = 1
              sum_g L_g (inputs + sum_ta bytes[t, a] x[g, t, a]) + W <= budget
              sum_g (L_g / L) sum_ta error[t, a]^2 x[g, t, a] <= error_budget^2

    The bytes are exact. The times are those of a roofline: computing again costs its
    products or its traffic, whichever is longer (see ``block_cost``), few bits cost one
    pass for encoding and one for decoding. W is an estimate, see ``BlockCost``. Errors
    are measured on ``example_args``, one tag at a time, and add in squares.

    What is computed again for several tags (one product that is cut into queries, keys
    and values) counts once, and what only another tag needs (a product that is added to
    something, say) counts if that one is not kept either, and so on along the chain.
    These are further variables of the program, and the sum is the replay's own count of
    operations, for the plan as for recomputing everything.
    Of equally fast plans the one with fewer bytes is taken, and then the one whose
    actions stand first in ``actions``.

    Args:
      block: ``block(params, x, *rest)``, a layer that tags values with
        ``jax.ad_checkpoint.checkpoint_name``.
      example_args: the parameters of one layer, its input, and the rest: real data,
        from which errors are measured, or ShapeDtypeStructs.
      n_layers: how many layers the stack has.
      budget_bytes: for all that ``plan.predicted.total_bytes`` counts.
      budget_fraction: instead of that, in (0, 1]: the tagged values may take this part
        of what saving all of them takes. Inputs and the working set come on top.
      error_budget: what ``plan.predicted.error``, a bound on the relative error of a
        layer's gradient, may be at most; None: any. The error itself is smaller, see
        ``Prediction``.
      hardware: a profile's name, or a ``Hardware``, as from ``calibrate``.
      actions: those that may be chosen: strings or ``Action`` objects.
      roles: tag -> role, for errors without data; see ``transformer_policy``.
      forbidden: tag -> actions that it may not get.
      errors: (tag, action) -> error, in place of those that would be measured; as
        ``probe_errors`` returns them.
      cotangent: of the loss at this layer, for the measurement; see ``probe_errors``.
      groups: into how many runs of layers the stack may be cut, each with a policy and
        a loop of its own. Runs with equal policies are joined.

    Returns:
      The plan; print it.

    Raises:
      ImportError: if scipy is missing.
      ValueError: if not exactly one budget is given, if it or the error budget cannot
        be kept (the message names the smallest that can), if the block has no tags that
        can be kept, or if an argument is out of range.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from lowrank_optax import activations
      >>> def layer(w, x):
      ...     hidden = checkpoint_name(x @ w["in"], "hidden")
      ...     act = checkpoint_name(jax.nn.silu(hidden), "act")
      ...     return x + act @ w["out"]
      >>> def shape(*axes):
      ...     return jax.ShapeDtypeStruct(axes, jnp.bfloat16)
      >>> args = {"in": shape(1024, 4096), "out": shape(4096, 1024)}, shape(512, 1024)
      >>> plan = activations.plan_activations(
      ...     layer, args, 12, budget_fraction=0.3, hardware="v5e"
      ... )
      >>> [(choice.tag, str(choice.action)) for choice in plan.segments[0].choices]
      [('hidden', 'int4'), ('act', 'int4')]

    References:
      Chen et al., Adacc: An Adaptive Framework Unifying Compression and Activation
      Recomputation for LLM Training (2025), https://arxiv.org/abs/2508.00806
    """
    n_layers = _checks.positive_int("n_layers", n_layers)
    profile = hardware_profile(hardware)
    _check_budgets(budget_bytes, budget_fraction, error_budget)
    actions = parse_actions(actions)
    groups = _checks.positive_int("groups", groups)
    if groups > n_layers:
        raise ValueError(
            f"`groups` must be at most the {n_layers} layers there are, got {groups}."
        )
    each, more = divmod(n_layers, groups)
    # Sizes differ by one at most; groups of one size are alike to the solver.
    layers = tuple(each + (g < more) for g in range(groups))
    example_args = predict.check_args(example_args)
    milp.scipy_optimize()  # before the work, if it is missing
    costs = block_cost(block, example_args, profile.fuses)
    if not costs.tags:
        raise ValueError(
            "The block tags nothing that can be kept, so there is nothing to plan. "
            f"{HOW_TO_TAG} Tags inside loops and branches do not count."
        )
    for role in roles.values():
        _checks.choice("role", role, TRANSFORMER_ACTIONS)
    barred = _barred(forbidden or {}, costs, actions)
    errors, probed = probes.errors_of(
        block, example_args, n_layers, costs, actions, roles, errors, cotangent
    )
    tables = milp.build(costs, actions, layers, profile, errors, barred)
    # No choice changes the inputs and the working set: the solver gets the rest.
    always = n_layers * costs.input_bytes + costs.working_bytes
    everything = n_layers * sum(tag.nbytes for tag in costs.tags)
    if budget_bytes is None:
        budget_bytes = always + math.ceil(budget_fraction * everything)
    most = math.inf if error_budget is None else float(error_budget)
    _check_feasible(tables, budget_bytes, most, always, everything)
    chosen = milp.solve(tables, budget_bytes - always, most**2)
    if chosen is None:
        raise RuntimeError("The solver found no plan though there is one.")
    return predict.plan_of(
        chosen, tables, costs, actions, int(budget_bytes), profile.name, probed
    )


def _check_budgets(nbytes: Any, fraction: Any, error: Any):
    """Raises unless exactly one budget is given and all are in range."""
    if (nbytes is None) == (fraction is None):
        given = "neither" if nbytes is None else "both"
        raise ValueError(
            "Give exactly one of `budget_bytes` (for everything that the plan counts) "
            "and `budget_fraction` (of what saving every tagged value takes); got "
            f"{given}."
        )
    if nbytes is not None and not 0 < nbytes < math.inf:
        raise ValueError(f"`budget_bytes` must be positive, got {nbytes!r}.")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(
            f"`budget_fraction` must be above 0 and at most 1, got {fraction!r}. For "
            "recomputing everything use compressed_checkpoint(block, {})."
        )
    if error is not None and not error >= 0:
        raise ValueError(f"`error_budget` must not be negative, got {error!r}.")


def _barred(
    forbidden: Mapping[str, Any], costs: BlockCost, actions: Sequence[Action]
) -> dict[str, tuple[Action, ...]]:
    """Returns the parsed actions that each tag may not get."""
    predict.check_tags("`forbidden`", forbidden, costs)
    found = {tag: parse_actions(barred) for tag, barred in forbidden.items()}
    for tag, barred in found.items():
        if set(actions) <= set(barred):
            raise ValueError(
                f"`forbidden` leaves '{tag}' none of the actions: "
                + ", ".join(str(action) for action in actions)
                + "."
            )
    return found


def _check_feasible(
    tables: Tables, budget: Any, most: float, always: int, everything: int
):
    """Raises if no plan keeps the budgets, and names the smallest that can be kept."""
    best = milp.smallest(tables, tables.error2, math.inf)
    least = math.sqrt(tables.total(best)[2]) if best is not None else math.inf
    # The slack is the solver's own: it holds a bound to about 1e-6.
    if least > most * (1 + 1e-6):
        raise ValueError(
            f"No choice of actions stays within error_budget={most}: the smallest "
            f"feasible one is {least:.6g}. Allow 'save' or 'recompute' among `actions`."
        )
    best = milp.smallest(tables, tables.nbytes, most**2)
    needed = always + (tables.total(best)[0] if best is not None else everything)
    if needed <= budget:
        return
    least = math.ceil(needed)
    text = (
        f"No plan fits into {budget:,} bytes: inputs and the working set of the layers "
        f"alone take {always:,}. The smallest feasible budget is budget_bytes={least} "
        f"({least / 2**20:,.2f} MiB)"
    )
    if least <= always:
        raise ValueError(text + ".")
    fraction = math.ceil((least - always) / everything * 1e6) / 1e6
    raise ValueError(
        text + f", or budget_fraction={fraction}. A larger `error_budget` or more "
        "`actions` allow less."
    )
