"""The selection report: what is projected, what stays full, and why."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import optax

from lowrank_optax.bracket.found import described_brackets
from lowrank_optax.bracket.plan import LeafPlan
from lowrank_optax.bracket.start import Described, described
from lowrank_optax.shapes.memory import state_bytes


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
class ReportRow(LeafPlan):
    """One leaf of a bracket: its plan, and the costs of either side.

    Attributes:
      costs: what a basis on the rows ("left") and on the columns ("right") would cost,
        where the leaf's sharding is known.
    """

    costs: dict[str, SideCost] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SelectionReport:
    """One row per leaf and bracket, printable.

    Attributes:
      rows: the leaves' plans, in the parameters' order.
      state_bytes: of the whole state, as ``lro.state_bytes`` counts them.
      adamw_bytes: of the state of ``optax.adamw`` for the same parameters.
    """

    rows: tuple[ReportRow, ...]
    state_bytes: int
    adamw_bytes: int

    @property
    def projected(self) -> tuple[str, ...]:
        """Paths of the projected leaves."""
        return tuple(row.path for row in self.rows if row.matrix)

    @property
    def full(self) -> tuple[str, ...]:
        """Paths of the leaves that stay full."""
        return tuple(row.path for row in self.rows if not row.matrix)

    def __str__(self) -> str:
        """Returns the table."""
        header = ("leaf", "shape", "decision", "state bytes", "full bytes", "why")
        table = [header, *(_cells(row) for row in self.rows)]
        if any(row.costs for row in self.rows):
            more = ("left | right: state bytes", "bytes reduced per step")
            costs = [more, *map(_cost_cells, self.rows)]
            table = [(*row, *cost) for row, cost in zip(table, costs, strict=True)]
        lines = aligned(table)
        lines.append(
            f"{len(self.projected)} projected, {len(self.full)} full; "
            f"{self.state_bytes:,} bytes of state, optax.adamw: {self.adamw_bytes:,}"
        )
        return "\n".join(lines)


def selection_report(tx: optax.GradientTransformation, params: Any) -> SelectionReport:
    """Reports for every leaf whether ``tx`` projects it, and why (not).

    Looks into any nesting (``optax.chain``, ``masked``, ``partition``,
    ``inject_hyperparams``); leaves hidden from every bracket are not listed. Where a
    leaf's sharding is known (``param_shardings``, or an array on an Explicit mesh), the
    state's bytes and those that every step sums over devices are given for a basis on
    either side: the choice that ``side="auto"`` makes.

    Args:
      tx: a transformation with at least one bracket inside.
      params: parameters, or ShapeDtypeStructs of them; nothing is allocated.

    Returns:
      The report; print it.

    Raises:
      ValueError: if there is no bracket in ``tx``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
      >>> report = lro.selection_report(lro.galore(1e-3, rank=4), params)
      >>> report.projected, report.full
      (('kernel',), ('bias',))
    """
    brackets = described_brackets(described(tx, params))
    if not brackets:
        raise ValueError(
            "selection_report found no low-rank bracket in this transformation; "
            "expected one built by lro.chain, lro.subspace or a method of lro."
        )
    rows = [
        ReportRow(**vars(leaf), costs=_side_costs(bracket, leaf))
        for bracket in brackets
        for leaf in bracket.plan.leaves
    ]
    used, adamw = (state_bytes(each, params).total for each in (tx, optax.adamw(1e-3)))
    return SelectionReport(tuple(rows), used, adamw)


def _side_costs(bracket: Described, leaf: LeafPlan) -> dict[str, SideCost]:
    """Returns both sides' costs; nothing if they are not known, or not ours to choose.

    A projector with a side of its own knows when its map crosses no border.
    """
    matrix, parts, planner = leaf.matrix, leaf.parts, bracket.planner
    if matrix is None or parts is None:
        return {}
    if planner.bracket.projector.side_of(matrix, parts) is not None:
        return {}
    costs = {}
    for side, count in zip(("left", "right"), parts, strict=True):
        seen = dataclasses.replace(matrix.seen_from(side), block=0)
        projected = math.prod(seen.batch_shape) * seen.rank * seen.n
        # A number of parts of 0 means that it is not known: counted as sharded.
        costs[side] = SideCost(
            planner.state_bytes(seen, leaf.dtype), 4 * projected * (count != 1)
        )
    return costs


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Returns the rows as lines with columns of one width."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]


def _bytes(row: ReportRow) -> int:
    # Not `or`: a method without state has 0 bytes.
    return row.full_bytes if row.low_bytes is None or not row.matrix else row.low_bytes


def _cost_cells(row: ReportRow) -> tuple[str, str]:
    """Both sides' costs, the rows' before the columns'."""
    costs = row.costs.values()
    return (
        " | ".join(f"{cost.state_bytes:,}" for cost in costs),
        " | ".join(f"{cost.reduced_bytes:,}" for cost in costs),
    )


def _cells(row: ReportRow) -> tuple[str, ...]:
    decision = f"{row.matrix.side}, rank {row.matrix.rank}" if row.matrix else "full"
    shape = "x".join(map(str, row.shape)) or "scalar"
    return (
        row.path,
        shape,
        decision,
        f"{_bytes(row):,}",
        f"{row.full_bytes:,}",
        row.reason,
    )
