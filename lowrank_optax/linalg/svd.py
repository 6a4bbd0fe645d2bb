"""The exact singular basis."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def leading_singular_vectors(
    gradient: Float[Array, "m n"], rank: int
) -> Float[Array, "m r"]:
    """Returns the first left singular vectors; max|G| = 1 keeps LAPACK in range."""
    scaled = gradient / jnp.max(jnp.abs(gradient))
    return jnp.linalg.svd(scaled, full_matrices=False)[0][:, :rank]
