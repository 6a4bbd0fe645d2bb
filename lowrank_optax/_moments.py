"""The moments inside any inner optimizer's state, found by Optax' field names."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lowrank_optax._matrices import refill, unbox

FIELDS = ("mu", "nu", "trace", "ema")

Group = dict[str, Any]
Read = Callable[[Any], Group]
Write = Callable[[Any, Group], Any]

_REGISTERED: dict[type, tuple[Read, Write]] = {}


class Moments(NamedTuple):
    """The moments of a state and the way back.

    Attributes:
      groups: one dict per state object that holds moments, field name -> tree.
      rebuild: puts groups of the same shape back into a copy of the state.
    """

    groups: tuple[Group, ...]
    rebuild: Callable[[tuple[Group, ...]], Any]


def register_moments(state_type: Any, read: Read, write: Write) -> None:
    """Tells transports where a state type of your own keeps its moments.

    States that are NamedTuples with fields ``mu``, ``nu``, ``trace`` or ``ema`` are
    known already. Registering a type again replaces the earlier functions.

    Args:
      state_type: the class of the state, a pytree.
      read: state -> dictionary from some of those names to trees like the
        parameters', decoded to floating point if they are stored otherwise.
      write: (state, such a dictionary) -> the state with these moments.

    Raises:
      TypeError: if ``state_type`` is not a class.

    Examples:
      >>> from typing import Any, NamedTuple
      >>> import lowrank_optax as lro
      >>> class HeavyBall(NamedTuple):
      ...     velocity: Any
      >>> lro.register_moments(
      ...     HeavyBall,
      ...     read=lambda state: {"trace": state.velocity},
      ...     write=lambda state, moments: HeavyBall(moments["trace"]),
      ... )
    """
    if not isinstance(state_type, type):
        raise TypeError(
            "register_moments expected the class of an optimizer state, got "
            f"{state_type!r}."
        )
    _REGISTERED[state_type] = read, write


def _holds_moments(node: Any) -> bool:
    if type(node) in _REGISTERED:
        return True
    fields = getattr(node, "_fields", ())
    return any(field in fields for field in FIELDS)


def find(state: Any) -> Moments:
    """Finds the moments of every NamedTuple and registered type inside ``state``."""
    nodes, treedef = jax.tree.flatten(state, is_leaf=_holds_moments)
    holders = [i for i, node in enumerate(nodes) if _holds_moments(node)]

    def rebuild(groups: tuple[Group, ...]) -> Any:
        renewed = list(nodes)
        for i, group in zip(holders, groups, strict=True):
            renewed[i] = _write(nodes[i], group)
        return treedef.unflatten(renewed)

    groups = tuple(_read(nodes[i]) for i in holders)
    return Moments(groups, rebuild)


def _read(node: Any) -> Group:
    if type(node) not in _REGISTERED:
        return {field: getattr(node, field) for field in FIELDS if hasattr(node, field)}
    group = dict(_REGISTERED[type(node)][0](node))
    if unknown := sorted(set(group) - set(FIELDS)):
        raise ValueError(
            f"The reader registered for {type(node).__name__} returned {unknown}; "
            f"moments are called {', '.join(FIELDS)}."
        )
    return group


def _write(node: Any, group: Group) -> Any:
    if type(node) not in _REGISTERED:
        return node._replace(**group)
    return _REGISTERED[type(node)][1](node, group)


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
