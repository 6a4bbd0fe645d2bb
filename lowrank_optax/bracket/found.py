"""``described_brackets``: the brackets that stand in an optimizer, and their parts."""

from collections.abc import Sequence
from typing import Any

import jax

from lowrank_optax.bracket.leaf import LowLeaf
from lowrank_optax.bracket.plan import low_leaf
from lowrank_optax.bracket.start import Described
from lowrank_optax.bracket.state import SubspaceState


def described_brackets(state: Any) -> list[Described]:
    """Returns the brackets in a described state, in its order."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Described))
    return [node for node in nodes if isinstance(node, Described)]


def bracket_states(brackets: Sequence[Described], state: Any) -> list[SubspaceState]:
    """Returns the states of these brackets in the state of their optimizer.

    Raises:
      ValueError: if it is another optimizer's.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SubspaceState))
    states = [node for node in nodes if isinstance(node, SubspaceState)]
    if len(states) != len(brackets):
        raise ValueError(
            f"Expected the state of this optimizer, with {len(brackets)} "
            f"low-rank bracket(s) in it; got one with {len(states)}. Pass what "
            "tx.init(params) or tx.update(...) returned."
        )
    return states


def leaf_of(
    found: Described, state: SubspaceState, position: int
) -> tuple[LowLeaf, Any, Any]:
    """Returns a projected leaf, what is stored of its bases, and what is pending."""
    plan, bracket = found.plan, found.planner.bracket
    (matrix,) = (matrix for i, matrix in plan.matrices() if i == position)
    dtype, shift = plan.leaves[position].dtype, plan.shifts[position]
    leaf = low_leaf(bracket, matrix, dtype, shift=shift)
    stored = plan.arrays(state.basis)[position]
    return leaf, stored, plan.flat(state.pending)[position]
