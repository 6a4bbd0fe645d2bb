"""A block, or a stack of layers, under a plan."""

from collections.abc import Callable
from typing import Any

import jax

from lowrank_optax.activations.checkpoint import compressed_checkpoint
from lowrank_optax.activations.plan import ActivationPlan


def apply_plan(block: Callable, plan: ActivationPlan) -> tuple[Callable, ...]:
    """Returns the block under the plan's policies, one per segment of layers.

    Args:
      block: ``block(params, x, *rest)`` with the plan's tags.
      plan: from ``plan_activations``.

    Returns:
      Functions like ``block``, see ``compressed_checkpoint``; that of segment i is for
      its ``plan.segments[i].layers`` layers.
    """
    return tuple(compressed_checkpoint(block, s.policy) for s in plan.segments)


def scan_layers(
    block: Callable, plan: ActivationPlan, stacked_params: Any, x: Any, *rest: Any
) -> Any:
    """Runs a stack of layers under a plan: one ``jax.lax.scan`` per segment.

    Args:
      block: ``block(params, x, *rest)``, which returns the next ``x``.
      plan: from ``plan_activations``.
      stacked_params: parameters with a leading axis of all layers. What else differs
        between layers, keys for dropout say, belongs here as well.
      x: what goes into the first layer.
      *rest: what all layers are given.

    Returns:
      What the last layer returns.

    Raises:
      ValueError: if the leading axis is not that of the plan.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> from lowrank_optax import activations
      >>> def layer(w, x):
      ...     return jnp.tanh(checkpoint_name(x @ w, "hidden"))
      >>> w, x = jnp.stack([jnp.eye(64)] * 4), jnp.ones((8, 64))
      >>> plan = activations.plan_activations(
      ...     layer, (w[0], x), 4, budget_fraction=0.5
      ... )
      >>> activations.scan_layers(layer, plan, w, x).shape
      (8, 64)
    """
    for path, leaf in jax.tree.leaves_with_path(stacked_params):
        if leaf.ndim < 1 or leaf.shape[0] != plan.n_layers:
            raise ValueError(
                f"The plan is for {plan.n_layers} layers, so every parameter must have "
                f"a leading axis of that size; params{jax.tree_util.keystr(path)} has "
                f"the shape {leaf.shape}."
            )
    first = 0
    for segment, body in zip(plan.segments, apply_plan(block, plan), strict=True):
        last = first + segment.layers
        part = stacked_params
        if len(plan.segments) > 1:
            part = jax.tree.map(
                lambda p, a=first, b=last: jax.lax.slice_in_dim(p, a, b), part
            )
        x, _ = jax.lax.scan(lambda x, p, f=body: (f(p, x, *rest), None), x, part)
        first = last
    return x
