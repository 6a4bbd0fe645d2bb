"""Which gradients an optimizer sees through a basis alone, and through which."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.bracket.plan import LeafPlan, Record, recording
from lowrank_optax.bracket.refresh import Clock, LeafBasis, Refresher
from lowrank_optax.bracket.state import Bracket, SubspaceState, clock_of
from lowrank_optax.leaves.matrix import Matrix, is_box, path_string, unbox, unbox_tree
from lowrank_optax.linalg.products import gram, wide


@dataclasses.dataclass(frozen=True)
class LeafTraffic:
    """What is sent, or summed, of one leaf's gradient.

    Attributes:
      path: the leaf's path.
      shape: its shape as stored.
      whole: numbers of the whole gradient.
      sent: numbers between refreshes.
      reason: why it is compressed or whole.
    """

    path: str
    shape: tuple[int, ...]
    whole: int
    sent: int
    reason: str

    @property
    def compressed(self) -> bool:
        """Whether a projection is sent between refreshes."""
        return self.sent < self.whole


class Channel:
    """A gradient ``G [m, n]`` in the form ``R = P^T G``, for the basis of this step.

    The bracket sees G through ``P^T G`` alone, so ``G' = P (P^T P)^-1 R`` is as good:
    ``P^T G' = R``.

    Attributes:
      whole: for every matrix, stacked flat, whether this step needs G itself: its basis
        is due for a refresh, or has lost its rank. None for never.
    """

    def __init__(self, refresher: Refresher, clock: Clock, leaf: LeafBasis):
        self._matrix, self._projector = refresher.matrix, refresher.projector
        self._basis = refresher.basis(clock, leaf.stored)
        self._factor = None
        self.whole = None
        if self._projector.stores_basis:
            self.whole = refresher.due(clock, leaf)
        if not self._projector.orthonormal:
            self._factor = jnp.linalg.cholesky(gram(wide(self._basis)))
            lost = ~jnp.all(jnp.isfinite(self._factor), (-2, -1)).reshape(-1)
            self.whole = lost if self.whole is None else self.whole | lost

    def down(self, gradient: Array) -> Array:
        """Returns ``R [*batch, r, n]`` of a gradient as stored, in its dtype."""
        view = self._matrix.view(gradient)
        low = self._projector.down(self._matrix, self._basis, view)
        return low.astype(gradient.dtype)

    def up(self, low: Array) -> Array:
        """Returns G', as stored, in float32 or wider."""
        return self._matrix.undo(self._up(self._basis, self._factor, wide(low)))

    def either(self, low: Array, whole: Callable[[Array], Array], gradient: Array):
        """Returns ``whole(G)`` of the matrices that this step needs whole, else G'."""
        if self.whole is None:
            return self.up(low)
        if not self._matrix.batch:
            return jax.lax.cond(
                self.whole[0], lambda: wide(whole(gradient)), lambda: self.up(low)
            )
        batch, flip = len(self._matrix.batch), self._matrix.flip

        def each(args):
            due, basis, factor, low, gradient = args
            return jax.lax.cond(
                due,
                lambda: wide(whole(gradient)),
                lambda: flip(self._up(basis, factor, wide(low))),
            )

        def stack() -> Array:
            view = flip(self._matrix.view(gradient))  # a loop's operands are stored
            trees = (self._basis, self._factor, low, view)
            flat = jax.tree.map(lambda x: x.reshape((-1, *x.shape[batch:])), trees)
            out = jax.lax.map(each, (self.whole, *flat))
            return self._matrix.undo(flip(out.reshape(view.shape)))

        return jax.lax.cond(jnp.any(self.whole), stack, lambda: self.up(low))

    def _up(self, basis: Any, factor: Array | None, low: Array) -> Array:
        if factor is not None:
            solve = jax.lax.linalg.triangular_solve
            half = solve(factor, low, left_side=True, lower=True)
            low = solve(factor, half, left_side=True, lower=True, transpose_a=True)
        return self._projector.up(self._matrix, basis, low)


