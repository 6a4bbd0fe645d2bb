"""The leading singular subspace by warm-started block power steps (the default)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.bases import block_power, random_start
from lowrank_optax.linalg.products import Operand
from lowrank_optax.projectors._protocol import At, OrthonormalProjector


@dataclasses.dataclass(frozen=True, eq=False)
class power(OrthonormalProjector):
    """Tracks the leading singular subspace by block power iteration.

    A refresh is one sweep from the old basis, ``P <- orth(G G^T P)``; the first one
    is a randomized range finder: ``cold_sweeps`` sweeps from a random basis. Only
    matrix products and an ``r x r`` Cholesky factorization, all at the highest
    precision: about two projections' worth of work, no SVD, compiles anywhere and
    shards without gathering the gradient.

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one refresh to the next, the first at step 0.
      basis_dtype: storage dtype of the basis.
      cold_sweeps: sweeps of the first refresh.
      blocks: into how many equal parts the kept axis falls, such as the heads of an
        attention kernel: an int, or a callable of the leaf's path. The basis is then
        formed from one part, at ``1 / blocks`` of the cost, and serves them all
        (GaLore+). An axis that ``blocks`` does not divide counts as one part.
      block: which part: "first" (the average of all where that is zero), or "mean".

    Raises:
      TypeError: if ``rank``, ``update_proj_gap``, ``cold_sweeps`` or ``blocks`` is not
        a Python number.
      ValueError: if one is out of range or ``block`` is unknown.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.power(rank=0.25).cold_sweeps
      12

    References:
      Halko, Martinsson, Tropp, Finding structure with randomness (2011).
      GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection (2024),
      https://arxiv.org/abs/2412.19820
    """

    cold_sweeps: int = 12
    _: dataclasses.KW_ONLY
    blocks: int | Callable[[str], int] = 1
    block: str = "first"

    def __post_init__(self):
        """Checks the numbers."""
        super().__post_init__()
        _checks.positive_int("cold_sweeps", self.cold_sweeps)
        _checks.choice("block", self.block, ("first", "mean"))
        if not callable(self.blocks):
            _checks.positive_int("blocks", self.blocks)

    def for_leaf(self, path: str) -> "power":
        """Asks how many blocks the leaf has."""
        if not callable(self.blocks):
            return self
        blocks = _checks.positive_int("blocks", self.blocks(path))
        return self.having(blocks=blocks)

    def renew(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """One loop serves both starts, so only one factorization is compiled."""
        gradient = self._part(matrix, gradient)
        start = jax.lax.cond(
            at.cold,
            lambda: random_start(at.key, matrix.m, matrix.rank, old.dtype),
            lambda: old,
        )
        sweeps = jnp.where(at.cold, self.cold_sweeps, 1)
        return block_power(gradient, start, sweeps)

    def _part(self, matrix: Matrix, gradient: Operand) -> Operand:
        """Returns the part of the gradient that the basis is formed from."""
        blocks = self.blocks
        assert not callable(blocks)  # `for_leaf` has asked
        if blocks == 1 or matrix.n % blocks:
            return gradient
        parts = gradient.array.reshape((matrix.m, blocks, -1))
        # No subspace follows from a part that is zero, such as a head without gradient.
        part = mean = jnp.mean(parts, 1)
        if self.block == "first":
            part = jnp.where(jnp.any(parts[:, 0] != 0), parts[:, 0], mean)
        return Operand.of(part, matrix.transposed)
