"""LDAdam's projector: a power step on the momentum to come."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.leaves.moments import weight_seen
from lowrank_optax.linalg.bases import cholesky_qr, independence
from lowrank_optax.linalg.products import HIGHEST, Operand, outer, wide
from lowrank_optax.projectors._protocol import (
    At,
    OrthonormalProjector,
    TrackingProjector,
)

_TINY = float(jnp.finfo(jnp.float32).tiny)

# Where B has fewer than r directions, this much of the old basis stands in. Elsewhere
# nothing is mixed in: the sweep then repeats the authors' to rounding.
_MIX = 1e-3
_DEPENDENT = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class power_iteration(TrackingProjector, OrthonormalProjector):
    r"""Follows a mixture of momentum and gradient, one block power sweep a step.

    With old basis ``U [m, r]``, gradient ``A [m, n]`` and first moment ``mu [r, n]``
    after n steps::

        B  = rho U mu / (1 - b1^n) + (1 - rho) A
        U <- orth(B (B^T U))

    B is never formed. Where B has fewer than r directions the old basis fills in, and
    where the inner optimizer keeps no ``mu``, B = A.

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      b1: decay of the inner optimizer's first moment.
      rho: weight of the momentum; equal to ``b1``, B is the momentum after this step.
      update_proj_gap: steps from one refresh to the next; 1 is LDAdam.
      basis_dtype: storage dtype of the basis.
      cold_start: how the first basis is found: "power" or "svd".

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number.
      ValueError: if one is out of range, or at init with ``side="both"``, where the
        momentum does not live in the coordinates of one basis.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.power_iteration(rank=16).update_proj_gap
      1

    References:
      Robert et al., LDAdam: Adaptive Optimization from Low-Dimensional Gradient
      Statistics (2024), https://arxiv.org/abs/2410.16103

    Differences from the authors' code:
      * Shifted CholeskyQR in place of Householder QR: products only, columns keep
        their signs.
      * A B of rank below r leaves the other directions where they were.
    """

    b1: float | Array = 0.908
    rho: float | Array = 0.908
    update_proj_gap: int = dataclasses.field(default=1, kw_only=True)
    basis_dtype: Any = dataclasses.field(default=None, kw_only=True)

    reads_moments = True

    def follow(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """Sweeps once; every thin product is scaled into range."""
        del matrix
        peak = gradient.peak
        root = jnp.sqrt(peak)  # halfway, so that neither 1e-38 nor 1e38 leaves range
        # L = U^T B = rho m + (1 - rho) U^T A, since U^T U = I; all over the peak
        momentum = self._momentum(at, peak)
        low = gradient.down(old / root) / root  # U^T B / peak, in the end
        if momentum is not None:
            low = momentum + (1.0 - self.rho) * low
        size = jnp.maximum(jnp.max(jnp.abs(low)), _TINY)
        low = low / size
        # B L^T = rho U m L^T + (1 - rho) A L^T, up to a common factor
        y = gradient.across(low / root) / root
        if momentum is not None:
            inside = outer(momentum / size, low)
            y = (1.0 - self.rho) / size * y
            y = y + jnp.matmul(old, inside, precision=HIGHEST)
        y = y / jnp.maximum(jnp.max(jnp.abs(y)), _TINY)
        # Directions alone count; columns that all but vanish are noise and stay small.
        norms = jnp.linalg.norm(y, axis=0, keepdims=True)
        y = y / jnp.maximum(norms, 1e-4 * jnp.max(norms) + _TINY)
        mix = jnp.where(independence(y) < _DEPENDENT, _MIX, 0.0)
        return cholesky_qr(y + mix * old)

    def _momentum(self, at: At, peak: Array) -> Array | None:
        """Returns ``rho mu / (1 - b1^n) / peak``, the share of B in the old span.

        A momentum that is not finite is left out.
        """
        mu = next((group["mu"] for group in at.moments if "mu" in group), None)
        if mu is None:
            return None
        mu = wide(mu)
        seen = weight_seen(self.b1, at.count.astype(mu.dtype))
        momentum = self.rho * (mu / peak) / jnp.maximum(seen, _TINY)
        return jnp.where(jnp.all(jnp.isfinite(momentum)), momentum, 0.0)
