"""THE combinator: an Optax transformation run inside a low-rank subspace.

Read ``_step`` first: every method of this library is that function with one part
chosen for each slot.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _moments
from lowrank_optax._matrices import Matrix, is_box, rebox, refill, unbox
from lowrank_optax._meshes import under_auto_axes
from lowrank_optax._refresh import PRNG, Clock, LeafBasis, Refresher, phases
from lowrank_optax._selection import Plan, Selection, make_plan, record
from lowrank_optax.projectors import Projector, two_sided
from lowrank_optax.recovery import LeafView, Recovered, Recovery
from lowrank_optax.transport import Transport, align_signs


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
      previous_basis: the basis of the step before, None on full leaves.
      state_before: inner state before transport.
      state_transported: inner state after transport, before the update.
      state_after: inner state after the update (None inside the update itself).
      matrices: the static ``Matrix`` of each projected leaf, None on full leaves.
    """

    gradient: Any
    params: Any
    projected: Any
    basis: Any
    previous_basis: Any
    state_before: Any
    state_transported: Any
    state_after: Any
    matrices: Any


@dataclasses.dataclass(frozen=True)
class _Bracket:
    """The slots of one bracket."""

    projector: Projector
    inner: optax.GradientTransformationExtraArgs
    transport: Transport
    recovery: Recovery | None
    full: optax.GradientTransformationExtraArgs | None
    selection: Selection
    scale: Any
    dtype: Any
    stagger: bool
    seed: int

    def plan(self, tree: Any) -> Plan:
        """Decides from shapes alone what happens to every leaf of ``tree``."""
        return make_plan(tree, self.selection, self.projector.rank, self._bytes)

    def refreshers(self, plan: Plan) -> dict[int, Refresher]:
        """Returns the refresher of every projected leaf, by position."""
        positions = [i for i, _ in plan.matrices()]
        matrices = [matrix for _, matrix in plan.matrices()]
        spread = phases(matrices, self.projector.update_proj_gap, self.stagger)
        return {
            i: self._refresher(matrix, phase)
            for i, matrix, phase in zip(positions, matrices, spread, strict=True)
        }

    def _refresher(self, matrix: Matrix, phase: tuple[int, ...] = ()) -> Refresher:
        both = matrix.side == "both"
        projector = two_sided(self.projector) if both else self.projector
        phase = phase or (0,) * math.prod(matrix.batch_shape)
        return Refresher(matrix, projector, self.transport, phase)

    def _bytes(self, leaf: Matrix | tuple[int, ...]) -> int:
        """Returns the state bytes of one projected matrix, or of one full leaf."""

        def full(shape):
            return (self.full or self.inner).init(jnp.zeros(shape, self.dtype))

        def low(matrix):
            refresher = self._refresher(matrix)
            basis = refresher.init()
            state = self.inner.init(self.low_zeros(refresher, basis.stored))
            recovery = self.recovery.init(matrix) if self.recovery else ()
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


