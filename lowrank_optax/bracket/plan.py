"""The plan of a tree: what happens to every leaf, recorded for the reports."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from lowrank_optax._meshes import outside_sharding
from lowrank_optax.bracket.selection import Selection, axis_parts
from lowrank_optax.leaves.matrix import Matrix, is_box, path_string, unbox
from lowrank_optax.projectors import Projector


class SideCost(NamedTuple):
    """What the choice of a side costs.

    Attributes:
      state_bytes: the bracket's state for the leaf, on all devices together.
      reduced_bytes: what every step sums over devices: the projections ``[r, n]`` in
        float32 if the projected axis is sharded, else nothing.
    """

    state_bytes: int
    reduced_bytes: int


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
      costs: what a basis on the rows ("left") and on the columns ("right") would cost,
        where the leaf's sharding is known.
    """

    path: str
    shape: tuple[int, ...]
    matrix: Matrix | None
    reason: str
    full_bytes: int
    low_bytes: int | None = None
    costs: dict[str, "SideCost"] = dataclasses.field(default_factory=dict)

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
    projector: Projector,
    state_bytes: Callable[[Matrix | tuple[int, ...]], int],
) -> Plan:
    """Decides for every leaf of ``tree`` whether and how it is projected.

    Args:
      tree: parameters or gradients, arrays or ShapeDtypeStructs, boxed or not.
      selection: the selection's options.
      projector: says how large the projections are.
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
            outside_sharding(path_string(path)) if sharding is None else sharding,
            selection,
            projector,
            state_bytes,
        )
        for (path, leaf), given, sharding in zip(flat, numbers, shardings, strict=True)
    ]
    return Plan(treedef, tuple(leaves))


def _plan_leaf(
    path, leaf, numbers, sharding, selection, projector, state_bytes
) -> LeafPlan:
    if 0 in leaf.shape:
        return LeafPlan(path, leaf.shape, None, "no elements", 0)
    full_bytes = state_bytes(leaf.shape)
    reason = selection.why_full(path, leaf, numbers)
    if reason is not None:
        return LeafPlan(path, leaf.shape, None, reason, full_bytes)
    matrix, reason = _make_matrix(path, leaf, numbers, sharding, selection, projector)
    if matrix is None:
        return LeafPlan(path, leaf.shape, None, reason, full_bytes)
    low_bytes = state_bytes(matrix)
    if low_bytes >= full_bytes and not selection.explicit(numbers):
        reason = f"low rank would not save: {low_bytes} >= {full_bytes} bytes"
        return LeafPlan(path, leaf.shape, None, reason, full_bytes, low_bytes)
    costs = {}
    if _RECORDS:  # only a report asks for them
        parts = axis_parts(sharding, leaf, matrix.rows, matrix.columns)
        costs = _side_costs(matrix, parts, projector, state_bytes)
    return LeafPlan(path, leaf.shape, matrix, reason, full_bytes, low_bytes, costs)


def _side_costs(matrix, parts, projector, state_bytes) -> dict[str, SideCost]:
    """Returns both sides' costs; nothing if they are not known, or not ours to choose.

    A projector with a side of its own knows when its map crosses no border.
    """
    if parts is None or projector.side_of(matrix, parts) is not None:
        return {}
    costs = {}
    for side, count in zip(("left", "right"), parts, strict=True):
        seen = dataclasses.replace(matrix.seen_from(side), block=0)
        projected = math.prod(seen.batch_shape) * seen.rank * seen.n
        costs[side] = SideCost(state_bytes(seen), 4 * projected * (count != 1))
    return costs


def _make_matrix(path, leaf, numbers, sharding, selection, projector):
    batch, shared, rows, columns, reduction_is_rows = selection.axes(
        path, leaf, numbers
    )
    draft = Matrix(
        path,
        tuple(leaf.shape),
        batch,
        rows,
        columns,
        "left",
        1,
        reduction_is_rows=reduction_is_rows,
    )
    m, n = draft.m, draft.n
    parts = axis_parts(sharding, leaf, rows, columns)
    own = projector.side_of(draft, parts)
    if own is not None and selection.side != "short":
        raise ValueError(
            f"lro.{type(projector).__name__} works along an axis of its own; got "
            f"side={selection.side!r} besides. Say it as the projector's axis alone."
        )
    side = own or selection.resolve_side(m, n, reduction_is_rows, parts)
    draft = draft.seen_from(side)
    r, largest = projector.rank_of(draft), projector.largest_rank(draft)
    if r > largest:
        if not selection.explicit(numbers) and not selection.clip_rank:
            return None, f"rank {r} exceeds min(m, n)={largest}"
        if not selection.clip_rank:
            raise ValueError(
                f"Leaf {path!r} of shape {tuple(leaf.shape)} is a {m} x {n} matrix and "
                f"was selected explicitly, but rank={r} exceeds min(m, n)={largest}. "
                "Lower the rank (a fraction such as rank=0.25 adapts to each leaf), "
                "leave the leaf out of the selection, or pass clip_rank=True to run it "
                "at r=min(m, n)."
            )
        r = largest
    chosen = "explicitly" if selection.explicit(numbers) else "by the default rule"
    matrix = dataclasses.replace(
        draft,
        rank=r,
        shared=shared,
        block=projector.block_of(draft),
        in_turn=_in_turn(draft, numbers, sharding, leaf, selection),
    )
    return matrix, f"selected {chosen}"


def _in_turn(draft: Matrix, numbers, sharding, leaf, selection: Selection) -> bool:
    """Whether the leaf is a stack of layers, and its matrices lie on several devices.

    Elsewhere all layers at once are faster: what is lifted need not be written out. If
    the axis of layers is cut itself, a loop over it would gather the stack.
    """
    if draft.batch != (0,) or numbers is not None or selection.layer_axis is None:
        return False
    parts = axis_parts(sharding, leaf, draft.rows, draft.columns)
    return parts not in (None, (1, 1)) and axis_parts(sharding, leaf, (0,), ()) == (
        1,
        1,
    )


class Record(NamedTuple):
    """One bracket at its initialisation: its plan, itself, and its first state."""

    plan: Plan
    bracket: Any
    state: Any


_RECORDS: list[list[Record]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Record]]:
    """Collects every bracket that is initialised inside the with block."""
    records: list[Record] = []
    _RECORDS.append(records)
    try:
        yield records
    finally:
        _RECORDS.pop()


def record(plan: Plan, bracket: Any, state: Any) -> None:
    """Hands a bracket to the innermost ``recording`` block, if there is one."""
    if _RECORDS:
        _RECORDS[-1].append(Record(plan, bracket, state))


def abstract_init(tx: Any, params: Any) -> Any:
    """Returns the shapes of ``tx.init(params)``, tracing it anew each time.

    ``jax.eval_shape`` remembers a function it has traced and would then not call
    it, and nothing would be recorded.
    """
    return jax.eval_shape(lambda params: tx.init(params), params)
