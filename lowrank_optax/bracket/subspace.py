"""``subspace``: an Optax transformation run inside a low-rank subspace.

Read ``step`` first: every method of this library is that function with one part chosen
for each slot.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax._meshes import explicit_like
from lowrank_optax.bracket.checks import check_maker, check_state
from lowrank_optax.bracket.leaf import FullLeaf, LowLeaf, cast, stepped, when
from lowrank_optax.bracket.match import CHOICES
from lowrank_optax.bracket.placement import typed
from lowrank_optax.bracket.plan import Plan
from lowrank_optax.bracket.planner import Planner, kind_of
from lowrank_optax.bracket.selection import Selection
from lowrank_optax.bracket.start import start, start_again
from lowrank_optax.bracket.state import (
    Bracket,
    Clock,
    Kept,
    Moments,
    Opened,
    SubspaceState,
    SubspaceView,
)
from lowrank_optax.bracket.storage import Storage, load, store
from lowrank_optax.leaves.boxes import refill, restore, unbox
from lowrank_optax.leaves.clock import next_count
from lowrank_optax.leaves.moments import FACTORS, by_leaf, finite_or, with_moments
from lowrank_optax.leaves.part import Made, transformation
from lowrank_optax.projectors import Projector
from lowrank_optax.recovery import Recovery
from lowrank_optax.transport import Transport, align_signs


def subspace(
    projector: Projector,
    inner: optax.GradientTransformation | optax.MultiSteps | Made,
    *,
    transport: Transport | None = None,
    recovery: Recovery | None = None,
    scale: Any = 1.0,
    learning_rate: optax.ScalarOrSchedule | None = None,
    full: optax.GradientTransformation | optax.MultiSteps | Made | None = None,
    full_scale: Any = None,
    match: str | None = None,
    selection: Selection | None = None,
    dtype: Any = jnp.float32,
    storage: Storage | None = None,
    stagger: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs ``inner`` on projected gradients and lifts what it returns.

    For every projected matrix ``G [m, n]`` with basis ``P [m, r]``, r << m::

        P  = refresh(G, P)  when due          R = P^T G          [r, n]
        N, state = inner(R, state)            U = scale * P N    [m, n]

    so the inner optimizer's state has ``r n`` elements in place of ``m n``. Leaves
    that are not projected go through the same inner at full size and unscaled.
    Numbers whose squares cannot be summed (above 7e16), in R or in a leaf that is not
    projected, are zeros for the inner optimizer: the square of 1e20 would freeze its
    place for good.
    ``lro.chain`` is the spelling of this primitive as a pipeline.

    Args:
      projector: forms the bases (``lro.power``, ``lro.svd``, ...).
      inner: any Optax transformation that treats leading axes as batch. It sees
        projections as updates, projected parameters as ``params``, and a
        ``SubspaceView`` as the extra argument ``subspace``.
      transport: what a change of basis does to the moments; None aligns signs.
      recovery: what the update gets from outside the subspace; None discards it.
      scale: factor on the lifted direction (not on full leaves); may be traced.
      full_scale: factor on the update of the leaves that are not projected, a number,
        an array or a schedule; None is 1.
      match: "adamw" makes the updates of projected matrices as long as AdamW's, see
        ``lro.project``; None leaves them as they are.
      learning_rate: a number or schedule whose negative multiplies everything that
        leaves the bracket, as ``optax.scale_by_learning_rate`` behind it would, but
        where the matrices are small; None leaves it out.
      full: another transformation for the leaves that are not projected, for
        inners that accept matrices only.
      selection: which leaves are projected; None is the default rule.
      dtype: the inner transformation's dtype, whatever parameters and gradients are.
      storage: in which dtypes its moments are kept between steps; None is as the
        parameters are, ``Storage()``.
      stagger: spread the refreshes of different matrices over the gap.
      seed: seed of the bracket's random numbers.

    Returns:
      A ``GradientTransformationExtraArgs`` with a ``SubspaceState``.

    Raises:
      TypeError: if ``projector`` or ``inner`` is something else.
      ValueError: if ``transport`` moves moments and the projector has no rotation;
        at init, if a leaf selected explicitly cannot be projected, if an explicit
        choice chooses none, or if ``layer_axis`` contradicts the leaves' siblings.

    Warns:
      NotProjectedWarning: at init, if less than half of what looks like a matrix is
        projected.

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
    transport = align_signs() if transport is None else transport
    if transport.moves and not projector.stores_basis:
        raise ValueError(
            f"{type(projector).__name__} keeps no basis, so there is no rotation to "
            "carry moments along. Use transport=lro.keep_moments()."
        )
    if transport.gathers and not projector.selects:
        raise ValueError(
            f"{type(transport).__name__} carries over the basis vectors that two bases "
            f"share, and those of lro.{type(projector).__name__} share none. Use "
            "transport=lro.rotate_moments(), or a projector such as lro.dct."
        )
    bracket = Bracket(
        projector,
        _checked("inner", inner),
        transport,
        recovery,
        None if full is None else _checked("full", full),
        scale,
        full_scale,
        match,
        learning_rate,
        dtype,
        storage or Storage(),
    )
    if match is not None:
        _checks.choice("match", match, CHOICES)
    planner = Planner(bracket, selection or Selection(), stagger, seed)

    def init(params: Any) -> Any:
        return start(planner, params)

    def update(updates, state, params=None, *, layer=None, **extra_args):
        layers = None if layer is None else layer.layers
        like = updates if params is None else params
        plan = planner.plan(like, layers)
        if params is not None:
            plan.check(updates)
        # Asked once of every kind of state, and not of those that an init has made.
        if kind_of(plan, state) not in planner.known:
            check_maker(plan, bracket, state)
            # A structure that an init has made is known; others cost the trace of one.
            if layer is None and jax.tree.structure(state) not in planner.structures:
                # nnx.Optimizer gives a state back with mappings in the place of tuples.
                state = restore(state, lambda: start_again(planner, like))
            check_state(planner, plan, state)
            planner.known.add(kind_of(plan, state))
        if layer is None:
            state = typed(planner, like, state)
        # The bracket goes along as an argument, and its arrays with it: on an Explicit
        # mesh, those that the step had closed over would keep their explicit type.
        args = (bracket, updates, state, params, layer, extra_args)
        return explicit_like((updates, state), functools.partial(step, plan), *args)

    return optax.GradientTransformationExtraArgs(init, update)


def step(
    plan: Plan,
    bracket: Bracket,
    updates: Any,
    state: SubspaceState,
    params: Any,
    layer: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, SubspaceState]:
    """One step of the bracket.

    Every leaf is opened: viewed as matrices, its basis renewed if that is due, its
    moments carried over, itself projected. The inner optimizer runs on the results.
    Every leaf is closed: completed from outside the subspace, lifted, turned back.
    """
    clock = clock_of(state, layer)
    before = state
    state = state._replace(
        inner_state=load(state.inner_state, bracket.dtype),
        full_state=load(state.full_state, bracket.dtype),
    )
    gradients, weights = plan.arrays(updates), plan.arrays(params)
    leaves = plan.leaves_of(bracket, gradients)
    kept, moments = plan.kept(bracket, state), _moments(plan, bracket, state)

    opened = [
        leaf.open(clock, g, w, k, m)
        for leaf, g, w, k, m in zip(
            leaves, gradients, weights, kept, moments, strict=True
        )
    ]

    view = _view(plan, bracket, state, opened, clock)
    directions, inner_state, full_state = _inner(
        plan, bracket, state, view, opened, updates, extra_args
    )

    if clock.open is not None:
        # An accumulation is shown what is not finite, so that it may skip it. One that
        # does not skip would keep it.
        inner_state = finite_or(inner_state, view.state_transported)
        full_state = finite_or(full_state, state.full_state)

    # The clock asked the old inner state whether a sum begins; the new one says whether
    # this step has completed it.
    gain = _gain(bracket, state.count)
    done = _has_stepped(state.inner_state, inner_state)
    seen = _seen(plan, bracket, inner_state, view)
    full_gain = _full_gain(bracket, state.count, gain)
    gains = [gain if isinstance(leaf, LowLeaf) else full_gain for leaf in leaves]
    closed = [
        leaf.close(clock, o, d, k, m, g, done)
        for leaf, o, d, k, m, g in zip(
            leaves, opened, directions, kept, seen, gains, strict=True
        )
    ]
    new_updates, kept = _completed(
        plan, bracket, updates, leaves, opened, closed, kept, gain, done
    )

    count = next_count(state.count, bracket.projector.update_proj_gap)
    rounded = functools.partial(
        store, dtype=bracket.dtype, key_data=state.key, count=state.count,
        layer=clock.layer,
    )  # fmt: skip
    return new_updates, plan.with_kept(bracket, before, kept)._replace(
        # Micro-batches in the middle of a sum do not count: gaps are in whole steps.
        count=count if done is None else jnp.where(done, count, state.count),
        inner_state=rounded(inner_state, before.inner_state),
        full_state=rounded(full_state, before.full_state),
    )


def clock_of(state: SubspaceState, layer: Any = None) -> Clock:
    """Returns the bracket's time."""
    done = _is_summed(state.inner_state)
    return Clock(state.count, done, state.key, 0 if layer is None else layer.index)


