"""Which leaves are projected: selection, the plan of a tree, and its report.

Everything here is decided from shapes and paths alone, before any array exists.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import _checks
from lowrank_optax._matrices import (
    Matrix,
    MatrixDimensionNumbers,
    is_box,
    path_string,
    unbox,
)

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
        """Returns (batch, rows, columns, reduction_is_rows) of a candidate leaf."""
        everything = tuple(range(leaf.ndim))
        if numbers is None:
            numbers = self._default_numbers(path, leaf)
        reduction = _axes_tuple(numbers.reduction_axis, leaf.ndim, path)
        output = _axes_tuple(numbers.output_axis, leaf.ndim, path)
        named = (*reduction, *output)
        if not reduction or not output or len(set(named)) != len(named):
            raise ValueError(
                f"Leaf {path!r} of shape {leaf.shape}: reduction_axis and output_axis "
                f"must name disjoint, non-empty axes, got {numbers}."
            )
        batch = tuple(axis for axis in everything if axis not in named)
        reduction_is_rows = min(reduction) < min(output)
        rows, columns = (
            (reduction, output) if reduction_is_rows else (output, reduction)
        )
        return batch, rows, columns, reduction_is_rows

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
        self, rows: int, columns: int, reduction_is_rows: bool, sharded: tuple | None
    ) -> str:
        """Returns "left", "right" or "both" from the matrix' own shape."""
        if self.side in ("left", "right", "both"):
            return self.side
        if rows == columns:
            short_is_rows = reduction_is_rows
        else:
            short_is_rows = rows < columns
        if self.side == "auto" and sharded is not None and sharded[0] != sharded[1]:
            return "right" if sharded[0] else "left"
        return "left" if short_is_rows == (self.side != "long") else "right"


def resolve_rank(rank: Any, path: str, smallest: int) -> int:
    """Returns the rank of one leaf as an int (fractions are of min(m, n))."""
    value = _checks.rank(rank(path)) if callable(rank) else rank
    return max(1, round(value * smallest)) if isinstance(value, float) else value


def _axes_tuple(axes: Any, ndim: int, path: str) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"Leaf {path!r} has {ndim} axes, its dimension numbers name {axes}."
        )
    return tuple(axis % ndim for axis in axes)


def _is_annotation(node: Any) -> bool:
    return node is None or hasattr(node, "reduction_axis") or _is_sharding(node)


def _is_sharding(node: Any) -> bool:
    return isinstance(node, jax.sharding.Sharding | jax.sharding.PartitionSpec)


def broadcast_prefix(tree: Any, treedef: Any, name: str) -> list[Any]:
    """Flattens a prefix tree of annotations to one entry per leaf of ``treedef``."""
    if _is_annotation(tree):
        return [tree] * treedef.num_leaves
    skeleton = treedef.unflatten(range(treedef.num_leaves))
    out: list[Any] = [None] * treedef.num_leaves

    def assign(annotation: Any, positions: Any) -> None:
        for position in jax.tree.leaves(positions):
            out[position] = annotation

    try:
        jax.tree.map(assign, tree, skeleton, is_leaf=_is_annotation)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"`{name}` must be a tree like the parameters (a prefix of it will do): "
            f"{error}"
        ) from error
    return out


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What happens to one leaf, and why.

    Attributes:
      path: the leaf's path.
      shape: its shape as stored.
      matrix: its matrix view if it is projected, else None.
      reason: why it is projected or full.
      full_bytes: state bytes of the inner optimizer at full size.
      low_bytes: state bytes of the bracket for this leaf (None if never considered).
    """

    path: str
    shape: tuple[int, ...]
    matrix: Matrix | None
    reason: str
    full_bytes: int
    low_bytes: int | None = None

    @property
    def empty(self) -> bool:
        """Whether the leaf has no elements (such leaves are hidden from the inner)."""
        return 0 in self.shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tree's structure and one ``LeafPlan`` per leaf, in its order."""

    treedef: Any
    leaves: tuple[LeafPlan, ...]

    def matrices(self) -> list[tuple[int, Matrix]]:
        """Returns (position, matrix) of every projected leaf."""
        return [(i, leaf.matrix) for i, leaf in enumerate(self.leaves) if leaf.matrix]


