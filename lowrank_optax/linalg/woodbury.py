"""A damped solve with a matrix of low rank, through its small Gram matrix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowrank_optax.linalg.products import HIGHEST


def solve_member(
    units: Float[Array, "*b s r n"],
    norms: Float[Array, "*b s"],
    member: Int[Array, ""],
    damping: float | Float[Array, ""],
) -> Float[Array, "*b r n"]:
    r"""Returns ``(damping I + H H^T)^{-1} h_k`` for one of H's own columns.

    The columns of ``H`` are ``h_i = norms_i * vec(units_i)``. As ``h_k = H e_k``,
    the result is ``H (damping I + H^T H)^{-1} e_k``: unlike Woodbury's form, no
    difference of large numbers. With ``a_i = sqrt(damping + |h_i|^2)`` the matrix is
    solved as ``D M D``, ``D = diag(a)``, where M has a unit diagonal whatever the
    scales of damping and columns, so nothing overflows or vanishes.

    Args:
      units: columns of about unit norm, or zero.
      norms: their lengths.
      member: the index k.
      damping: positive. In the coordinate of a column it acts as at least
        ``8 eps s a_i^2``, which exceeds the Gram matrix' rounding error, so that its
        Cholesky factor exists.

    Returns:
      One matrix, in the dtype of ``norms``.
    """
    s, dtype = norms.shape[-1], norms.dtype
    units, root = units.astype(dtype), jnp.sqrt(jnp.asarray(damping, dtype))
    a = jnp.hypot(root, norms)
    a = jnp.where(a > 0, a, 1.0)
    share, rest = norms / a, jnp.square(root / a)
    rest = jnp.maximum(rest, 8 * s * float(jnp.finfo(dtype).eps))
    flat = units.reshape((*norms.shape, -1))
    cosines = jnp.einsum("...ik,...jk->...ij", flat, flat, precision=HIGHEST)
    # M = D^-1 (damping I + H^T H) D^-1, whose diagonal is share^2 + rest = 1
    mixed = share[..., :, None] * cosines * share[..., None, :]
    mixed += rest[..., :, None] * jnp.eye(s, dtype=dtype)
    one = jnp.broadcast_to(jnp.arange(s) == member, norms.shape).astype(dtype)
    factor = jnp.linalg.cholesky(mixed)
    weights = jax.scipy.linalg.cho_solve((factor, True), one[..., None])[..., 0]
    # H D^-1 = units * share on the left, and D^-1 e_k = e_k / a_k on the right
    weights = weights * share / jnp.take(a, member, axis=-1)[..., None]
    solved = jnp.einsum("...s,...sk->...k", weights, flat, precision=HIGHEST)
    return solved.reshape((*units.shape[:-3], *units.shape[-2:]))
