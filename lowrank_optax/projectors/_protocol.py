"""``Projector``: how one matrix gets its basis, and how the basis is used."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Axes, Matrix, Parts
from lowrank_optax.leaves.part import Part
from lowrank_optax.linalg.bases import (
    Rotation,
    block_power,
    cholesky_qr,
    leading_singular_vectors,
    outside,
    random_start,
)
from lowrank_optax.linalg.products import HIGHEST, Operand, up, wide, wider


class At(NamedTuple):
    """Where and when a basis is formed; all traced scalars of one matrix.

    Attributes:
      key: a PRNG key of this bracket, leaf, matrix and epoch.
      epoch: how many refresh periods have begun, ``count // update_proj_gap``.
      layer: index of the matrix in its stack.
      cold: True until the matrix has had its first basis (and after a failed
        refresh), when there is no old basis worth starting from.
      moments: the matrix' moments, for projectors with ``reads_moments``.
      count: steps of the inner optimizer taken so far.
    """

    key: Any
    epoch: Any
    layer: Any
    cold: Any
    moments: Any = ()
    count: Any = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Projector(Part):
    """How one matrix ``[m, n]`` is seen through ``r`` numbers per column.

    A subclass says what it stores (``start``, any tree of arrays, and ``axes``, what
    their axes mean), how that is renewed before use (``refresh``, stored by ``pack``)
    or moved after it (``advance``), and how it becomes the basis ``P [m, r]`` that is
    used (``basis``). All methods are pure and see one matrix. The bracket asks when
    (``is_due``), guards against zero and non-finite gradients, and runs stacks. A
    gradient comes as an ``Operand``, which multiplies in its stored order; its
    ``array`` is ``[m, n]``.

    Attributes:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one refresh to the next, the first at step 0.
    """

    rank: Any
    update_proj_gap: int = 200

    # Not annotated, so that these are facts of a class and no fields.
    stores_basis = True
    reads_moments = False
    advances = False  # whether the basis moves after use
    selects = False  # whether rotations between its bases are 0-1 selections
    orthonormal = False  # up to float32's rounding, that is
    entrywise = False  # whether an entry of R is one of G
    smaller = True  # whether R is to be smaller than G, and is not formed where not

    def __post_init__(self):
        """Checks the numbers that fix shapes."""
        _checks.rank(self.rank)
        _checks.positive_int("update_proj_gap", self.update_proj_gap)

    def side_of(self, matrix: Matrix, parts: Parts | None) -> str | None:
        """Returns "left" or "right" if it has a side of its own.

        ``parts``: into how many parts the matrix' rows and columns are sharded.
        """
        del matrix, parts
        return None

    def rank_of(self, matrix: Matrix) -> int:
        """Returns r for one matrix, an int."""
        rank = self.rank
        value = _checks.rank(rank(matrix.path)) if callable(rank) else rank
        if isinstance(value, float):
            return max(1, round(value * min(matrix.m, matrix.n)))
        return value

    def largest_rank(self, matrix: Matrix) -> int:
        """Returns the largest r that the matrix can have."""
        return min(matrix.m, matrix.n)

    def at_rank(self, matrix: Matrix, rank: int) -> "tuple[str, Projector] | None":
        """Returns how one asks for a rank, such as "rank=8", and the projector of it.

        None if no option gives the matrix this rank.
        """
        if not 1 <= rank <= self.largest_rank(matrix):
            return None
        return f"rank={rank}", self.having(rank=rank)

    def block_of(self, matrix: Matrix) -> int:
        """Returns b if row k of ``R`` is made of rows k b to (k + 1) b - 1, else 0."""
        del matrix
        return 0

    def sides(self) -> "tuple[Projector, Projector]":
        """Returns the projectors of the rows and of the columns for side="both"."""
        return self, self

    def both(self) -> "Projector | None":
        """Returns a two-sided projector that is more than one for each side."""
        return None

    def for_leaf(self, path: str) -> "Projector":
        """Returns the projector of the leaf at this path.

        Leaves share a trace if their projectors and shapes are equal, so that nothing
        else may look at the path.
        """
        del path
        return self

    def stored_as(self, dtype: Any) -> "Projector":
        """Returns the projector that stores in ``dtype`` unless it was told another."""
        del dtype
        return self

    def start(self, matrix: Matrix) -> Any:
        """Returns what is stored for ONE matrix before its first refresh."""
        raise NotImplementedError

    def axes(self, matrix: Matrix) -> Any:
        """Returns a tree like ``start``'s, of ``Axes``: what the arrays' axes mean.

        An axis that is not that of the parameter's rows or columns has no name, and no
        sharding.
        """
        return jax.tree.map(
            lambda x: Axes(((),) * x.ndim), jax.eval_shape(lambda: self.start(matrix))
        )

    def adopt(self, matrix: Matrix, basis: Any, at: At, of: "Projector") -> Any:
        """Returns what is stored of a basis ``[m, s]`` found elsewhere, s <= r.

        Its vectors stay the first ones; ``r - s`` others, orthogonal to them, follow.
        What is kept beside a basis begins anew. ``of`` is the projector that found it.
        """
        del basis, at, of
        raise ValueError(
            f"lro.{type(self).__name__} forms its bases by itself, so that it cannot "
            f"go on from another one (leaf {matrix.path!r})."
        )

    def is_due(self, stored: Any, steps: Array) -> Array:
        """Whether the matrix wants a refresh."""
        del stored
        return steps % self.update_proj_gap == 0

    def refresh(self, matrix: Matrix, gradient: Any, stored: Any, at: At) -> Any:
        """Returns the new basis; ``gradient`` is finite and not zero."""
        raise NotImplementedError

    def pack(self, new: Any) -> Any:
        """Returns what is stored of a new basis, once its signs are chosen."""
        return new

    def advance(
        self,
        matrix: Matrix,
        stored: Any,
        gradient: Any,
        projected: Array,
        at: At,
    ) -> Any:
        """Returns what is stored after ``projected = P^T G`` was used."""
        del matrix, gradient, projected, at
        return stored

    def basis(self, matrix: Matrix, stored: Any, at: At) -> Any:
        """Returns the basis used this step, for one matrix."""
        del matrix, at
        return stored

    def align(self, old: Any, new: Any) -> Any:
        """Returns the new stored basis with signs chosen to agree with the old."""
        del old
        return new

    def rotation(self, old: Any, new: Any) -> Rotation:
        """Returns the coordinates of the old basis' vectors in the new basis."""
        raise ValueError(
            f"{type(self).__name__} has no rotation between its bases, so moments "
            "cannot be carried along. Use transport=lro.keep_moments()."
        )

    def down(self, matrix: Matrix, basis: Any, x: Operand) -> Array:
        """Returns ``P^T X``, ``[r, n]``."""
        x = Operand.of(x, matrix.transposed)
        dtype = wider(basis.dtype, x.dtype)
        # Every step takes this product: its precision is JAX's default, or the user's.
        return x.astype(dtype).down(basis.astype(dtype), precision=None)

    def up(self, matrix: Matrix, basis: Any, low: Array) -> Operand:
        """Returns ``P N``, ``[m, n]``."""
        dtype = wider(basis.dtype, low.dtype)
        return up(basis.astype(dtype), low.astype(dtype), matrix.transposed)


