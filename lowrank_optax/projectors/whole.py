"""``whole``: every matrix as it is, for what keeps little of a full matrix itself."""

import dataclasses
from typing import Any

from jaxtyping import Array

from lowrank_optax.leaves.matrix import Matrix, Parts
from lowrank_optax.linalg.products import Operand
from lowrank_optax.projectors._protocol import At, Projector


@dataclasses.dataclass(frozen=True, eq=False)
class whole(Projector):
    r"""Projects on nothing smaller: ``P = I``, ``R = G``.

    For transformations that work on matrices and keep little of them, or nothing, as
    ``lro.normalize_rows_and_columns``, or one momentum, as ``lro.muon``. From the
    bracket they have its choice of leaves and its view of them: stacks, experts,
    attention kernels and convolutions as ``[*batch, m, n]`` in stored order, and which
    of the two axes is the input, in ``subspace.matrices``. Nothing is stored, found or
    turned around. The matrices' rows are those of the stored array, so
    ``lro.project``'s ``side`` keeps its default.

    Raises:
      ValueError: at init, if ``lro.project`` was given a ``side`` besides.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> bracket = lro.project(lro.whole(), full=optax.scale_by_adam())
      >>> tx = lro.chain(bracket, lro.orthogonalize(), lro.backproject(scale=0.1))
      >>> state = tx.init({"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)})
      >>> state.full_state.mu["bias"].shape, state.inner_state
      ((32,), EmptyState())
    """

    # Every projector has these two fields, and here they say nothing.
    rank: Any = dataclasses.field(default=None, init=False, repr=False)
    update_proj_gap: int = dataclasses.field(default=1, init=False, repr=False)

    stores_basis = False
    orthonormal = True
    entrywise = True
    # What is done to a matrix is why it is chosen, whatever a full leaf would take.
    smaller = False

    def __post_init__(self):
        """Has nothing to check: the base class would check the rank."""

    def side_of(self, matrix: Matrix, parts: Parts | None) -> str:
        """Returns "left": rows are stored rows."""
        del matrix, parts
        return "left"

    def rank_of(self, matrix: Matrix) -> int:
        """Returns m."""
        return matrix.m

    def largest_rank(self, matrix: Matrix) -> int:
        """Returns m, whatever n is."""
        return matrix.m

    def at_rank(self, matrix: Matrix, rank: int) -> None:
        """Has one rank, m."""
        del matrix, rank

    def block_of(self, matrix: Matrix) -> int:
        """Returns 1: every row of R is one of G."""
        del matrix
        return 1

    def both(self) -> Projector:
        """Refuses."""
        raise ValueError(
            'lro.whole leaves matrices as they are, so there is no side="both". Leave '
            "`side` out."
        )

    def start(self, matrix: Matrix) -> tuple[()]:
        """Stores nothing."""
        del matrix
        return ()

    def basis(self, matrix: Matrix, stored: tuple[()], at: At) -> tuple[()]:
        """Has no arrays, which stands for the identity."""
        del matrix, stored, at
        return ()

    def down(self, matrix: Matrix, basis: tuple[()], x: Operand) -> Array:
        """Returns the matrix itself."""
        del basis
        return Operand.of(x, matrix.transposed).array

    def up(self, matrix: Matrix, basis: tuple[()], low: Array) -> Operand:
        """Returns the matrix itself."""
        del basis
        return Operand.of(low, matrix.transposed)
