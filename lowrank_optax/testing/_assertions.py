"""Assertions on bases, updates and states, in chex' manner."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np


def _tolerance(dtype: Any) -> float:
    """Bound on ``|P^T P - I|``: float32 work, or that rounded to a short dtype.

    A column of bfloat16 numbers, each 2^-9 off its value, has norm 1 to 4e-3; 2e-2
    leaves room for the sums of two such columns.
    """
    return 1e-5 if jnp.finfo(dtype).nmant >= 23 else 2e-2


def assert_orthonormal(basis: Any, atol: float | None = None) -> None:
    """Asserts that the columns of every basis are finite and orthonormal.

    Args:
      basis: an array ``[..., m, r]`` or a tree of such.
      atol: bound on ``max|P^T P - I|``; None is 1e-5 for float32 and 2e-2 for
        shorter storage dtypes.

    Raises:
      AssertionError: with the basis' path and the deviation.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.testing import assert_orthonormal
      >>> assert_orthonormal({"w": jnp.eye(4, 2)})
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(basis):
        bound = _tolerance(leaf.dtype) if atol is None else atol
        # In float64, so that the products add no rounding of their own.
        wide = np.asarray(leaf, np.float64)
        gram = np.swapaxes(wide, -1, -2) @ wide
        error = np.max(np.abs(gram - np.eye(gram.shape[-1])), initial=0.0)
        # Written so that NaN fails.
        if not error <= bound:
            raise AssertionError(
                f"Basis{jax.tree_util.keystr(path)} of shape {leaf.shape} is not "
                f"orthonormal: max|P^T P - I| is {error:.2e}, more than {bound:.0e}."
            )


def assert_in_span(
    update: Any, basis: Any, *, side: str = "left", rtol: float = 1e-5
) -> None:
    """Asserts that ``U = P P^T U``: nothing of an update lies outside the subspace.

    Args:
      update: an array ``[..., m, n]``.
      basis: an orthonormal basis ``[..., m, r]`` of its columns' space, or with
        ``side="right"`` ``[..., n, r]`` of its rows' space.
      side: "left" or "right".
      rtol: bound on ``|U - P P^T U| / |U|``, in Frobenius norms.

    Raises:
      AssertionError: with the part that lies outside.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.testing import assert_in_span
      >>> basis = jnp.eye(4, 2)
      >>> assert_in_span(basis @ jnp.ones((2, 3)), basis)
    """
    wide, basis = np.asarray(update, np.float64), np.asarray(basis, np.float64)
    if side == "right":
        wide = np.swapaxes(wide, -1, -2)
    outside = wide - basis @ (np.swapaxes(basis, -1, -2) @ wide)
    whole, part = np.linalg.norm(wide), np.linalg.norm(outside)
    if not part <= rtol * whole:
        raise AssertionError(
            f"The update leaves the subspace: {part:.2e} of its norm {whole:.2e} lies "
            f"outside, more than rtol={rtol:.0e}."
        )


def assert_bit_equal(tree: Any, other: Any) -> None:
    """Asserts that two trees hold the same bits: NaNs and signed zeros included.

    Args:
      tree: any tree of arrays.
      other: the tree to compare it with.

    Raises:
      AssertionError: if structure, shape, dtype or any bit differs.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax.testing import assert_bit_equal
      >>> assert_bit_equal({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    """
    chex.assert_trees_all_equal_structs(tree, other)
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, other)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True
    )
    for (path, leaf), counterpart in pairs:
        first, second = np.asarray(leaf), np.asarray(counterpart)
        # By bytes, because NaN equals nothing and 0.0 equals -0.0.
        if first.tobytes() != second.tobytes():
            raise AssertionError(
                f"Bits differ at {jax.tree_util.keystr(path)}:\n{first}\n{second}"
            )


def assert_state_stable(before: Any, after: Any) -> None:
    """Asserts that a step left structure, shapes, dtypes and weak types alone.

    What ``lax.scan`` and ``lax.cond`` ask of a state, and what keeps ``jit`` from
    tracing again.

    Args:
      before: a state, or its shapes.
      after: the state after a step.

    Raises:
      AssertionError: with the leaf that changed.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> from lowrank_optax.testing import assert_state_stable
      >>> tx, w = lro.galore(1e-2, rank=2), {"w": jnp.ones((16, 8))}
      >>> state = tx.init(w)
      >>> assert_state_stable(state, tx.update(w, state, w)[1])
    """
    chex.assert_trees_all_equal_structs(before, after)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    )
    for (path, old), new in pairs:
        if _type(old) != _type(new):
            raise AssertionError(
                f"The state changed its type at {jax.tree_util.keystr(path)}: "
                f"{_type(old)} became {_type(new)}."
            )


def _type(leaf: Any) -> tuple[Any, ...]:
    return tuple(leaf.shape), leaf.dtype, getattr(leaf, "weak_type", False)
