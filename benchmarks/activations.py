"""Policies for activation memory, side by side: ``python -m benchmarks.activations``.

The gradient of a scanned LLaMA is compiled under each policy: bytes and operations are
the compiler's own counts, ``jax.checkpoint``'s policies are the peers. On the CPU the
trainer's model also runs: its gradients are compared with those of no policy on the
same weights and text, and all rows take turns in one process, so that the ratios of
their times are the result. With ``--tpu`` a block is compiled for a TPU that need not
be there (extra ``tpu``); nothing runs. Run one at a time.

The compiler counts the body of a loop once: operations are those of one layer, forward
and backward, and of what is outside the layers.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# The TPU's compiler is loaded beside JAX on the CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # beside XLA's own threads

import jax
import numpy as np

import lowrank_optax as lro
from benchmarks import _tagged_block
from benchmarks._planned import (
    Layer,
    find_layer,
    planned,
    predicted_bytes,
)
from benchmarks._runs import Workload
from examples.llama import model
from examples.llama.batches import Position, Rows, training_batches
from examples.llama.model import abstract_model, init_params
from examples.llama.optimizers import build_optimizer
from examples.llama.run_folder import write_whole
from examples.llama.step import mean_gradient, split_rows
from lowrank_optax import activations

MIB = 2**20
NONE, FULL = "no remat", "full remat"
PROFILE = "v5e"  # of the planner, for the TPU's compiler
BLOCK = {"layers": 4, "batch_size": 16, "seq_len": 512, "width": 1024, "ff_width": 2816}


class Case(NamedTuple):
    """`gradient(*arguments, wrap)` returns a loss and its gradients."""

    gradient: Callable[..., Any]
    arguments: tuple[Any, ...]


PEERS: dict[str, model.Wrap] = {
    NONE: lambda layer: layer,
    FULL: model.full,
    "jax.checkpoint, names": model.names,
}
FRACTIONS = (0.5, 0.3, 0.2, 0.1)


def compressed(policy: activations.Policy) -> model.Wrap:
    return lambda layer: activations.compressed_checkpoint(layer, policy)


def our_policies(layer: Layer, hardware: str) -> dict[str, activations.Policy]:
    """One action for what the block's matrix products made, roles, and plans."""
    found = {
        action: activations.Policy(dict.fromkeys(model.PRODUCTS, action))
        for action in ("save", "int8", "int4", "int4+4")
    }
    found["transformer_policy()"] = activations.transformer_policy()
    for fraction in FRACTIONS:
        found[f"planned, {fraction:.0%}"] = planned(layer, fraction, hardware)
    return found


def rows(
    case: Case, ours: dict[str, activations.Policy]
) -> dict[str, Callable[..., Any]]:
    """Returns the rows of the table: functions of the case's arguments."""
    wraps = PEERS | {name: compressed(policy) for name, policy in ours.items()}
    return {
        name: functools.partial(case.gradient, wrap=wrap)
        for name, wrap in wraps.items()
    }


def add_predictions(
    found: dict[str, dict], ours: dict[str, Any], layer: Layer, hardware: str
) -> None:
    """Adds what the planner predicts, and which policy a row has."""
    alike = {FULL: {}, "jax.checkpoint, names": ours["save"]}
    for name, policy in (alike | ours).items():
        found[name]["predicted_bytes"] = predicted_bytes(layer, policy, hardware)
    for name, policy in ours.items():
        found[name]["policy"] = str(policy)


# --- compiled and run on the CPU ----------------------------------------------------


def trained(options: argparse.Namespace) -> tuple[Case, dict[str, Any], dict]:
    """Returns the trainer's model on a batch of text, its weights by age, and facts."""
    flags = {"optimizer": "adamw", "lr": 0.001, "steps": options.steps, "warmup": 10}
    sizes = {"batch_size": options.rows, "seq_len": options.length}
    work = Workload(**flags, **sizes, eval_tokens=options.length)
    work.model = dataclasses.replace(
        work.model, width=options.width, ff_width=options.ff_width
    )
    work.definition, work.abstract_params = abstract_model(work.model)
    weights = {"start": init_params(work.model, work.config.seed)}
    for step in work.train(work.config, build_optimizer(work.config)):
        if step.number == options.steps:
            weights["trained"] = step.params
            break
    text = Rows(work.text, work.tokenizer, options.length, True, work.config.seed + 1)
    batch, _ = next(training_batches(text, options.rows, Position()))

    def gradient(params: Any, batch: Any, wrap: model.Wrap) -> Any:
        return mean_gradient(work.definition, params, batch, wrap)

    arguments = (weights["start"], split_rows(batch, 1))
    facts = {"model": dataclasses.asdict(work.model), **sizes, "steps": options.steps}
    return Case(gradient, arguments), weights, facts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles and runs all rows on the CPU; times are medians over the rounds."""
    case, weights, facts = trained(options)
    layer = find_layer(*case, facts["model"]["layers"])
    ours = our_policies(layer, "cpu")
    programs = {name: compiled(row, case) for name, row in rows(case, ours).items()}
    found = {name: account(program) for name, program in programs.items()}
    _, batch = case.arguments
    for age, params in weights.items():
        exact_loss, exact = programs[NONE](params, batch)
        for name, program in programs.items():
            loss, got = program(params, batch)
            found[name][f"error_{age}"] = distance(got, exact)
            layers = distance(got["layers"], exact["layers"])
            found[name][f"layers_error_{age}"] = layers
            found[name][f"loss_equal_{age}"] = bool(loss == exact_loss)
    add_predictions(found, ours, layer, "cpu")
    seconds = turns(programs, case.arguments, options.rounds)
    for name, row in found.items():
        pairs = zip(seconds[name], seconds[FULL], strict=True)
        row["step_seconds"] = statistics.median(seconds[name])
        row["over_full_remat"] = statistics.median(a / b for a, b in pairs)
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    return {"jax": jax.__version__, **machine, **facts, "rows": found}


def turns(
    programs: dict[str, Any], arguments: tuple[Any, ...], rounds: int
) -> dict[str, list[float]]:
    """Returns the seconds of each program, one of each per round."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[name].append(time.perf_counter() - started)
    return seconds


