"""``power_momentum``: a sum of gradients, r directions of which leave at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.boxes import is_box, rebox, unbox
from lowrank_optax.leaves.stand_in import hidden
from lowrank_optax.linalg.bases import independent
from lowrank_optax.linalg.products import HIGHEST, unit_peak, wide, wider
from lowrank_optax.transforms._matrices import (
    check_made,
    drawn_for,
    map_matrices,
    rank_rule,
    require_matrices,
)

# Of the largest column of M^T P: what float32 makes of a direction that M has not.
_NOISE = 128.0


class PowerMomentumState(NamedTuple):
    """State of ``power_momentum``.

    Attributes:
      count: steps taken.
      mu: M, what has not left yet of the sum of the gradients.
      directions: Q, float32, ``[..., k, r]`` with k the shorter side of the matrix.
    """

    count: Array
    mu: Any
    directions: Any


def power_momentum(
    rank: int | float = 0.25,
    decay: float | Array = 0.95,
    *,
    axis: int = -2,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Sums gradients, and lets r orthonormal directions of the sum out (Dion).

    For every matrix, with its longer side as rows (the outputs of a square one)::

        M <- M + G                                        [k', k],  k' >= k
        P  = orth(M Q)                                    [k', r]   a power step
        R  = M^T P                                        [k, r]
        M <- M - (1 - decay) P R^T                        the rest stays: error feedback
        Q <- the columns of R, divided by their norms
        N  = sqrt(outputs / inputs) P Q^T

    N is near the polar factor of the part of M that has rank r, which Q follows from
    step to step. Only ``M Q`` and ``M^T P`` are sums over a side of the matrix, so that
    a mesh sends matrices of r columns, where a polar factor needs all of M. At full
    rank every direction decays by ``decay`` in a step, and M is a momentum.

    A direction that M does not have, as where it is zero or of lower rank, has no place
    in N, and keeps its column of Q. So the size of a gradient does not matter.

    The last two axes of a leaf are a matrix, leading axes are batch.

    Args:
      rank: r, an int or a fraction of the shorter side; no more than that side.
      decay: of the directions that leave, the paper's mu (0.95 in its code). May be
        traced.
      axis: the input axis outside a bracket: -2 for Flax kernels ``(in, out)``, -1 for
        torch's weights. Inside one, dimension numbers say it.
      seed: of the normal numbers that Q starts with.

    Returns:
      A transformation with a ``PowerMomentumState``.

    Raises:
      TypeError: if ``rank`` is not a Python number.
      ValueError: if it or ``axis`` is out of range, or at init if a leaf has fewer than
        two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.power_momentum(1, decay=0.5)
      >>> g = jnp.array([[0.0, 3.0], [0.0, 0.0], [0.0, 4.0]])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> state.directions.shape, bool(jnp.allclose(state.mu, g / 2))
      ((2, 1), True)

    References:
      Ahn et al., Dion: Distributed Orthonormalized Updates (2025),
      https://arxiv.org/abs/2504.05295
    """
    _checks.choice("axis", axis, (-2, -1))
    rule = rank_rule("lro.power_momentum", rank)

    def rank_of(p: Any) -> int:
        return min(rule(p), *p.shape[-2:])

    def init(params: Any) -> PowerMomentumState:
        require_matrices("lro.power_momentum", params)

        def directions(path: Any, leaf: Any) -> Any:
            p = unbox(leaf)
            rows = _rows(p.shape, axis)
            # As a sum has it: sharded like the parameter, and each device's own if
            # that is.
            side = jnp.zeros_like(jnp.sum(p, rows), wider(jnp.float32, p.dtype))
            shape = (*side.shape, rank_of(p))
            # Columns of about unit norm.
            drawn = drawn_for("power", seed, path, shape, side.dtype)
            drawn = drawn / max(1, side.shape[-1]) ** 0.5 + side[..., None]
            batch = tuple((i,) for i in range(p.ndim - 2))
            return rebox(leaf, drawn, (*batch, (p.ndim - 3 - rows,), ()))

        drawn = jax.tree_util.tree_map_with_path(directions, params, is_leaf=is_box)
        count, mu = jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)
        return PowerMomentumState(count, mu, hidden(params, drawn))

    def one(update: Array, mu: Array, q: Array, axis: int) -> tuple[Array, ...]:
        if not update.size:
            return update, mu, q
        total = wide(mu) + wide(update)
        turned = _rows(total.shape, axis) == -1
        x, size = unit_peak(_swap(total) if turned else total)
        p = independent(_product(x, q.astype(x.dtype)))
        low = _product(_swap(x), p)
        norms = jnp.sqrt(jnp.sum(low * low, -2, keepdims=True))
        least = _NOISE * jnp.finfo(x.dtype).eps * jnp.max(norms, -1, keepdims=True)
        found = norms > least
        unit = jnp.where(found, low / jnp.where(found, norms, 1), 0)
        # As the matrix is stored: the large product is not turned around.
        lifted = (p, unit) if not turned else (unit, p)
        out = _product(lifted[0], _swap(lifted[1]))
        taken = (p, low) if not turned else (low, p)
        taken = size * _product(taken[0], _swap(taken[1]))
        factor = (total.shape[-3 - axis] / total.shape[axis]) ** 0.5
        left = total - (1 - decay) * taken
        return (
            (factor * out).astype(update.dtype),
            left.astype(mu.dtype),
            jnp.where(found, unit, q).astype(q.dtype),
        )

    def update(updates, state, params=None, *, subspace=None, **extra_args):
        del params, extra_args
        check_made("rank", rank_of, lambda _, q: q.shape[-1], updates, state.directions)
        count = jnp.asarray(optax.safe_increment(state.count))
        out, mu, directions = map_matrices(
            one,
            updates,
            state.mu,
            state.directions,
            subspace=subspace,
            axis=axis,
            in_turn=True,
        )
        return out, PowerMomentumState(count, mu, directions)

    return optax.GradientTransformationExtraArgs(init, update)


def _rows(shape: tuple[int, ...], axis: int) -> int:
    """Returns the axis, -2 or -1, along which P lies: the longer, else the outputs."""
    output = -3 - axis
    return axis if shape[axis] > shape[output] else output


def _swap(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=HIGHEST)
