"""Polar factors: the nearest matrices with orthonormal rows or columns."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_optax.linalg.bases import newton_schulz
from lowrank_optax.linalg.products import HIGHEST, unit_norm, unit_peak


def polar_svd(x: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
    """Returns ``U V^T`` of ``X = U S V^T``, without the directions where S vanishes.

    A singular value below ``eps sqrt(max(m, n))`` of the largest counts as zero: what
    rounding makes of a zero one is several times less. The matrices of a stack run one
    by one: XLA's batched SVD can wait forever for its own threads on a small CPU.
    """
    shape, dtype = x.shape, x.dtype

    def one(x: Array) -> Array:
        left, values, right = jnp.linalg.svd(x, full_matrices=False)
        least = jnp.finfo(dtype).eps * max(shape[-2:]) ** 0.5 * values[0]
        # Not `<`: a zero matrix has the bound 0, and has to give zero.
        left = jnp.where(values <= least, 0.0, left)
        return jnp.matmul(left, right, precision=HIGHEST)

    stack = unit_peak(x)[0].reshape((-1, *shape[-2:]))
    return jax.lax.map(one, stack).reshape(shape)


def polar_newton_schulz(
    x: Float[Array, "*b m n"], steps: int
) -> Float[Array, "*b m n"]:
    """Returns what ``steps`` of ``Y <- Y (3 I - Y^T Y) / 2`` make of ``X / |X|``.

    A step takes every singular value s to ``s (3 - s^2) / 2``: 1.5 s where s is
    small, quadratically close to 1 near 1.
    """
    wide = x.shape[-2] < x.shape[-1]
    # Divided by the Frobenius norm, no singular value exceeds 1, and the iteration
    # converges. A wide matrix is turned, so that the smaller Gram matrix is formed.
    y, _ = unit_norm(x)
    y = jnp.swapaxes(y, -1, -2) if wide else y
    y = jax.lax.fori_loop(0, steps, lambda _, y: newton_schulz(y), y)
    return jnp.swapaxes(y, -1, -2) if wide else y


def polar_quintic(
    x: Float[Array, "*b m n"], coefficients: Sequence[tuple[float, float, float]]
) -> Float[Array, "*b m n"]:
    """Returns ``X / |X|`` after steps ``Y <- a Y + b Y Y^T Y + c (Y Y^T)^2 Y``.

    One step for every ``(a, b, c)``, each of which takes a singular value s to
    ``a s + b s^3 + c s^5``. Coefficients that raise small values fast do not converge:
    Muon's leave them between 0.68 and 1.14. So products are at the precision that is
    JAX's default, or the user's.
    """
    tall = x.shape[-2] > x.shape[-1]
    y, _ = unit_norm(x)
    # A tall matrix is turned, so that the smaller Gram matrix is formed.
    y = jnp.swapaxes(y, -1, -2) if tall else y
    table = jnp.asarray(coefficients, y.dtype)

    def step(i: Array, y: Array) -> Array:
        a, b, c = table[i]
        products = jnp.matmul(y, jnp.swapaxes(y, -1, -2))
        inner = b * products + jnp.matmul(c * products, products)
        return a * y + jnp.matmul(inner, y)

    y = jax.lax.fori_loop(0, len(coefficients), step, y)
    return jnp.swapaxes(y, -1, -2) if tall else y
