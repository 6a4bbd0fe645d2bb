"""What a basis sees of real gradients over time: ``python -m benchmarks.basis_sees``.

The trainer's tiny LLaMA learns the sources of Python's standard library with AdamW, and
the gradients of two kernels are kept. Projectors then follow them as they would in
training. Written down: how much of each gradient's energy a rank-r basis captures, the
most that any could, and by how much subspaces turn. ``notebooks/05_what_a_basis_sees``
shows the same, step by step.
"""

import argparse
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro
from examples.llama.model import abstract_model, init_params
from examples.llama.presets import PRESETS
from examples.llama.step import token_losses

RESULTS = pathlib.Path(__file__).parents[1] / "docs/results/basis_sees.json"
LAYER, RATE = 1, 3e-3
KERNELS = {"attention q": ("attn", "q"), "feed-forward up": ("mlp", "up")}
RANK, GAP = 8, 50
LAGS = (1, 10, 50)
# The projectors of four methods, at one rank.
PROJECTORS: dict[str, Callable[[], lro.Projector]] = {
    "GaLore": lambda: lro.power(RANK, GAP),
    "SubTrack++": lambda: lro.grassmann(RANK, GAP // 5),
    "LDAdam": lambda: lro.power_iteration(RANK),
    "APOLLO": lambda: lro.gaussian(RANK, GAP),
}


def stdlib() -> np.ndarray:
    """Bytes of the standard library's sources, two million of them."""
    folder = pathlib.Path(os.__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return np.frombuffer(sources[:2_000_000], np.uint8).astype(np.int32)


def gradients(steps: int, rows: int = 8, length: int = 64) -> dict[str, jax.Array]:
    """Trains, and returns the gradients of the kernels at every step, `[T, m, n]`."""
    model = PRESETS["tiny"].model
    definition, _ = abstract_model(model)
    params = init_params(model, 0)
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, RATE, 20, 4 * steps))
    found = stdlib()
    starts = np.random.default_rng(0).integers(0, len(found) - length, (steps, rows))
    batches = found[starts[..., None] + np.arange(length + 1)]

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        batch = {"tokens": inputs, "targets": targets, "mask": jnp.ones(inputs.shape)}
        return token_losses(definition, params, batch).mean()

    def step(carry: Any, tokens: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        params, state = carry
        grads = jax.grad(loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        kept = {
            name: grads["layers"][part][kernel]["kernel"][LAYER]
            for name, (part, kernel) in KERNELS.items()
        }
        return (optax.apply_updates(params, updates), state), kept

    carry = params, tx.init(params)
    return jax.jit(lambda *a: jax.lax.scan(step, *a)[1])(carry, jnp.asarray(batches))


class Seen(NamedTuple):
    """State of ``keep_basis``: an orthonormal basis of the subspace, ``[m, r]``."""

    basis: jax.Array


def keep_basis(rows: int) -> optax.GradientTransformationExtraArgs:
    """A stage that changes nothing, and keeps the basis that the bracket shows it."""

    def update(
        updates: Any, state: Any, params: Any = None, *, subspace: Any, **extra: Any
    ) -> tuple[Any, Any]:
        del state, params, extra
        # A random projection's columns are not orthonormal.
        return updates, Seen(jnp.linalg.qr(subspace.basis)[0])

    def init(params: Any) -> Any:
        del params
        return Seen(jnp.zeros((rows, RANK)))

    whole: Any = update  # which asks for the extra argument by its name
    return optax.GradientTransformationExtraArgs(init, whole)


def bases(projector: lro.Projector, gradients: jax.Array) -> jax.Array:
    """The basis at every step of a projector that follows the gradients, `[T, m, r]`.

    Adam stands inside, since some projectors look at its moments.
    """
    tx = lro.chain(
        lro.project(projector, side="left"),
        optax.scale_by_adam(),
        keep_basis(gradients.shape[1]),
        lro.backproject(),
    )

    def step(state: Any, gradient: jax.Array) -> tuple[Any, jax.Array]:
        _, state = tx.update(gradient, state)
        return state, optax.tree_utils.tree_get(state.inner_state, "Seen").basis

    state = tx.init(jnp.zeros_like(gradients[0]))
    return jax.jit(lambda *a: jax.lax.scan(step, *a)[1])(state, gradients)


def captured(bases: jax.Array, gradients: jax.Array) -> jax.Array:
    """`|P^T G|^2 / |G|^2` of orthonormal bases, `[T]`."""
    inside = jnp.einsum("tmr,tmn->trn", bases, gradients)
    return jnp.sum(inside**2, (1, 2)) / jnp.sum(gradients**2, (1, 2))


def principal(gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Share of the energy in each direction, falling, `[T, m]`, and those, `[T, m, m]`.

    The directions are the left singular vectors, the shares squared singular values.
    """
    values, vectors = jnp.linalg.eigh(gradients @ gradients.mT)
    values = jnp.maximum(values[:, ::-1], 0)
    return values / jnp.sum(values, 1, keepdims=True), vectors[:, :, ::-1]


def overlap(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared cosine of the angles between two subspaces: 1 same, r/m random."""
    return jnp.sum((a.mT @ b) ** 2, (-2, -1)) / a.shape[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args()
    result: dict[str, Any] = {"rank": RANK, "update_proj_gap": GAP, "kernels": {}}
    for name, found in gradients(flags.steps).items():
        shares, directions = principal(found)
        leading = directions[..., :RANK]
        row: dict[str, Any] = {"shape": [*found.shape[1:]]}
        row["spectrum"] = {
            f"{step}": listed(jnp.cumsum(shares[step])[: 8 * RANK])
            for step in (0, flags.steps - 1)
        }
        row["captured"] = {"any basis": listed(shares[:, :RANK].sum(1))}
        for method, make in PROJECTORS.items():
            row["captured"][method] = listed(captured(bases(make(), found), found))
        row["overlap"] = {
            f"{lag}": listed(overlap(leading[:-lag], leading[lag:])) for lag in LAGS
        }
        result["kernels"][name] = row
    # A line for each list.
    text = re.sub(r"\n\s+(?=[\d\]])", " ", json.dumps(result, indent=1))
    flags.out.write_text(f"{text}\n")
    for name, row in result["kernels"].items():
        for method, values in row["captured"].items():
            print(f"{name:<16} {method:<18} {np.mean(values[20:]):.3f}")
        for lag, values in row["overlap"].items():
            print(f"{name:<16} overlap, lag {lag:<5} {np.mean(values[20:]):.3f}")


def listed(values: jax.Array) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


if __name__ == "__main__":
    main()
