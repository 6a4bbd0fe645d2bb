"""Steps on the Grassmann manifold: subspaces turned along geodesics.

A subspace is an orthonormal basis ``S [m, r]``. Orthonormal ``U [m, k]`` with
``S^T U = 0`` and orthonormal ``V [r, k]`` name a geodesic that turns the directions
``S V`` towards ``U``, all by the same angle.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_optax.linalg.bases import cholesky_qr, newton_schulz
from lowrank_optax.linalg.products import HIGHEST, Operand, inner

_TINY = float(jnp.finfo(jnp.float32).tiny)

# Squarings of the r x r Gram matrix: 2^10 power steps.
_SQUARINGS = 10

# A slope below this share of |S^T G|^2 is rounding: the gradient lies in the span.
_ROUNDING = 1e-6


class Seen(NamedTuple):
    """A gradient seen from a subspace, in units of its largest entry.

    Attributes:
      gradient: G ``[m, n]``, of any scale.
      peak: its largest absolute entry.
      low: ``A = S^T G / peak``.
    """

    gradient: Operand
    peak: Float[Array, ""]
    low: Float[Array, "r n"]


def see(gradient: Array | Operand, basis: Float[Array, "m r"]) -> Seen:
    """Projects a finite gradient that is not zero."""
    gradient = Operand.of(gradient)
    peak = gradient.peak
    return Seen(gradient, peak, gradient.down(basis) / peak)


def captured(seen: Seen, m: int) -> Float[Array, ""]:
    """Returns the share of G that the subspace sees, beyond what a random one would.

    ``(c - r / m) / (1 - r / m)`` of ``c = |S^T G|^2 / |G|^2``: 1 if the subspace holds
    all of G, and 0 on average if it has nothing to do with it. Needs r < m.
    """
    whole = jnp.sum(jnp.square(seen.gradient.stored / seen.peak))
    chance = seen.low.shape[0] / m
    return (jnp.sum(jnp.square(seen.low)) / whole - chance) / (1.0 - chance)


class Geodesic(NamedTuple):
    """Where a geodesic leads.

    Attributes:
      u: directions outside the subspace, ``[m, k]``.
      v: the coordinates that turn towards them, ``[r, k]``.
      slope: size of the tangent ``dF/dS`` along it for a gradient whose largest entry
        is 1; 0 where there is none to follow.
    """

    u: Float[Array, "m k"]
    v: Float[Array, "r k"]
    slope: Float[Array, ""]


def descent(
    basis: Float[Array, "m r"],
    seen: Seen,
) -> Geodesic:
    """Returns the steepest rank-1 descent of ``F(S) = min_A |S A - G|^2``.

    With ``A = S^T G`` and ``R = G - S A``, ``dF/dS = -2 R A^T``. The residual is never
    formed: ``R A^T = (I - S S^T) G A^T``. Its leading singular pair is u, v, and
    ``slope = 2 sigma``; u is projected once more, to be orthogonal to S in floating
    point.

    Args:
      basis: the subspace.
      seen: the gradient and its projection on this subspace.
    """
    # G A^T, then R A^T = (I - S S^T) G A^T, which is -1/2 dF/dS: u points downhill.
    product = seen.gradient.across(seen.low) / seen.peak
    tangent = horizontal(basis, product)
    v = leading_direction(tangent)
    moved = horizontal(basis, jnp.matmul(tangent, v[:, None], precision=HIGHEST))
    sigma = jnp.linalg.norm(moved)
    u = moved / jnp.maximum(sigma, _TINY)
    follow = sigma > _ROUNDING * jnp.sum(jnp.square(seen.low))
    return Geodesic(u, v[:, None], jnp.where(follow, 2.0 * sigma, 0.0))


def random_direction(key: Array, basis: Float[Array, "m r"]) -> Geodesic:
    """Returns a random geodesic that turns as many directions as there is room for.

    All singular values of its tangent are equal, which is what those of a Gaussian
    tangent concentrate to when m >> r.
    """
    m, r = basis.shape
    k = min(r, m - r)
    outside, inside = jax.random.split(key)
    u = cholesky_qr(horizontal(basis, jax.random.normal(outside, (m, k), basis.dtype)))
    # If all directions turn, U V^T is distributed as U, so V need not be random.
    v = jnp.eye(r, dtype=basis.dtype)
    if k < r:
        v = cholesky_qr(jax.random.normal(inside, (r, k), basis.dtype))
    return Geodesic(u, v, jnp.ones([], basis.dtype))


def best_angle(geodesic: Geodesic, seen: Seen) -> Float[Array, ""]:
    """Returns the angle in (-pi/2, pi/2] at which the subspace holds most of G.

    Along the geodesic ``|S(a)^T G|^2`` is ``cos^2 a p + 2 cos a sin a c + sin^2 a q``
    up to a constant, with ``p = |V^T A|^2``, ``q = |U^T G|^2`` and
    ``c = <V^T A, U^T G>``, so its maximum is at ``a = atan2(2 c, p - q) / 2``.
    """
    inside = jnp.matmul(geodesic.v.T, seen.low, precision=HIGHEST)
    outside = seen.gradient.down(geodesic.u) / seen.peak
    p, q, c = jnp.sum(inside**2), jnp.sum(outside**2), jnp.sum(inside * outside)
    return 0.5 * jnp.arctan2(2.0 * c, p - q)


def turn_along(
    geodesic: Geodesic, basis: Float[Array, "m r"], angle: Float[Array, ""]
) -> Float[Array, "m r"]:
    """Returns ``S + [(cos a - 1) S V + sin a U] V^T``, orthonormal again.

    ``cos a - 1`` as ``-2 sin^2(a/2)``, and one Newton-Schulz sweep against drift.
    """
    turned = jnp.matmul(basis, geodesic.v, precision=HIGHEST)
    change = jnp.sin(angle) * geodesic.u - 2.0 * jnp.sin(0.5 * angle) ** 2 * turned
    moved = basis + jnp.matmul(change, geodesic.v.T, precision=HIGHEST)
    return newton_schulz(moved)


def horizontal(
    basis: Float[Array, "m r"], x: Float[Array, "m k"]
) -> Float[Array, "m k"]:
    """Returns ``(I - S S^T) X``."""
    inside = inner(basis, x)
    return x - jnp.matmul(basis, inside, precision=HIGHEST)


def leading_direction(x: Float[Array, "m r"]) -> Float[Array, "r"]:
    """Returns the leading right singular vector of ``x`` (zeros for zeros).

    Power iteration on the ``r x r`` Gram matrix, by squaring it.
    """
    gram = inner(x, x)

    def square(_, gram):
        # With trace 1 the largest eigenvalue is in [1/r, 1]: no square leaves range.
        gram = gram / jnp.maximum(jnp.trace(gram), _TINY)
        return jnp.matmul(gram, gram, precision=HIGHEST)

    gram = jax.lax.fori_loop(0, _SQUARINGS, square, gram)
    # The limit is a multiple of v v^T, and this is its longest column.
    column = gram[:, jnp.argmax(jnp.diagonal(gram))]
    column = column / jnp.maximum(jnp.max(jnp.abs(column)), _TINY)
    return column / jnp.maximum(jnp.linalg.norm(column), _TINY)
