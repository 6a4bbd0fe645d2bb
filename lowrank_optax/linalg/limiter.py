"""The norm-growth limiter: no norm grows faster than by a factor per step (Fira)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def limit_growth(
    norm: Array, least: Array | float, before: Array, growth: Any
) -> tuple[Array, Array]:
    """Limits what has this norm to ``growth`` times the norm before.

    A norm that does not exceed ``least`` (or is NaN, or infinite without one before it)
    counts as zero, and the first one after a zero is not limited.

    Args:
      norm: per matrix.
      least: what the norm has to exceed.
      before: the norm of the step before, after limiting.
      growth: largest ratio of the two.

    Returns:
      The factor (0 for a norm that counts as zero), and the norm with it.
    """
    largest = jnp.where(before > 0, growth * before, jnp.inf)
    counts = norm > least  # False where a NaN is involved
    limited = jnp.where(counts, jnp.minimum(norm, largest), 0.0)
    # An infinity that was the first would allow every later norm.
    limited = jnp.where(jnp.isfinite(limited), limited, 0.0)
    factor = jnp.where(counts, limited / jnp.where(counts, norm, 1.0), 0.0)
    return factor, limited.astype(before.dtype)
