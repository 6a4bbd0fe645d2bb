"""Lion's two averages, with the sign left to a later stage."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array


def scale_by_lion_interpolation(
    b1: float | Array = 0.9, b2: float | Array = 0.99, mu_dtype: Any = None
) -> optax.GradientTransformation:
    """Lion without its sign.

    From a gradient g::

        c  = b1 mu + (1 - b1) g          the update
        mu = b2 mu + (1 - b2) g

    ``optax.scale_by_sign`` behind it makes it ``optax.scale_by_lion``. In a bracket the
    sign may stand behind the backprojection instead, where every element of the weights
    then moves equally far: the Lion form of Online Subspace Descent.

    Args:
      b1: weight of the average in the update.
      b2: decay of the average.
      mu_dtype: storage dtype of the average, None for the parameter's.

    Returns:
      A transformation with Optax' ``ScaleByLionState``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_lion_interpolation(b1=0.5, b2=0.75)
      >>> g = {"w": jnp.array([2.0, -4.0])}
      >>> updates, state = tx.update(g, tx.init(g))
      >>> updates["w"], state.mu["w"]
      (Array([ 1., -2.], dtype=float32), Array([ 0.5, -1. ], dtype=float32))

    References:
      Chen et al., Symbolic Discovery of Optimization Algorithms (2023),
      https://arxiv.org/abs/2302.06675
    """

    def init(params: Any) -> optax.ScaleByLionState:
        mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype), params)
        return optax.ScaleByLionState(jnp.zeros([], jnp.int32), mu)

    def update(updates, state, params=None):
        del params

        def mix(decay, like):
            return jax.tree.map(
                lambda g, m, x: (decay * m + (1.0 - decay) * g).astype(x.dtype),
                updates,
                state.mu,
                like,
            )

        count = jnp.asarray(optax.safe_increment(state.count))
        # Both averages start from the old mu, so their order does not matter.
        mu = mix(b2, state.mu)
        return mix(b1, updates), optax.ScaleByLionState(count, mu)

    return optax.GradientTransformation(init, update)
