"""The exact singular basis."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_optax.linalg.scaling import unit_peak


def leading_singular_vectors(
    gradient: Float[Array, "m n"], rank: int
) -> Float[Array, "m r"]:
    """Returns the first left singular vectors."""
    return left_singular_vectors(gradient)[0][:, :rank]


def left_singular_vectors(
    gradient: Float[Array, "m n"],
) -> tuple[Float[Array, "m s"], Float[Array, " s"]]:
    """Returns the s = min(m, n) left singular vectors, leading ones first.

    Args:
      gradient: any scale; must be finite and not zero.

    Returns:
      The vectors and the singular values, these up to a common power of two.
    """
    scaled, _ = unit_peak(gradient)
    left, values, _ = jnp.linalg.svd(scaled, full_matrices=False)
    return left, values
