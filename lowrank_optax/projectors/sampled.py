"""Singular vectors drawn with probability proportional to their singular values."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.bases import left_singular_vectors
from lowrank_optax.projectors._protocol import At, OrthonormalProjector


@dataclasses.dataclass(frozen=True, eq=False)
class sampled_svd(OrthonormalProjector):
    r"""Projects on ``r`` singular vectors drawn by importance.

    ``G = U diag(sigma) V^T``; r of the s = min(m, n) columns of U are drawn one after
    the other without replacement, each with probability proportional to its sigma among
    those left::

        P = U[:, sort(top_r(log(sigma) + z))]      z_i independent standard Gumbel

    The leading vectors are likely and the rest has a chance, so that the subspace does
    not freeze. The drawn columns stand by falling sigma. A vector with sigma = 0 is
    drawn only if fewer than r others exist; with r = s all are, and the basis is
    ``lro.svd``'s. The projection is not reweighted, so ``P P^T G`` is no unbiased
    estimate of G.

    z is a function of the bracket's key, the leaf's path, the layer and the epoch: the
    same on all replicas and in resumed runs. A refresh needs ALL singular vectors, so
    no randomized shortcut exists; what ``lro.svd`` says of its cost and of a TPU holds
    here.

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one draw to the next, the first at step 0.
      basis_dtype: storage dtype of the basis.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number.
      ValueError: if either is out of range.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.sampled_svd(rank=8).orthonormal
      True

    References:
      Breaking the Frozen Subspace: Importance Sampling for Low-Rank Optimization in
      LLM Pretraining (2025), https://arxiv.org/abs/2502.05790
    """

    def compute(self, matrix: Matrix, gradient: Array, old: Array, at: At) -> Array:
        """Returns the drawn columns of U."""
        del old
        vectors, sigma = left_singular_vectors(gradient)
        noise = jax.random.gumbel(at.key, sigma.shape, sigma.dtype)
        # Gumbel's trick for draws without replacement; log(0) is -inf and comes last.
        drawn = jax.lax.top_k(jnp.log(sigma) + noise, matrix.rank)[1]
        # `top_k` orders by the noise, too; sorted, the vectors stand by falling sigma.
        return vectors[:, jnp.sort(drawn)]
