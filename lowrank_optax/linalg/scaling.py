"""Matrices brought into a range where squares neither overflow nor vanish."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def unit_peak(x: Float[Array, "*b m n"]) -> tuple[Array, Array]:
    """Splits every matrix into one whose largest element is near 1, and a factor.

    The factor is a power of two, so nothing is rounded. Dividing by the largest element
    would not do: a compiler multiplies by the reciprocal instead, and that of 1e38 is
    too small for a float32.

    Returns:
      ``(y, factor)`` with ``X = factor * Y``; max|Y| is in [0.5, 4), or 0 if X is zero.
    """
    peak = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    most = jnp.finfo(x.dtype).maxexp - 2
    exponent = jnp.clip(jnp.frexp(peak)[1], -most, most)
    one = jnp.ones((), x.dtype)
    return x * jnp.ldexp(one, -exponent), jnp.ldexp(one, exponent)


def unit_norm(x: Float[Array, "*b m n"]) -> tuple[Array, Float[Array, "*b"]]:
    """Returns ``X / |X|`` and ``|X|`` of every matrix; zero is zero times zero."""
    x, factor = unit_peak(x)
    size = jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))
    norm = jnp.minimum(factor * size, jnp.finfo(x.dtype).max)
    return x / jnp.where(size == 0, 1.0, size), norm[..., 0, 0]
