"""How far one learning rate goes with each method: ``python -m benchmarks.step_sizes``.

Every method takes the same gradients at its own defaults, and once more with
``match="adamw"``. Reported is the root mean square of its updates over that of
``optax.adamw`` at the steps 1, 10 and 101, on a matrix that is shown noise and on one
with a signal of rank 8 in noise; a leaf that is not projected stands at 1.
"""

import argparse
import inspect
import os
import platform
import time
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # beside XLA's own threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from benchmarks._runs import add_flags, run_missing

M, N, RANK, SIGNAL = 128, 256, 32, 8
RATE = 1e-3
AT = (1, 10, 101)
KINDS = {"noise": "noise", "signal": "signal and noise"}


def gradients(seed: int, step: jax.Array) -> dict[str, jax.Array]:
    """Returns gradients of the size that a language model's have."""
    key = jax.random.key(seed)
    left, right, first, second, table = jax.random.split(key, 5)
    signal = jax.random.normal(left, (M, SIGNAL)) @ jax.random.normal(
        right, (SIGNAL, N)
    )
    signal = signal / SIGNAL * (1.0 + 0.3 * jnp.sin(step / 7.0))

    def noise(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, step), shape)

    return {
        "noise": 1e-3 * noise(first, M, N),
        "signal": 1e-3 * (signal + 0.5 * noise(second, M, N)),
        "embed": 1e-3 * noise(table, 2 * N, M),
    }


def sizes(tx: optax.GradientTransformation, seed: int) -> dict[str, list[float]]:
    """Returns root mean squares of the updates, in learning rates, at ``AT``."""
    params = jax.tree.map(
        lambda g: 0.02 * jax.random.normal(jax.random.key(seed), g.shape),
        gradients(seed, jnp.int32(0)),
    )

    def step(carry: Any, number: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(gradients(seed, number), state, params)
        params = optax.apply_updates(params, updates)
        rms = jax.tree.map(lambda u: jnp.sqrt(jnp.mean(jnp.square(u))) / RATE, updates)
        return (params, state), rms

    @jax.jit
    def run() -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(max(AT)))[1]

    found = run()
    return {name: [float(x[at - 1]) for at in AT] for name, x in found.items()}


def method(name: str, match: str | None) -> optax.GradientTransformation:
    """Returns the method at its defaults, at a quarter of the rank."""
    factory = lro.METHODS[name].factory
    taken = inspect.signature(factory).parameters
    options: dict[str, Any] = {"match": match}
    if "rank" in taken and taken["rank"].default != 1:
        options["rank"] = RANK
    if "select" in taken:
        options["select"] = ["noise", "signal"]
    return factory(RATE, **options)


def measured(name: str, seed: int) -> dict[str, Any]:
    """Returns one method's sizes over AdamW's, without and with ``match``."""
    started = time.perf_counter()
    adamw = sizes(optax.adamw(RATE, weight_decay=0.0), seed)
    found: dict[str, Any] = {"name": name, "seed": seed}
    for label, match in (("default", None), ("matched", "adamw")):
        own = sizes(method(name, match), seed)
        for leaf in own:
            ratios = [x / y for x, y in zip(own[leaf], adamw[leaf], strict=True)]
            found[f"{label}_{leaf}"] = [float(f"{x:.3g}") for x in ratios]
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def table(runs: list[dict[str, Any]]) -> str:
    """Formats all finished runs as Markdown, one row per method."""
    heads = [f"{form}, {what}" for form in ("default", "matched") for what in KINDS]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for name in lro.METHODS:
        for run in (r for r in runs if r["name"] == name):
            keys = [f"{form}_{x}" for form in ("default", "matched") for x in KINDS]
            cells = [" / ".join(f"{x:.2f}" for x in run[key]) for key in keys]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, one line each, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_flags(parser, steps=max(AT), seeds=[0])
    options = parser.parse_args()
    if options.steps != max(AT):
        parser.error(f"--steps is {max(AT)} here")
    settings = {
        "steps": max(AT),
        "at": list(AT),
        "shape": [M, N],
        "rank": RANK,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(table(run_missing(options, settings, lro.METHODS, measured)))


if __name__ == "__main__":
    main()
