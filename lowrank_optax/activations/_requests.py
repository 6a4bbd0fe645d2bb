"""Checks of what is asked of the planner."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_optax import _checks
from lowrank_optax.activations.actions import Action, parse_action
from lowrank_optax.activations.cost import BlockCost
from lowrank_optax.activations.roles import TRANSFORMER_ACTIONS


def check_budgets(nbytes: Any, fraction: Any, error: Any):
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


def parse(actions: Any) -> tuple[Action, ...]:
    """Returns distinct actions in their order."""
    if isinstance(actions, str | Action):
        actions = (actions,)
    found = tuple(dict.fromkeys(parse_action(action) for action in actions))
    if not found:
        raise ValueError(
            "`actions` must name at least one action, for example ('save', 'int8')."
        )
    return found


def sizes(n_layers: int, groups: Any) -> tuple[int, ...]:
    """Returns the sizes of the groups, the larger ones first."""
    groups = _checks.positive_int("groups", groups)
    if groups > n_layers:
        raise ValueError(
            f"`groups` must be at most the {n_layers} layers there are, got {groups}."
        )
    each, more = divmod(n_layers, groups)
    return tuple(each + (g < more) for g in range(groups))


def check_args(args: Any) -> tuple[Any, ...]:
    """Returns the example arguments as a tuple."""
    if not isinstance(args, list | tuple) or len(args) < 2:
        raise ValueError(
            "`example_args` must be a tuple of what the block is called with: the "
            "parameters of one layer, its input, and the rest if there is any."
        )
    return tuple(args)


def check_tags(
    forbidden: Mapping[str, Any],
    roles: Mapping[str, str],
    costs: BlockCost,
    actions: Sequence[Action],
) -> dict[str, tuple[Action, ...]]:
    """Returns the parsed actions that each tag may not get."""
    names = [tag.tag for tag in costs.tags]
    found = {}
    for tag, barred in forbidden.items():
        if tag not in names:
            raise ValueError(
                f"`forbidden` lists '{tag}', which the block does not tag where it can "
                "be kept. It tags " + ", ".join(f"'{name}'" for name in names) + "."
            )
        found[tag] = parse(barred)
        if set(actions) <= set(found[tag]):
            raise ValueError(
                f"`forbidden` leaves '{tag}' none of the actions: "
                + ", ".join(str(action) for action in actions)
                + "."
            )
    for role in roles.values():
        _checks.choice("role", role, TRANSFORMER_ACTIONS)
    return found


def infeasible_budget(needed: Any, always: int, everything: int, given: Any) -> str:
    """Returns the message for a budget below what any plan takes."""
    least = math.ceil(needed)
    text = (
        f"No plan fits into {given:,} bytes: inputs and the working set of the layers "
        f"alone take {always:,}. The smallest feasible budget is budget_bytes={least} "
        f"({least / 2**20:,.2f} MiB)"
    )
    if least <= always:
        return text + "."
    fraction = math.ceil((least - always) / everything * 1e6) / 1e6
    return (
        text + f", or budget_fraction={fraction}. A larger `error_budget` or more "
        "`actions` allow less."
    )


def infeasible_error(least: float, given: Any) -> str:
    """Returns the message for an error that no assignment of actions stays below."""
    return (
        f"No choice of actions stays within error_budget={given}: the smallest "
        f"feasible one is {least:.6g}. Allow 'save' or 'recompute' among `actions`."
    )
