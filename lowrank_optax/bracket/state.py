"""A bracket's slots, its state, and what it decides before any array exists."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.bracket.plan import Plan, make_plan, record
from lowrank_optax.bracket.refresh import PRNG, Clock, Refresher, phases
from lowrank_optax.bracket.selection import Selection
from lowrank_optax.leaves import moments as _moments
from lowrank_optax.leaves.matrix import Matrix, is_box, rebox, refill, unbox
from lowrank_optax.projectors import Projector, TwoSidedBasis, two_sided
from lowrank_optax.recovery import Recovery
from lowrank_optax.transport import Transport


class SubspaceState(NamedTuple):
    """State of a bracket; trees have the parameters' structure.

    Attributes:
      count: updates of the inner optimizer so far.
      key: key data of the bracket's random numbers, ``uint32[2]``.
      basis: what the projector stores per matrix, ``MaskedNode`` on full leaves.
      pending: per matrix, whether a refresh is owed (at the start, and after a
        zero or non-finite gradient), ``MaskedNode`` on full leaves.
      inner_state: the inner optimizer's, on projections and (without ``full``) on
        full leaves.
      full_state: the state of ``full``, or ``()``.
      recovery_state: the recovery's per matrix, or ``()``.
    """

    count: Array
    key: Array
    basis: Any
    pending: Any
    inner_state: Any
    full_state: Any
    recovery_state: Any


class SubspaceView(NamedTuple):
    """What an inner transformation may read, passed as extra argument ``subspace``.

    Read-only and never stored; trees are structured like the updates that the
    inner transformation sees.

    Attributes:
      gradient: the gradient, matrices as ``[*batch, m, n]``.
      params: the parameters likewise, or None.
      projected: what the inner transformation was given.
      basis: the basis of this step, None on full leaves.
      previous_basis: the basis of the step before, None on full leaves and ``()``
        where the projector stores none.
      state_before: inner state before transport.
      state_transported: inner state after transport, before the update.
      matrices: the static ``Matrix`` of each projected leaf, None on full leaves.
    """

    gradient: Any
    params: Any
    projected: Any
    basis: Any
    previous_basis: Any
    state_before: Any
    state_transported: Any
    matrices: Any


@dataclasses.dataclass(frozen=True)
class Bracket:
    """The slots of one bracket."""

    projector: Projector
    inner: optax.GradientTransformationExtraArgs
    transport: Transport
    recovery: Recovery | None
    full: optax.GradientTransformationExtraArgs | None
    selection: Selection
    scale: Any
    learning_rate: Any
    dtype: Any
    stagger: bool
    seed: int

    def plan(self, tree: Any) -> Plan:
        """Decides from shapes alone what happens to every leaf of ``tree``."""
        return make_plan(tree, self.selection, self.projector, self._bytes)

    def refreshers(self, plan: Plan) -> dict[int, Refresher]:
        """Returns the refresher of every projected leaf, by position."""
        positions = [i for i, _ in plan.matrices()]
        matrices = [matrix for _, matrix in plan.matrices()]
        spread = phases(matrices, self.projector.update_proj_gap, self.stagger)
        return {
            i: self.refresher(matrix, phase)
            for i, matrix, phase in zip(positions, matrices, spread, strict=True)
        }

    def refresher(self, matrix: Matrix, phase: tuple[int, ...] = ()) -> Refresher:
        """Returns the refresher of one projected leaf; without phases, for shapes."""
        both = matrix.side == "both"
        projector = two_sided(self.projector) if both else self.projector
        phase = phase or (0,) * math.prod(matrix.batch_shape)
        return Refresher(matrix, projector, self.transport, phase)

    def _bytes(self, leaf: Matrix | tuple[int, ...]) -> int:
        """Returns the state bytes of one projected matrix, or of one full leaf."""

        def full(shape):
            return (self.full or self.inner).init(jnp.zeros(shape, self.dtype))

        def low(matrix):
            refresher = self.refresher(matrix)
            basis = refresher.init()
            state = self.inner.init(self.low_zeros(refresher, basis.stored))
            recovery = self.recovery.start(matrix) if self.recovery else ()
            return basis, state, recovery

        make = low if isinstance(leaf, Matrix) else full
        shapes = jax.eval_shape(functools.partial(make, leaf))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    def low_zeros(self, refresher: Refresher, stored: Any) -> Array:
        """Returns zeros in the shape of a leaf's projection."""
        shape = (*refresher.matrix.batch_shape, refresher.matrix.m, refresher.matrix.n)

        def project():
            clock = Clock(jnp.int32(0), jnp.bool_(True), _key_data(self.seed))
            basis = refresher.basis(clock, stored)
            x = jnp.zeros(shape, self.dtype)
            return refresher.projector.down(refresher.matrix, basis, x)

        return jnp.zeros(jax.eval_shape(project).shape, self.dtype)

    def split(self, plan: Plan, low: list[Any]) -> tuple[Any, Any]:
        """Returns the trees of the inner and of the ``full`` transformation."""
        matrices = {i for i, _ in plan.matrices()}
        hidden = {i for i, leaf in enumerate(plan.leaves) if leaf.empty}

        def tree(hide):
            leaves = [optax.MaskedNode() if i in hide else x for i, x in enumerate(low)]
            return plan.treedef.unflatten(leaves)

        if self.full is None:
            return tree(hidden), ()
        outside = set(range(len(low))) - matrices
        return tree(hidden | outside), tree(hidden | matrices)

    def init(self, params: Any) -> SubspaceState:
        """Returns the state of a fresh bracket."""
        plan = self.plan(params)
        leaves = plan.treedef.flatten_up_to(params)
        low: list[Any] = [
            refill(leaf, cast(unbox(leaf), self.dtype)) for leaf in leaves
        ]
        basis: list[Any] = [optax.MaskedNode()] * len(leaves)
        pending, recovery = list(basis), list(basis)
        for i, refresher in self.refreshers(plan).items():
            matrix, first = refresher.matrix, refresher.init()
            zeros = self.low_zeros(refresher, first.stored)
            basis[i] = _rebox_basis(leaves[i], first.stored, matrix)
            pending[i] = first.pending
            low[i] = rebox(leaves[i], zeros, matrix.low_axes)
            if self.recovery is not None:
                start = self.recovery.start(matrix)
                recovery[i] = _rebox_recovery(leaves[i], start, matrix)
        inner, full = self.split(plan, low)
        inner_state = self.inner.init(inner)
        if self.transport.moves and plan.matrices():
            _require_moments(inner_state)
        if self.recovery is not None and not self.recovery.accumulates:
            _refuse_accumulation(self.recovery, inner_state)
        state = SubspaceState(
            jnp.zeros([], jnp.int32),
            _key_data(self.seed),
            plan.treedef.unflatten(basis),
            plan.treedef.unflatten(pending),
            inner_state,
            self.full.init(full) if self.full is not None else (),
            plan.treedef.unflatten(recovery) if self.recovery is not None else (),
        )
        record(plan, self, state)
        return state