@dataclasses.dataclass(frozen=True, eq=False)
class BasisProjector(Projector):
    """A projector that stores the basis itself.

    Attributes:
      basis_dtype: storage dtype of the basis, None for the parameter's; it is computed
        in float32, or in float64 if that is stored.
    """

    basis_dtype: Any = None

    def stored_as(self, dtype: Any) -> "Projector":
        """Returns the projector that stores its bases in ``dtype``, or as told."""
        if self.basis_dtype is not None:
            return self
        return self.having(basis_dtype=dtype)

    def start(self, matrix: Matrix) -> Array:
        """Starts from the first r unit vectors: valid, and never used for long."""
        return jnp.eye(matrix.m, matrix.rank, dtype=self.basis_dtype or jnp.float32)

    def axes(self, matrix: Matrix) -> Axes:
        """Says that the basis has the matrix' rows, and its own vectors."""
        return matrix.basis_axes

    def adopt(self, matrix: Matrix, basis: Array, at: At, of: Projector) -> Any:
        """Takes any basis over; new vectors are random ones from its complement."""
        del of
        missing = matrix.rank - basis.shape[1]
        if missing:
            basis = wide(basis)
            drawn = outside(cholesky_qr(basis), missing, at.key)
            basis = jnp.concatenate([basis, drawn], axis=1)
        return basis.astype(self.basis_dtype or jnp.float32)

    def refresh(self, matrix: Matrix, gradient: Any, stored: Array, at: At) -> Array:
        """Computes the basis in float32 and rounds it to the storage dtype."""
        old = wide(stored)
        gradient = Operand.of(gradient, matrix.transposed).astype(old.dtype)
        return self.renew(matrix, gradient, old, at).astype(stored.dtype)

    def renew(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """Returns the new basis ``[m, r]`` in the dtype of ``old``.

        In place of ``compute`` where the gradient enters through products alone.
        """
        return self.compute(matrix, gradient.array, old, at)

    def compute(self, matrix: Matrix, gradient: Array, old: Array, at: At) -> Array:
        """Returns the new basis ``[m, r]`` from the gradient as a plain array."""
        # `renew` and `compute` call each other: without either, that would never end.
        if type(self).renew is BasisProjector.renew:
            raise NotImplementedError
        return self.renew(matrix, Operand.of(gradient, matrix.transposed), old, at)

    def align(self, old: Array, new: Array) -> Array:
        """Flips new basis vectors that point against the old ones."""
        agreement = jnp.sum(old * new, axis=0, keepdims=True)
        return jnp.where(agreement < 0, -new, new)

    def rotation(self, old: Array, new: Array) -> Rotation:
        """Returns ``C = P_new^T P_old``."""
        # Moments go through every one of these rotations, so their errors add up.
        return Rotation(jnp.matmul(wide(new).T, wide(old), precision=HIGHEST))


@dataclasses.dataclass(frozen=True, eq=False)
class OrthonormalProjector(BasisProjector):
    """A projector that stores the basis itself, and whose bases are orthonormal."""

    @property
    def orthonormal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the storage dtype keeps it so."""
        dtype = self.basis_dtype or jnp.float32
        return bool(jnp.finfo(dtype).eps <= jnp.finfo(jnp.float32).eps)


def check_complete(projector: Projector) -> None:
    """Raises TypeError if a projector's class lacks a method that it must define."""
    kind: Any = type(projector)
    missing = None
    if kind.start is Projector.start:
        missing = "start"
    elif projector.stores_basis and kind.refresh is Projector.refresh:
        missing = "refresh"
    elif kind.refresh is BasisProjector.refresh and (
        kind.renew is BasisProjector.renew and kind.compute is BasisProjector.compute
    ):
        missing = "compute"
    if missing:
        raise TypeError(
            f"{kind.__name__} defines no `{missing}`. A projector of its own kind has "
            "`start` and `refresh`; a subclass of lro.OrthonormalProjector needs "
            "`compute(self, matrix, gradient, old, at)` alone, which returns [m, rank]."
        )


# As many as `lro.power` takes by default.
COLD_SWEEPS = 12


@dataclasses.dataclass(frozen=True, eq=False)
class TrackingProjector(BasisProjector):
    """Starts from the gradient's leading singular subspace, then follows it.

    It starts again where it has lost the gradient, if a subclass can tell.

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
            at.cold | self.has_lost(matrix, gradient, old),
            lambda: self.find(matrix, gradient, at),
            lambda: self.follow(matrix, gradient, old, at),
        )

    def has_lost(self, matrix: Matrix, gradient: Operand, old: Array) -> Any:
        """Returns whether the basis is to be found anew instead of followed."""
        del matrix, gradient, old
        return False

    def find(self, matrix: Matrix, gradient: Operand, at: At) -> Array:
        """Returns the first basis ``[m, r]``."""
        if self.cold_start == "svd":
            return leading_singular_vectors(gradient.array, matrix.rank)
        start = random_start(at.key, matrix.m, matrix.rank, gradient.dtype)
        return block_power(gradient, start, COLD_SWEEPS)

    def follow(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """Returns the next basis."""
        raise NotImplementedError
