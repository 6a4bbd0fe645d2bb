"""``Matrix``: a leaf seen as a stack of matrices."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank_optax.linalg.products import Operand

# Into how many parts rows and columns are sharded; 0 where the number is not known, or
# where a part is no run of consecutive rows (columns).
Parts = tuple[int, int]


# JAX takes apart plain tuples and named ones; any other subclass is a leaf to it.
class Axes(tuple):
    """For each axis of an array of the state, the axes of the parameter behind it.

    ``()`` where there is none, as for the vectors of a basis. A leaf in a tree.

    Attributes:
      of: "parameter", or what else the axes are those of: one "basis" ``[m, r]`` or one
        "projection" ``[r, n]``. The array then lies as that does.
    """

    of: str = "parameter"

    @classmethod
    def of_a(cls, of: str, axes: Iterable[tuple[int, ...]]) -> "Axes":
        """Returns the axes of a basis or a projection behind those of an array."""
        found = cls(axes)
        found.of = of
        return found

    def __add__(self, other: tuple) -> "Axes":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the axes of an array with those of both."""
        return Axes((*self, *other))


class MatrixDimensionNumbers(NamedTuple):
    """Which axes of a leaf form the matrix; axes not named are batch axes.

    The first two fields are Optax's own (``optax.contrib.MuonDimensionNumbers``), and
    any object with these two attributes is accepted in its place.

    Attributes:
      reduction_axis: the axis (or axes) a layer sums over, its input.
      output_axis: the axis (or axes) a layer produces, its output.
      shared_axis: axes over which one basis serves, such as the positions of a
        convolution kernel: the matrices along them lie side by side. With
        ``side="both"`` this is a Tucker-2 decomposition.
    """

    reduction_axis: int | tuple[int, ...] = 0
    output_axis: int | tuple[int, ...] = 1
    shared_axis: int | tuple[int, ...] = ()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Matrix:
    """One leaf seen as a stack of matrices ``[*batch, m, n]``, basis on the left.

    Attributes:
      path: the leaf's path, keys joined by "/", for messages. Matrices that differ in
        it alone are equal: one trace serves them all.
      shape: the leaf's shape as stored.
      batch: axes that only count matrices (layers, experts, heads).
      rows: stored axes that form the matrix' rows.
      columns: stored axes that form its columns.
      side: "left" (basis on the rows), "right" (on the columns) or "both".
      rank: number of basis vectors r.
      shared: axes over which one basis serves; they stand before those of the kept
        axis, n (of the columns with "both").
      reduction_is_rows: whether the rows are what a layer sums over.
      block: how many rows of the view make up one row of the projection, in order; 0
        where every row has a part in it.
      in_turn: whether the matrices of the stack, whose one batch axis is the first, are
        worked on one after another, since each lies on several devices.
    """

    path: str = dataclasses.field(compare=False)
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    side: str
    rank: int
    shared: tuple[int, ...] = ()
    reduction_is_rows: bool = True
    block: int = 0
    in_turn: bool = False

    @functools.cached_property
    def transposed(self) -> bool:
        """Whether the view swaps stored rows and columns (basis on the columns)."""
        return self.side == "right"

    @functools.cached_property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @functools.cached_property
    def blocks(self) -> int:
        """How many matrices lie side by side in the view."""
        return self._size(self.shared)

    @functools.cached_property
    def m(self) -> int:
        """Size of the projected axis in the view."""
        return self._size(self._projected)

    @functools.cached_property
    def n(self) -> int:
        """Size of the other axis in the view."""
        return self._size(self._kept)

    @functools.cached_property
    def batch_axes(self) -> "Axes":
        """For each batch axis the stored axis behind it."""
        return Axes((axis,) for axis in self.batch)

    @functools.cached_property
    def basis_axes(self) -> "Axes":
        """For each axis of one basis ``[m, r]`` the stored axes behind it."""
        return Axes((self._projected, ()))

    @functools.cached_property
    def low_axes(self) -> "Axes":
        """For each axis of one projection ``[r, n]`` the stored axes behind it."""
        kept = self.shared if self.side == "both" else self._kept
        return Axes((self._projected if self.block else (), kept))

    def behind(self, axes: Axes) -> Axes:
        """Returns the stored axes behind those of any array kept with a basis."""
        if axes.of == "parameter":
            return axes
        own = self.basis_axes if axes.of == "basis" else self.low_axes
        return Axes(own[group[0]] if len(group) == 1 else () for group in axes)

    @functools.cached_property
    def _projected(self) -> tuple[int, ...]:
        return self.columns if self.transposed else self.rows

    @functools.cached_property
    def _kept(self) -> tuple[int, ...]:
        return (*self.shared, *(self.rows if self.transposed else self.columns))

    @functools.cached_property
    def _order(self) -> tuple[int, ...]:
        """The stored axes in the order of the view, before it is flipped."""
        if self.transposed:
            return (*self.batch, *self._kept, *self._projected)
        return (*self.batch, *self._projected, *self._kept)

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    @functools.cached_property
    def single(self) -> "Matrix":
        """One matrix of the stack, without the batch axes."""
        kept = [axis for axis in range(len(self.shape)) if axis not in self.batch]
        moved = {
            field: tuple(kept.index(axis) for axis in getattr(self, field))
            for field in ("rows", "columns", "shared")
        }
        shape = tuple(self.shape[axis] for axis in kept)
        return dataclasses.replace(self, shape=shape, batch=(), **moved)

    def seen_from(self, side: str) -> "Matrix":
        """Returns the same matrix with its basis on another side."""
        return dataclasses.replace(self, side=side)

    def other_side(self, view: Operand) -> Operand:
        """Turns the view of ``side="both"`` into the one ``seen_from("right")``."""
        blocks = view.array.reshape((self.m, self.blocks, -1))
        # [n, blocks m], as what is seen from the right is the transpose of its storage.
        other = jnp.transpose(blocks, (2, 1, 0)).reshape((blocks.shape[-1], -1))
        return Operand.of(other, transposed=True)

    def operand(self, leaf: Array) -> Operand:
        """Returns the leaf as ``[*batch, m, n]``, in its stored order."""
        order = self._order
        matrix = leaf if order == tuple(range(leaf.ndim)) else leaf.transpose(order)
        sizes = (self.n, self.m) if self.transposed else (self.m, self.n)
        return Operand(matrix.reshape((*self.batch_shape, *sizes)), self.transposed)

    def leaf(self, operand: Operand) -> Array:
        """Inverse of ``operand``: ``[*batch, m, n]`` back to the stored shape."""
        order = self._order
        if operand.transposed != self.transposed:
            operand = Operand.of(operand.array, self.transposed)
        leaf = operand.stored.reshape(tuple(self.shape[axis] for axis in order))
        if order == tuple(range(leaf.ndim)):
            return leaf
        return leaf.transpose(tuple(np.argsort(order)))

    def view(self, leaf: Array) -> Array:
        """Returns the leaf as an array ``[*batch, m, n]``."""
        return self.operand(leaf).array

    def undo(self, matrix: Array) -> Array:
        """Inverse of ``view``: ``[*batch, m, n]`` back to the stored shape."""
        return self.leaf(Operand.of(matrix, self.transposed))


def path_string(path: tuple[Any, ...]) -> str:
    """Joins a key path by "/", without the value attribute of Flax variables."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    while len(names) > 1 and names[-1] in ("value", "raw_value"):
        names.pop()
    return "/".join(names)
