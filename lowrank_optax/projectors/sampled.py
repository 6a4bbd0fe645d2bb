"""``sampled_svd``: singular vectors drawn with probabilities by singular value."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
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

    With ``sampling="unbiased"`` it is one, and of those of its kind the one with the
    least variance (PLUMAGE). Vector i is drawn with probability ``pi_i``, and its
    column is longer the rarer it is::

        pi_i = min(1, c sigma_i)          c such that they add up to r
        P    = the drawn columns of U, divided by sqrt(pi_i)
        E[P P^T X] = U U^T X              for any X, U U^T G = G

    ``E |P P^T G - G|^2`` is ``sum sigma_i^2 (1 / pi_i - 1)``, whatever is drawn
    together, and these ``pi`` minimize it. The draw is systematic: with one uniform u,
    vector i is in if a whole number lies between ``pi_1 + ... + pi_{i-1} + u`` and
    ``pi_1 + ... + pi_i + u``, which gives r of them, each with ``pi_i``. The basis is
    orthogonal and not orthonormal. Gradients until the next draw are weighted likewise,
    without bias, but a vector that was rare and is drawn then weighs ``1 / pi_i``. What
    divides by a second moment, as Adam, takes half of the weights out again.

    z, or u, is a function of the bracket's key, the leaf's path, the layer and the
    epoch: the same on all replicas and in resumed runs. A refresh needs ALL singular
    vectors, so no randomized shortcut exists; what ``lro.svd`` says of its cost and of
    a TPU holds here.

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one draw to the next, the first at step 0.
      basis_dtype: storage dtype of the basis.
      sampling: "sequential" (SARA), or "unbiased" (PLUMAGE).

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number.
      ValueError: if either is out of range, or ``sampling`` is something else.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.sampled_svd(rank=8).orthonormal
      True

    References:
      Breaking the Frozen Subspace: Importance Sampling for Low-Rank Optimization in
      LLM Pretraining (2025), https://arxiv.org/abs/2502.05790
      PLUMAGE: Probabilistic Low Rank Unbiased Min Variance Gradient Estimator for
      Efficient Large Model Training (2025), https://arxiv.org/abs/2505.18313
    """

    sampling: str = dataclasses.field(default="sequential", kw_only=True)

    def __post_init__(self):
        """Checks the choice, too."""
        super().__post_init__()
        _checks.choice("sampling", self.sampling, ("sequential", "unbiased"))

    @property
    def orthonormal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether columns have unit length, in float32's precision."""
        return self.sampling == "sequential" and super().orthonormal

    def compute(self, matrix: Matrix, gradient: Array, old: Array, at: At) -> Array:
        """Returns the drawn columns of U, or these with their weights."""
        del old
        vectors, sigma = left_singular_vectors(gradient)
        if self.sampling == "unbiased":
            pi = inclusion(sigma, matrix.rank)
            drawn = systematic(at.key, pi, matrix.rank)
            return vectors[:, drawn] / jnp.sqrt(pi[drawn])
        noise = jax.random.gumbel(at.key, sigma.shape, sigma.dtype)
        # Gumbel's trick for draws without replacement; log(0) is -inf and comes last.
        drawn = jax.lax.top_k(jnp.log(sigma) + noise, matrix.rank)[1]
        # `top_k` orders by the noise, too; sorted, the vectors stand by falling sigma.
        return vectors[:, jnp.sort(drawn)]


def inclusion(sigma: Array, r: int) -> Array:
    """Returns ``min(1, c sigma)``, whose sum is r, for falling ``sigma``.

    The k largest have 1, with the least k for which no other one gets more. Where fewer
    than r are not zero, those that are share the rest evenly.
    """
    # As small as this is never drawn unless it has to be.
    sigma = jnp.maximum(sigma, 1e-30 * sigma[0])
    rest = jnp.cumsum(sigma[::-1])[::-1]
    left = r - jnp.arange(r, dtype=sigma.dtype)
    k = jnp.argmax(left * sigma[:r] <= rest[:r])
    scaled = (r - k).astype(sigma.dtype) * (sigma / rest[k])
    return jnp.where(jnp.arange(len(sigma)) < k, 1, jnp.minimum(scaled, 1))


def systematic(key: Array, pi: Array, r: int) -> Array:
    """Draws r different indices, in order, each with its own probability ``pi``.

    In whole units of 2^-32, whose sums wrap around: an index is drawn where they do. A
    sum of many floats would be off by more than a small probability.
    """
    units = (pi * 2.0**32).astype(jnp.uint32)  # 1 is beyond the last, and counts below
    ends = jnp.cumsum(units, dtype=jnp.uint32) + jax.random.bits(key, (), jnp.uint32)
    drawn = (pi >= 1) | (ends < units)
    # r of them, up to the rounding of the last sum: then the largest step in or out.
    return jnp.sort(jax.lax.top_k(drawn.astype(jnp.int32), r)[1])
