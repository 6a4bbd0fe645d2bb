"""``scale_by_rank_one_rms``: the second moment as a product of two vectors (RACS)."""

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
from lowrank_optax.linalg.limiter import limit_growth
from lowrank_optax.linalg.products import unit_peak, wide, wider
from lowrank_optax.transforms._matrices import map_matrices, require_matrices


class ScaleByRankOneRmsState(NamedTuple):
    """State of ``scale_by_rank_one_rms``.

    Attributes:
      count: steps taken.
      row: running mean of the rows' factors, ``[..., m]``.
      col: running mean of the columns' factors, ``[..., n]``.
      norm: that of the last direction of every matrix, after limiting; ``()`` without
        a limit.
    """

    count: Array
    row: Any
    col: Any
    norm: Any


def scale_by_rank_one_rms(
    decay: float | Array = 0.9,
    growth_limit: float | Array | None = 1.01,
    iterations: int = 5,
    debias: bool = True,
    axis: int = -2,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides every matrix by the root of a rank-one estimate of its squares.

    Of a matrix ``G``, with ``A = G * G`` (entry by entry), i for inputs and j for
    outputs, from ``q_j = 1``, ``iterations`` times::

        s_i = sum_j A_ij q_j / sum q^2            the best s for this q
        q_j = sum_i A_ij s_i / sum s^2            the best q for this s

    which converges to the nearest matrix of rank one, ``A ~ s q^T``. Then::

        s' = decay s' + (1 - decay) s             q' likewise
        U  = G / sqrt(s' q'^T)                    both corrected for their bias
        U <- U min(1, growth_limit |U_before| / |U|)

    State: ``m + n + 1`` float32 numbers. The size of G does not matter as long as its
    squares are in range, as with Adam. Where a row or a column has never had a
    gradient, U is zero. A norm of zero limits nothing.

    The last two axes of a leaf are a matrix, leading axes are batch.

    Args:
      decay: of both means. May be traced.
      growth_limit: largest ratio of one ``|U|`` to the one before it; None for no limit
        and no state. May be traced.
      iterations: of the fit (5, ours: the source was not at hand).
      debias: whether both means are corrected for their start at zero. Without, the
        first step is ``1 / (1 - decay)`` times as long.
      axis: the input axis outside a bracket: -2 for Flax kernels ``(in, out)``, -1 for
        torch's weights. Inside one, dimension numbers say it.

    Returns:
      The transformation.

    Raises:
      TypeError: if ``iterations`` is not a Python int.
      ValueError: if ``axis`` is neither, or at init if a leaf has fewer than two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_rank_one_rms()
      >>> g = {"w": jnp.outer(jnp.array([1.0, -10.0]), jnp.array([1e-3, 1.0, 3.0]))}
      >>> updates, state = tx.update(g, tx.init(g))
      >>> updates["w"].round(3).tolist(), state.row["w"].shape, state.col["w"].shape
      ([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]], (2,), (3,))

    References:
      Gong et al., Towards Efficient Optimizer Design for LLM via Structured Fisher
      Approximation with a Low-Rank Extension (2025), https://arxiv.org/abs/2502.07752
    """
    _checks.positive_int("iterations", iterations)
    _checks.choice("axis", axis, (-2, -1))

    def init(params: Any) -> ScaleByRankOneRmsState:
        require_matrices("lro.scale_by_rank_one_rms", params)

        def over(*gone: int) -> Any:
            def kept(leaf: Any) -> Any:
                p = unbox(leaf)
                # As a sum has it: sharded like the parameter, and each device's own if
                # that is.
                zeros = jnp.zeros_like(jnp.sum(p, gone), wider(jnp.float32, p.dtype))
                left = sorted(set(range(p.ndim)) - {axis % p.ndim for axis in gone})
                return rebox(leaf, zeros, tuple((axis,) for axis in left))

            return hidden(params, jax.tree.map(kept, params, is_leaf=is_box))

        norm = () if growth_limit is None else over(-2, -1)
        return ScaleByRankOneRmsState(
            jnp.zeros([], jnp.int32), over(-1), over(-2), norm
        )

    def update(updates, state, params=None, *, subspace=None, **extra_args):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        seen = weight_seen(decay, count.astype(jnp.float32)) if debias else 1.0
        one = functools.partial(
            _one, decay=decay, seen=seen, limit=growth_limit, iterations=iterations
        )
        # Without a limit the norm is an empty tuple, and no tree.
        norms = [] if growth_limit is None else [state.norm]
        out, row, col, *norms = map_matrices(
            one, updates, state.row, state.col, *norms, subspace=subspace, axis=axis
        )
        return out, ScaleByRankOneRmsState(count, row, col, norms[0] if norms else ())

    return optax.GradientTransformationExtraArgs(init, update)


def _one(
    update: Array,
    row: Array,
    col: Array,
    *norm: Array,
    axis: int,
    decay: Any,
    seen: Any,
    limit: Any,
    iterations: int,
) -> tuple[Array, ...]:
    """Returns one leaf's direction and what is kept of it."""
    if not update.size:
        return (update, row, col, *norm)
    factors = _fitted(wide(update), iterations, axis)
    kept = [
        decay * old + (1 - decay) * jnp.squeeze(new, gone)
        for old, new, gone in zip((row, col), factors, (-1, -2), strict=True)
    ]
    rows, columns = kept[0][..., :, None] / seen, kept[1][..., None, :] / seen
    # Root by root, as the product of two small ones would be zero.
    out = wide(update) * _inverse_root(rows) * _inverse_root(columns)
    if norm:
        size = jnp.sqrt(jnp.sum(jnp.square(out), (-2, -1)))
        factor, limited = limit_growth(size, 0.0, norm[0], limit)
        out, norm = out * factor[..., None, None], (limited,)
    return (out.astype(update.dtype), *kept, *norm)


def _inverse_root(x: Array) -> Array:
    return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1)), 0)


def _fitted(gradient: Array, iterations: int, axis: int) -> tuple[Array, Array]:
    """Returns factors ``[..., m, 1]`` and ``[..., 1, n]`` of the gradient's squares."""
    # Squares of squares are summed below, and those of 1e10 would be out of range.
    x, size = unit_peak(gradient)
    squares, other = x * x, -3 - axis

    def best(axis: int, others: Array) -> Array:
        """Returns the factors that are left when ``axis`` is summed over."""
        weight = jnp.sum(others * others, axis, keepdims=True)
        total = jnp.sum(squares * others, axis, keepdims=True)
        return total / jnp.where(weight > 0, weight, 1)

    def step(_: Any, of_outputs: Array) -> Array:
        return best(axis, best(other, of_outputs))

    start = jnp.ones_like(jnp.sum(squares, axis, keepdims=True))
    of_outputs = jax.lax.fori_loop(0, iterations - 1, step, start)
    of_inputs = best(other, of_outputs)
    of_outputs = best(axis, of_inputs)
    # The gradient's size goes with the inputs: q is one of numbers near 1.
    of_inputs = of_inputs * size * size
    return (of_inputs, of_outputs) if axis == -2 else (of_outputs, of_inputs)