def make_plan(
    tree: Any,
    selection: Selection,
    rank: Any,
    state_bytes: Callable[[Matrix | tuple[int, ...]], int],
) -> Plan:
    """Decides for every leaf of ``tree`` whether and how it is projected.

    Args:
      tree: parameters or gradients, arrays or ShapeDtypeStructs, boxed or not.
      selection: the selection's options.
      rank: an int, a fraction of min(m, n), or a callable of the path.
      state_bytes: bytes of state for a projected matrix, or for a full shape.

    Returns:
      The plan.

    Raises:
      ValueError: if a leaf selected explicitly has too large a rank or no axes.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    numbers = selection.numbers(tree, treedef)
    shardings = selection.shardings(treedef)
    leaves = [
        _plan_leaf(
            path_string(path),
            unbox(leaf),
            given,
            sharding,
            selection,
            rank,
            state_bytes,
        )
        for (path, leaf), given, sharding in zip(flat, numbers, shardings, strict=True)
    ]
    return Plan(treedef, tuple(leaves))


def _plan_leaf(path, leaf, numbers, sharding, selection, rank, state_bytes) -> LeafPlan:
    if 0 in leaf.shape:
        return LeafPlan(path, leaf.shape, None, "no elements", 0)
    full_bytes = state_bytes(leaf.shape)
    reason = selection.why_full(path, leaf, numbers)
    if reason is not None:
        return LeafPlan(path, leaf.shape, None, reason, full_bytes)
    matrix, reason = _make_matrix(path, leaf, numbers, sharding, selection, rank)
    if matrix is None:
        return LeafPlan(path, leaf.shape, None, reason, full_bytes)
    low_bytes = state_bytes(matrix)
    if low_bytes >= full_bytes and not selection.explicit(numbers):
        reason = f"low rank would not save: {low_bytes} >= {full_bytes} bytes"
        return LeafPlan(path, leaf.shape, None, reason, full_bytes, low_bytes)
    return LeafPlan(path, leaf.shape, matrix, reason, full_bytes, low_bytes)


def _make_matrix(path, leaf, numbers, sharding, selection, rank):
    batch, rows, columns, reduction_is_rows = selection.axes(path, leaf, numbers)
    draft = Matrix(path, tuple(leaf.shape), batch, rows, columns, "left", 1)
    m, n = draft.m, draft.n
    r = resolve_rank(rank, path, min(m, n))
    if r > min(m, n):
        if not selection.explicit(numbers) and not selection.clip_rank:
            return None, f"rank {r} exceeds min(m, n)={min(m, n)}"
        if not selection.clip_rank:
            raise ValueError(
                f"Leaf {path!r} of shape {tuple(leaf.shape)} is a {m} x {n} matrix and "
                f"was selected explicitly, but rank={r} exceeds min(m, n)={min(m, n)}. "
                "Lower the rank (a fraction such as rank=0.25 adapts to each leaf), "
                "leave the leaf out of the selection, or pass clip_rank=True to run it "
                "at r=min(m, n)."
            )
        r = min(m, n)
    sharded = _sharded_axes(sharding, leaf, rows, columns)
    side = selection.resolve_side(m, n, reduction_is_rows, sharded)
    chosen = "explicitly" if selection.explicit(numbers) else "by the default rule"
    return dataclasses.replace(draft, side=side, rank=r), f"selected {chosen}"


def _sharded_axes(sharding, leaf, rows, columns) -> tuple[bool, bool] | None:
    """Returns whether the rows and the columns are sharded, None if not known."""
    if sharding is None:
        sharding = getattr(
            jax.typeof(leaf) if _is_array(leaf) else leaf, "sharding", None
        )
        if not getattr(getattr(sharding, "mesh", None), "explicit_axes", ()):
            return None
    spec = getattr(sharding, "spec", sharding)
    if not isinstance(spec, jax.sharding.PartitionSpec):
        return None
    names = [*spec, *[None] * (leaf.ndim - len(spec))]
    return any(names[i] is not None for i in rows), any(
        names[i] is not None for i in columns
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


_RECORDS: list[list[Plan]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Plan]]:
    """Collects the plans of every bracket initialised inside the with block."""
    plans: list[Plan] = []
    _RECORDS.append(plans)
    try:
        yield plans
    finally:
        _RECORDS.pop()


def record(plan: Plan) -> None:
    """Hands a bracket's plan to the innermost ``recording`` block, if there is one."""
    if _RECORDS:
        _RECORDS[-1].append(plan)


def abstract_init(tx: Any, params: Any) -> Any:
    """Returns the shapes of ``tx.init(params)``, tracing it anew each time.

    ``jax.eval_shape`` remembers a function it has traced and would then not call
    it, and nothing would be recorded.
    """
    return jax.eval_shape(lambda params: tx.init(params), params)