class Compression:
    """How the gradients of ``params`` reach ``tx``: decided from shapes alone.

    Attributes:
      rows: every leaf's traffic, by its path, in the parameters' order.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        self._records = _records(tx, params)
        self._where: dict[str, tuple[int, int]] = {}
        self.rows: dict[str, LeafTraffic] = {}
        plans: dict[str, list[tuple[int, int, LeafPlan]]] = {}
        for k, record in enumerate(self._records):
            for i, leaf in enumerate(record.plan.leaves):
                plans.setdefault(leaf.path, []).append((k, i, leaf))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
            path, shape = path_string(keys), unbox(leaf).shape
            found = plans.get(path, [])
            seen = [(k, i, plan.matrix) for k, i, plan in found if plan.matrix]
            sent = size = unbox(leaf).size
            reason = found[0][2].reason if found else "no bracket sees it"
            if len(seen) > 1:
                reason = "several brackets project it"
            elif seen:
                ((k, i, matrix),) = seen
                reason, sent = _judge(self._records[k].bracket, matrix, size)
                if sent < size:
                    self._where[path] = k, i
            self.rows[path] = LeafTraffic(path, shape, size, sent, reason)

    def channels(self, state: Any) -> dict[str, Channel]:
        """Returns the channel of every compressed leaf in this state, by path."""
        states = _states(state)
        if len(states) != len(self._records):
            raise ValueError(
                f"Expected the state of this optimizer, with {len(self._records)} "
                f"low-rank bracket(s) in it; got one with {len(states)}. Pass what "
                "tx.init(params) or tx.update(...) returned."
            )
        pairs = list(zip(self._records, states, strict=True))
        return {
            path: _channel(*pairs[k], position)
            for path, (k, position) in self._where.items()
        }


def _channel(record: Record, state: SubspaceState, position: int) -> Channel:
    plan, bracket, _ = record
    stored = plan.treedef.flatten_up_to(state.basis)[position]
    pending = plan.treedef.flatten_up_to(state.pending)[position]
    refresher = bracket.refreshers(plan)[position]
    return Channel(refresher, clock_of(state), LeafBasis(unbox_tree(stored), pending))


def _judge(bracket: Bracket, matrix: Matrix, size: int) -> tuple[str, int]:
    """Returns why a projected leaf is compressed or not, and its numbers sent."""
    refresher = bracket.refresher(matrix)
    projector = refresher.projector
    name = f"lro.{type(bracket.projector).__name__}"
    one_sided = matrix.side != "both"
    if bracket.recovery is not None:
        part = f"lro.{type(bracket.recovery).__name__}"
        return f"{part} reads the whole gradient at every step", size
    if projector.advances:
        return f"{name} moves its basis by the whole gradient at every step", size
    if projector.stores_basis and projector.update_proj_gap == 1:
        return f"{name} refreshes its basis at every step", size
    if not projector.orthonormal and not one_sided:
        return f'{name} keeps no orthonormal bases, and side="both" has two', size

    def low():
        return bracket.low_zeros(refresher, refresher.init().stored)

    sent = jax.eval_shape(low).size
    if sent >= size:
        return f"its projection is not smaller: {sent} >= {size} numbers", size
    if projector.stores_basis:
        return f"a projection between refreshes, {sent} of {size} numbers", sent
    return f"a projection at every step, {sent} of {size} numbers", sent


def _states(tree: Any) -> list[SubspaceState]:
    def is_state(x: Any) -> bool:
        return isinstance(x, SubspaceState)

    return [x for x in jax.tree.leaves(tree, is_leaf=is_state) if is_state(x)]


def _records(tx: optax.GradientTransformation, params: Any) -> list[Record]:
    """Returns the brackets of ``tx`` in the order in which its state has theirs."""
    with recording() as records:
        counts: list[Any] = []

        def init(params):
            state = tx.init(params)
            counts.extend(bracket.count for bracket in _states(state))
            return state

        jax.eval_shape(init, params)
    if not records:
        raise ValueError(
            "lro.distributed found no low-rank bracket in this optimizer, so there is "
            "nothing to compress; expected one built by lro.chain, lro.subspace or a "
            "method of lro. For any other, take jax.lax.pmean of the gradients."
        )
    owners = {id(record.state.count): record for record in records}
    return [owners[id(count)] for count in counts]
