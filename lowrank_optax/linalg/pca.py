"""The loss of principal component analysis, and its gradient by thin products."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_optax.linalg.products import HIGHEST, Operand, gram, outer


class Size(NamedTuple):
    """A norm as a product, since ``|G|`` can exceed float32 where no entry does."""

    peak: Array | float = 1.0
    ratio: Array | float = 1.0


def frobenius(matrix: Array | Operand) -> Size:
    """Returns ``|G|``; both factors are 1 for a zero matrix."""
    stored = Operand.of(matrix).stored  # a norm does not mind the order
    peak = jnp.max(jnp.abs(stored))
    peak = jnp.where(peak > 0, peak, 1.0)
    ratio = jnp.sqrt(jnp.sum(jnp.square(stored / peak)))
    return Size(peak, jnp.where(ratio > 0, ratio, 1.0))


def pca_gradient(
    gradient: Array | Operand,
    basis: Float[Array, "m r"],
    low: Float[Array, "r n"],
    size: Size,
) -> Float[Array, "m r"]:
    """Returns the derivative by P of ``|P P^T G - G|^2 / size^2``.

    With ``A = P^T G / size`` and ``S = P^T P`` it is ``2 (P A A^T + G A^T (S - 2 I) /
    size)``: one product with G, and nothing of size m x n.

    Args:
      gradient: G ``[m, n]``.
      basis: P, any columns.
      low: ``P^T G``, which whoever asks has at hand.
      size: what G is divided by.
    """
    gradient = Operand.of(gradient)
    # By halves, so that neither 1e-38 nor 1e38 leaves range, and by factors: XLA makes
    # one divisor of two in a row, and the product may overflow.
    half, share = 1.0 / jnp.sqrt(size.peak), 1.0 / size.ratio
    low = low * half * half * share
    mixed = gradient.across(low * half) * half * share
    # Now low is A, mixed is G A^T / size, and excess is S - 2 I.
    inside = outer(low, low)
    excess = gram(basis) - 2.0 * jnp.eye(basis.shape[1], dtype=basis.dtype)
    pulled = jnp.matmul(basis, inside, precision=HIGHEST)
    return 2.0 * (pulled + jnp.matmul(mixed, excess, precision=HIGHEST))


def penalty_gradient(basis: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """Returns the derivative by P of ``|P^T P - I|^2``, ``4 P (P^T P - I)``."""
    excess = gram(basis) - jnp.eye(basis.shape[1], dtype=basis.dtype)
    return 4.0 * jnp.matmul(basis, excess, precision=HIGHEST)