def _is_summed(inner_state: Any) -> Any:
    """Returns whether no accumulation is under way, None where there never is one."""
    # `optax.MultiSteps` is known by this field, wherever it stands inside. It is 0 at
    # the start, and again after the micro-batch that completes a sum.
    found = optax.tree_utils.tree_get_all_with_path(inner_state, "mini_step")
    if len(found) > 1:
        raise ValueError(
            f"The bracket's inner transformation accumulates in {len(found)} places "
            "(optax.MultiSteps), so that no one moment ends a sum. Put one "
            "optax.MultiSteps around all that stands between project and backproject."
        )
    return found[0][1] == 0 if found else None


def _has_stepped(before: Any, after: Any) -> Any:
    """Returns whether an accumulation inside is complete, None where there is none.

    Of two states: a micro-batch that ``optax.MultiSteps`` was told to skip completes
    nothing, though no sum is under way behind it either.
    """
    steps = optax.tree_utils.tree_get(after, "gradient_step")
    if steps is None:
        return None
    return steps != optax.tree_utils.tree_get(before, "gradient_step")


def _gain(bracket: Bracket, count: Array) -> Any:
    """Returns the negative learning rate of this step, None if it is not ours."""
    rate = bracket.learning_rate
    if rate is None:
        return None
    return -jnp.asarray(rate(count) if callable(rate) else rate)


