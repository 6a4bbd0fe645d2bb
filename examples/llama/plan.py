"""Does a run fit? `python -m examples.llama.plan --help`; nothing is allocated.

Exit codes: 0 it fits; 1 it does not, with what would; 2 the command needs mending.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from examples.llama import optimizers
from examples.llama.activations import ACTIVATIONS
from examples.llama.config import Resolved, TrainConfig, UsageError, resolve
from examples.llama.estimate import Parts, Topology, estimate, parse_topology
from examples.llama.mesh import AXES, make_mesh, param_shardings, parse_mesh
from examples.llama.model import ModelConfig, abstract_model, count_params
from examples.llama.plan_layers import plan_from_shapes, wrap_with
from examples.llama.step import MODEL, OPTIMIZER

MIB = 2**20
# Rows of the table of what fits, beside the optimizer that was asked for.
COMPARED = (
    "adamw", "adamw_8bit", "galore", "galore_8bit", "q_galore", "subtrack",
    "apollo", "apollo_mini", "gwt",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Say whether a training run fits on a TPU slice or on GPUs, before renting it."""

    preset: str = "7b"
    """model, as for training"""
    optimizer: str = "galore"
    """name, as for training"""
    rank: int | None = None
    """of the projection; left out: the preset's"""
    topology: str = "v5e:16x16"
    """a TPU and its extent (v5e:16x16, v4:4x4x8, v5p:2x2x2), or a GPU and a number
    (h100:8)"""
    mesh: str = "fsdp=-1"
    """sizes of data, fsdp, tensor, as for training"""
    batch: int = 512
    """rows per optimizer step, on all devices together"""
    seq: int = 2048
    """length of a row, tokens"""
    micro_batches: int = 1
    """parts that the rows of one step are computed in, one after another"""
    param_dtype: str = "bfloat16"
    """of parameters, gradients and moments"""
    activation_policy: str = "full"
    """none, full, names or adacc, as for training"""
    activation_budget: str = ""
    """a percentage or bytes, as for training"""
    compile: bool = False
    """also compile the step with the TPU's compiler (extra tpu; minutes)"""


def training(config: PlanConfig, **changes: Any) -> tuple[Resolved, ModelConfig]:
    """The trainer's configuration of this run."""
    asked = dataclasses.replace(config, **changes)
    return resolve(
        TrainConfig(
            preset=asked.preset,
            optimizer=asked.optimizer,
            rank=asked.rank,
            batch_size=asked.batch,
            seq_len=asked.seq,
            micro_batches=asked.micro_batches,
            param_dtype=asked.param_dtype,
            compute_dtype="bfloat16",
            activation_policy=asked.activation_policy,
            activation_budget=asked.activation_budget,
        )
    )


def parts_of(config: PlanConfig, topology: Topology, **changes: Any) -> Parts:
    """What one variant of the run takes per device."""
    resolved, model = training(config, **changes)
    sizes = parse_mesh(config.mesh, topology.devices)
    check_rows(resolved, sizes)
    tx = optimizers.guarded(resolved, optimizers.build_optimizer(resolved))
    return estimate(resolved, model, tx, sizes, topology.profile)


