"""Leading singular subspaces by block power iteration."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowrank_optax.linalg.layout import as_stored, correlate, project
from lowrank_optax.linalg.orthogonalize import cholesky_qr
from lowrank_optax.linalg.scaling import unit_peak

# How much of the old basis is mixed into the new one before it is orthonormalized:
# it gives directions to a gradient of rank below r, at a negligible loss of energy.
_MIX = 1e-3


def block_power(
    gradient: Float[Array, "m n"],
    start: Float[Array, "m r"],
    sweeps: int | Int[Array, ""],
    transposed: bool = False,
) -> Float[Array, "m r"]:
    """Improves a basis of the leading left singular subspace.

    One sweep is ``Y = G (G^T P)``, its columns scaled to unit norm, ``Y + 1e-3 P``
    orthonormalized. Columns of ``Y`` that vanish (``G`` of rank below r) are not
    scaled up, so there the old basis fills in.

    Args:
      gradient: any scale; must be finite and not zero.
      start: columns to start from, orthonormal or random of about unit norm.
      sweeps: number of sweeps, may be traced.
      transposed: whether ``gradient`` is the transpose of a stored array (the result
        is the same, only faster when this is true).

    Returns:
      Orthonormal columns in the dtype of ``start``; NaN if ``start`` sees nothing of
      the gradient.
    """
    stored = as_stored(gradient, transposed)

    def sweep(_, basis):
        # Scaling both thin products keeps gradients of 1e-20 and 1e15 in range.
        low, _ = unit_peak(project(stored, basis, transposed))
        y, _ = unit_peak(correlate(stored, low, transposed))
        norms = jnp.linalg.norm(y, axis=0)
        y = y / jnp.maximum(norms, 1e-4 * jnp.max(norms))
        return cholesky_qr(y + _MIX * basis)

    return jax.lax.fori_loop(0, sweeps, sweep, start)


def random_start(key: Array, m: int, rank: int, dtype: Any) -> Float[Array, "m r"]:
    """Returns a Gaussian ``[m, r]`` with columns of about unit norm."""
    return jax.random.normal(key, (m, rank), dtype) / m**0.5
