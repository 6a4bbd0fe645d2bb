"""Compiles an optimizer update for a TPU: ``python -m benchmarks.tpu_aot``.

The update of a whole LLaMA, layers stacked, parameters and state sharded over every
device of the topology (FSDP), is compiled by the TPU's own compiler (extra ``tpu``).
No TPU is needed and nothing runs: the table tells compile time, program size, bytes
per device and what is sent between devices, not speed.

Run one at a time: two compilations on one machine slow each other.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import time
from typing import Any

# The compiler is loaded beside JAX on the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lowrank_optax as lro
from lowrank_optax.quantization import blockwise_int8

# Width, feed-forward width, layers: the GaLore scripts' models.
PRESETS = {
    "60m": (512, 1376, 8),
    "130m": (768, 2048, 12),
    "350m": (1024, 2736, 24),
    "1b": (2048, 5461, 24),
    "7b": (4096, 11008, 32),
}
VOCABULARY = 32000
PROJECTORS = {"power": lro.power, "svd": lro.svd, "gaussian": lro.gaussian}
METHODS = (
    "fira", "subtrack", "ldadam", "online_subspace_descent", "apollo",
    "apollo unlimited", "gwt", "galore_8bit", "galore_8bit block 128", "q_galore",
    "adamw_8bit", "adamw_8bit block 128", "adamw_8bit tables",
)  # fmt: skip
AXIS = "fsdp"
MIB = 2**20


def parameters(preset: str, dtype: str) -> dict[str, Any]:
    """Returns the shapes of the whole model, layers stacked."""
    width, ff_width, layers = PRESETS[preset]
    shapes = {
        "embed": {"embedding": (VOCABULARY, width)},
        "layers": {
            **{name: {"kernel": (layers, width, width)} for name in "qkvo"},
            "gate": {"kernel": (layers, width, ff_width)},
            "up": {"kernel": (layers, width, ff_width)},
            "down": {"kernel": (layers, ff_width, width)},
            "norm1": {"scale": (layers, width)},
            "norm2": {"scale": (layers, width)},
        },
        "norm": {"scale": (width,)},
        "lm_head": {"kernel": (width, VOCABULARY)},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def fsdp(mesh: Mesh, params: Any) -> Any:
    """Shards every leaf's largest axis that divides, never the axis of layers."""

    def place(path, leaf):
        stacked = "layers" in jax.tree_util.keystr(path)
        axes = range(1 if stacked else 0, leaf.ndim)
        even = [axis for axis in axes if leaf.shape[axis] % mesh.size == 0]
        spec: list[str | None] = [None] * leaf.ndim
        if even:
            spec[max(even, key=lambda axis: leaf.shape[axis])] = AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, params)


def optimizers(options: argparse.Namespace, shardings: Any) -> dict[str, Any]:
    """Returns the rows of the table."""
    projector = PROJECTORS[options.projector](options.rank)
    rows: dict[str, Any] = {"optax.adamw": optax.adamw(1e-3)}
    for side in options.sides:
        bracket = lro.project(
            projector, side=side, layer_axis=0, param_shardings=shardings
        )
        rows[f"galore side={side}"] = lro.chain(
            bracket, optax.scale_by_adam(), lro.backproject(0.25, 1e-2)
        )
    for name in options.methods:
        rows[name] = method(name, options.rank, shardings)
    return rows


def method(name: str, rank: int, shardings: Any) -> optax.GradientTransformation:
    """Returns the optimizer of a row."""
    stacks = {"layer_axis": 0, "param_shardings": shardings}
    if name == "adamw_8bit":
        return lro.adamw_8bit(1e-3)
    if name == "adamw_8bit block 128":  # whole blocks in every shard
        return lro.adamw_8bit(1e-3, block=128)
    if name == "apollo unlimited":  # what the bound of recovery's entries takes
        return lro.apollo(1e-2, rank, entry_limit=None, **stacks)
    if name == "galore_8bit block 128":
        return lro.galore_8bit(1e-2, rank, block=128, **stacks)
    if name == "adamw_8bit tables":  # codes looked up instead of computed
        codecs = blockwise_int8(signed_scale=True), blockwise_int8(signed=False)
        inner = lro.quantize_state(optax.scale_by_adam(), *codecs)
        return optax.chain(inner, optax.scale_by_learning_rate(1e-3))
    size = () if name == "gwt" else (rank,)  # its own: two levels
    return getattr(lro, name)(1e-2, *size, **stacks)


