"""Which leaves are projected, from which side, at which rank.

Everything here is decided from shapes and paths alone, before any array exists.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import MatrixDimensionNumbers, Parts

SIDES = ("short", "long", "left", "right", "both", "auto")
_NEVER_KEYS = ("scale", "bias")
_NEVER_PATHS = re.compile(r"norm|embed|lm_head", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which leaves are projected, and from which side (the options of ``project``).

    Attributes:
      select: None (default rule), a regular expression searched in the path, or a
        callable ``(path, leaf) -> bool``.
      min_size: leaves with fewer elements stay full.
      weight_dimension_numbers: None, a tree of ``MatrixDimensionNumbers`` (None
        where a leaf is not a matrix), or a callable of the parameters giving it.
      layer_axis: an axis of every leaf with three or more axes that only counts
        layers.
      side: see ``lro.project``.
      clip_rank: run leaves whose rank exceeds min(m, n) at r = min(m, n).
      param_shardings: tree of shardings read by ``side="auto"``.
    """

    select: str | Callable[[str, Any], bool] | None = None
    min_size: int = 0
    weight_dimension_numbers: Any = None
    layer_axis: int | None = None
    side: str = "short"
    clip_rank: bool = False
    param_shardings: Any = None

    def __post_init__(self):
        _checks.choice("side", self.side, SIDES)

    def numbers(self, tree: Any, treedef: Any) -> list[Any]:
        """Returns the dimension numbers of every leaf, None where none are given."""
        numbers = self.weight_dimension_numbers
        if callable(numbers):
            numbers = numbers(tree)
        return broadcast_prefix(numbers, treedef, "weight_dimension_numbers")

    def shardings(self, treedef: Any) -> list[Any]:
        """Returns the declared sharding of every leaf, None where none is given."""
        return broadcast_prefix(self.param_shardings, treedef, "param_shardings")

    def explicit(self, numbers: Any) -> bool:
        """Whether a selected leaf was asked for by name, so is never dropped."""
        return self.select is not None or numbers is not None

    def why_full(self, path: str, leaf: Any, numbers: Any) -> str | None:
        """Returns why the leaf is not a candidate, or None if it is one.

        Raises:
          TypeError: if a leaf asked for is complex.
        """
        reason = self._why_not_chosen(path, leaf, numbers)
        if reason is not None or jnp.issubdtype(leaf.dtype, jnp.floating):
            return reason
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating) and self.explicit(numbers):
            raise TypeError(
                f"Leaf {path!r} is {leaf.dtype}; low-rank projection is for real "
                "matrices. Leave the leaf out of the selection."
            )
        return f"not a real floating-point leaf ({leaf.dtype})"

    def _why_not_chosen(self, path: str, leaf: Any, numbers: Any) -> str | None:
        if leaf.ndim < 2:
            return "fewer than two axes"
        if leaf.size < self.min_size:
            return f"smaller than min_size={self.min_size}"
        if self.select is not None:
            chosen = (
                self.select(path, leaf)
                if callable(self.select)
                else re.search(self.select, path)
            )
            return None if chosen else "not chosen by select"
        if numbers is not None:
            return None
        if self.weight_dimension_numbers is not None:
            return "no dimension numbers given for it"
        if path.rsplit("/", 1)[-1] in _NEVER_KEYS or _NEVER_PATHS.search(path):
            return "named like a norm, bias, embedding or head"
        if leaf.ndim > 2 and self.layer_axis is None:
            return "three or more axes, no dimension numbers and no layer_axis"
        if leaf.ndim > 3:
            return "four or more axes and no dimension numbers"
        return None

    def axes(self, path: str, leaf: Any, numbers: Any):
        """Returns (batch, shared, rows, columns, reduction_is_rows) of a leaf."""
        everything = tuple(range(leaf.ndim))
        if numbers is None:
            numbers = self._default_numbers(path, leaf)
        reduction = _axes_tuple(numbers.reduction_axis, leaf.ndim, path)
        output = _axes_tuple(numbers.output_axis, leaf.ndim, path)
        shared = _axes_tuple(getattr(numbers, "shared_axis", ()), leaf.ndim, path)
        named = (*reduction, *output, *shared)
        if not reduction or not output or len(set(named)) != len(named):
            raise ValueError(
                f"Leaf {path!r} of shape {leaf.shape}: reduction_axis and output_axis "
                "must name disjoint, non-empty axes (and shared_axis others), got "
                f"{numbers}."
            )
        batch = tuple(axis for axis in everything if axis not in named)
        reduction_is_rows = min(reduction) < min(output)
        rows, columns = (
            (reduction, output) if reduction_is_rows else (output, reduction)
        )
        return batch, shared, rows, columns, reduction_is_rows

    def _default_numbers(self, path: str, leaf: Any) -> MatrixDimensionNumbers:
        if leaf.ndim == 2:
            return MatrixDimensionNumbers(0, 1)
        if leaf.ndim == 3 and self.layer_axis is not None:
            layer = range(3)[self.layer_axis]
            first, second = (axis for axis in range(3) if axis != layer)
            return MatrixDimensionNumbers(first, second)
        raise ValueError(
            f"Leaf {path!r} of shape {leaf.shape} was selected, but which of its "
            f"{leaf.ndim} axes form the matrix is not said. Give "
            "weight_dimension_numbers with a MatrixDimensionNumbers for this leaf, "
            "or layer_axis for stacked [L, m, n] leaves."
        )

    def resolve_side(
        self, rows: int, columns: int, reduction_is_rows: bool, parts: Parts | None
    ) -> str:
        """Returns "left", "right" or "both" from the matrix' own shape."""
        if self.side in ("left", "right", "both"):
            return self.side
        if rows == columns:
            short_is_rows = reduction_is_rows
        else:
            short_is_rows = rows < columns
        if self.side == "auto" and parts is not None:
            # An unknown number of parts, 0, counts as several. `P^T G` sums along the
            # side of the basis, so on an unsharded side it needs no communication.
            sharded = [count != 1 for count in parts]
            if sharded[0] != sharded[1]:
                return "right" if sharded[0] else "left"
        return "left" if short_is_rows == (self.side != "long") else "right"


