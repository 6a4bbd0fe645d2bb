"""Bytes of steps without a backward pass: ``python -m benchmarks.zeroth_order``.

The trainer's model on shapes alone: each row is compiled for the CPU and never run, and
the compiler's own count is printed, arguments and temporaries together, beside that of
a forward pass. ``by hand`` is what one writes first: a tree of normal numbers, and two
trees of parameters moved along it.
"""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.step import token_losses

MIB = 2**20
EPS, RATE = 1e-3, 1e-6


def layerwise(layer: Callable) -> Callable:
    """A scanned layer whose parameters are perturbed where they are used."""
    return lambda x, params: layer(x, lro.materialize(params))


def by_hand(loss_fn: Callable, params: Any, key: Any, batch: Any) -> Any:
    """One step of MeZO with a tree of numbers from `jax.random`."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    z = treedef.unflatten(
        jax.random.normal(k, x.shape, x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    )

    def at(scale: float) -> Any:
        return loss_fn(jax.tree.map(lambda w, z: w + scale * z, params, z), batch)

    k = (at(EPS) - at(-EPS)) / (2 * EPS)
    return jax.tree.map(lambda w, z: w - RATE * k * z, params, z), key


def backward(loss_fn: Callable, params: Any, key: Any, batch: Any) -> Any:
    """One step of gradient descent."""
    grads = jax.grad(loss_fn)(params, batch)
    return jax.tree.map(lambda w, g: w - RATE * g, params, grads), key


def held(function: Callable, *args: Any, donate: bool = True) -> int:
    """Bytes that the compiled function holds, what is donated counted once."""
    jitted = jax.jit(function, donate_argnums=(0, 1) if donate else ())
    found: Any = jitted.lower(*args).compile().memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


def rows(config: ModelConfig, batch: Any, rank: int) -> dict[str, int]:
    """Returns the bytes of every row."""
    definition, params = abstract_model(config)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(token_losses(definition, params, batch, layerwise))

    found = {"forward pass": held(loss_fn, params, batch, donate=False)}
    for name, step in (("backpropagation, SGD", backward), ("MeZO by hand", by_hand)):
        found[name] = held(functools.partial(step, loss_fn), params, key, batch)

    def estimated(zo: lro.ZerothOrder, params: Any, state: Any, batch: Any) -> Any:
        (_, grads), state = zo.value_and_grad(params, state, batch)
        return optax.apply_updates(
            params, jax.tree.map(lambda g: -RATE * g, grads)
        ), state

    def moved(zo: lro.ZerothOrder, params: Any, state: Any, batch: Any) -> Any:
        return zo.step(params, state, batch, learning_rate=RATE)[:2]

    cases = [
        ("mezo, estimate and SGD", lro.mezo(), None, estimated),
        ("mezo, step", lro.mezo(), None, moved),
        ("mezo, step, scanned", lro.mezo(), "layers", moved),
        (f"subzero({rank}), step, scanned", lro.subzero(rank), "layers", moved),
        (f"tezo({rank}), step, scanned", lro.tezo(rank), "layers", moved),
        (f"lozo({rank}), step, scanned", lro.lozo(rank), "layers", moved),
    ]
    for name, method, scanned, step in cases:
        zo = lro.zeroth_order(loss_fn, method, eps=EPS, scanned=scanned)
        state = jax.eval_shape(zo.init, params, key)
        found[name] = held(functools.partial(step, zo), params, state, batch)
    return found


def table(found: dict[str, int]) -> str:
    """Formats them as a Markdown table."""
    first = next(iter(found.values()))
    lines = ["| step | MiB | of a forward pass |", "|---|---|---|"]
    lines += [f"| {k} | {v / MIB:.1f} | {v / first:.2f} |" for k, v in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    config = ModelConfig(
        vocab_size=options.vocab,
        width=options.width,
        ff_width=8 * options.width // 3,
        layers=options.layers,
        heads=max(1, options.width // 64),
    )
    shape = options.rows, options.positions
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
        "targets": jax.ShapeDtypeStruct(shape, jnp.int32),
        "mask": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    print(table(rows(config, batch, options.rank)))


if __name__ == "__main__":
    main()
