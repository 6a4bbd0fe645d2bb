"""The discrete cosine transform as matrices, whole or a few columns of one.

``Q[i, j] = sqrt(2 / n) c_i cos(pi i (2 j + 1) / (2 n))`` with ``c_0 = sqrt(1/2)`` and
``c_i = 1`` is orthogonal. Its columns are the basis vectors of "dct3", its rows those
of "dct2": two different bases of the same space.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowrank_optax.linalg.products import wider

KINDS = ("dct3", "dct2")

LARGEST = 2**20
"""Largest n whose angles are exact in 32 bits."""

_SPLIT = 10  # bits of the frequency multiplied first


def dct_matrix(n: int, kind: str = "dct3", dtype: Any = jnp.float32) -> Array:
    """Returns the orthogonal ``[n, n]`` whose columns are the basis vectors.

    Args:
      n: size.
      kind: "dct3" is Q, "dct2" its transpose.
      dtype: dtype of the result.

    Returns:
      ``Q`` or ``Q^T``.
    """
    return dct_columns(n, jnp.arange(n), kind, dtype)


def dct_columns(
    n: int, indices: Int[Array, " r"], kind: str = "dct3", dtype: Any = jnp.float32
) -> Float[Array, "{n} r"]:
    """Returns some columns of ``dct_matrix`` without forming the rest.

    ``i (2 j + 1) mod 4 n`` is taken in integers and brought to the first eighth of the
    circle, so that an entry's error does not grow with n.

    Args:
      n: size, at most 2^20.
      indices: which columns.
      kind: "dct3" or "dct2".
      dtype: dtype of the result.

    Returns:
      The columns.

    Raises:
      ValueError: if n is larger.
    """
    if n > LARGEST:
        raise ValueError(
            f"A cosine basis of {n} entries is beyond the {LARGEST} whose angles are "
            "exact; project the other side of the matrix, or leave it full."
        )
    work = wider(jnp.float32, dtype)
    rows = jnp.arange(n, dtype=jnp.uint32)[:, None]
    columns = indices.astype(jnp.uint32)[None, :]
    frequency, sample = (rows, columns) if kind == "dct3" else (columns, rows)
    cosine = _cosine(_times(frequency, 2 * sample + 1, 4 * n), n, work)
    share = jnp.where(frequency == 0, 1, 2).astype(work) / n
    return (jnp.sqrt(share) * cosine).astype(dtype)


def _times(a: Array, b: Array, period: int) -> Array:
    """Returns ``a b mod period`` for a < 2^20, b < 2^21, period <= 2^22."""
    # All in 32 bits: 10 bits of a times 21 of b, and 22 of a remainder moved up by 10.
    high = ((a >> _SPLIT) * b % period << _SPLIT) % period
    low = (a & (2**_SPLIT - 1)) * b % period
    return (high + low) % period


def _cosine(quarter: Array, n: int, dtype: Any) -> Array:
    """Returns ``cos(pi k / (2 n))`` of integers k in [0, 4 n)."""
    k = jnp.minimum(quarter, 4 * n - quarter)  # cos(-x) = cos(x): now in [0, 2 n]
    sign = jnp.where(k > n, -1, 1).astype(dtype)
    k = jnp.minimum(k, 2 * n - k)  # cos(pi - x) = -cos(x): now in [0, n]
    angle = jnp.pi / (2 * n)
    small = jnp.cos(k.astype(dtype) * angle)
    near = jnp.sin((n - k).astype(dtype) * angle)  # a small cosine keeps its digits
    return sign * jnp.where(2 * k > n, near, small)
