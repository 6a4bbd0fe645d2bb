"""``axes_of_state``: which axis of a parameter stands behind an axis of a state."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lowrank_optax.leaves.boxes import is_box, unbox
from lowrank_optax.leaves.matrix import Axes
from lowrank_optax.quantization import is_quantized


def axes_of_state(init: Callable[[Any], Any], params: Any) -> Any:
    """Returns a tree like ``init(params)`` of ``Axes``, found by asking ``init``.

    The k-th axes of all parameters are made longer by one. Where an axis of a state
    becomes longer, too, it is the k-th of the parameter that the state belongs to:
    nothing is concluded from sizes that happen to be equal.

    Args:
      init: the init of any transformation.
      params: its parameters, arrays or ShapeDtypeStructs.

    Returns:
      The axes behind every array of the state, or behind the array that an encoded one
      stands for, as numbers of the parameter's own; ``()`` for an axis that follows
      none, or more than one.
    """
    flat, treedef = jax.tree.flatten(params, is_leaf=is_box)
    state, structure = _flatten(jax.eval_shape(init, params))
    owner = owners([path for path, _ in state], params)
    behind: list[list[set]] = [[set() for _ in leaf.shape] for _, leaf in state]

    def asked(longer: int | None) -> dict[tuple[str, ...], Any]:
        tree = treedef.unflatten(_apart(leaf, longer) for leaf in flat)
        return dict(_flatten(jax.eval_shape(init, tree))[0])

    first = asked(None)
    for k in range(max((unbox(leaf).ndim for leaf in flat), default=0)):
        after = asked(k)
        for i, (path, leaf) in enumerate(state):
            before, now = first.get(path), after.get(path)
            # An init that decides by sizes may make another state of the longer axes;
            # arrays without a counterpart there say nothing about this axis.
            if owner[i] is None or before is None or now is None:
                continue
            if not len(leaf.shape) == len(before.shape) == len(now.shape):
                continue
            for axis in range(len(leaf.shape)):
                if now.shape[axis] != before.shape[axis]:
                    behind[i][axis].add((k,))
    return structure.unflatten(
        Axes(next(iter(found)) if len(found) == 1 else () for found in leaf)
        for leaf in behind
    )


def owners(paths: list[tuple[str, ...]], params: Any) -> list[int | None]:
    """Returns for paths in a state the position of the parameter they belong to.

    That is the one whose own path they end with, the longest if there are several.
    """
    pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    known = {names_of(path): i for i, (path, _) in enumerate(pairs)}

    def owner(names: tuple[str, ...]) -> int | None:
        # Longest end first; the empty one is the path of a tree that is a bare array.
        ends = (names[start:] for start in range(len(names) + 1))
        return next((known[end] for end in ends if end in known), None)

    return [owner(names) for names in paths]


def _apart(leaf: Any, longer: int | None) -> Any:
    """Returns a leaf with sizes at least two apart, one axis longer by one.

    Their order stays, the earlier of equals before the later: an init that keeps sums
    over the largest axis, as Optax's Adafactor, keeps them over the same one.
    """
    leaf = unbox(leaf)  # without its box, which might not bear an array of other shape
    shape, least = list(leaf.shape), 0
    for axis in np.argsort(shape, kind="stable"):
        shape[axis] = max(shape[axis], least)
        least = shape[axis] + 2
    if longer is not None and longer < len(shape):
        shape[longer] += 1
    return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)


def _flatten(state: Any) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: is_quantized(x) or is_box(x)
    )
    return [(names_of(path), unbox(leaf)) for path, leaf in pairs], structure


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns a key path as names."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
