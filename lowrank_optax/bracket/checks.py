"""``check_state`` and its like: whether a state is this bracket's own."""

from typing import Any

import jax

from lowrank_optax.bracket.plan import Plan
from lowrank_optax.bracket.state import Bracket, SubspaceState
from lowrank_optax.leaves.moments import by_leaf
from lowrank_optax.projectors import BasisProjector, gaussian


def check_alone(state: Any) -> None:
    """Raises if a method, which is a bracket, stands inside a bracket."""

    def is_bracket(x: Any) -> bool:
        return isinstance(x, SubspaceState)

    inner = getattr(state, "inner_state", ())
    if any(map(is_bracket, jax.tree.leaves(inner, is_leaf=is_bracket))):
        raise ValueError(
            "There is a bracket inside a bracket: a method such as lro.galore is a "
            "whole optimizer and projects by itself. Use it alone, or put inside what "
            "shall see the low-rank gradient, such as optax.scale_by_adam()."
        )


def check_maker(plan: Plan, bracket: Bracket, state: Any) -> None:
    """Raises if the state is another optimizer's or method's."""
    fields = getattr(state, "_fields", None)  # a mapping has none, and is restored from
    if isinstance(state, tuple) and fields != SubspaceState._fields:
        raise ValueError(
            "This state was made by another optimizer: expected a SubspaceState, got "
            f"{type(state).__name__}. Make one with tx.init(params)."
        )
    if not isinstance(state, SubspaceState):
        return
    recovery, found = bracket.recovery, state.recovery_state
    extra = recovery is None and bool(jax.tree.leaves(found))
    lacks = recovery is not None and isinstance(found, tuple) and not found
    # Of a parameter that is no tree, and kept full, a recovery keeps `()` as well.
    bare = jax.tree_util.treedef_is_leaf(plan.treedef)
    if extra or (lacks and plan.leaves and not bare):
        own = "no recovery" if recovery is None else type(recovery).__name__
        raise ValueError(
            f"This state was made by another method: it has {'a' if extra else 'no'} "
            f"recovery_state, and this optimizer has {own}. Make one with "
            "tx.init(params)."
        )
    # As above, a bare parameter that is kept full has `()` in any case.
    sampled = bool(jax.tree.leaves(state.sample))
    if sampled != (bracket.match is not None) and plan.matrices():
        other = "adamw" if sampled else None
        raise ValueError(
            f"This state was made with match={other!r}, and this optimizer has "
            f"match={bracket.match!r}. Make one with tx.init(params)."
        )


def check_state(plan: Plan, bracket: Bracket, state: SubspaceState) -> None:
    """Raises if the bases have another rank."""
    bases, moments = plan.arrays(state.basis), []
    if not bracket.projector.stores_basis:
        moments = [of_leaf for (of_leaf,) in by_leaf(plan.treedef, state.inner_state)]
    for i, matrix in plan.matrices():
        found = None
        if matrix.side == "both":
            continue
        if isinstance(bracket.projector, BasisProjector):
            found = getattr(bases[i], "shape", (None,))[-1]
        elif isinstance(bracket.projector, gaussian):
            seen = [x for group in moments[i] for x in group.values()]
            found = seen[0].shape[-2] if seen and seen[0].ndim > 1 else None
        if found is not None and found != matrix.rank:
            raise ValueError(
                f"The state was made with rank {found} for leaf {matrix.path!r}, and "
                f"this optimizer has rank {matrix.rank}. Use rank={found} to go on, or "
                "start anew with tx.init(params)."
            )
