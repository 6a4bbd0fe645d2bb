"""``normalize_outputs``: steps as long for one output of a matrix as for another."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.boxes import is_box, rebox, unbox
from lowrank_optax.leaves.moments import weight_seen
from lowrank_optax.leaves.stand_in import hidden
from lowrank_optax.linalg.products import wide, wider
from lowrank_optax.transforms._matrices import map_matrices, require_matrices


class NormalizeOutputsState(NamedTuple):
    """State of ``normalize_outputs``.

    Attributes:
      count: steps taken.
      row: running mean of every row's mean square, ``[..., m]`` where rows are the
        outputs, else ``[..., 0]``.
      col: that of every column, ``[..., n]`` where columns are.
    """

    count: Array
    row: Any
    col: Any


def normalize_outputs(
    decay: float | Array = 0.95, axis: int = -2
) -> optax.GradientTransformationExtraArgs:
    r"""Divides every output's entries by the root of their mean square over time.

    For a matrix ``X`` with inputs i and outputs j::

        v_j = decay v_j + (1 - decay) mean_i X_ij^2
        Y   = X_ij / sqrt(v_j)                          v corrected for its bias
        Y  <- Y |X| / |Y|                               Frobenius norms

    The step that comes in is as long as the one that goes out, but its length is spread
    evenly over the outputs. Behind ``lro.orthogonalize`` this is NorMuon's rule. State:
    one float32 number for every output.

    The last two axes of a leaf are a matrix, leading axes are batch. An output that has
    never had a step gets none, and X = 0 gives 0.

    Args:
      decay: of the mean (0.95 in the paper). May be traced.
      axis: the input axis outside a bracket: -2 for Flax kernels ``(in, out)``, -1 for
        torch's weights. Inside one, dimension numbers say it.

    Returns:
      The transformation.

    Raises:
      ValueError: if ``axis`` is neither, or at init if a leaf has fewer than two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.normalize_outputs()
      >>> g = {"w": jnp.array([[3.0, 0.1], [3.0, -0.1]])}
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> print(updates["w"].round(2))
      [[ 2.12  2.12]
       [ 2.12 -2.12]]

    References:
      Li et al., NorMuon: Making Muon more efficient and scalable (2025),
      https://arxiv.org/abs/2510.05491
    """
    _checks.choice("axis", axis, (-2, -1))

    def init(params: Any) -> NormalizeOutputsState:
        require_matrices("lro.normalize_outputs", params)

        def over(axis: int) -> Any:
            def kept(leaf: Any) -> Any:
                p = unbox(leaf)
                # As a mean has it: sharded like the parameter, and each device's own
                # if that is.
                zeros = jnp.zeros_like(jnp.sum(p, axis), wider(jnp.float32, p.dtype))
                left = [i for i in range(p.ndim) if i != axis % p.ndim]
                return rebox(leaf, zeros, tuple((i,) for i in left))

            return hidden(params, jax.tree.map(kept, params, is_leaf=is_box))

        return NormalizeOutputsState(jnp.zeros([], jnp.int32), over(-1), over(-2))

    def update(updates, state, params=None, *, subspace=None, **extra_args):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        seen = weight_seen(decay, count.astype(jnp.float32))
        one = functools.partial(_one, decay=decay, seen=seen)
        out, row, col = map_matrices(
            one, updates, state.row, state.col, subspace=subspace, axis=axis
        )
        return out, NormalizeOutputsState(count, row, col)

    return optax.GradientTransformationExtraArgs(init, update)


def _one(
    update: Array, row: Array, col: Array, *, axis: int, decay: Any, seen: Any
) -> tuple[Array, Array, Array]:
    """Returns one leaf's direction and what is kept of it."""
    if not update.size:
        return update, row, col
    x = wide(update)
    squares = jnp.square(x)
    # Which axis has the outputs is known when a bracket says it, and not before: of
    # both means one is used.
    row = decay * row + (1 - decay) * jnp.mean(squares, -1)
    col = decay * col + (1 - decay) * jnp.mean(squares, -2)
    size = (col[..., None, :] if axis == -2 else row[..., :, None]) / seen
    out = x * jnp.where(size > 0, jax.lax.rsqrt(jnp.where(size > 0, size, 1)), 0)
    before = jnp.sum(squares, (-2, -1), keepdims=True)
    after = jnp.sum(jnp.square(out), (-2, -1), keepdims=True)
    out = out * jnp.sqrt(before / jnp.where(after > 0, after, 1))
    return out.astype(update.dtype), row, col