def _axes_tuple(axes: Any, ndim: int, path: str) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"Leaf {path!r} has {ndim} axes, its dimension numbers name {axes}."
        )
    return tuple(axis % ndim for axis in axes)


def _is_annotation(node: Any) -> bool:
    # Dimension numbers are named tuples and None is an empty tree: JAX would take both
    # apart without this test.
    return node is None or hasattr(node, "reduction_axis") or _is_sharding(node)


def _is_sharding(node: Any) -> bool:
    return isinstance(node, jax.sharding.Sharding | jax.sharding.PartitionSpec)


def broadcast_prefix(tree: Any, treedef: Any, name: str) -> list[Any]:
    """Flattens a prefix tree of annotations to one entry per leaf of ``treedef``.

    What ``optax.masked`` hides of the parameters has no entry.
    """
    out: list[Any] = [None] * treedef.num_leaves

    def spread(node: Any, positions: Any) -> None:
        if isinstance(positions, optax.MaskedNode):
            return
        if _is_annotation(node) or jax.tree_util.all_leaves([node]):
            for position in jax.tree.leaves(positions):
                out[position] = node
            return
        # One level: the children count as leaves.
        jax.tree.map(spread, node, positions, is_leaf=lambda x: x is not node)

    try:
        spread(tree, treedef.unflatten(range(treedef.num_leaves)))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"`{name}` must be a tree like the parameters (a prefix of it will do): "
            f"{error}"
        ) from error
    return out


def axis_parts(sharding, leaf, rows, columns) -> Parts | None:
    """Returns how rows and columns are sharded, None if not known."""
    if sharding is None:
        return None
    spec = getattr(sharding, "spec", sharding)
    if not isinstance(spec, jax.sharding.PartitionSpec):
        return None
    names = [*spec, *[None] * (leaf.ndim - len(spec))]
    mesh = getattr(sharding, "mesh", None)

    def parts(axes: tuple[int, ...]) -> int:
        if all(names[axis] is None for axis in axes):
            return 1
        first, *rest = (names[axis] for axis in axes)
        # Of several axes merged into one only the first may be cut: each part of it is
        # then a run of consecutive rows.
        if mesh is None or any(name is not None for name in rest):
            return 0
        return math.prod(mesh.shape[name] for name in mesh_axes(first))

    return parts(rows), parts(columns)


def mesh_axes(name: Any) -> tuple[str, ...]:
    """Returns the mesh axes that an entry of a partition spec stands for."""
    if name is None:
        return ()
    return name if isinstance(name, tuple) else (name,)
