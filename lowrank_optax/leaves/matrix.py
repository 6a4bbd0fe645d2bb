"""How a leaf is seen as a stack of matrices, and its metadata box kept."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Into how many parts rows and columns are sharded; 0 where the number is not known, or
# where a part is no run of consecutive rows (columns).
Parts = tuple[int, int]


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
      path: the leaf's path, keys joined by "/".
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
      in_turn: whether the first axis counts layers that are worked on one after
        another, so that what one of them takes is there once: of a stack on several
        devices, if its sharding is known.
    """

    path: str
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

    @property
    def transposed(self) -> bool:
        """Whether the view swaps stored rows and columns (basis on the columns)."""
        return self.side == "right"

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch)

    @property
    def blocks(self) -> int:
        """How many matrices lie side by side in the view."""
        return self._size(self.shared)

    @property
    def m(self) -> int:
        """Size of the projected axis in the view."""
        return self._size(self._projected)

    @property
    def n(self) -> int:
        """Size of the other axis in the view."""
        return self._size(self._kept)

    @property
    def basis_axes(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of a basis ``[*batch, m, r]`` the stored axes behind it."""
        return (*((axis,) for axis in self.batch), self._projected, ())

    @property
    def low_axes(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of ``[*batch, r, n]`` the stored axes behind it."""
        kept = self.shared if self.side == "both" else self._kept
        first = self._projected if self.block else ()
        return (*((axis,) for axis in self.batch), first, kept)

    @property
    def _projected(self) -> tuple[int, ...]:
        return self.columns if self.transposed else self.rows

    @property
    def _kept(self) -> tuple[int, ...]:
        return (*self.shared, *(self.rows if self.transposed else self.columns))

    @property
    def _order(self) -> tuple[int, ...]:
        """The stored axes in the order of the view, before it is flipped."""
        if self.transposed:
            return (*self.batch, *self._kept, *self._projected)
        return (*self.batch, *self._projected, *self._kept)

    def _size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    def seen_from(self, side: str) -> "Matrix":
        """Returns the same matrix with its basis on another side."""
        return dataclasses.replace(self, side=side)

    def of_one_layer(self) -> "Matrix":
        """Returns what ``in_turn`` leaves of the stack."""
        fields = ("batch", "rows", "columns", "shared")
        moved = {
            f: tuple(axis - 1 for axis in getattr(self, f) if axis) for f in fields
        }
        return dataclasses.replace(self, shape=self.shape[1:], in_turn=False, **moved)

    def other_side(self, view: jax.Array) -> jax.Array:
        """Turns the view of ``side="both"`` into the one ``seen_from("right")``."""
        blocks = view.reshape((*view.shape[:-1], self.blocks, -1))
        blocks = jnp.moveaxis(blocks, -3, -1)  # [..., blocks, n, m]
        blocks = jnp.swapaxes(blocks, -3, -2)
        return blocks.reshape((*blocks.shape[:-2], -1))

    def view(self, leaf: jax.Array) -> jax.Array:
        """Returns the leaf as ``[*batch, m, n]``."""
        order = self._order
        matrix = leaf if order == tuple(range(leaf.ndim)) else leaf.transpose(order)
        sizes = (self.n, self.m) if self.transposed else (self.m, self.n)
        return self.flip(matrix.reshape((*self.batch_shape, *sizes)))

    def flip(self, matrix: jax.Array) -> jax.Array:
        """Swaps the last two axes if the view does: stored order and back."""
        return jnp.swapaxes(matrix, -1, -2) if self.transposed else matrix

    def undo(self, matrix: jax.Array) -> jax.Array:
        """Inverse of ``view``: ``[*batch, m, n]`` back to the stored shape."""
        matrix = self.flip(matrix)
        order = self._order
        leaf = matrix.reshape(tuple(self.shape[axis] for axis in order))
        if order == tuple(range(leaf.ndim)):
            return leaf
        return leaf.transpose(tuple(np.argsort(order)))


def path_string(path: tuple[Any, ...]) -> str:
    """Joins a key path by "/", without the value attribute of Flax variables."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    while len(names) > 1 and names[-1] in ("value", "raw_value"):
        names.pop()
    return "/".join(names)


def is_box(leaf: Any) -> bool:
    """Whether the leaf is Flax' metadata box around an array (Partitioned, ...)."""
    return hasattr(leaf, "unbox") and hasattr(leaf, "replace_boxed")


def unbox(leaf: Any) -> Any:
    """Returns the array inside a Flax box, or the leaf itself (numbers as arrays)."""
    leaf = leaf.unbox() if is_box(leaf) else leaf
    return jnp.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf


def refill(leaf: Any, value: Any) -> Any:
    """Puts ``value`` into the same box, if ``leaf`` is one."""
    return leaf.replace_boxed(value) if is_box(leaf) else value


def unbox_tree(tree: Any) -> Any:
    """``unbox`` for what a leaf's state may be, such as a pair of bases."""
    return jax.tree.map(unbox, tree, is_leaf=is_box)


def refill_tree(tree: Any, value: Any) -> Any:
    """``refill`` likewise."""
    return jax.tree.map(refill, tree, value, is_leaf=is_box)


def is_altered(treedef: Any, *trees: Any) -> bool:
    """Whether a mapping stands where a tree like the parameters has an array or tuple.

    As in the states that ``nnx.Optimizer`` gives back; ``()`` is no such tree.
    """
    return any(
        isinstance(leaf, Mapping)
        for tree in trees
        if not (isinstance(tree, tuple) and not tree)
        for leaf in treedef.flatten_up_to(tree)
    )


def restore(found: Any, make: Callable[[], Any]) -> Any:
    """Returns ``found`` in the structure of ``make()``, leaves matched by their paths.

    ``found`` may have a mapping wherever that has a tuple with named fields.
    """
    template = jax.eval_shape(make)
    if jax.tree.structure(found, is_leaf=is_box) == jax.tree.structure(
        template, is_leaf=is_box
    ):
        return found

    def named(path: tuple[Any, ...]) -> tuple[str, ...]:
        return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

    flat = jax.tree_util.tree_leaves_with_path(found, is_leaf=is_box)
    leaves = {named(path): leaf for path, leaf in flat}
    wanted = jax.tree_util.tree_leaves_with_path(template, is_leaf=is_box)
    if any(named(path) not in leaves for path, _ in wanted):
        return found  # another state altogether
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[named(path)], template
    )


def rebox(leaf: Any, value: Any, axes: tuple[tuple[int, ...], ...]) -> Any:
    """Puts ``value`` into a box like ``leaf``'s, each axis under its own name.

    An axis that no single stored axis stands behind (the rank) stays unnamed.
    """
    if not is_box(leaf):
        return value
    names = getattr(leaf, "names", None)
    if names is None:
        return leaf.replace_boxed(value)
    renamed = tuple(names[group[0]] if len(group) == 1 else None for group in axes)
    return dataclasses.replace(leaf, value=value, names=renamed)
