"""What gradients sent as projections cost: ``python -m benchmarks.compressed``.

Three tables: numbers sent per method, counted from shapes; bytes of the all-reduces in
programs compiled for 8 CPU devices; temporaries of accumulating steps compiled for one.
Nothing is run.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

import lowrank_optax as lro
from benchmarks.state_memory import RANKS
from examples.llama.model import abstract_model
from examples.llama.presets import PRESETS

MIB = 2**20
LAYERS, M, N, RANK, ROWS, MICRO = 8, 512, 1376, 64, 64, 4
SHAPES = {"up": (LAYERS, M, N), "down": (LAYERS, N, M)}
PARAMS = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in SHAPES.items()}
BATCH = jax.ShapeDtypeStruct((ROWS, M), jnp.float32)


def loss(params: Any, batch: Any) -> jax.Array:
    """A stack of two-layer blocks, rematerialized."""

    def block(x: Any, w: Any) -> tuple[Any, None]:
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return jnp.mean(jnp.square(jax.lax.scan(jax.checkpoint(block), batch, params)[0]))


def stepping(gradient: Callable[..., Any], tx: Any) -> Callable[..., Any]:
    """A training step."""

    def step(params: Any, state: Any, batch: Any) -> Any:
        value, grads = gradient(params, state, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def compiled(step: Callable[..., Any], tx: Any) -> Any:
    """The program of a step, parameters and state updated in place."""
    state = jax.eval_shape(tx.init, PARAMS)
    return jax.jit(step, donate_argnums=(0, 1)).lower(PARAMS, state, BATCH).compile()


def sent() -> None:
    """Prints what LLaMA's gradients are to each method."""
    print("| model, rank | method | numbers, plainly | between refreshes | of it |")
    for preset in ("1b", "7b"):
        params, rank = abstract_model(PRESETS[preset].model)[1], RANKS[preset]
        common: dict[str, Any] = {"rank": rank, "layer_axis": 0}
        methods = {
            "galore": lro.galore(1e-3, **common),
            'galore, side="long"': lro.galore(1e-3, side="long", **common),
            "gwt": lro.gwt(1e-3, layer_axis=0),
            "subtrack": lro.subtrack(1e-3, **common),
        }
        for name, tx in methods.items():
            whole, part = lro.distributed.traffic_report(tx, params).numbers
            print(f"| {preset}, {rank} | {name} | {whole:,} | {part:,} |", end="")
            print(f" {100 * part / whole:.1f} % |")


def bytes_sent(tx: Any) -> None:
    """Prints the all-reduces of a data-parallel step outside of branches."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    print("| step | all-reduce MiB |")
    for name, refresh in (("plain, and at a refresh", True), ("between", False)):
        gradient = lro.distributed.value_and_grad(
            loss, tx, axis_name="data", refresh=refresh
        )
        whole, rows = PartitionSpec(), PartitionSpec("data")
        specs = {"in_specs": (whole, whole, rows), "out_specs": whole}
        mapped = jax.shard_map(stepping(gradient, tx), mesh=mesh, **specs)
        hlo = str(compiled(mapped, tx).as_text())
        found = lro.collectives(hlo, by_channel=False)
        print(f"| {name} | {sum(item.total for item in found) / MIB:.3f} |")


def temporaries(tx: Any) -> None:
    """Prints the temporaries of a step over four micro-batches."""
    inside = lro.chain(
        lro.project(lro.power(RANK, 100), layer_axis=0),
        optax.MultiSteps(optax.scale_by_adam(), MICRO),
        lro.backproject(0.25, 1e-2),
    )

    def one_by_one(params: Any, state: Any, batch: Any) -> Any:
        def plain(params: Any, state: Any, batch: Any) -> Any:
            return jax.value_and_grad(loss)(params, batch)

        def add(carry: Any, rows: Any) -> Any:
            params, state, value = stepping(plain, inside)(*carry, rows)
            return (params, state), value

        rows = batch.reshape(MICRO, -1, M)
        return jax.lax.scan(add, (params, state), rows)

    def accumulating(refresh: bool | None) -> Any:
        gradient = lro.distributed.value_and_grad(
            loss, tx, micro_batches=MICRO, refresh=refresh
        )
        return compiled(stepping(gradient, tx), tx)

    rows = {
        "plain, and at a refresh": accumulating(True),
        "between": accumulating(False),
        "either, in one program": accumulating(None),
        "MultiSteps inside the bracket": compiled(one_by_one, inside),
    }
    print("| step | temporaries MiB |")
    for name, program in rows.items():
        size = program.memory_analysis().temp_size_in_bytes
        print(f"| {name} | {size / MIB:.1f} |")


def main() -> None:
    """Prints the three tables."""
    tx = lro.galore(1e-2, rank=RANK, update_proj_gap=100, layer_axis=0)
    sent()
    print(f"\n{LAYERS} x {M} x {N} and its transpose, rank {RANK}, float32")
    bytes_sent(tx)
    temporaries(tx)


if __name__ == "__main__":
    main()
