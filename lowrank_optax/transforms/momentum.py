"""``momentum``: the mean of the gradients so far, looked at a step ahead."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.leaves.moments import weight_seen


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