def distance(got: Any, exact: Any) -> float:
    """The relative L2 distance of two trees."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True))
    off = sum(float(np.sum((np.asarray(a, float) - b) ** 2)) for a, b in pairs)
    return (
        off / sum(float(np.sum(np.square(b, dtype=float))) for _, b in pairs)
    ) ** 0.5


# --- compiled for a TPU ---------------------------------------------------------------


def compile_for_tpu(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles all rows for one device of a topology."""
    compiler = importlib.metadata.version("libtpu")
    devices = lro.topology_devices(options.topology)
    device = jax.sharding.SingleDeviceSharding(devices[0])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        _tagged_block.shapes(**BLOCK, dtype="bfloat16"),
    )
    case, found = Case(_tagged_block.value_and_grad, arguments), {}
    layer = find_layer(*case, BLOCK["layers"])
    ours = our_policies(layer, PROFILE)
    for name, row in rows(case, ours).items():
        started = time.perf_counter()
        found[name] = account(compiled(row, case))
        found[name]["compile_seconds"] = round(time.perf_counter() - started, 1)
        print(f"{name}: {found[name]}", flush=True)
    add_predictions(found, ours, layer, PROFILE)
    facts = {"topology": options.topology, "devices": 1, "dtype": "bfloat16"}
    versions = {"jax": jax.__version__, "libtpu": compiler}
    return {**versions, **facts, **BLOCK, "rows": found}


# --- both -----------------------------------------------------------------------------


def compiled(row: Callable[..., Any], case: Case) -> Any:
    return jax.jit(row).lower(*case.arguments).compile()


def account(program: Any) -> dict[str, Any]:
    audit = activations.audit(program)
    return {"temp_bytes": audit.temp_bytes, "flops": audit.flops}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Formats rows as Markdown."""
    ran = "step_seconds" in found[NONE]
    head = ["kept", "temp MiB", "of no remat", "GFLOP", "of no remat"]
    head += ["predicted/compiled"]
    head += ["error", "error, layers", "step ms", "of full remat"] * ran
    head += ["compile s"] * (not ran)
    lines = [head, ["---"] * len(head)]
    for name, row in found.items():
        cells = [name]
        for key, unit in (("temp_bytes", MIB), ("flops", 1e9)):
            cells.append(f"{row[key] / unit:.1f}")
            cells.append(f"{100 * row[key] / found[NONE][key]:.1f} %")
        predicted = row.get("predicted_bytes")
        cells.append(f"{predicted / row['temp_bytes']:.2f}" if predicted else "-")
        if ran:
            cells.append(f"{row['error_trained']:.4f}")
            cells.append(f"{row['layers_error_trained']:.4f}")
            cells.append(f"{1e3 * row['step_seconds']:.0f}")
            cells.append(f"{row['over_full_remat']:.2f}")
        else:
            cells.append(f"{row['compile_seconds']:.0f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table and adds its figures to the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--tpu", action="store_true", help="compile for a TPU, run none"
    )
    parser.add_argument("--topology", default="v5e:2x2", help="with --tpu")
    parser.add_argument("--rows", type=int, default=4, help="of the batch, on the CPU")
    parser.add_argument("--length", type=int, default=128, help="of a row, tokens")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--ff-width", type=int, default=704)
    parser.add_argument("--steps", type=int, default=100, help="before 'trained'")
    parser.add_argument("--rounds", type=int, default=15, help="timed")
    parser.add_argument("--out", type=pathlib.Path, help="JSON; the other part stays")
    options = parser.parse_args(arguments)
    part = "tpu" if options.tpu else "cpu"
    try:
        result = compile_for_tpu(options) if options.tpu else measure(options)
    except importlib.metadata.PackageNotFoundError:
        parser.error("the TPU's compiler is missing: pip install '.[tpu]'")
    print(table(result["rows"]))
    if options.out:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        report = json.dumps(known | {part: result}, indent=1)
        write_whole(options.out, report + "\n")


if __name__ == "__main__":
    main()
