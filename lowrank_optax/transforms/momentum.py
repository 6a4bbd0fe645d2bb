"""``momentum``: the mean of the gradients; ``row_momentum``: a sum, row by row."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.leaves.moments import weight_seen
from lowrank_optax.transforms._matrices import map_matrices, require_matrices


class MomentumState(NamedTuple):
    """State of ``momentum``.

    Attributes:
      count: steps taken.
      mu: mean of the gradients, biased towards its start at zero.
    """

    count: Array
    mu: Any


def momentum(
    decay: float | Array = 0.95, nesterov: bool = True
) -> optax.GradientTransformation:
    r"""Replaces the gradient by its exponential mean, corrected for its bias.

    At step t = 1, 2, ...::

        mu = decay mu + (1 - decay) G
        N  = mu / (1 - decay^t)                                           nesterov=False
        N  = decay mu / (1 - decay^(t+1)) + (1 - decay) G / (1 - decay^t)

    The momentum of ``optax.contrib.muon``, by itself: so it may stand in
    ``lro.quantize_state``, and in a bracket, which keep it in fewer bits.

    Args:
      decay: of the mean. May be traced.
      nesterov: whether the gradient counts once more.

    Returns:
      A transformation with a ``MomentumState``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.momentum(0.5, nesterov=False)
      >>> updates, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
      >>> float(updates[0]), float(state.mu[0])
      (4.0, 2.0)
    """

    def init(params: Any) -> MomentumState:
        return MomentumState(
            jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = count.astype(jnp.float32)
        mu = jax.tree.map(lambda g, m: decay * m + (1 - decay) * g, updates, state.mu)
        seen = weight_seen(decay, steps)

        def ahead(g: Array, m: Array) -> Array:
            if not nesterov:
                return (m / seen).astype(g.dtype)
            ahead = decay * m / weight_seen(decay, steps + 1.0)
            return (ahead + (1 - decay) * g / seen).astype(g.dtype)

        return jax.tree.map(ahead, updates, mu), MomentumState(count, mu)

    return optax.GradientTransformation(init, update)


def row_momentum(
    fraction: float = 0.25, decay: float | Array = 0.95, axis: int = -2
) -> optax.GradientTransformationExtraArgs:
    r"""Sums gradients, and lets the largest rows of the sum through (Dion2).

    For every matrix, with its shorter side as rows (the outputs of a square one)::

        M <- M + G
        S  = the ceil(fraction rows) rows of M of the largest sum |M_ij|
        N  = rows S of M, zeros elsewhere
        M <- M, its rows S times decay

    In front of ``lro.orthogonalize`` in the place of ``lro.momentum``: the polar factor
    of N is that of the rows in S. A row that is not chosen adds up until it is.

    The last two axes of a leaf are a matrix, leading axes are batch.

    Args:
      fraction: of the rows, in (0, 1].
      decay: of the rows that were let through (0.95 in the code). May be traced.
      axis: the input axis outside a bracket: -2 for Flax kernels ``(in, out)``, -1 for
        torch's weights. Inside one, dimension numbers say it.

    Returns:
      A transformation with a ``MomentumState``.

    Raises:
      ValueError: if ``fraction`` is out of range, or at init if a leaf has fewer than
        two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.row_momentum(0.5, decay=0.5, axis=-1)
      >>> g = jnp.array([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
      >>> updates, state = tx.update(g, tx.init(g))
      >>> updates.tolist(), state.mu.tolist()
      ([[0.0, 0.0, 0.0], [0.0, 2.0, 2.0]], [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])

    References:
      Dion2: A Simple Method to Shrink Matrix in Muon (2025),
      https://arxiv.org/abs/2512.16928
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"`fraction` must lie in (0, 1], got {fraction}.")

    def init(params: Any) -> MomentumState:
        require_matrices("lro.row_momentum", params)
        return MomentumState(
            jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)
        )

    def one(update: Array, mu: Array, axis: int) -> tuple[Array, Array]:
        mu = mu + update
        output = -3 - axis
        rows = output if mu.shape[output] <= mu.shape[axis] else axis
        size = mu.shape[rows]
        norms = jnp.sum(jnp.abs(mu), -3 - rows)
        # Places by falling norm: exactly so many, where some are equal, too.
        places = jnp.argsort(jnp.argsort(-norms, -1), -1)
        chosen = jnp.expand_dims(places < math.ceil(fraction * size), -3 - rows)
        let = jnp.where(chosen, mu, 0)
        return let.astype(update.dtype), jnp.where(chosen, decay * mu, mu)

    def update(updates, state, params=None, *, subspace=None, **extra_args):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        out, mu = map_matrices(one, updates, state.mu, subspace=subspace, axis=axis)
        return out, MomentumState(count, mu)

    return optax.GradientTransformationExtraArgs(init, update)
