"""Compiles whole training steps for a TPU: ``python -m benchmarks.tpu_step``.

The trainer's own step (``examples/llama``), forward, backward and update, is compiled
by the TPU's own compiler (extra ``tpu``) for a slice that need not be there: FSDP over
all devices, bfloat16, every layer recomputed. Nothing runs: the table tells bytes,
program size and compile time, not speed. The optimizer's part is also compiled by
itself, for its own temporaries.

Every row takes minutes and is written to the file at once, beside what is there.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

# The compiler is loaded beside JAX on the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from examples.llama import optimizers
from examples.llama.config import Resolved, TrainConfig, resolve
from examples.llama.model import ACTIVATIONS, abstract_model, count_params
from examples.llama.placement import make_mesh, param_shardings, parse_mesh
from examples.llama.step import MODEL, OPTIMIZER
from examples.plan.compiled import compile_step, compile_update, sent
from examples.plan.estimate import estimate, state_bytes

RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "tpu_step.json"
MIB = 2**20
Make = Callable[[Resolved, Any], optax.GradientTransformation]


def registered(**flags: Any) -> Make:
    """An optimizer of the trainer's registry, with these flags."""
    return lambda config, shardings: optimizers.build_optimizer(
        dataclasses.replace(config, **flags), shardings
    )


def in_bfloat16(method: Callable[..., Any], side: str) -> Make:
    """A method with its basis in bfloat16."""

    def make(config: Resolved, shardings: Any) -> optax.GradientTransformation:
        return method(
            optimizers.learning_rate(config),
            update_proj_gap=config.update_proj_gap,
            side=side,
            param_shardings=shardings,
            basis_dtype=jnp.bfloat16,
            **optimizers.low_rank(config),
        )

    return make


def galore_8bit(block: int) -> Make:
    """8-bit GaLore with blocks that divide the columns of a shard."""

    def make(config: Resolved, shardings: Any) -> optax.GradientTransformation:
        options = optimizers.low_rank(config)
        return lro.galore_8bit(
            optimizers.learning_rate(config),
            update_proj_gap=config.update_proj_gap,
            side="auto",
            param_shardings=shardings,
            block=block,
            **options,
        )

    return make


def adafactor(config: Resolved, shardings: Any) -> optax.GradientTransformation:
    del shardings
    return optax.adafactor(optimizers.learning_rate(config))


ROWS: dict[str, Make] = {
    "optax.adamw": registered(optimizer="adamw"),
    "optax.adafactor": adafactor,
    "galore, side long": in_bfloat16(lro.galore, "long"),
    "galore, side auto": in_bfloat16(lro.galore, "auto"),
    "galore, side short": in_bfloat16(lro.galore, "short"),
    "subtrack, side auto": registered(optimizer="subtrack", side="auto"),
    "subtrack, bfloat16 basis": in_bfloat16(lro.subtrack, "auto"),
    "gwt, level 2": registered(optimizer="gwt"),
    "galore_8bit, side auto": registered(optimizer="galore_8bit", side="auto"),
    "galore_8bit, side auto, block 128": galore_8bit(128),
    "apollo, side auto": registered(optimizer="apollo", side="auto"),
}


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Compiles a row; returns its figures, bytes on one device."""
    config, model = resolve(
        TrainConfig(
            preset=options.preset,
            optimizer="galore",  # for what the flags leave out
            rank=options.rank,
            batch_size=options.batch,
            micro_batches=1,
            seq_len=options.seq,
            param_dtype="bfloat16",
            compute_dtype="bfloat16",
            activation_policy="full",
        )
    )
    profile = lro.parse_topology(options.topology).chip
    devices = lro.topology_devices(options.topology)
    sizes = parse_mesh("fsdp=-1", len(devices))
    mesh, (_, params) = make_mesh(sizes, devices), abstract_model(model)
    shardings = param_shardings(mesh, params)
    optimizer = ROWS[name](config, shardings)
    tx = optimizers.guarded(config, optimizer)
    row: dict[str, Any] = {
        "parameter_bytes": lro.bytes_per_device(params, shardings),
        "state_bytes": state_bytes(tx, params, shardings),
        "layer_state_bytes": _of_layers(name, config, params, shardings),
        "estimate_bytes": estimate(config, model, tx, sizes, profile).total,
    }
    update = compile_update(model, optimizer, mesh)
    row["update"] = {
        "temp_bytes": update.audit.temp_bytes,
        "program_bytes": update.program_bytes,
        "compile_seconds": update.seconds,
        "compile_cpu_seconds": update.cpu_seconds,
        "largest_gather_bytes": _largest_gather(update.collectives),
    }
    print(f"{name}, update: {row}", flush=True)
    if options.update_only:
        return row
    step = compile_step(config, model, optimizer, mesh, ACTIVATIONS["full"])
    return row | {
        "argument_bytes": step.audit.argument_bytes,
        "temp_bytes": step.audit.temp_bytes,
        "peak_bytes": step.audit.peak_bytes,
        "total_bytes": step.total,
        "program_bytes": step.program_bytes,
        "compile_seconds": step.seconds,
        "compile_cpu_seconds": step.cpu_seconds,
        "collectives_model": sent(step.collectives, MODEL),
        "collectives_optimizer": sent(step.collectives, OPTIMIZER, 1),
    }


def _of_layers(name: str, config: Resolved, params: Any, shardings: Any) -> int:
    """Bytes of the state of the layers' matrices alone."""
    kernels, places = (
        {"layers": {name: tree["layers"][name] for name in ("attn", "mlp")}}
        for tree in (params, shardings)
    )
    return state_bytes(ROWS[name](config, places), kernels, places)


