"""Both sides at once: ``P^T G Q``, the form of GaLore's theory."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from lowrank_optax.leaves.matrix import Axes, Matrix
from lowrank_optax.linalg.bases import Rotation
from lowrank_optax.linalg.products import Operand, back_by_blocks, by_blocks
from lowrank_optax.projectors._protocol import At, Projector


class TwoSidedBasis(NamedTuple):
    """The two bases of a matrix: ``left [m, r]`` and ``right [n, r]``."""

    left: Any
    right: Any


@dataclasses.dataclass(frozen=True, eq=False)
class TwoSided(Projector):
    """Lifts a one-sided projector to ``side="both"``: coordinates are ``[r, r]``.

    Attributes:
      left: projector of the rows.
      right: projector of the columns, applied to the transposed matrix.
    """

    left: Any = None
    right: Any = None

    @property
    def stores_basis(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the one-sided projector."""
        return self.left.stores_basis

    @property
    def orthonormal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the one-sided projector."""
        return self.left.orthonormal

    def start(self, matrix: Matrix) -> TwoSidedBasis:
        """Stores what both sides store."""
        left, right = (
            self.left.start(matrix),
            self.right.start(matrix.seen_from("right")),
        )
        # A subclass has rules of its own for two bases that move or read moments.
        if type(self) is TwoSided and (self.left.advances or self.left.reads_moments):
            raise ValueError(
                f"lro.{type(self.left).__name__} works in the coordinates of one "
                f'basis, so leaf {matrix.path!r} has no side="both". Use "short", '
                '"long", "left" or "right", or lro.power.'
            )
        return TwoSidedBasis(left, right)

    def axes(self, matrix: Matrix) -> TwoSidedBasis:
        """Says the same of both sides."""
        right = self.right.axes(matrix.seen_from("right"))
        return TwoSidedBasis(self.left.axes(matrix), jax.tree.map(_of_columns, right))

    def adopt(
        self, matrix: Matrix, basis: TwoSidedBasis, at: At, of: Projector
    ) -> TwoSidedBasis:
        """Takes each side over."""
        left, right = (of.left, of.right) if isinstance(of, TwoSided) else (of, of)
        other = matrix.seen_from("right")
        return TwoSidedBasis(
            self.left.adopt(matrix, basis.left, at, left),
            self.right.adopt(other, basis.right, other_key(at), right),
        )

    def for_leaf(self, path: str) -> "TwoSided":
        """Returns the two sides' projectors of the leaf."""
        left, right = self.left.for_leaf(path), self.right.for_leaf(path)
        return self.having(left=left, right=right)

    def stored_as(self, dtype: Any) -> "TwoSided":
        """Returns the projector whose two sides store in ``dtype``."""
        left, right = self.left.stored_as(dtype), self.right.stored_as(dtype)
        return self.having(left=left, right=right)

    def refresh(self, matrix: Matrix, gradient: Any, stored: Any, at: At) -> Any:
        """Refreshes each side from its own view of the gradient."""
        gradient = Operand.of(gradient)
        return TwoSidedBasis(
            self.left.refresh(matrix, gradient, stored.left, at),
            self.right.refresh(
                matrix.seen_from("right"),
                matrix.other_side(gradient),
                stored.right,
                other_key(at),
            ),
        )

    def basis(self, matrix: Matrix, stored: Any, at: At) -> TwoSidedBasis:
        """Returns both bases."""
        return TwoSidedBasis(
            self.left.basis(matrix, stored.left, at),
            self.right.basis(matrix.seen_from("right"), stored.right, other_key(at)),
        )

    def align(self, old: Any, new: Any) -> TwoSidedBasis:
        """Aligns each side with its own old basis."""
        return TwoSidedBasis(
            self.left.align(old.left, new.left), self.right.align(old.right, new.right)
        )

    def rotation(self, old: Any, new: Any) -> Rotation:
        """Returns ``(C_left, C_right)``."""
        left = self.left.rotation(old.left, new.left)
        right = self.right.rotation(old.right, new.right)
        return Rotation(left.left, right.left)

    def down(self, matrix: Matrix, basis: Any, x: Operand) -> Array:
        """Returns ``P^T X Q``, for every block of X."""
        # Rows first: the second product then has r of them and not m.
        rows = self.left.down(matrix, basis.left, x)
        return by_blocks(rows, basis.right.astype(rows.dtype))

    def up(self, matrix: Matrix, basis: Any, low: Array) -> Operand:
        """Returns ``P N Q^T``, for every block of N."""
        rows = back_by_blocks(low, basis.right.astype(low.dtype))
        return self.left.up(matrix, basis.left, rows)


def two_sided(projector: Projector) -> Projector:
    """Returns the two-sided form of a projector: its own, or one part per side."""
    own = projector.both()
    if own is not None:
        return own
    left, right = projector.sides()
    return TwoSided(projector.rank, projector.update_proj_gap, left, right)


def other_key(at: At) -> At:
    # From one key both sides of a square matrix would draw the same numbers.
    return at._replace(key=jax.random.fold_in(at.key, 1))


def _of_columns(axes: Axes) -> Axes:
    """Returns what an array of the right side has of the projection ``[r, q]``."""
    if axes.of != "projection":
        return axes
    return Axes.of_a(axes.of, (tuple(1 - axis for axis in group) for group in axes))
