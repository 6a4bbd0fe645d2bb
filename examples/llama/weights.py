"""How parameters are stored from one step to the next, one way per `--weights`."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro


class Weights(NamedTuple):
    """`store(params)`, `load(stored)` and `apply(stored, updates, key)`.

    The model, its gradients and the optimizer see what `load` returns.
    """

    store: Callable[[Any], Any]
    load: Callable[[Any], Any]
    apply: Callable[[Any, Any, Any], Any]


PLAIN = Weights(
    store=lambda params: params,
    load=lambda stored: stored,
    apply=lambda stored, updates, key: optax.apply_updates(stored, updates),
)


def stochastic_bf16(dtype: str) -> Weights:
    """In bfloat16, each sum rounded at random."""
    return Weights(
        store=lambda params: optax.tree.cast(params, jnp.bfloat16),
        load=lambda stored: optax.tree.cast(stored, dtype),
        apply=lro.stochastic_round_apply_updates,
    )


def int8(dtype: str) -> Weights:
    """The layers' matrices as 8-bit codes, each sum rounded at random."""
    return Weights(
        store=functools.partial(lro.quantize_weights, layer_axis=0),
        load=functools.partial(lro.dequantize_weights, dtype=dtype),
        apply=lro.stochastic_round_apply_updates,
    )


# Each takes the type that a step computes with, `--param-dtype`.
WEIGHTS: dict[str, Callable[[str], Weights]] = {
    "plain": lambda dtype: PLAIN,
    "stochastic-bf16": stochastic_bf16,
    "int8": int8,
}


@functools.partial(jax.jit, static_argnums=0)
def step_key(seed: int, step: Any) -> jax.Array:
    """The key that a step rounds with: a resumed run rounds as it would have."""
    # Apart from the model's and the optimizer's keys, which have the same seed.
    stream = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"weights"))
    return jax.random.fold_in(stream, step)
