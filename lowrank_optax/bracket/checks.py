"""``check_state`` and its like: whether a state is this bracket's own."""

import dataclasses
from typing import Any

import jax
import optax

from lowrank_optax.bracket.plan import Plan
from lowrank_optax.bracket.planner import Planner
from lowrank_optax.bracket.state import Bracket, SubspaceState
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.leaves.moments import FACTORS, find

# The shapes of a matrix' basis, and those of its moments.
_Sizes = tuple[list[tuple[int, ...]], list[tuple[int, ...]]]


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


def check_state(planner: Planner, plan: Plan, state: SubspaceState) -> None:
    """Raises if the state is that of another rank, or of other leaves projected."""
    bases, moments = plan.flat(state.basis), _moments(plan.treedef, state.inner_state)
    for i, (leaf, basis) in enumerate(zip(plan.leaves, bases, strict=True)):
        if leaf.matrix is None and jax.tree.leaves(basis):
            raise ValueError(
                f"The state was made with leaf {leaf.path!r} projected, and this "
                f"optimizer keeps it full ({leaf.reason}). Use the options that it was "
                "made with to go on, carry it over with lro.resize_state, or start "
                "anew with tx.init(params)."
            )
        if leaf.matrix is None:
            continue
        if isinstance(basis, optax.MaskedNode):
            raise ValueError(
                f"The state was made with leaf {leaf.path!r} at full size, and this "
                f"optimizer has rank {leaf.matrix.rank}. Use the options that it was "
                "made with to go on, carry it over with lro.resize_state, or start "
                "anew with tx.init(params)."
            )
        found = _sizes(basis), _sizes([tree[i] for tree in moments])
        if found != _expected(planner, leaf.matrix, leaf.dtype):
            _check_rank(planner, leaf.matrix, leaf.dtype, found)


def _check_rank(planner: Planner, matrix: Matrix, dtype: Any, found: _Sizes) -> None:
    """Raises if the sizes of a basis and its moments are those of another rank."""
    projector = planner.bracket.projector
    own = projector.at_rank(matrix, matrix.rank)
    alike = {}
    for rank in sorted({n for sizes in found for shape in sizes for n in shape}):
        other = projector.at_rank(matrix, rank)
        if own is None or other is None or other[0] == own[0]:
            continue
        option, projector_then = other
        bracket = dataclasses.replace(planner.bracket, projector=projector_then)
        block = projector_then.block_of(matrix)
        then = dataclasses.replace(matrix, rank=rank, block=block)
        basis, moments = _expected(planner.of(bracket), then, dtype)
        # Of an inner transformation that treats leaves by their names, the moments of
        # one leaf alone are not known; two ranks may share the bytes of their codes.
        alike[option] = 2 * (moments == found[1] != []) + (basis == found[0] != [])
    option = max(alike, key=alike.__getitem__, default=None)
    if own is not None and option is not None and alike[option]:
        raise ValueError(
            f"The state was made with {option.replace('=', ' ')} for leaf "
            f"{matrix.path!r}, and this optimizer has {own[0].replace('=', ' ')}. "
            f"Use {option} to go on, carry it over with lro.resize_state, or start "
            "anew with tx.init(params)."
        )


def _expected(planner: Planner, matrix: Matrix, dtype: Any) -> _Sizes:
    kept, inner, _ = planner.state_of(matrix, dtype)
    return _sizes(kept.stored), _sizes(_moments(jax.tree.structure(0), inner))


def _moments(treedef: Any, inner_state: Any) -> list[list[Any]]:
    """Returns the shapes of all moments, encoded as they are, leaf by leaf."""
    # Moments of a registered state may be computed from what it stores.
    groups = jax.eval_shape(lambda state: find(state, FACTORS).groups, inner_state)
    return [treedef.flatten_up_to(tree) for group in groups for tree in group.values()]


def _sizes(tree: Any) -> list[tuple[int, ...]]:
    return [x.shape for x in jax.tree.leaves(tree)]
