"""What is known of a training step under a plan: its key, bytes, error and shapes."""

import math
from typing import Any

import jax

from lowrank_optax.activations.audit import audit
from lowrank_optax.activations.plan import ActivationPlan

Key = tuple[tuple[int, Any], ...]


def peak_bytes() -> int | None:
    """Returns the most memory in use so far, where the device counts it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def program_bytes(program: Any) -> Any:
    """Returns what a compiled step takes in all; None before it is compiled."""
    return None if program is None else audit(program).total_bytes


def key(plan: ActivationPlan) -> Key:
    """Returns what two plans with the same step have in common."""
    return tuple((segment.layers, segment.policy) for segment in plan.segments)


def error_of(plan: ActivationPlan, errors: Any) -> float:
    """Returns a plan's error by other measurements than those it was made with."""
    squares = sum(
        segment.layers * sum(errors[c.tag, c.action] ** 2 for c in segment.choices)
        for segment in plan.segments
    )
    return math.sqrt(squares / plan.n_layers)


def shapes(args: Any) -> Any:
    """Returns the shapes of the arguments, and where arrays are."""

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        weak = getattr(leaf, "weak_type", False)  # keys have none
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=weak
        )

    return jax.tree.map(shape, args)
