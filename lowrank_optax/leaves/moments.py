"""The moments inside any inner optimizer's state, found by Optax' field names."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank_optax.leaves.boxes import is_altered, refill, refill_tree, unbox_tree
from lowrank_optax.quantization import dequantize, is_quantized

FIELDS = ("mu", "nu", "trace", "ema")

# Second moments by row or column: they are read, but no transport moves them.
FACTORS = ("row", "col")

# Gradients, each written once: they are stored as moments are, but neither read nor
# moved.
HISTORY = ("history",)

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


def _held(node: Any, also: tuple[str, ...]) -> tuple[str, ...]:
    fields = getattr(node, "_fields", ())
    return tuple(field for field in FIELDS + also if field in fields)


def find(state: Any, also: tuple[str, ...] = ()) -> Moments:
    """Finds the moments of every NamedTuple and registered type inside ``state``.

    ``also``: further fields, ``FACTORS`` or ``HISTORY``.
    """

    def holds(node: Any) -> bool:
        return type(node) in _REGISTERED or bool(_held(node, also))

    nodes, treedef = jax.tree.flatten(state, is_leaf=holds)
    holders = [i for i, node in enumerate(nodes) if holds(node)]

    def rebuild(groups: tuple[Group, ...]) -> Any:
        renewed = list(nodes)
        for i, group in zip(holders, groups, strict=True):
            renewed[i] = _write(nodes[i], group)
        return treedef.unflatten(renewed)

    groups = tuple(_read(nodes[i], also) for i in holders)
    return Moments(groups, rebuild)


def _read(node: Any, also: tuple[str, ...]) -> Group:
    if type(node) not in _REGISTERED:
        return {field: getattr(node, field) for field in _held(node, also)}
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


def are_altered(treedef: Any, state: Any) -> bool:
    """``is_altered`` for the moments of a state."""
    groups = find(state).groups
    return any(is_altered(treedef, *group.values()) for group in groups)


def weight_seen(decay: Any, steps: Array) -> Array:
    """Returns ``1 - decay^steps``, by which a moment's bias is corrected.

    ``1 - 0.999`` has lost two digits in float32; ``expm1`` loses none.
    """
    # A Python number stays in double precision here: as a float32, 0.999 is off by 1e-5
    # of its distance to 1.
    if isinstance(decay, int | float):
        # A decay of 0 gives -inf, and expm1 makes the right 1 of it.
        with np.errstate(divide="ignore"):
            rate = float(np.log(decay))
    else:
        rate = jnp.log(decay)
    return -jnp.expm1(steps * rate)


def by_leaf(
    treedef: Any, *states: Any, also: tuple[str, ...] = ()
) -> list[tuple[Any, ...]]:
    """Returns for every leaf its moments in each of the states, decoded.

    The moments of one leaf in one state are a tuple with a dict of arrays per group.
    """

    def decoded(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array)
        return leaf if is_array else dequantize(unbox_tree(leaf))

    def of(state: Any) -> list[tuple[Group, ...]]:
        leaves: list[tuple[Group, ...]] = [()] * treedef.num_leaves
        for group in find(state, also).groups:
            fields = {name: treedef.flatten_up_to(tree) for name, tree in group.items()}
            for i, groups in enumerate(leaves):
                own = {name: decoded(flat[i]) for name, flat in fields.items()}
                # A leaf that is masked in this state has no array here.
                arrays = {k: x for k, x in own.items() if isinstance(x, jax.Array)}
                leaves[i] = (*groups, arrays)
        return leaves

    return list(zip(*map(of, states), strict=True))


def with_moments(state: Any, treedef: Any, leaves: dict[int, tuple[Group, ...]]) -> Any:
    """Returns the state with the moments of some leaves replaced."""
    if not leaves:
        return state
    moments, renewed = find(state), []
    for g, group in enumerate(moments.groups):
        trees = {}
        for field, tree in group.items():
            flat = treedef.flatten_up_to(tree)
            for position, moved in leaves.items():
                if field in moved[g]:
                    flat[position] = _refilled(flat[position], moved[g][field])
            trees[field] = treedef.unflatten(flat)
        renewed.append(trees)
    return moments.rebuild(tuple(renewed))


def _refilled(leaf: Any, moment: Array) -> Any:
    """Puts a moment where another was: in its box, encoded as that was."""
    if isinstance(leaf, jax.Array):
        return moment
    if is_quantized(leaf):
        return refill_tree(leaf, unbox_tree(leaf).encode(moment))
    return refill(leaf, moment)


def finite_or(state: Any, before: Any) -> Any:
    """Returns a state whose moments keep their old entries where new ones overflow.

    ``before``: the state before the update. What is encoded is finite as it is.
    """
    new, old = find(state, FACTORS), find(before, FACTORS)

    def choose(x: Any, last: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.where(jnp.isfinite(x), x, last)

    return new.rebuild(jax.tree.map(choose, new.groups, old.groups))
