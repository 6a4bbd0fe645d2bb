"""``cholesky_qr`` and ``block_power``: orthonormal bases from matrix products alone.

Beside them stand the exact singular vectors, the one basis here that needs an SVD, and
``Rotation``, the change from one basis to another in the coordinates of moments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from lowrank_optax.linalg.products import (
    HIGHEST,
    Operand,
    by_blocks,
    gram,
    outer,
    unit_peak,
)

# Multiples of eps * trace(Y^T Y) added to the Gram matrix in each sweep. The first
# shift exceeds the Gram matrix' own rounding error, so that its Cholesky factor
# exists for any Y; the second catches what a condition number near 1/eps leaves.
_SHIFTS = (8.0, 2.0, 0.0)

# How much of the old basis is mixed into the new one before it is orthonormalized:
# it gives directions to a gradient of rank below r, at a negligible loss of energy.
_MIX = 1e-3


def cholesky_qr(y: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """Orthonormalizes the columns of ``y`` by shifted CholeskyQR3.

    Each sweep computes ``L L^T = Y^T Y + s I`` and ``Y <- Y L^{-T}``. The triangular
    factor has a positive diagonal, so every column keeps the sign of its component
    along the column it came from.

    Only an ``r x r`` matrix is factorized and every product contracts over ``m``:
    sharded over ``m`` this needs r-sized all-reduces and gathers nothing.

    Args:
      y: float32 or float64 columns, norms within a few orders of magnitude.

    Returns:
      Columns with ``|Q^T Q - I| <= 1e-5`` in float32 for condition numbers of ``y``
      up to about 1e5; NaN in place of a basis that could not be formed.

    References:
      Fukaya et al., Shifted Cholesky QR for computing the QR factorization of
      ill-conditioned matrices (2020).
    """
    eye = jnp.eye(y.shape[1], dtype=y.dtype)
    shifts = jnp.asarray(_SHIFTS, y.dtype) * jnp.finfo(y.dtype).eps

    def sweep(i, y):
        products = gram(y)
        products += shifts[i] * jnp.trace(products) * eye
        # Inverting the r x r factor turns the tall solve into a product. What the
        # inverse loses in orthogonality the next sweep restores; the span is exact.
        inverse = solve_triangular(jnp.linalg.cholesky(products), eye, lower=True)
        return outer(y, inverse)

    # A loop, so that one factorization is compiled and not three.
    return jax.lax.fori_loop(0, len(_SHIFTS), sweep, y)


def independence(y: Float[Array, "m r"]) -> Float[Array, ""]:
    """Returns the least share of a unit column that lies outside those before it.

    Resolves shares down to about 1e-3, the root of float32's precision; 0 where the
    columns are dependent beyond that.
    """
    share = jnp.min(jnp.diagonal(jnp.linalg.cholesky(gram(y))))
    # A Gram matrix that is singular to rounding has NaN for a Cholesky factor.
    return jnp.where(jnp.isfinite(share), share, 0.0)


def independent(y: Float[Array, "*b m r"]) -> Float[Array, "*b m r"]:
    """Orthonormalizes columns in their order, with zeros for those that depend.

    What a QR factorization returns, up to signs, of columns of which each has something
    of its own: more than ``32 eps`` of it, 4e-6 in float32. Where one has less, a QR
    factorization returns a direction that is made of rounding; here there is none.

    As in ``cholesky_qr`` nothing larger than ``r x r`` is factorized, and every product
    contracts over ``m``.
    """
    r, eps = y.shape[-1], jnp.finfo(y.dtype).eps
    eye, least = jnp.eye(r, dtype=y.dtype), 32 * eps
    # Of the Gram matrix' trace, r. The last sweep may meet dependent columns, too.
    shifts = jnp.asarray((8.0, 4.0, 2.0), y.dtype) * eps * r

    def sweep(i, state):
        y, norms, share, _ = state
        # What a column has of its own, however little, became larger in the sweep
        # before, and the column shorter. What is rounding goes before it can take
        # from the columns behind it.
        some = share > least
        y = jnp.where(some, y / jnp.where(some, norms, 1), 0)
        factor = jnp.linalg.cholesky(gram(y) + jnp.where(some, shifts[i], 1) * eye)
        inverse = jax.lax.linalg.triangular_solve(
            factor, jnp.broadcast_to(eye, factor.shape), left_side=True, lower=True
        )
        own = jnp.diagonal(factor, axis1=-2, axis2=-1)[..., None, :]
        y = outer(y, inverse)
        norms = jnp.sqrt(jnp.sum(y * y, -2, keepdims=True))
        return y, norms, share * own * norms, own

    norms = jnp.sqrt(jnp.sum(y * y, -2, keepdims=True))
    share = (norms > 0).astype(y.dtype)
    start = y, norms, share, share
    y, _, share, own = jax.lax.fori_loop(0, len(shifts), sweep, start)
    # After three sweeps an independent column is orthogonal to all before it.
    return jnp.where((own > 0.5) & (share > least), y, 0)


def newton_schulz(y: Float[Array, "*b m r"]) -> Float[Array, "*b m r"]:
    """Brings nearly orthonormal columns back: ``Y (3 I - Y^T Y) / 2``.

    One sweep of the Newton-Schulz iteration for the polar factor, the orthonormal
    matrix nearest to ``y``: a defect ``d = |Y^T Y - I|`` becomes about ``0.75 d^2``,
    and no column changes its sign. Needs singular values below ``sqrt(3)``.
    """
    return 1.5 * y - 0.5 * jnp.matmul(y, gram(y), precision=HIGHEST)


def block_power(
    gradient: Array | Operand,
    start: Float[Array, "m r"],
    sweeps: int | Int[Array, ""],
) -> Float[Array, "m r"]:
    """Improves a basis of the leading left singular subspace.

    One sweep is ``Y = G (G^T P)``, its columns scaled to unit norm, ``Y + 1e-3 P``
    orthonormalized. Columns of ``Y`` that vanish (``G`` of rank below r) are not
    scaled up, so there the old basis fills in.

    Args:
      gradient: G ``[m, n]`` of any scale; must be finite and not zero.
      start: columns to start from, orthonormal or random of about unit norm.
      sweeps: number of sweeps, may be traced.

    Returns:
      Orthonormal columns in the dtype of ``start``; NaN if ``start`` sees nothing of
      the gradient.
    """
    gradient = Operand.of(gradient)

    def sweep(_, basis):
        # Scaling both thin products keeps gradients of 1e-20 and 1e15 in range.
        low, _ = unit_peak(gradient.down(basis))
        y, _ = unit_peak(gradient.across(low))
        norms = jnp.linalg.norm(y, axis=0, keepdims=True)
        y = y / jnp.maximum(norms, 1e-4 * jnp.max(norms))
        return cholesky_qr(y + _MIX * basis)

    return jax.lax.fori_loop(0, sweeps, sweep, start)


def random_start(key: Array, m: int, rank: int, dtype: Any) -> Float[Array, "m r"]:
    """Returns a Gaussian ``[m, r]`` with columns of about unit norm."""
    return jax.random.normal(key, (m, rank), dtype) / m**0.5


def outside(basis: Float[Array, "m r"], columns: int, key: Array) -> Array:
    """Returns random orthonormal columns that are orthogonal to an orthonormal basis.

    ``columns`` are at most ``m - r``.
    """
    drawn = random_start(key, basis.shape[0], columns, basis.dtype)
    # Twice, as what is left of the first projection is of float32's rounding.
    for _ in range(2):
        inside = jnp.matmul(basis.T, drawn, precision=HIGHEST)
        drawn = drawn - jnp.matmul(basis, inside, precision=HIGHEST)
        drawn = cholesky_qr(drawn)
    return drawn


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


class Rotation(NamedTuple):
    """A change of basis in coordinates: ``R_new = left R_old (right^T)``."""

    left: Array
    right: Array | None = None

    def apply(self, low: Array) -> Array:
        """Rotates ``[r, n]`` coordinates."""
        low = jnp.matmul(self.left, low, precision=HIGHEST)
        if self.right is None:
            return low
        return by_blocks(low, self.right.T, HIGHEST)

    def diagonal(self, low: Array) -> Array:
        """Returns the factors with which coordinates like ``low`` stay in place."""
        left = jnp.diagonal(self.left)[:, None]
        if self.right is None:
            return left
        blocks = low.shape[-1] // self.right.shape[-1]
        return left * jnp.tile(jnp.diagonal(self.right), blocks)

    def apply_rest(self, low: Array) -> Array:
        """Returns ``apply(low) - diagonal * low``, without cancellation on one side."""
        if self.right is not None:
            return self.apply(low) - self.diagonal(low) * low
        rest = self.left - jnp.diag(jnp.diagonal(self.left))
        return jnp.matmul(rest, low, precision=HIGHEST)

    def squared(self) -> "Rotation":
        """Returns the rotation with squared entries, for variances."""
        right = None if self.right is None else self.right**2
        return Rotation(self.left**2, right)
