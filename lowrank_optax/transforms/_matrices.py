"""``map_matrices``: what is written for one leaf's matrices, done to a tree of them."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.boxes import is_box, refill, unbox
from lowrank_optax.leaves.matrix import Matrix, path_string


def map_matrices(
    function: Callable[..., Any],
    updates: Any,
    *trees: Any,
    subspace: Any,
    axis: int,
    in_turn: bool = False,
) -> tuple[Any, ...]:
    """Applies a function to every update and to what is kept of it.

    Args:
      function: ``(update, *kept, axis)`` of arrays out of their boxes, ``update`` being
        ``[*batch, m, n]`` and ``axis`` its input axis, -2 or -1; returns a tuple of as
        many arrays, which go back into the boxes.
      updates: the tree of updates.
      trees: what is kept, trees like it.
      subspace: the view of the bracket around, which knows the input axes, or None.
      axis: the input axis of what the view says nothing about.
      in_turn: whether stacks of which every layer lies on several devices are worked on
        layer by layer.
    """
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_box)
    columns = [leaves, *map(treedef.flatten_up_to, trees)]

    def one(matrix: Matrix | None, *kept: Any) -> Any:
        arrays = tuple(map(unbox, kept))
        if matrix is None:
            return function(*arrays, axis=axis)
        inward = -2 if matrix.reduction_is_rows != matrix.transposed else -1
        if in_turn and matrix.in_turn:
            return jax.lax.map(lambda a: function(*a, axis=inward), arrays)
        return function(*arrays, axis=inward)

    out = list(map(one, _matrices(updates, subspace), *columns))
    return tuple(
        treedef.unflatten(
            refill(box, result[i]) for box, result in zip(column, out, strict=True)
        )
        for i, column in enumerate(columns)
    )


def rank_rule(called: str, rank: int | float) -> Callable[[Any], int]:
    """Returns what the rank of a leaf is, given its array: the number or a fraction.

    Raises TypeError for what is no Python number, a function of the path included.
    """
    _checks.rank(rank)
    if callable(rank):
        raise TypeError(
            f"`rank` of {called} is one for all leaves, an int or a fraction; a "
            "function of the path would not be asked."
        )

    def rank_of(p: Any) -> int:
        if isinstance(rank, float):
            return max(1, round(rank * min(p.shape[-2:])))
        return rank

    return rank_of


def drawn_for(salt: str, seed: int, path: Any, shape: Any, dtype: Any) -> Array:
    """Returns normal numbers of a leaf's own, the same in every process."""
    number = zlib.crc32((salt + path_string(path)).encode())
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.random.normal(key, shape, dtype)


def check_made(
    option: str,
    own: Callable[[Any], int],
    found: Callable[[Any, Any], int],
    updates: Any,
    kept: Any,
) -> None:
    """Raises if the state was made with another rank, level or the like.

    Args:
      option: its name.
      own: returns what the transformation has, of an update.
      found: returns what the state was made with, of an update and what is kept of it.
      updates: the tree of updates.
      kept: what is kept, a tree like it.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_box)
    for (path, update), own_kept in zip(
        pairs, treedef.flatten_up_to(kept), strict=True
    ):
        if isinstance(own_kept, optax.MaskedNode):
            continue
        now, then = own(unbox(update)), found(unbox(update), unbox(own_kept))
        if now != then:
            raise ValueError(
                f"The state was made with {option} {then} for leaf "
                f"{path_string(path)!r}, and this optimizer has {option} {now}. Use "
                f"{option}={then} to go on, or start anew with tx.init(params)."
            )


def _matrices(updates: Any, subspace: Any) -> list[Matrix | None]:
    """Returns how the bracket sees every leaf that is not masked."""

    def is_leaf(node: Any) -> bool:
        return is_box(node) or isinstance(node, optax.MaskedNode)

    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_leaf)
    # The view has an entry for every parameter, masked here or not.
    matrices = [None] * len(leaves)
    if subspace is not None:
        matrices = treedef.flatten_up_to(subspace.matrices)
    return [
        matrix
        for leaf, matrix in zip(leaves, matrices, strict=True)
        if not isinstance(leaf, optax.MaskedNode)
    ]


def require_matrices(called: str, tree: Any) -> None:
    """Raises ValueError if a leaf has fewer than two axes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box):
        if jnp.ndim(unbox(leaf)) < 2:
            raise ValueError(
                f"{called} works on matrices; leaf {path_string(path)!r} has "
                f"shape {jnp.shape(unbox(leaf))}. Give such leaves another "
                "transformation: full= in lro.project, or optax.partition."
            )
