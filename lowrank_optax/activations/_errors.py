"""Where the gradient errors that a plan is made with come from."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lowrank_optax.activations import probe
from lowrank_optax.activations.actions import Action
from lowrank_optax.activations.cost import BlockCost

Errors = Mapping[tuple[str, Action], float]


def settle(
    block: Callable,
    args: Sequence[Any],
    n_layers: int,
    costs: BlockCost,
    actions: Sequence[Action],
    roles: Mapping[str, str],
    given: Any,
    cotangent: Any,
) -> tuple[Errors, bool]:
    """Returns (tag, action) -> error, and whether they were measured.

    They are those that are given, else measured where there is data, else by role.
    """
    if given is not None:
        _check(given, costs, actions)
        return given, True
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(args)):
        return _by_role(costs, actions, roles), False
    options = {"cotangent": cotangent, "n_layers": n_layers}
    return probe.probe_errors(block, args, actions, **options), True


def _by_role(
    costs: BlockCost, actions: Sequence[Action], roles: Mapping[str, str]
) -> Errors:
    """Returns errors without data, see ``probe.error_of_role``."""
    found = {}
    for tag in costs.tags:
        for action in actions:
            exact = all(probe.is_exact(action, v.shape, v.dtype) for v in tag.values)
            width = max(math.prod(v.shape[-1:]) for v in tag.values)
            role = roles.get(tag.tag, "")
            error = 0.0 if exact else probe.error_of_role(role, action, width)
            found[tag.tag, action] = error
    return found


def _check(errors: Mapping[Any, float], costs: BlockCost, actions: Any):
    """Raises if errors that were passed do not cover every tag and action."""
    for tag in costs.tags:
        for action in actions:
            if (tag.tag, action) not in errors:
                raise ValueError(
                    f"`errors` has no entry for ('{tag.tag}', {action!r}). Measure "
                    "with probe_errors(block, example_args, actions)."
                )
