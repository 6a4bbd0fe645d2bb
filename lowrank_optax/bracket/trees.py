"""One step's trees as lists by leaf position: views, boxes, dtypes, and back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.bracket.finish import Finish, stepped
from lowrank_optax.bracket.plan import Plan
from lowrank_optax.bracket.refresh import LeafBasis
from lowrank_optax.bracket.state import (
    Bracket,
    SubspaceState,
    SubspaceView,
    cast,
    clock_of,
)
from lowrank_optax.leaves import moments as _moments
from lowrank_optax.leaves.matrix import (
    is_altered,
    is_box,
    rebox,
    refill,
    refill_tree,
    restore,
    unbox,
    unbox_tree,
)


class Leaves:
    """One step's plan applied to its trees: lists by leaf position."""

    def __init__(self, bracket: Bracket, plan: Plan, updates, state, params):
        self.bracket, self.plan = bracket, plan
        _check_trees(plan, updates)
        self.refreshers = bracket.refreshers(plan)
        self.before = self._restored(state, updates if params is None else params)
        self.updates = plan.treedef.flatten_up_to(updates)
        self.params = None if params is None else plan.treedef.flatten_up_to(params)
        self.clock = clock_of(state)

    def _restored(self, state: SubspaceState, like: Any) -> SubspaceState:
        """Gives what is kept per parameter its own types back.

        ``nnx.Optimizer`` returns a tuple at a parameter's place as a mapping.
        """
        altered = is_altered(self.plan.treedef, state.basis, state.recovery_state)
        if altered or _moments.are_altered(self.plan.treedef, state.inner_state):
            return restore(state, lambda: self.bracket.init(like))
        return state

    def view(self, tree: Any) -> list[Any]:
        leaves = [unbox(leaf) for leaf in self.plan.treedef.flatten_up_to(tree)]
        return [
            self.refreshers[i].matrix.view(leaf) if i in self.refreshers else leaf
            for i, leaf in enumerate(leaves)
        ]

    def enter(self, gradients: list[Any]) -> list[Any]:
        """Lets the recovery replace the gradients of matrices."""
        recovery, entered = self.bracket.recovery, list(gradients)
        if recovery is not None:
            states = self._recovery_states()
            for i, refresher in self.refreshers.items():
                entered[i] = recovery.enter(
                    refresher.matrix, unbox_tree(states[i]), gradients[i]
                )
        return entered

    def _recovery_states(self) -> list[Any]:
        return self.plan.treedef.flatten_up_to(self.before.recovery_state)

    def refresh(self, gradients: list[Any]) -> tuple[dict[int, LeafBasis], Any]:
        """Returns every projected leaf's basis, and the transported inner state."""
        treedef = self.plan.treedef
        moments = _moments.find(self.before.inner_state)
        renewed, moved = {}, {}
        for i, refresher in self.refreshers.items():
            carried = (
                _moments.of_leaf(moments.groups, treedef, i)
                if refresher.reads_moments
                else ()
            )
            leaf = self.before_refresh[i]._replace(moments=carried)
            renewed[i] = refresher.refresh(self.clock, gradients[i], leaf)
            if self.bracket.transport.moves:
                moved[i] = renewed[i].moments
        if not moved:
            return renewed, self.before.inner_state
        groups = _moments.with_leaves(moments.groups, treedef, moved)
        return renewed, moments.rebuild(groups)

    def bases(self, renewed: dict[int, LeafBasis]) -> dict[int, Any]:
        """Returns what the projector uses of each projected leaf."""
        return {
            i: refresher.basis(self.clock, renewed[i].stored)
            for i, refresher in self.refreshers.items()
        }

    @functools.cached_property
    def previous_bases(self) -> dict[int, Any]:
        """The bases as they stood before this step, ``()`` where none is stored."""
        return {
            i: refresher.basis(self.clock, self.before_refresh[i].stored)
            if refresher.projector.stores_basis
            else ()
            for i, refresher in self.refreshers.items()
        }

    @functools.cached_property
    def before_refresh(self) -> dict[int, LeafBasis]:
        """What was stored of each projected leaf before this step."""
        stored = self.plan.treedef.flatten_up_to(self.before.basis)
        pending = self.plan.treedef.flatten_up_to(self.before.pending)
        return {
            i: LeafBasis(unbox_tree(stored[i]), pending[i]) for i in self.refreshers
        }

    def down(self, renewed: dict[int, LeafBasis], leaves: list[Any]) -> list[Any]:
        """Projects the matrices; casts every leaf to the inner's dtype."""
        dtype, low = self.bracket.dtype, [cast(x, self.bracket.dtype) for x in leaves]
        for i, refresher in self.refreshers.items():

            def project(matrix, basis, stored, down=refresher.projector.down):
                return cast(down(matrix, basis, matrix.flip(stored)), dtype)

            # In stored order, as the operands of a loop are materialized.
            stored = refresher.matrix.flip(leaves[i])
            low[i] = refresher.each(self.clock, renewed[i].stored, project, stored)
        return low

    def _boxed(self, low: list[Any]) -> list[Any]:
        return [
            rebox(box, leaf, self.refreshers[i].matrix.low_axes)
            if i in self.refreshers
            else refill(box, leaf)
            for i, (box, leaf) in enumerate(zip(self.updates, low, strict=True))
        ]

    def subspace_view(self, gradients, bases, projected, transported) -> SubspaceView:
        """Gathers what inner transformations may read."""
        unflatten = self.plan.treedef.unflatten
        none: list[Any] = [None] * len(gradients)
        used, previous, matrices = list(none), list(none), list(none)
        for i, refresher in self.refreshers.items():
            used[i], matrices[i] = bases[i], refresher.matrix
            previous[i] = self.previous_bases[i]
        return SubspaceView(
            unflatten(gradients),
            None if self.params is None else unflatten(self.view_params()),
            unflatten(projected),
            unflatten(used),
            unflatten(previous),
            self.before.inner_state,
            transported,
            unflatten(matrices),
        )

    def view_params(self) -> list[Any]:
        """Returns the parameters, matrices as ``[*batch, m, n]``."""
        return self.view(self.plan.treedef.unflatten(self.params))

    def inner(
        self, view: SubspaceView, renewed, extra_args
    ) -> tuple[list[Any], Any, Any]:
        """Runs the inner transformation, and ``full`` on the other leaves."""
        bracket, treedef = self.bracket, self.plan.treedef
        projected = treedef.flatten_up_to(view.projected)
        low, rest = bracket.split(self.plan, self._boxed(projected))
        low_params = rest_params = None
        if self.params is not None:
            boxed = self._boxed(self.down(renewed, self.view_params()))
            low_params, rest_params = bracket.split(self.plan, boxed)
        directions, inner_state = bracket.inner.update(
            low,
            view.state_transported,
            low_params,
            **{**extra_args, "subspace": view},
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

    def lift(
        self, view: SubspaceView, gradients, directions, renewed, inner_state
    ) -> tuple[dict[int, Array], Any]:
        """Returns each matrix' update and the recovery's new state.

        The update is ``P low + G * phi + addend``, times the learning rate if it is
        ours.
        """
        recovery, treedef = self.bracket.recovery, self.plan.treedef
        moments = [
            _moments.find(state, factors=True).groups if recovery else ()
            for state in (inner_state, view.state_transported, view.state_before)
        ]
        projected = treedef.flatten_up_to(view.projected)
        states = self._recovery_states() if recovery else []
        lifted = {}
        for i, refresher in self.refreshers.items():
            stored = refresher.matrix.flip(gradients[i])
            dtype = unbox(self.updates[i]).dtype
            finish = Finish(self.bracket, refresher.projector, dtype, self.clock.count)
            arrays: Any = stored, directions[i]
            before = unbox_tree(states[i]) if recovery else ()
            if recovery:
                groups = [_moments.of_leaf(group, treedef, i) for group in moments]
                arrays += (projected[i], self.previous_bases[i], *groups, before)
            lifted[i], after = refresher.each(
                self.clock, renewed[i].stored, finish, *arrays
            )
            if recovery:
                # What counts for all layers comes back once per layer.
                after = jax.tree.map(
                    lambda new, old: new if new.shape == old.shape else new[0],
                    after,
                    before,
                )
                after = _when_stepped(inner_state, after, before)
                states[i] = refill_tree(states[i], after)
        return lifted, treedef.unflatten(states) if recovery else ()

    def descend(self, directions: list[Any]) -> list[Any]:
        """Multiplies full leaves by the negative learning rate, if it is ours."""
        return [
            x
            if i in self.refreshers or isinstance(x, optax.MaskedNode)
            else stepped(self.bracket, self.clock.count, x)
            for i, x in enumerate(directions)
        ]

    def undo(self, lifted: dict[int, Any], directions: list[Any]) -> Any:
        """Returns the updates in the leaves' own shapes and dtypes."""
        leaves = []
        for i, (like, leaf) in enumerate(zip(self.updates, directions, strict=True)):
            if i in lifted:
                matrix = self.refreshers[i].matrix
                leaf = matrix.undo(matrix.flip(lifted[i]))
            if self.plan.leaves[i].empty:
                leaf = unbox(like)
            leaves.append(refill(like, cast(leaf, unbox(like).dtype)))
        return self.plan.treedef.unflatten(leaves)

    def advance(
        self, renewed: dict[int, LeafBasis], gradients, view: SubspaceView, inner_state
    ) -> dict[int, LeafBasis]:
        """Moves the bases that move after use, when the inner optimizer stepped."""
        projected = self.plan.treedef.flatten_up_to(view.projected)
        moved = dict(renewed)
        for i, refresher in self.refreshers.items():
            if refresher.projector.advances:
                after = refresher.advance(
                    self.clock,
                    gradients[i],
                    projected[i],
                    self.before_refresh[i],
                    renewed[i],
                )
                stored = _when_stepped(inner_state, after.stored, renewed[i].stored)
                moved[i] = after._replace(stored=stored)
        return moved

    def state(self, renewed, inner_state, full_state, recovery_state) -> SubspaceState:
        """Returns the new state; time passes when an accumulation completes."""
        treedef = self.plan.treedef
        stored = treedef.flatten_up_to(self.before.basis)
        pending = treedef.flatten_up_to(self.before.pending)
        for i, leaf in renewed.items():
            stored[i] = refill_tree(stored[i], leaf.stored)
            pending[i] = leaf.pending
        later = jnp.asarray(optax.safe_increment(self.before.count))
        return SubspaceState(
            _when_stepped(inner_state, later, self.before.count),
            self.before.key,
            treedef.unflatten(stored),
            treedef.unflatten(pending),
            inner_state,
            full_state,
            recovery_state,
        )


def _when_stepped(inner_state: Any, after: Any, before: Any) -> Any:
    """Returns ``before`` in the middle of an accumulation."""
    steps = optax.tree_utils.tree_get(inner_state, "mini_step")
    if steps is None:
        return after
    return jax.tree.map(lambda a, b: jnp.where(steps == 0, a, b), after, before)


def _check_trees(plan: Plan, updates: Any) -> None:
    structure = jax.tree.structure(updates, is_leaf=is_box)
    if structure != plan.treedef:
        raise ValueError(
            "Gradients and parameters must be trees of the same structure; got "
            f"gradients {structure} and parameters {plan.treedef}."
        )
    for leaf, update in zip(
        plan.leaves, plan.treedef.flatten_up_to(updates), strict=True
    ):
        if unbox(update).shape != leaf.shape:
            raise ValueError(
                f"The gradient of leaf {leaf.path!r} has shape {unbox(update).shape}, "
                f"its parameter {leaf.shape}; they must be the same."
            )