def check_rows(config: Resolved, sizes: dict[str, int]) -> None:
    """Raises if the rows of a micro-batch cannot be cut evenly."""
    parts = sizes["data"] * sizes["fsdp"]
    rows = config.batch_size // config.micro_batches
    if rows % parts:
        near = -(-rows // parts) * parts * config.micro_batches
        raise UsageError(
            f"{rows} rows of a micro-batch cannot be cut over data x fsdp = {parts} "
            f"devices; the nearest that works is --batch {near}"
        )


def breakdown(parts: Parts, topology: Topology) -> str:
    """A line for each part."""
    rows = [(name, size) for name, size in dataclasses.asdict(parts).items()]
    rows += [("at the fullest", parts.total), ("a device has", topology.memory_bytes)]
    return "\n".join(f"  {name:<14} {size / MIB:>12,.1f} MiB" for name, size in rows)


def what_fits(config: PlanConfig, topology: Topology) -> Iterator[str]:
    """Lines of the table: optimizers, ranks and types of parameters."""
    yield f"  {'optimizer':<14}{'rank':>6}{'parameters':>12}{'state':>14}{'all':>14}"
    own = training(config)[0].rank
    for name in dict.fromkeys((config.optimizer, *COMPARED)):
        ranked = name not in ("adamw", "adamw_8bit", "apollo_mini", "gwt")
        for rank in (own, own // 4) if ranked else (None,):
            for dtype in ("float32", "bfloat16"):
                changes = {"optimizer": name, "rank": rank, "param_dtype": dtype}
                parts = parts_of(config, topology, **changes)
                fits = "fits" if parts.total <= topology.memory_bytes else "too much"
                yield (
                    f"  {name:<14}{rank or '-':>6}{dtype:>12}"
                    f"{parts.state / MIB:>10,.1f} MiB{parts.total / MIB:>10,.1f} MiB"
                    f"  {fits}"
                )


def ways_out(config: PlanConfig, topology: Topology) -> Iterator[str]:
    """Changes, each alone, with which the run would fit."""
    changes: list[tuple[str, dict[str, Any]]] = [
        (f"--activation-policy {name}", {"activation_policy": name})
        for name in ("adacc", "full")
    ]
    parts = config.micro_batches
    while config.batch % (2 * parts) == 0 and parts < config.batch:
        parts *= 2
        changes.append((f"--micro-batches {parts}", {"micro_batches": parts}))
    changes += [(f"--optimizer {name}", {"optimizer": name}) for name in COMPARED[1:]]
    for text, change in changes:
        try:
            found = parts_of(config, topology, **change)
        except UsageError:
            continue
        if found.total <= topology.memory_bytes:
            yield f"{text} would take {found.total / MIB:,.0f} MiB"


def compiled_beside(parts: Parts, config: PlanConfig, topology: Topology) -> str:
    """The TPU compiler's account of the trainer's step beside the estimate."""
    from examples.llama import aot  # slow to import, and wants another library

    resolved, model = training(config)
    mesh = make_mesh(
        parse_mesh(config.mesh, topology.devices), aot.find_devices(topology.name)
    )
    _, params = abstract_model(model)
    tx = optimizers.guarded(
        resolved, optimizers.build_optimizer(resolved, param_shardings(mesh, params))
    )
    wrap_layer = ACTIVATIONS[resolved.activation_policy]
    if resolved.activation_budget:
        wrap_layer = wrap_with(plan_from_shapes(resolved, model))
    found = aot.compile_step(resolved, model, tx, mesh, wrap_layer)
    rows = [
        ("arguments", found.audit.argument_bytes, parts.parameters + parts.state),
        ("temporaries", found.audit.temp_bytes, parts.temporaries),
        ("together", found.total, parts.total),
    ]
    lines = [f"compiled in {found.seconds:.0f} s, for one device:"]
    for name, size, expected in rows:
        off = 100 * (expected / max(size, 1) - 1)
        lines.append(
            f"  {name:<14} {size / MIB:>12,.1f} MiB, the estimate {off:+.1f} %"
        )
    lines.append(f"  {'program':<14} {found.program_bytes / MIB:>12,.1f} MiB")
    for owner in (MODEL, OPTIMIZER):
        sums = aot.sent(found.collectives, owner)
        text = "; ".join(
            f"{count} {op}, {size / MIB:,.1f} MiB"
            for op, (count, size) in sorted(sums.items())
        )
        lines.append(f"  sent by the {owner}: {text or 'nothing'}")
    return "\n".join(lines)


def report(config: PlanConfig) -> bool:
    """Prints the plan; whether it fits."""
    topology = parse_topology(config.topology)
    parts, (resolved, model) = parts_of(config, topology), training(config)
    sizes = parse_mesh(config.mesh, topology.devices)
    _, params = abstract_model(model)
    mesh = ", ".join(f"{axis} {sizes[axis]}" for axis in AXES)
    print(
        f"{config.preset} ({count_params(params):,} parameters) with "
        f"{config.optimizer}, rank {resolved.rank}, on {topology.devices} devices of "
        f"{config.topology} ({mesh}); {config.batch} rows of {config.seq} tokens\n"
        f"estimate for one device:\n{breakdown(parts, topology)}"
    )
    print("what fits:\n" + "\n".join(what_fits(config, topology)))
    fits = parts.total <= topology.memory_bytes
    if not fits:
        found = list(ways_out(config, topology))
        more = "; or more devices" if found else "more devices, or a smaller --preset"
        print("it does not fit; " + "; ".join(found) + more)
    if config.compile:
        print(compiled_beside(parts, config, topology))
    return fits


def main(args: Sequence[str] | None = None) -> int:
    config = tyro.cli(PlanConfig, prog="python -m examples.llama.plan", args=args)
    try:
        return 0 if report(config) else 1
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