def clock_of(state: SubspaceState) -> Clock:
    """Returns the bracket's time; closed in the middle of an accumulation inside it."""
    steps = optax.tree_utils.tree_get(state.inner_state, "mini_step")
    is_open = jnp.bool_(True) if steps is None else steps == 0
    return Clock(state.count, is_open, state.key)


def _key_data(seed: int) -> Array:
    return jax.random.key_data(jax.random.key(seed, impl=PRNG))


def cast(leaf: Any, dtype: Any) -> Any:
    """Casts real floating-point leaves; counters, complex and keys stay."""
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _rebox_basis(leaf: Any, stored: Any, matrix: Matrix) -> Any:
    if not is_box(leaf):
        return stored
    if isinstance(stored, TwoSidedBasis):
        sides = zip(stored, ("left", "right"), strict=True)
        return TwoSidedBasis(
            *(_rebox_basis(leaf, x, matrix.seen_from(side)) for x, side in sides)
        )
    shape = (*matrix.batch_shape, matrix.m, matrix.rank)
    return jax.tree.map(
        lambda x: rebox(leaf, x, matrix.basis_axes) if x.shape == shape else x, stored
    )


def _rebox_recovery(leaf: Any, state: Any, matrix: Matrix) -> Any:
    """Boxes what is shaped like the parameter itself; scalars stay bare."""
    return jax.tree.map(
        lambda x: refill(leaf, x) if x.shape == matrix.shape else x, state
    )


def _require_moments(inner_state: Any) -> None:
    if not any(_moments.find(inner_state).groups):
        raise ValueError(
            "This transport moves moments, but the inner optimizer's state has none "
            f"(no field {', '.join(_moments.FIELDS)}). Use an inner optimizer with "
            "moments, such as optax.scale_by_adam(), or transport=lro.align_signs(). "
            "A state type of your own can be named with lro.register_moments."
        )


def _refuse_accumulation(recovery: Recovery, inner_state: Any) -> None:
    if optax.tree_utils.tree_get(inner_state, "mini_step") is not None:
        raise ValueError(
            f"{type(recovery).__name__} does not work around an accumulation inside "
            "the bracket. Put optax.MultiSteps around the whole optimizer instead."
        )
