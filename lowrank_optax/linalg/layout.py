"""Products in the operands' stored order.

XLA folds a transpose into the product it feeds or follows, and on CPU a product of
row-major operands is faster than one of folded transposes. So thin matrices are
transposed for real, and the m x n ones contracted as they are stored.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def turn(thin: Float[Array, "*b m r"]) -> Float[Array, "*b r m"]:
    """Transposes a thin operand before the product that reads it."""
    return jax.lax.optimization_barrier(jnp.swapaxes(thin, -1, -2))


def turned(product: Float[Array, "*b m r"]) -> Float[Array, "*b r m"]:
    """Transposes a thin product after it was formed."""
    return jnp.swapaxes(jax.lax.optimization_barrier(product), -1, -2)
