"""A projector around another one."""

import dataclasses
from typing import Any

from jaxtyping import Array

from lowrank_optax.leaves.matrix import Matrix, Parts
from lowrank_optax.linalg.products import Operand
from lowrank_optax.projectors._protocol import BasisProjector, Projector
from lowrank_optax.projectors._two_sided import two_sided


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapped(Projector):
    """Works as the projector inside, whose bases it keeps or times in another way.

    A subclass says how its stored tree holds that of the projector inside.

    Attributes:
      projector: the one inside.
    """

    projector: Any = None

    @property
    def reads_moments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As inside."""
        return self.projector.reads_moments

    @property
    def orthonormal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As inside."""
        return self.projector.orthonormal

    def for_leaf(self, path: str) -> Projector:
        """Returns the same around the projector of the leaf."""
        return self.having(projector=self.projector.for_leaf(path))

    def stored_as(self, dtype: Any) -> Projector:
        """Returns the same around a projector that stores in ``dtype``."""
        return self.having(projector=self.projector.stored_as(dtype))

    def side_of(self, matrix: Matrix, parts: Parts | None) -> str | None:
        """As inside."""
        return self.projector.side_of(matrix, parts)

    def rank_of(self, matrix: Matrix) -> int:
        """As inside."""
        return self.projector.rank_of(matrix)

    def largest_rank(self, matrix: Matrix) -> int:
        """As inside."""
        return self.projector.largest_rank(matrix)

    def at_rank(self, matrix: Matrix, rank: int) -> tuple[str, Projector] | None:
        """Returns the same around the projector of that rank."""
        found = self.projector.at_rank(matrix, rank)
        if found is None:
            return None
        return found[0], self.having(projector=found[1])

    def block_of(self, matrix: Matrix) -> int:
        """As inside."""
        return self.projector.block_of(matrix)

    def both(self) -> Projector:
        """Returns the same around the two-sided form of the projector inside."""
        return self.having(projector=two_sided(self.projector))

    def down(self, matrix: Matrix, basis: Any, x: Operand) -> Array:
        """As inside."""
        return self.projector.down(matrix, basis, x)

    def up(self, matrix: Matrix, basis: Any, low: Array) -> Operand:
        """As inside."""
        return self.projector.up(matrix, basis, low)


def innermost(projector: Any) -> Any:
    """Returns the projector that forms the bases."""
    while isinstance(projector, Wrapped):
        projector = projector.projector
    return projector


def check_basis(name: str, projector: Any) -> None:
    """Checks that a projector keeps each basis as it is until the next refresh."""
    inside = innermost(projector)
    if not isinstance(inside, Projector):
        raise TypeError(
            f"lro.{name} expected a projector such as lro.power(rank=128), got "
            f"{type(projector).__name__}."
        )
    if not isinstance(inside, BasisProjector) or inside.advances or projector.advances:
        raise ValueError(
            f"lro.{name} takes projectors that store a basis and keep it from one "
            f"refresh to the next, such as lro.power; lro.{type(inside).__name__} "
            "does not."
        )
