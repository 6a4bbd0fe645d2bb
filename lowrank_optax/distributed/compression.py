"""Which gradients an optimizer sees through a basis alone, and through which."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.bracket.found import bracket_states, described_brackets, leaf_of
from lowrank_optax.bracket.leaf import LowLeaf
from lowrank_optax.bracket.plan import LeafPlan, low_leaf
from lowrank_optax.bracket.planner import Planner
from lowrank_optax.bracket.start import Described, described
from lowrank_optax.bracket.state import Clock, SubspaceState
from lowrank_optax.bracket.subspace import clock_of
from lowrank_optax.leaves.boxes import is_box, unbox
from lowrank_optax.leaves.matrix import Matrix, path_string
from lowrank_optax.linalg.products import Operand, gram, wide


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

    def __init__(self, leaf: LowLeaf, clock: Clock, stored: Any, pending: Any):
        self._leaf, self._matrix = leaf, leaf.matrix
        self._basis = leaf.basis(leaf.at(clock), stored)
        # A tree without leaves for orthonormal bases, whose P^T P is the identity.
        self._factor = ()
        self.whole = None
        if leaf.projector.stores_basis:
            self.whole = leaf.due(clock, stored, pending)
        if not leaf.projector.orthonormal:
            factor = leaf.lift(
                lambda p: jnp.linalg.cholesky(gram(wide(p))), self._basis
            )
            # Where columns depend on each other the factorization returns NaN, and G'
            # does not exist.
            lost = ~jnp.all(jnp.isfinite(factor), (-2, -1))
            self.whole = lost if self.whole is None else self.whole | lost
            self._factor = factor

    def down(self, gradient: Array) -> Array:
        """Returns ``R [*batch, r, n]`` of a gradient as stored, in its dtype."""

        def one(basis: Any, x: Operand) -> Array:
            return self._leaf.projector.down(self._matrix, basis, x)

        low = self._leaf.lift(one, self._basis, self._matrix.operand(gradient))
        return low.astype(gradient.dtype)

    def up(self, low: Array) -> Array:
        """Returns G', as stored, in float32 or wider."""
        lifted = self._leaf.lift(self._up, self._basis, self._factor, wide(low))
        return self._matrix.leaf(lifted)

    def either(self, low: Array, whole: Callable[[Array], Array], gradient: Array):
        """Returns ``whole(G)`` of the matrices that this step needs whole, else G'."""
        if self.whole is None:
            return self.up(low)

        def one(due: Array, basis: Any, factor: Any, low: Array, x: Operand) -> Operand:
            return jax.lax.cond(
                due,
                lambda: x.map(lambda stored: wide(whole(stored))),
                lambda: self._up(basis, factor, wide(low)),
            )

        def each() -> Array:
            seen = self._matrix.operand(gradient)
            trees = (self.whole, self._basis, self._factor, low, seen)
            return self._matrix.leaf(self._leaf.one_by_one(one, *trees))

        if not self._matrix.batch:
            return each()
        # Each matrix is sent whole by itself, and only in steps that need one.
        return jax.lax.cond(jnp.any(self.whole), each, lambda: self.up(low))

    def _up(self, basis: Any, factor: Any, low: Array) -> Operand:
        if not isinstance(factor, tuple):
            solve = jax.lax.linalg.triangular_solve
            # With P^T P = L L^T: L half = R, then L^T low = half.
            half = solve(factor, low, left_side=True, lower=True)
            low = solve(factor, half, left_side=True, lower=True, transpose_a=True)
        return self._leaf.projector.up(self._matrix, basis, low)


class Compression:
    """How the gradients of ``params`` reach ``tx``: decided from shapes alone.

    Attributes:
      rows: every leaf's traffic, by its path, in the parameters' order.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        self._brackets = described_brackets(described(tx, params))
        if not self._brackets:
            raise ValueError(
                "lro.distributed found no low-rank bracket in this optimizer, so there "
                "is nothing to compress; expected one built by lro.chain, lro.subspace "
                "or a method of lro. For any other, take jax.lax.pmean of the "
                "gradients."
            )
        self._where: dict[str, tuple[int, int]] = {}
        self.rows: dict[str, LeafTraffic] = {}
        plans: dict[str, list[tuple[int, int, LeafPlan]]] = {}
        for k, bracket in enumerate(self._brackets):
            for i, leaf in enumerate(bracket.plan.leaves):
                plans.setdefault(leaf.path, []).append((k, i, leaf))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
            path, shape = path_string(keys), unbox(leaf).shape
            found = plans.get(path, [])
            seen = [(k, i, plan.matrix) for k, i, plan in found if plan.matrix]
            sent = size = unbox(leaf).size
            reason = found[0][2].reason if found else "no bracket sees it"
            # G' holds what one basis sees, and lacks what another would have projected.
            if len(seen) > 1:
                reason = "several brackets project it"
            elif seen:
                ((k, i, matrix),) = seen
                reason, sent = _judge(
                    self._brackets[k].planner, matrix, unbox(leaf).dtype, size
                )
                if sent < size:
                    self._where[path] = k, i
            self.rows[path] = LeafTraffic(path, shape, size, sent, reason)

    def channels(self, state: Any) -> dict[str, Channel]:
        """Returns the channel of every compressed leaf in this state, by path."""
        states = bracket_states(self._brackets, state)
        return {
            path: _channel(self._brackets[k], states[k], position)
            for path, (k, position) in self._where.items()
        }


def _channel(found: Described, state: SubspaceState, position: int) -> Channel:
    leaf, stored, pending = leaf_of(found, state, position)
    return Channel(leaf, clock_of(state), stored, pending)


def _judge(planner: Planner, matrix: Matrix, dtype: Any, size: int) -> tuple[str, int]:
    """Returns why a projected leaf is compressed or not, and its numbers sent."""
    bracket = planner.bracket
    leaf = low_leaf(bracket, matrix, dtype)
    projector = leaf.projector
    name = f"lro.{type(bracket.projector).__name__}"
    one_sided = matrix.side != "both"
    if bracket.recovery is not None:
        part = f"lro.{type(bracket.recovery).__name__}"
        return f"{part} reads the whole gradient at every step", size
    if bracket.match is not None:
        return f"match={bracket.match!r} reads the gradient itself at every step", size
    if projector.advances:
        return f"{name} moves its basis by the whole gradient at every step", size
    if projector.stores_basis and projector.update_proj_gap == 1:
        return f"{name} refreshes its basis at every step", size
    if not projector.orthonormal and not one_sided:
        return f'{name} keeps no orthonormal bases, and side="both" has two', size

    def low():
        return planner.low_zeros(leaf, leaf.start().stored)

    sent = jax.eval_shape(low).size
    if sent >= size:
        return f"its projection is not smaller: {sent} >= {size} numbers", size
    if projector.stores_basis:
        return f"a projection between refreshes, {sent} of {size} numbers", sent
    return f"a projection at every step, {sent} of {size} numbers", sent
