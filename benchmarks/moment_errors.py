"""Codecs on Adam's moments from real text: ``python -m benchmarks.moment_errors``.

The trainer's tiny model learns the sources of Python's standard library with AdamW in
float32. Its moments after some steps are stored in every codec; reported is how far the
moments and the step made of them, ``mhat / (sqrt(nhat) + eps)``, are off: the norm of
the error over that of what is right, all matrices of 4096 entries or more together, and
the largest step that a stored pair makes, over the largest of the right ones. The time
is that of decoding and encoding both, over the first row's.
"""

import argparse
import os
import time
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # beside XLA's own threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

from benchmarks._runs import Workload
from examples.llama import optimizers
from lowrank_optax import quantization

int8, companded = quantization.blockwise_int8, quantization.companded
float8, int4 = quantization.float8, quantization.linear_int4

# Codecs of first and second moments.
PAIRS = {
    "8-bit map, blocks of 256 (default)": (
        int8(256, signed_scale=True, exact=False),
        int8(256, signed=False, exact=False),
    ),
    "8-bit map, blocks of 64": (
        int8(64, signed_scale=True, exact=False),
        int8(64, signed=False, exact=False),
    ),
    "companded, blocks of 256": (companded(256), companded(256, signed=False)),
    "companded, blocks of 64": (companded(64), companded(64, signed=False)),
    "companded, as released": (
        companded(32, True, "flat", False, half_scale=True),
        companded(32, False, "flat", False, half_scale=True),
    ),
    "companded mu, 8-bit map nu, 256": (
        companded(256),
        int8(256, signed=False, exact=False),
    ),
    "float8 e4m3, blocks of 256": (float8("e4m3", 256), float8("e5m2", 256)),
    "4 bits, even steps, blocks of 128": (int4(128), int4(128, signed=False)),
    "4 bits, companded, blocks of 128": (
        companded(128, bits=4),
        companded(128, signed=False, bits=4),
    ),
}


def moments(steps: list[int]) -> dict[int, Any]:
    """Adam's pairs of moments of all large matrices, after each number of steps."""
    work = Workload(steps=max(steps), optimizer="adamw")
    tx, found = optimizers.build_optimizer(work.config), {}
    for step in work.train(work.config, tx):
        if step.number in steps:
            mu, nu = (
                jax.tree.leaves(optax.tree_utils.tree_get(step.state, name))
                for name in ("mu", "nu")
            )
            # The next step takes the buffers.
            pairs = jax.tree.map(jnp.copy, list(zip(mu, nu, strict=True)))
            found[step.number] = [pair for pair in pairs if pair[0].size >= LEAST]
    return found


LEAST = 4096


def errors(found: Any, pair: tuple[Any, Any], step: int, eps: float = 1e-8) -> Any:
    """Relative errors of mu, of the root of nu, of the step, and its largest."""

    def stored(x: Any, codec: Any) -> Any:
        return codec.decode(codec.encode(x), x.shape)

    def direction(mu: Any, nu: Any) -> Any:
        mu, nu = mu / (1 - 0.9**step), nu / (1 - 0.999**step)
        return mu / (jnp.sqrt(nu) + eps)

    @jax.jit
    def sums(mu: Any, nu: Any) -> Any:
        back = stored(mu, pair[0]), stored(nu, pair[1])
        right, wrong = direction(mu, nu), direction(*back)
        pairs = (mu, back[0]), (jnp.sqrt(nu), jnp.sqrt(back[1])), (right, wrong)
        squares = [(jnp.sum((a - b) ** 2), jnp.sum(a**2)) for a, b in pairs]
        return squares, (jnp.max(jnp.abs(wrong)), jnp.max(jnp.abs(right)))

    rows = [sums(*each) for each in found]
    off = []
    for i in range(3):
        over, under = (sum(float(row[0][i][k]) for row in rows) for k in (0, 1))
        off.append((over / under) ** 0.5)
    most, right = (max(float(row[1][k]) for row in rows) for k in (0, 1))
    return (*off, most / right)


def seconds(pair: tuple[Any, Any], shape: tuple[int, int] = (1024, 1024)) -> float:
    """The shortest of ten passes that decode both moments, move and encode them."""

    @jax.jit
    def step(stored: Any) -> Any:
        values = [c.decode(x, shape) for c, x in zip(pair, stored, strict=True)]
        moved = [0.9 * x + 0.1 * x.mean() for x in values]
        return [c.encode(x) for c, x in zip(pair, moved, strict=True)]

    x = jax.random.normal(jax.random.key(0), shape)
    stored, best = [pair[0].encode(x), pair[1].encode(x * x)], float("inf")
    for _ in range(11):  # the first one compiles
        start = time.perf_counter()
        stored = jax.block_until_ready(step(stored))
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Trains once and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 30])
    options = parser.parse_args()
    times = {name: seconds(pair) for name, pair in PAIRS.items()}
    first = next(iter(times.values()))
    print(
        "| moments after | stored as | bytes | mu | sqrt(nu) | step | largest | time |"
    )
    print("|---" * 8 + "|")
    for step, found in moments(options.steps).items():
        size = sum(mu.size for mu, _ in found)
        for name, pair in PAIRS.items():
            held = sum(codec.nbytes(m.shape) for m, _ in found for codec in pair)
            *off, most = errors(found, pair, step)
            cells = " | ".join(f"{100 * x:.2f} %" for x in off)
            cells += f" | {most:.2f} | {times[name] / first:.2f}"
            print(f"| {step} steps | {name} | {held / size:.3f} | {cells} |")


if __name__ == "__main__":
    main()
