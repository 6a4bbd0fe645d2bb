"""Adam as the released low-rank optimizers have it, in pieces."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.leaves.moments import weight_seen


class ScaleByBiasCorrectionState(NamedTuple):
    """Number of steps taken."""

    count: Array


def scale_by_raw_adam(
    b1: float | Array = 0.9, b2: float | Array = 0.999, eps: float | Array = 1e-6
) -> optax.GradientTransformation:
    """Adam's direction from uncorrected moments, ``mu / (sqrt(nu) + eps)``.

    Together with ``scale_by_bias_correction`` this is the AdamW of the released
    GaLore, Fira, APOLLO and COAP codes, whose ``eps`` stands on the uncorrected
    ``sqrt(nu)``: an effective ``eps / sqrt(1 - b2^t)``.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root.

    Returns:
      A transformation with Optax' ``ScaleByAdamState``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_raw_adam(b1=0.5, b2=0.75, eps=0.0)
      >>> g = {"w": jnp.array([2.0, 4.0])}
      >>> tx.update(g, tx.init(g))[0]["w"]
      Array([1., 1.], dtype=float32)
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        # Two trees of zeros: a buffer that stands in two places cannot be donated.
        return optax.ScaleByAdamState(
            jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params)
        )

    def update(updates, state, params=None):
        del params
        mu = optax.tree_utils.tree_update_moment(updates, state.mu, b1, 1)
        nu = optax.tree_utils.tree_update_moment(updates, state.nu, b2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def scale_by_bias_correction(
    b1: float | Array = 0.9, b2: float | Array = 0.999
) -> optax.GradientTransformation:
    """Multiplies every leaf by ``sqrt(1 - b2^t) / (1 - b1^t)``, t from 1.

    The released codes keep this factor outside everything else, limiters included.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.

    Returns:
      The transformation.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_bias_correction(b1=0.5, b2=0.75)
      >>> g = {"w": jnp.ones(1)}
      >>> round(float(tx.update(g, tx.init(g))[0]["w"][0]), 6)
      1.0
    """

    def init(params: Any) -> ScaleByBiasCorrectionState:
        del params
        return ScaleByBiasCorrectionState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = count.astype(float)  # float64 where that is enabled
        factor = jnp.sqrt(weight_seen(b2, steps)) / weight_seen(b1, steps)
        updates = jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
        return updates, ScaleByBiasCorrectionState(count)

    return optax.GradientTransformation(init, update)