def _full_gain(bracket: Bracket, count: Array, gain: Any) -> Any:
    """Returns the same for the leaves that are not projected."""
    scale = bracket.full_scale
    if scale is None:
        return gain
    scale = jnp.asarray(scale(count) if callable(scale) else scale)
    return scale if gain is None else scale * gain


def _moments(plan: Plan, bracket: Bracket, state: SubspaceState) -> list[Any]:
    """Returns the moments that a refresh reads or moves, per leaf."""
    if bracket.transport.moves or bracket.projector.reads_moments:
        return [of_leaf for (of_leaf,) in by_leaf(plan.treedef, state.inner_state)]
    return [()] * len(plan.leaves)


def _view(
    plan: Plan,
    bracket: Bracket,
    state: SubspaceState,
    opened: list[Opened],
    clock: Clock,
) -> SubspaceView:
    """Gathers what inner transformations may read, the moments carried over."""
    carried = state.inner_state
    if bracket.transport.moves:
        moved = {i: opened[i].renewed.moments for i, _ in plan.matrices()}
        carried = with_moments(carried, plan.treedef, moved)
    weights = [None if o.weights is None else o.weights.array for o in opened]
    tree = plan.treedef.unflatten
    return SubspaceView(
        gradient=tree([o.gradient.array for o in opened]),
        params=None if any(w is None for w in weights) else tree(weights),
        projected=tree([o.low for o in opened]),
        basis=tree([o.basis for o in opened]),
        previous_basis=tree([o.previous for o in opened]),
        state_before=state.inner_state,
        state_transported=carried,
        matrices=tree([leaf.matrix for leaf in plan.leaves]),
        clock=clock,
    )


