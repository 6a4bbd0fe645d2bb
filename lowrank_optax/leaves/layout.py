"""``axes_of_state``: which axis of a parameter stands behind an axis of a state."""

from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax.leaves.boxes import is_box, unbox
from lowrank_optax.leaves.matrix import Axes
from lowrank_optax.quantization import is_quantized


def axes_of_state(init: Callable[[Any], Any], params: Any, axes: Any) -> Any:
    """Returns a tree like ``init(params)`` of ``Axes``, found by asking ``init``.

    The k-th axes of all parameters are made longer by one. Where an axis of a state
    becomes longer, too, it is the k-th of the parameter that the state belongs to:
    nothing is concluded from sizes that happen to be equal.

    Args:
      init: the init of any transformation.
      params: its parameters, arrays or ShapeDtypeStructs.
      axes: a tree like ``params`` of ``Axes``: the meaning of the parameters' axes.

    Returns:
      The axes behind every array of the state, or behind the array that an encoded one
      stands for; ``()`` for an axis that follows none, or more than one.
    """
    flat, treedef = jax.tree.flatten(params, is_leaf=is_box)
    meanings = treedef.flatten_up_to(axes)
    state, structure = _flatten(jax.eval_shape(init, params))
    owner = owners([path for path, _ in state], params)
    behind: list[list[set]] = [[set() for _ in leaf.shape] for _, leaf in state]
    for k in range(max((len(meaning) for meaning in meanings), default=0)):
        longer = treedef.unflatten(_longer(leaf, k) for leaf in flat)
        after = dict(_flatten(jax.eval_shape(init, longer))[0])
        for i, (path, leaf) in enumerate(state):
            now = after.get(path)
            # An init that decides by sizes may make another state of the longer axes;
            # arrays without a counterpart there say nothing about this axis.
            if owner[i] is None or now is None or len(now.shape) != len(leaf.shape):
                continue
            for axis in range(len(leaf.shape)):
                if now.shape[axis] != leaf.shape[axis]:
                    behind[i][axis].add(meanings[owner[i]][k])
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


def _longer(leaf: Any, axis: int) -> Any:
    shape = list(unbox(leaf).shape)
    if axis < len(shape):
        shape[axis] += 1
    # Without its box, which might not bear an array of another shape.
    return jax.ShapeDtypeStruct(tuple(shape), unbox(leaf).dtype)


def _flatten(state: Any) -> tuple[list[tuple[tuple[str, ...], Any]], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: is_quantized(x) or is_box(x)
    )
    return [(names_of(path), unbox(leaf)) for path, leaf in pairs], structure


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns a key path as names."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
