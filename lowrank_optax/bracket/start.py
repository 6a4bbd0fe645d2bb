"""``start``: the state of a fresh bracket, or its description for a report."""

import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax._meshes import vary_like
from lowrank_optax.bracket.checks import check_alone
from lowrank_optax.bracket.leaf import LowLeaf, cast
from lowrank_optax.bracket.notice import check_projected
from lowrank_optax.bracket.placement import laid_out
from lowrank_optax.bracket.plan import Plan
from lowrank_optax.bracket.planner import Planner, kind_of
from lowrank_optax.bracket.state import Bracket, SubspaceState
from lowrank_optax.leaves.boxes import rebox
from lowrank_optax.leaves.matrix import Axes
from lowrank_optax.leaves.moments import FIELDS, find
from lowrank_optax.leaves.part import transformation
from lowrank_optax.leaves.stand_in import hidden
from lowrank_optax.quantization import is_quantized

# How a bracket starts: in a report it describes itself, since reports look into any
# nesting of transformations. Nothing that a step computes depends on it.
_START: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar(
    "start", default=None
)


def start(planner: Planner, params: Any) -> Any:
    """Returns the state of a fresh bracket, or in a report what that asks for."""
    how = _START.get()
    if how is not None:
        return how(planner, params)
    state = start_again(planner, params)
    check_alone(state)
    check_projected(planner.selection, planner.plan(params).leaves)
    return laid_out(planner, params, state)


def start_again(planner: Planner, params: Any) -> SubspaceState:
    """Returns the state of a fresh bracket without a word about what it projects."""
    state = _start(planner, params)
    planner.structures.add(jax.tree.structure(state))
    planner.known.add(kind_of(planner.plan(params), state))
    return state


def _start(planner: Planner, params: Any) -> SubspaceState:
    plan, bracket = planner.plan(params), planner.bracket
    boxes, arrays = plan.flat(params), plan.arrays(params)
    leaves = plan.leaves_of(bracket, arrays)
    low: list[Any] = [cast(x, bracket.dtype) for x in arrays]
    basis: list[Any] = [optax.MaskedNode()] * len(boxes)
    pending, recovery, sample = list(basis), list(basis), list(basis)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, LowLeaf):
            first = vary_like(leaf.start(), arrays[i])
            low[i] = vary_like(planner.low_zeros(leaf, first.stored), arrays[i])
            basis[i] = box_basis(boxes[i], first.stored, leaf)
            pending[i] = first.pending
            recovery[i] = vary_like(leaf.start_recovery(boxes[i]), arrays[i])
            sample[i] = first.sample
    inner, full = plan.inner_trees(bracket, params, low)
    inner_state = transformation(bracket.inner).init(inner)
    if plan.matrices():
        _check_moments(bracket, inner_state)
    full_state = ()
    if bracket.full is not None:
        full_state = transformation(bracket.full).init(full)
    dtypes = [leaf.dtype for leaf in plan.leaves]

    def stored(state: Any) -> Any:
        # Without leaves there is nothing to cast, and perhaps no tree.
        return bracket.storage.first(state, plan.treedef, dtypes) if dtypes else state

    def own(leaves: list[Any]) -> Any:
        return hidden(params, plan.treedef.unflatten(leaves))

    return SubspaceState(
        jnp.zeros([], jnp.int32),
        planner.key_data(),
        own(basis),
        own(pending),
        stored(inner_state),
        stored(full_state),
        () if bracket.recovery is None else own(recovery),
        () if bracket.match is None else own(sample),
    )


def _check_moments(bracket: Bracket, inner_state: Any) -> None:
    """Raises if the parts want of the inner optimizer's state what it does not have."""
    if bracket.transport.moves and not any(find(inner_state).groups):
        raise ValueError(
            "This transport moves moments, but the inner optimizer's state has none "
            f"(no field {', '.join(FIELDS)}). Use an inner optimizer with "
            "moments, such as optax.scale_by_adam(), or transport=lro.align_signs(). "
            "A state type of your own can be named with lro.register_moments."
        )
    recovery, whole = bracket.recovery, []
    if recovery is not None and not recovery.accumulates:
        whole = [type(recovery).__name__]
    if bracket.match is not None:  # its sample is of one micro-batch, and noisier
        whole = [f"match={bracket.match!r}"]
    if whole and optax.tree_utils.tree_get_all_with_path(inner_state, "mini_step"):
        raise ValueError(
            f"{whole[0]} does not work around an accumulation inside the bracket. Put "
            "optax.MultiSteps around the whole optimizer instead."
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Described:
    """A bracket's state where it stands in an optimizer's, with its plan.

    Attributes:
      state: the state.
      plan: what happens to every leaf.
      planner: the bracket and its options.
    """

    state: SubspaceState
    plan: Plan = dataclasses.field(metadata={"static": True})
    planner: Planner = dataclasses.field(metadata={"static": True})


def described(tx: Any, params: Any) -> Any:
    """Returns the shapes of ``tx.init(params)``, a ``Described`` for every bracket."""
    return jax.eval_shape(_started_as(_described, tx), params)


def outside_brackets(tx: Any) -> Callable[[Any], Any]:
    """Returns ``tx.init`` with ``()`` in the place of every bracket's state."""
    return _started_as(lambda *_: (), tx)


def _described(planner: Planner, params: Any) -> Described:
    return Described(_start(planner, params), planner.plan(params), planner)


def _started_as(how: Callable[[Planner, Any], Any], tx: Any) -> Callable[[Any], Any]:
    # A new function each time: eval_shape remembers those that it has traced.
    def init(params: Any) -> Any:
        token = _START.set(how)
        try:
            return tx.init(params)
        finally:
            _START.reset(token)

    return init


def box_basis(leaf: Any, stored: Any, door: LowLeaf) -> Any:
    """Puts boxes like the leaf's around what has axes in common with it."""
    batch = door.matrix.batch_axes

    def box(x: Any, axes: Axes) -> Any:
        # Codes and scales have other axes than the array that they stand for, and the
        # names of its axes would be wrong on them.
        axes = door.matrix.behind(axes)
        return x if is_quantized(x) or not any(axes) else rebox(leaf, x, batch + axes)

    axes = door.projector.axes(door.matrix)
    return jax.tree.map(box, stored, axes, is_leaf=is_quantized)