def _inner(
    plan: Plan,
    bracket: Bracket,
    state: SubspaceState,
    view: SubspaceView,
    opened: list[Opened],
    updates: Any,
    extra_args: dict[str, Any],
) -> tuple[list[Any], Any, Any]:
    """Runs the inner transformation, and ``full`` on the leaves left to it."""
    low, rest = plan.inner_trees(bracket, updates, [o.low for o in opened])
    low_params = rest_params = None
    if view.params is not None:
        weights = [o.low_weights for o in opened]
        low_params, rest_params = plan.inner_trees(bracket, updates, weights)
    # Merged in one mapping: inside another bracket, `extra_args` holds a view already,
    # and a keyword given twice is an error.
    with jax.named_scope("lowrank/inner"):
        directions, inner_state = transformation(bracket.inner).update(
            low, view.state_transported, low_params, **{**extra_args, "subspace": view}
        )
        directions, full_state = plan.arrays(directions), ()
        if bracket.full is not None:
            others, full_state = transformation(bracket.full).update(
                rest, state.full_state, rest_params, **extra_args
            )
            directions = [
                d if leaf.matrix else other
                for leaf, d, other in zip(
                    plan.leaves, directions, plan.arrays(others), strict=True
                )
            ]
    return directions, inner_state, full_state


def _seen(
    plan: Plan, bracket: Bracket, inner_state: Any, view: SubspaceView
) -> list[Moments]:
    """Returns the moments that a recovery may read, per leaf."""
    if bracket.recovery is None:
        return [Moments()] * len(plan.leaves)
    states = inner_state, view.state_transported, view.state_before
    found = by_leaf(plan.treedef, *states, also=FACTORS)
    return [Moments(*of_leaf) for of_leaf in found]


def _completed(
    plan: Plan,
    bracket: Bracket,
    updates: Any,
    doors: list[LowLeaf | FullLeaf],
    opened: list[Opened],
    closed: list[tuple[Any, Any, Kept]],
    before: list[Kept],
    gain: Any,
    done: Any,
) -> tuple[Any, list[Kept]]:
    """Returns the updates in boxes, with what a recovery makes of whole leaves."""
    leaves, kept = [], []
    for box, door, o, (update, outside, new), old in zip(
        plan.flat(updates), doors, opened, closed, before, strict=True
    ):
        if outside is not None and bracket.recovery is not None:
            # Not lifted: whatever the layout, the transformation sees the leaf itself.
            term, state = bracket.recovery.update_whole(
                refill(box, outside), old.recovery
            )
            # The lifted part came without its cast, so that the sum is rounded once.
            update = update + stepped(unbox(term), gain)
            assert isinstance(door, LowLeaf)
            update = door.resized(update, o, gain)
            update = cast(update, unbox(box).dtype)
            new = new._replace(recovery=when(done, state, old.recovery))
        leaves.append(update)
        kept.append(new)
    return plan.boxed(updates, leaves), kept


def _checked(name: str, tx: Any) -> Any:
    """Checks what is given as a transformation; what is yet to be made, once made."""
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    _checks.transformation(name, transformation(tx), "scale_by_adam()")
    return tx if isinstance(tx, Made) else optax.with_extra_args_support(tx)