def _largest_gather(items: Any) -> int:
    return max((item.bytes for item in items if item.op == "all-gather"), default=0)


def table(rows: dict[str, Any]) -> str:
    """Formats the rows of one slice as a Markdown table."""
    head = (
        "optimizer", "total", "state", "of it layers", "temp", "optimizer sends",
        "sends in a refresh", "estimate / compiled", "update alone: temp", "program",
        "compile s (CPU s)",
    )  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for name, row in rows.items():
        if "total_bytes" not in row:
            continue
        sends = row["collectives_optimizer"]
        plain = sum(b for op, (_, b) in sends.items() if "refresh" not in op)
        fresh = sum(b for op, (_, b) in sends.items() if "refresh" in op)
        lines.append((
            name,
            f"{row['total_bytes'] / MIB:.0f}",
            f"{row['state_bytes'] / MIB:.0f}",
            f"{row['layer_state_bytes'] / MIB:.0f}",
            f"{row['temp_bytes'] / MIB:.0f}",
            f"{plain / MIB:.1f}",
            f"{fresh / MIB:.0f}",
            f"{row['estimate_bytes'] / row['total_bytes']:.3f}",
            f"{row['update']['temp_bytes'] / MIB:.0f}",
            f"{row['program_bytes'] / MIB:.0f}",
            f"{row['compile_seconds']:.0f} ({row['compile_cpu_seconds']:.0f})",
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Compiles the rows that are asked for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--topology", default="v5e:4x4", help="such as v5e:16x16")
    parser.add_argument("--batch", type=int, default=512, help="rows on all devices")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--update-only", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    key = f"{options.preset} on {options.topology}"
    for name in options.rows:
        row = measure(options, name)
        _, model = resolve(TrainConfig(preset=options.preset))
        entry = found.setdefault(key, {"rows": {}})
        entry |= {
            "what": "compiled for the topology, never run",
            "parameters": count_params(abstract_model(model)[1]),
            "batch": options.batch,
            "seq": options.seq,
            "rank": options.rank,
            "jax": jax.__version__,
            "libtpu": importlib.metadata.version("libtpu"),
            "cpu_cores": os.cpu_count(),
        }
        entry["rows"][name] = entry["rows"].get(name, {}) | row
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({name: row}), flush=True)
    if key in found:
        print(f"{key}, MiB on one device\n{table(found[key]['rows'])}")


if __name__ == "__main__":
    main()
