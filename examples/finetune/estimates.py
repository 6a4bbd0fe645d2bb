"""`estimate_gradient` puts gradients without a backward pass before an optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro

# `--gradient`: the directions that losses are tried along.
METHODS = {
    "mezo": lambda rank: lro.mezo(),
    "subzero": lambda rank: lro.subzero(rank=rank),
    "tezo": lambda rank: lro.tezo(rank=rank),
    "lozo": lambda rank: lro.lozo(rank=rank),
}


class EstimateState(NamedTuple):
    """The estimator's own state, and what the last step has shown."""

    zeroth_order: lro.ZerothOrderState
    loss: jax.Array
    norm: jax.Array


def estimate_gradient(
    method: str, rank: int, eps: float, seed: int
) -> optax.GradientTransformationExtraArgs:
    """The gradient is an estimate from two values of `loss_fn(params)`.

    `update` takes that function as an extra argument, and no gradient: what comes
    instead is not looked at. The optimizer behind sees the estimate.
    """
    zo = lro.zeroth_order(
        lambda params, loss_fn: loss_fn(params), METHODS[method](rank), eps=eps
    )

    def init(params: Any) -> EstimateState:
        nothing = jnp.zeros([], jnp.float32)
        return EstimateState(zo.init(params, jax.random.key(seed)), nothing, nothing)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del updates
        loss_fn = extra["loss_fn"]
        (loss, grads), own = zo.value_and_grad(params, state.zeroth_order, loss_fn)
        return grads, EstimateState(own, loss, optax.tree.norm(grads))

    return optax.GradientTransformationExtraArgs(init, update)
