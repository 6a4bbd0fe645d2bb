"""The moments inside any inner optimizer's state, found by Optax' field names."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lowrank_optax._matrices import refill, unbox

FIELDS = ("mu", "nu", "trace", "ema")

Group = dict[str, Any]


class Moments(NamedTuple):
    """The moments of a state and the way back.

    Attributes:
      groups: one dict per state object that holds moments, field name -> tree.
      rebuild: puts groups of the same shape back into a copy of the state.
    """

    groups: tuple[Group, ...]
    rebuild: Callable[[tuple[Group, ...]], Any]


def _holds_moments(node: Any) -> bool:
    fields = getattr(node, "_fields", ())
    return any(field in fields for field in FIELDS)


def find(state: Any) -> Moments:
    """Finds the fields named in ``FIELDS`` in every NamedTuple inside ``state``."""
    nodes, treedef = jax.tree.flatten(state, is_leaf=_holds_moments)
    holders = [i for i, node in enumerate(nodes) if _holds_moments(node)]

    def rebuild(groups: tuple[Group, ...]) -> Any:
        renewed = list(nodes)
        for i, group in zip(holders, groups, strict=True):
            renewed[i] = nodes[i]._replace(**group)
        return treedef.unflatten(renewed)

    def group(node: Any) -> Group:
        return {field: getattr(node, field) for field in FIELDS if hasattr(node, field)}

    groups = tuple(group(nodes[i]) for i in holders)
    return Moments(groups, rebuild)


def of_leaf(
    groups: tuple[Group, ...], treedef: Any, position: int
) -> tuple[Group, ...]:
    """Picks one leaf's moments out of every group's trees (arrays only)."""
    return tuple(
        {
            field: leaf
            for field, tree in group.items()
            if isinstance(
                leaf := unbox(treedef.flatten_up_to(tree)[position]), jax.Array
            )
        }
        for group in groups
    )


def with_leaves(
    groups: tuple[Group, ...], treedef: Any, leaves: dict[int, tuple[Group, ...]]
) -> tuple[Group, ...]:
    """Returns the groups with the moments of some leaves replaced."""
    renewed = []
    for g, group in enumerate(groups):
        trees = {}
        for field, tree in group.items():
            flat = treedef.flatten_up_to(tree)
            for position, moments in leaves.items():
                if field in moments[g]:
                    flat[position] = refill(flat[position], moments[g][field])
            trees[field] = treedef.unflatten(flat)
        renewed.append(trees)
    return tuple(renewed)
