"""Compiles layer-wise steps for one TPU chip: ``python -m benchmarks.layerwise``.

The trainer's model, bfloat16, every layer recomputed in the backward pass, on one chip.
The TPU's own compiler (extra ``tpu``) counts the bytes; nothing runs. ``clip`` stands
for clipping by the global norm and leaving steps out that are not finite: in the plain
step they are parts of the optimizer, in the layer-wise step they cost a second backward
pass. Every row is written to the file at once, beside what is there.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
from typing import Any

# The compiler is loaded beside JAX on the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import optax
from jax.sharding import SingleDeviceSharding

import lowrank_optax as lro
from examples.llama import optimizers
from examples.llama.choose_steps import make_layerwise_steps
from examples.llama.config import TrainConfig, resolve
from examples.llama.model import abstract_model, count_params
from examples.llama.step import abstract_batch, make_steps, mean_gradient
from examples.plan.compiled import NoRoom, compiled
from lowrank_optax import layerwise

RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "layerwise.json"
MIB = 2**20
CLIP = 1.0
STEPS = ("plain", "layer-wise", "plain, clip", "layer-wise, clip")


def settings(options: argparse.Namespace, optimizer: str) -> tuple[Any, Any]:
    """The trainer's configuration and model."""
    return resolve(
        TrainConfig(
            preset=options.preset,
            optimizer=optimizer,
            rank=options.rank,
            batch_size=options.batch,
            micro_batches=1,
            seq_len=options.seq,
            param_dtype="bfloat16",
            compute_dtype="bfloat16",
            clip=CLIP,
        )
    )


def make_step(step: str, config: Any, model: Any) -> tuple[Any, Any]:
    """Returns a compiled step's function and the optimizer that makes its state."""
    tx = optimizers.build_optimizer(config)
    if step == "layer-wise":
        return make_layerwise_steps(model, tx, wrap_layer=jax.checkpoint).train, tx
    if step == "layer-wise, clip":
        guard = {"clip_norm": CLIP, "skip_nonfinite": True}
        steps = make_layerwise_steps(model, tx, wrap_layer=jax.checkpoint, **guard)
        return steps.train, tx
    definition, _ = abstract_model(model)
    if step == "plain, clip":
        tx = optimizers.guarded(config, tx)
        return make_steps(definition, tx, wrap_layer=jax.checkpoint).train, tx

    def plain(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = mean_gradient(definition, params, batch, jax.checkpoint)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(plain, donate_argnums=(0, 1)), tx


def measure(options: argparse.Namespace, optimizer: str, step: str) -> dict[str, Any]:
    """Compiles a row; returns its bytes."""
    config, model = settings(options, optimizer)
    train, tx = make_step(step, config, model)
    _, params = abstract_model(model)
    state = jax.eval_shape(tx.init, params)
    place = SingleDeviceSharding(lro.topology_devices(options.topology)[0])

    places = (place, place)
    if options.layers_outermost:
        places = layerwise.formats((params, state), place)
    train: Any = jax.jit(
        train.__wrapped__,
        donate_argnums=(0, 1),
        in_shardings=(*places, place),
        out_shardings=(*places, place),
    )
    arguments = params, state, abstract_batch(config)
    try:
        found = compiled(train.lower(*arguments))
    except NoRoom as error:
        return {"refused": str(error)}
    return {
        "parameter_bytes": optimizers.tree_bytes(params),
        "state_bytes": optimizers.tree_bytes(state),
        "temp_bytes": found.audit.temp_bytes,
        "argument_bytes": found.audit.argument_bytes,
        "total_bytes": found.total,
        "program_bytes": found.program_bytes,
        "compile_seconds": found.seconds,
        "compile_cpu_seconds": found.cpu_seconds,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Formats the rows of one size as a Markdown table."""
    head = ("optimizer", "step", "temp MiB", "of plain", "total MiB", "program MiB")
    lines = [head, ("---",) * len(head)]
    for optimizer, steps in rows.items():
        for name, row in steps.items():
            if "temp_bytes" not in row:
                lines.append((optimizer, name, "does not fit", "-", "-", "-"))
                continue
            plain = steps.get(name.replace("layer-wise", "plain"), {})
            plain = plain.get("temp_bytes")
            lines.append((
                optimizer,
                name,
                f"{row['temp_bytes'] / MIB:,.0f}",
                f"{row['temp_bytes'] / plain:.3f}" if plain else "-",
                f"{row['total_bytes'] / MIB:,.0f}",
                f"{row['program_bytes'] / MIB:.0f}",
            ))  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Compiles the rows that are asked for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--topology", default="v5e:2x2", help="one of its chips")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--optimizers", nargs="+", default=["galore", "subtrack"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument(
        "--layers-outermost",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with the layouts of lro.layerwise.formats",
    )
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    order = "layers outermost" if options.layers_outermost else "compiler's layouts"
    key = f"{options.preset}, {options.batch} x {options.seq}, {order}"
    for optimizer in options.optimizers:
        for step in options.steps:
            row = measure(options, optimizer, step)
            _, model = settings(options, optimizer)
            entry = found.setdefault(key, {"rows": {}})
            entry |= {
                "what": f"compiled for one chip of a {options.topology}, never run",
                "parameters": count_params(abstract_model(model)[1]),
                "dtype": "bfloat16",
                "batch": options.batch,
                "seq": options.seq,
                "rank": options.rank,
                "jax": jax.__version__,
                "libtpu": importlib.metadata.version("libtpu"),
            }
            entry["rows"].setdefault(optimizer, {})[step] = row
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps({optimizer: {step: row}}), flush=True)
    print(f"{key}, MiB on one chip\n{table(found[key]['rows'])}")


if __name__ == "__main__":
    main()
