"""Projectors whose basis follows the gradient from one refresh to the next."""

import dataclasses

import jax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.bases import (
    block_power,
    leading_singular_vectors,
    random_start,
)
from lowrank_optax.linalg.products import Operand
from lowrank_optax.projectors._protocol import At, BasisProjector

COLD_SWEEPS = 12


@dataclasses.dataclass(frozen=True, eq=False)
class TrackingProjector(BasisProjector):
    """Starts from the gradient's leading singular subspace, then follows it.

    Attributes:
      cold_start: how the first basis is found: "power", a randomized range finder of
        12 sweeps that costs no SVD, or "svd", the singular vectors themselves.
    """

    cold_start: str = dataclasses.field(default="power", kw_only=True)

    starts = ("power", "svd")

    def __post_init__(self):
        """Checks the choice."""
        super().__post_init__()
        _checks.choice("cold_start", self.cold_start, self.starts)

    def renew(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """Starts or follows."""
        return jax.lax.cond(
            at.cold,
            lambda: self.find(matrix, gradient, at),
            lambda: self.follow(matrix, gradient, old, at),
        )

    def find(self, matrix: Matrix, gradient: Operand, at: At) -> Array:
        """Returns the first basis ``[m, r]``."""
        if self.cold_start == "svd":
            return leading_singular_vectors(gradient.array, matrix.rank)
        start = random_start(at.key, matrix.m, matrix.rank, gradient.dtype)
        return block_power(gradient, start, COLD_SWEEPS)

    def follow(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """Returns the next basis."""
        raise NotImplementedError
