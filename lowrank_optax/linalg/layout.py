"""Dtypes to compute in, and products in the operands' stored order.

XLA folds a transpose into the product it feeds or follows, and on CPU a product of
row-major operands is faster than one of folded transposes. So thin matrices are
transposed for real, and the m x n ones contracted as they are stored.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST


def wide(x: Array) -> Array:
    """Returns ``x`` in float32, or in float64 if it is that already."""
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def turn(thin: Float[Array, "*b m r"]) -> Float[Array, "*b r m"]:
    """Transposes a thin operand before the product that reads it."""
    return jax.lax.optimization_barrier(jnp.swapaxes(thin, -1, -2))


def turned(product: Float[Array, "*b m r"]) -> Float[Array, "*b r m"]:
    """Transposes a thin product after it was formed."""
    return jnp.swapaxes(jax.lax.optimization_barrier(product), -1, -2)


def as_stored(gradient: Float[Array, "m n"], transposed: bool) -> Array:
    """Returns the array behind a view: ``[n, m]`` if the view is its transpose.

    Taken before a loop or branch, whose operands are materialized.
    """
    return gradient.T if transposed else gradient


def project(
    stored: Array, basis: Float[Array, "m r"], transposed: bool
) -> Float[Array, "r n"]:
    """Returns ``P^T G`` at the highest precision."""
    if transposed:
        return turned(jnp.matmul(stored, basis, precision=HIGHEST))
    return jnp.matmul(turn(basis), stored, precision=HIGHEST)


def correlate(
    stored: Array, low: Float[Array, "r n"], transposed: bool
) -> Float[Array, "m r"]:
    """Returns ``G low^T`` at the highest precision."""
    if transposed:
        low = jax.lax.optimization_barrier(low)
        return turned(jnp.matmul(low, stored, precision=HIGHEST))
    return jnp.matmul(stored, turn(low), precision=HIGHEST)


def gram(columns: Float[Array, "*b m r"]) -> Float[Array, "*b r r"]:
    """Returns ``Y^T Y`` at the highest precision."""
    return jnp.matmul(turn(columns), columns, precision=HIGHEST)


def by_blocks(low: Array, right: Array, precision: Any = None) -> Array:
    """Returns ``[X_1 Q, X_2 Q, ...]`` of blocks ``low = [X_1, X_2, ...]``."""
    blocks = low.reshape((*low.shape[:-1], -1, right.shape[-2]))
    out = jnp.einsum("...rkn,...ns->...rks", blocks, right, precision=precision)
    return out.reshape((*low.shape[:-1], -1))