def subspace(
    projector: Projector,
    inner: optax.GradientTransformation,
    *,
    transport: Transport | None = None,
    recovery: Recovery | None = None,
    scale: Any = 1.0,
    full: optax.GradientTransformation | None = None,
    selection: Selection | None = None,
    dtype: Any = jnp.float32,
    stagger: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` on projected gradients and lifts what it returns.

    For every projected matrix ``G [m, n]`` with basis ``P [m, r]``, r << m::

        P  = refresh(G, P)  when due          R = P^T G          [r, n]
        N, state = inner(R, state)            U = scale * P N    [m, n]

    so the inner optimizer's state has ``r n`` elements in place of ``m n``. Leaves
    that are not projected go through the same inner at full size and unscaled.
    ``lro.chain`` is the spelling of this primitive as a pipeline.

    Args:
      projector: forms the bases (``lro.power``, ``lro.svd``, ...).
      inner: any Optax transformation that treats leading axes as batch. It sees
        projections as updates, projected parameters as ``params``, and a
        ``SubspaceView`` as the extra argument ``subspace``.
      transport: what a change of basis does to the moments; None aligns signs.
      recovery: what the update gets from outside the subspace; None discards it.
      scale: factor on the lifted direction (not on full leaves); may be traced.
      full: another transformation for the leaves that are not projected, for
        inners that accept matrices only.
      selection: which leaves are projected; None is the default rule.
      dtype: the inner transformation's dtype, whatever parameters and gradients are.
      stagger: spread the refreshes of different matrices over the gap.
      seed: seed of the bracket's random numbers.

    Returns:
      A ``GradientTransformationExtraArgs`` with a ``SubspaceState``.

    Raises:
      TypeError: if ``projector`` or ``inner`` is something else.
      ValueError: at init, if a leaf selected explicitly cannot be projected.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = lro.subspace(lro.power(rank=2), optax.scale_by_adam())
      >>> state = tx.init({"w": jnp.ones((64, 32))})
      >>> state.basis["w"].shape, state.inner_state.mu["w"].shape
      ((32, 2), (2, 64))
    """
    if not isinstance(projector, Projector):
        raise TypeError(
            "Expected a projector such as lro.power(rank=128), got "
            f"{type(projector).__name__}."
        )
    bracket = _Bracket(
        projector,
        _transformation("inner", inner),
        align_signs() if transport is None else transport,
        recovery,
        None if full is None else _transformation("full", full),
        selection or Selection(),
        scale,
        dtype,
        stagger,
        seed,
    )

    def init(params: Any) -> SubspaceState:
        return _init(bracket, params)

    def update(updates, state, params=None, **extra_args):
        step = functools.partial(_step, bracket)
        return under_auto_axes(step, updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _init(bracket: _Bracket, params: Any) -> SubspaceState:
    plan = bracket.plan(params)
    record(plan)
    leaves = plan.treedef.flatten_up_to(params)
    low: list[Any] = [
        refill(leaf, _cast(unbox(leaf), bracket.dtype)) for leaf in leaves
    ]
    basis: list[Any] = [optax.MaskedNode()] * len(leaves)
    pending, recovery = list(basis), list(basis)
    for i, refresher in bracket.refreshers(plan).items():
        matrix, start = refresher.matrix, refresher.init()
        zeros = bracket.low_zeros(refresher, start.stored)
        basis[i] = _rebox_basis(leaves[i], start.stored, matrix)
        pending[i] = start.pending
        low[i] = rebox(leaves[i], zeros, matrix.low_axes)
        if bracket.recovery is not None:
            recovery[i] = bracket.recovery.init(matrix)
    inner, full = bracket.split(plan, low)
    inner_state = bracket.inner.init(inner)
    if bracket.transport.moves and plan.matrices():
        _require_moments(inner_state)
    return SubspaceState(
        jnp.zeros([], jnp.int32),
        _key_data(bracket.seed),
        plan.treedef.unflatten(basis),
        plan.treedef.unflatten(pending),
        inner_state,
        bracket.full.init(full) if bracket.full is not None else (),
        plan.treedef.unflatten(recovery) if bracket.recovery is not None else (),
    )


def _step(bracket: _Bracket, updates, state, params, extra_args):
    """One step of the bracket. The comments number the lines of the design."""
    plan = bracket.plan(updates if params is None else params)
    tree = _Tree(bracket, plan, updates, state, params)

    # 1. matrix view of every projected leaf
    gradients = tree.view(updates)
    # 2. a new basis where one is due, and 3. the moments carried over to it
    with jax.named_scope("lowrank/refresh"):
        renewed, transported = tree.refresh(gradients)
    # 4. project
    with jax.named_scope("lowrank/project"):
        projected = tree.down(renewed, gradients)
    # 5. the inner optimizer, in the subspace and on the full leaves
    with jax.named_scope("lowrank/inner"):
        view = tree.subspace_view(gradients, renewed, projected, transported)
        directions, inner_state, full_state = tree.inner(view, extra_args)
    # 6. recover, 7. backproject
    with jax.named_scope("lowrank/backproject"):
        recovered, recovery_state = tree.recover(
            gradients, projected, directions, renewed, inner_state
        )
        lifted = tree.up(renewed, recovered, gradients)
    # 8. undo the matrix view, 9. back to the gradient's dtype, 10. store
    new_updates = tree.undo(lifted, directions)
    return new_updates, tree.state(renewed, inner_state, full_state, recovery_state)


class _Tree:
    """One step's plan applied to its trees: lists by leaf position."""

    def __init__(self, bracket: _Bracket, plan: Plan, updates, state, params):
        self.bracket, self.plan, self.before = bracket, plan, state
        _check_structure(plan, updates)
        self.refreshers = bracket.refreshers(plan)
        self.updates = plan.treedef.flatten_up_to(updates)
        self.params = None if params is None else plan.treedef.flatten_up_to(params)
        steps = optax.tree_utils.tree_get(state.inner_state, "mini_step")
        self.clock = Clock(
            state.count, jnp.bool_(True) if steps is None else steps == 0, state.key
        )

    def view(self, tree: Any) -> list[Any]:
        leaves = [unbox(leaf) for leaf in self.plan.treedef.flatten_up_to(tree)]
        return [
            self.refreshers[i].matrix.view(leaf) if i in self.refreshers else leaf
            for i, leaf in enumerate(leaves)
        ]

    def refresh(self, gradients: list[Any]) -> tuple[dict[int, LeafBasis], Any]:
        """Returns every projected leaf's basis, and the transported inner state."""
        treedef = self.plan.treedef
        stored = treedef.flatten_up_to(self.before.basis)
        pending = treedef.flatten_up_to(self.before.pending)
        moments = _moments.find(self.before.inner_state)
        renewed, moved = {}, {}
        for i, refresher in self.refreshers.items():
            carried = (
                _moments.of_leaf(moments.groups, treedef, i)
                if refresher.reads_moments
                else ()
            )
            leaf = LeafBasis(_unbox_basis(stored[i]), pending[i], carried)
            renewed[i] = refresher.refresh(self.clock, gradients[i], leaf)
            if self.bracket.transport.moves:
                moved[i] = renewed[i].moments
        if not moved:
            return renewed, self.before.inner_state
        groups = _moments.with_leaves(moments.groups, treedef, moved)
        return renewed, moments.rebuild(groups)

    def down(self, renewed: dict[int, LeafBasis], leaves: list[Any]) -> list[Any]:
        """Projects the matrices; casts every leaf to the inner's dtype."""
        self.bases = {
            i: refresher.basis(self.clock, renewed[i].stored)
            for i, refresher in self.refreshers.items()
        }
        return self._project(leaves)

    def _project(self, leaves: list[Any]) -> list[Any]:
        low = list(leaves)
        for i, refresher in self.refreshers.items():
            low[i] = refresher.projector.down(
                refresher.matrix, self.bases[i], leaves[i]
            )
        return [_cast(leaf, self.bracket.dtype) for leaf in low]

    def _boxed(self, low: list[Any]) -> list[Any]:
        return [
            rebox(box, leaf, self.refreshers[i].matrix.low_axes)
            if i in self.refreshers
            else refill(box, leaf)
            for i, (box, leaf) in enumerate(zip(self.updates, low, strict=True))
        ]

    def subspace_view(self, gradients, renewed, projected, transported) -> SubspaceView:
        """Gathers what inner transformations may read."""
        unflatten = self.plan.treedef.unflatten
        none: list[Any] = [None] * len(gradients)
        bases, previous, matrices = list(none), list(none), list(none)
        stored = self.plan.treedef.flatten_up_to(self.before.basis)
        for i, refresher in self.refreshers.items():
            bases[i], matrices[i] = self.bases[i], refresher.matrix
            previous[i] = _unbox_basis(stored[i])
        return SubspaceView(
            unflatten(gradients),
            None if self.params is None else unflatten(self.view_params()),
            unflatten(projected),
            unflatten(bases),
            unflatten(previous),
            self.before.inner_state,
            transported,
            None,
            unflatten(matrices),
        )

    def view_params(self) -> list[Any]:
        """Returns the parameters, matrices as ``[*batch, m, n]``."""
        return self.view(self.plan.treedef.unflatten(self.params))

    def inner(self, view: SubspaceView, extra_args) -> tuple[list[Any], Any, Any]:
        """Runs the inner transformation, and ``full`` on the other leaves."""
        bracket, treedef = self.bracket, self.plan.treedef
        projected = treedef.flatten_up_to(view.projected)
        low, rest = bracket.split(self.plan, self._boxed(projected))
        low_params = rest_params = None
        if self.params is not None:
            boxed = self._boxed(self._project(self.view_params()))
            low_params, rest_params = bracket.split(self.plan, boxed)
        directions, inner_state = bracket.inner.update(
            low, view.state_transported, low_params, subspace=view, **extra_args
        )
        leaves = [unbox(leaf) for leaf in treedef.flatten_up_to(directions)]
        if bracket.full is None:
            return leaves, inner_state, ()
        others, full_state = bracket.full.update(
            rest, self.before.full_state, rest_params, **extra_args
        )
        others = [unbox(leaf) for leaf in treedef.flatten_up_to(others)]
        leaves = [
            leaves[i] if i in self.refreshers else x for i, x in enumerate(others)
        ]
        return leaves, inner_state, full_state

    def recover(self, gradients, projected, directions, renewed, inner_state):
        """Returns each matrix' terms of the update, and the recovery's new state."""
        recovery, treedef = self.bracket.recovery, self.plan.treedef
        if recovery is None:
            scale = self.bracket.scale
            discard = {i: Recovered(scale * directions[i]) for i in self.refreshers}
            return discard, ()
        groups = _moments.find(inner_state).groups
        states = treedef.flatten_up_to(self.before.recovery_state)
        recovered = {}
        for i, refresher in self.refreshers.items():
            view = LeafView(
                gradients[i],
                projected[i],
                directions[i],
                self.bases[i],
                _moments.of_leaf(groups, treedef, i),
                self.clock.count,
            )
            recovered[i], states[i] = recovery.update(
                refresher.matrix, states[i], view, self.bracket.scale
            )
        return recovered, treedef.unflatten(states)

    def up(self, renewed, recovered: dict[int, Recovered], gradients) -> dict[int, Any]:
        """Lifts the directions: ``P low + G * phi + addend``."""
        lifted = {}
        for i, (low, phi, addend) in recovered.items():
            refresher, terms = self.refreshers[i], []
            if low is not None:
                terms.append(
                    refresher.projector.up(refresher.matrix, self.bases[i], low)
                )
            if phi is not None:
                terms.append(gradients[i].astype(phi.dtype) * phi)
            if addend is not None:
                terms.append(addend)
            lifted[i] = functools.reduce(jnp.add, terms)
        return lifted

    def undo(self, lifted: dict[int, Any], directions: list[Any]) -> Any:
        """Returns the updates in the leaves' own shapes and dtypes."""
        leaves = []
        for i, (like, leaf) in enumerate(zip(self.updates, directions, strict=True)):
            if i in lifted:
                leaf = self.refreshers[i].matrix.undo(lifted[i])
            if self.plan.leaves[i].empty:
                leaf = unbox(like)
            leaves.append(refill(like, _cast(leaf, unbox(like).dtype)))
        return self.plan.treedef.unflatten(leaves)

    def state(self, renewed, inner_state, full_state, recovery_state) -> SubspaceState:
        """Returns the new state; time passes when an accumulation completes."""
        treedef = self.plan.treedef
        stored = treedef.flatten_up_to(self.before.basis)
        pending = treedef.flatten_up_to(self.before.pending)
        for i, leaf in renewed.items():
            stored[i] = _refill_basis(stored[i], leaf.stored)
            pending[i] = leaf.pending
        steps = optax.tree_utils.tree_get(inner_state, "mini_step")
        later = jnp.asarray(optax.safe_increment(self.before.count))
        return SubspaceState(
            later if steps is None else jnp.where(steps == 0, later, self.before.count),
            self.before.key,
            treedef.unflatten(stored),
            treedef.unflatten(pending),
            inner_state,
            full_state,
            recovery_state,
        )


def _key_data(seed: int) -> Array:
    return jax.random.key_data(jax.random.key(seed, impl=PRNG))


def _cast(leaf: Any, dtype: Any) -> Any:
    """Casts real floating-point leaves; counters, complex and keys stay."""
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _rebox_basis(leaf: Any, stored: Any, matrix: Matrix) -> Any:
    if not is_box(leaf):
        return stored
    return jax.tree.map(lambda x: rebox(leaf, x, matrix.basis_axes), stored)


def _unbox_basis(stored: Any) -> Any:
    return jax.tree.map(unbox, stored, is_leaf=is_box)


def _refill_basis(stored: Any, value: Any) -> Any:
    return jax.tree.map(refill, stored, value, is_leaf=is_box)


def _transformation(name: str, tx: Any) -> optax.GradientTransformationExtraArgs:
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation such as "
            f"optax.scale_by_adam(), got {type(tx).__name__}."
        )
    return optax.with_extra_args_support(tx)


def _require_moments(inner_state: Any) -> None:
    if not any(_moments.find(inner_state).groups):
        raise ValueError(
            "This transport moves moments, but the inner optimizer's state has none "
            f"(no field {', '.join(_moments.FIELDS)}). Use an inner optimizer with "
            "moments, such as optax.scale_by_adam(), or transport=lro.align_signs()."
        )


def _check_structure(plan: Plan, updates: Any) -> None:
    structure = jax.tree.structure(updates, is_leaf=is_box)
    if structure != plan.treedef:
        raise ValueError(
            "Gradients and parameters must be trees of the same structure; got "
            f"gradients {structure} and parameters {plan.treedef}."
        )
