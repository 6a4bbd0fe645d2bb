"""Leading singular subspaces by block power iteration."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowrank_optax.linalg.layout import turn, turned
from lowrank_optax.linalg.orthogonalize import HIGHEST, cholesky_qr

# How much of the old basis is mixed into the new one before it is orthonormalized:
# it gives directions to a gradient of rank below r, at a negligible loss of energy.
_MIX = 1e-3


def block_power(
    gradient: Float[Array, "m n"],
    start: Float[Array, "m r"],
    sweeps: int | Int[Array, ""],
    transposed: bool = False,
) -> Float[Array, "m r"]:
    """Improves an orthonormal basis of the leading left singular subspace.

    One sweep is ``Y = G (G^T P) / max|G|^2``, its columns scaled to unit norm,
    ``Y + 1e-3 P`` orthonormalized. Columns of ``Y`` that vanish (``G`` of rank below
    r) are not scaled up, so there the old basis fills in.

    Args:
      gradient: any scale; must be finite and not zero.
      start: orthonormal columns to start from.
      sweeps: number of sweeps, may be traced.
      transposed: whether ``gradient`` is the transpose of a stored array (the result
        is the same, only faster when this is true).

    Returns:
      Orthonormal columns in the dtype of ``start``.
    """
    peak = jnp.max(jnp.abs(gradient)).astype(start.dtype)

    def sweep(_, basis):
        # Scaling the thin products keeps 1e-20 and 1e15 in range without an m x n
        # temporary. (Not low / peak / peak: XLA would divide by peak^2.)
        if transposed:
            low = jnp.matmul(gradient.T, basis, precision=HIGHEST)
            low = low / jnp.max(jnp.abs(low))
            y = turned(jnp.matmul(turn(low), gradient.T, precision=HIGHEST)) / peak
        else:
            low = jnp.matmul(turn(basis), gradient, precision=HIGHEST)
            low = low / jnp.max(jnp.abs(low))
            y = jnp.matmul(gradient, turn(low), precision=HIGHEST) / peak
        norms = jnp.linalg.norm(y, axis=0)
        y = y / jnp.maximum(norms, 1e-4 * jnp.max(norms))
        return cholesky_qr(y + _MIX * basis)

    return jax.lax.fori_loop(0, sweeps, sweep, start)


def random_orthonormal(key: Array, m: int, r: int) -> Float[Array, "m r"]:
    """Returns ``r`` orthonormal columns spanning a uniformly random subspace."""
    return cholesky_qr(jax.random.normal(key, (m, r), jnp.float32))