def measure(tx: optax.GradientTransformation, params: Any, shardings: Any) -> dict:
    """Compiles one update; returns the row's figures."""
    layout = lro.state_shardings(tx, params, shardings)

    def placed(tree, layout):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            layout,
        )

    def update(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    weights, state = placed(params, shardings), placed(_state(tx, params), layout)
    step = jax.jit(update, donate_argnums=(1, 2), out_shardings=(shardings, layout))
    lowered = step.lower(weights, state, weights)
    wall, cpu = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory: Any = compiled.memory_analysis()
    return {
        "compile_seconds": wall,
        "compile_cpu_seconds": cpu,
        "program_bytes": memory.generated_code_size_in_bytes,
        "state_bytes_per_device": _bytes_per_device(state),
        "temp_bytes_per_device": memory.temp_size_in_bytes,
        "argument_bytes_per_device": memory.argument_size_in_bytes,
        # The compiler's count, which takes loop bodies and branches once.
        "bytes_accessed_per_device": _bytes_accessed(compiled),
        **_sent(compiled.as_text() or ""),
    }


def _bytes_accessed(compiled: Any) -> float:
    return compiled.cost_analysis()["bytes accessed"]


def _state(tx: optax.GradientTransformation, params: Any) -> Any:
    return jax.eval_shape(tx.init, params)


def _bytes_per_device(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _sent(hlo: str) -> dict[str, Any]:
    """Sums the collectives of every step, and of branches that only some run."""
    every, some = {}, {}
    items = lro.collectives(hlo)
    for item in items:
        sums = some if item.conditional else every
        count, total = sums.get(item.op, (0, 0))
        sums[item.op] = (count + item.times, total + item.total)
    return {
        "collectives_every_step": every,
        "collectives_in_branches": some,
        "trip_counts_known": all(item.exact for item in items),
    }


def table(rows: dict[str, dict]) -> str:
    """Formats the rows as a Markdown table."""
    head = (
        "update of", "state MiB/device", "temp MiB/device", "program MiB",
        "compile s (CPU s)", "collectives of every step", "and of a refresh",
    )  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for name, row in rows.items():
        lines.append((
            name,
            f"{row['state_bytes_per_device'] / MIB:.0f}",
            f"{row['temp_bytes_per_device'] / MIB:.0f}",
            f"{row['program_bytes'] / MIB:.1f}",
            f"{row['compile_seconds']:.0f} ({row['compile_cpu_seconds']:.0f})",
            _summary(row["collectives_every_step"]),
            _summary(row["collectives_in_branches"]),
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _summary(sums: dict[str, tuple[int, int]]) -> str:
    parts = [
        f"{count} {op}, {total / MIB:.0f} MiB"
        for op, (count, total) in sorted(sums.items())
    ]
    return "; ".join(parts) or "none"


def main(arguments: list[str] | None = None) -> None:
    """Compiles every row and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="1b")
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--projector", choices=PROJECTORS, default="power")
    parser.add_argument("--topology", default="v5e:4x4", help="such as v5e:16x16")
    parser.add_argument("--dtype", default="float32", help="of the parameters")
    parser.add_argument("--sides", nargs="+", default=["short", "auto"])
    parser.add_argument("--methods", nargs="*", default=METHODS, help="besides galore")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    options = parser.parse_args(arguments)
    try:
        compiler = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        parser.error("the TPU's compiler is missing: pip install '.[tpu]'")

    devices = lro.topology_devices(options.topology)
    mesh = Mesh(np.array(devices), (AXIS,))
    params = parameters(options.preset, options.dtype)
    shardings = fsdp(mesh, params)
    header = {
        "what": "compiled for the topology, never run",
        "preset": options.preset,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "dtype": options.dtype,
        "rank": options.rank,
        "projector": options.projector,
        "topology": options.topology,
        "devices": mesh.size,
        "jax": jax.__version__,
        "libtpu": compiler,
        "cpu_cores": os.cpu_count(),
    }
    print(", ".join(f"{key} {value}" for key, value in header.items()), flush=True)
    rows = {}
    for name, tx in optimizers(options, shardings).items():
        rows[name] = measure(tx, params, shardings)
        seconds = rows[name]["compile_seconds"]
        print(f"{name}: compiled in {seconds:.0f} s", flush=True)
        if options.json:  # every row takes minutes, and so is written at once
            options.json.parent.mkdir(parents=True, exist_ok=True)
            figures = {**header, "rows": rows}
            options.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\n{table(rows)}\n\n{NOTE}")


NOTE = (
    "State and temporaries are those of one device, parameters and gradients not\n"
    "counted. Collectives: size of the results on one device. Those of a refresh are\n"
    "multiplied by the layers of each stack, sum up all branches (the cold start\n"
    "included) and count one power sweep; the first refresh takes more."
)

if __name__ == "__main__":
    main()
