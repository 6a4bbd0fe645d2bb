"""`report` says whether a run fits, from shapes: `python -m examples.plan --help`."""

import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import optax

import lowrank_optax as lro
from examples.llama import optimizers
from examples.llama.command_line import parsed
from examples.llama.config import (
    NO_SIDE,
    Resolved,
    TrainConfig,
    UsageError,
    resolve,
)
from examples.llama.model import ModelConfig, abstract_model, count_params
from examples.llama.placement import AXES, ROWS, param_shardings, parse_mesh
from examples.plan.compiled import NoRoom, beside, compile_run, require_compiler
from examples.plan.estimate import (
    Parts,
    estimate,
    memory_bytes,
    state_bytes,
    state_parts,
)

MIB = 2**20
# Rows of the table of what fits, beside the optimizer that was asked for.
COMPARED = (
    "adamw", "adamw_8bit", "galore", "galore_8bit", "q_galore", "subtrack",
    "apollo", "apollo_mini", "gwt",
)  # fmt: skip
NO_RANK = ("adamw", "adamw_8bit", "adamw_4bit", "apollo_mini", "gwt")
# The estimate is within a tenth of what the TPU's compiler takes (docs/pods.md).
MARGIN = 0.9


# With --compile the compiler decides, without it the estimate.
CODES = {
    0: "it fits",
    1: "it does not; what would is printed",
    2: "the command needs mending",
}


@dataclasses.dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Say whether a training run fits on a TPU slice or on GPUs, before renting it.

    In brackets: a flag's value when it is left out, here with --preset {preset} and
    --optimizer {optimizer}; give others beside --help for theirs. --no-FLAG turns a
    switch off. The flags below "plan" are the trainer's, with its values.
    """

    topology: str = ""
    """a TPU and its extent (v5e:16x16, v4:4x4x8, v5p:2x2x2, v6e:4x4), or a GPU and a
    number (h100:8, rtx4090:1, a100-40:4); empty: v5e:16x16, or one device of
    --memory"""
    memory: str = ""
    """of one device, in place of the data sheet's: 24GB, 22.5GiB or bytes; empty:
    the data sheet's"""
    compile: bool = False
    """also compile the step with the TPU's compiler (extra tpu; minutes)"""


UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_memory(text: str) -> int:
    """Bytes of 24GB, 22.5GiB and the like."""
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    try:
        size = float(found[1]) * unit if found and unit else 0.0
    except ValueError:
        size = 0.0
    if size < 1:
        raise UsageError(f"--memory must be a size such as 24GB or 22GiB; got {text!r}")
    return int(size)


def devices_of(plan: PlanConfig) -> lro.Topology:
    """The devices that are asked for; those of --memory alone have no name."""
    if plan.memory and not plan.topology:
        return lro.Topology(f"one device of {plan.memory}", "rtx4090", (1,))
    try:
        return lro.parse_topology(plan.topology or "v5e:16x16")
    except ValueError as error:
        raise UsageError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Run:
    """What is planned: the trainer's own configuration, model, mesh and optimizer."""

    config: Resolved
    model: ModelConfig
    topology: lro.Topology
    sizes: dict[str, int]
    memory: int = 0

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer that the flags ask for, without clipping and guard."""
        _, params = abstract_model(self.model)
        places = param_shardings(lro.abstract_mesh(self.sizes), params)
        return optimizers.build_optimizer(self.config, places)

    @property
    def tx(self) -> optax.GradientTransformation:
        """The same as the trainer has it, with clipping and guard."""
        return optimizers.guarded(self.config, self.optimizer)

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return self.memory or memory_bytes(self.topology)

    def parts(self) -> Parts:
        return estimate(
            self.config, self.model, self.tx, self.sizes, self.topology.chip
        )

    def with_state(self, parts: Parts) -> Parts:
        """The parts of a run that has another optimizer, with this one's state."""
        _, params = abstract_model(self.model)
        places = param_shardings(lro.abstract_mesh(self.sizes), params)
        size = state_bytes(self.tx, params, places)
        return dataclasses.replace(parts, **state_parts(self.config, size))


def plan_run(plan: PlanConfig, **changes: Any) -> Run:
    """The run that the flags, or the flags with changes, describe."""
    plan = dataclasses.replace(plan, **changes)
    flags = {f.name: getattr(plan, f.name) for f in dataclasses.fields(TrainConfig)}
    if "optimizer" in changes and plan.optimizer in NO_SIDE:
        flags["side"] = ""
    config, model = resolve(TrainConfig(**flags))
    memory = parse_memory(plan.memory) if plan.memory else 0
    topology = devices_of(plan)
    devices = topology.devices
    each = config.batch_size // config.micro_batches
    # As the trainer chooses: all devices, if the rows can be cut over them, else one.
    mesh = config.mesh or ("data=-1" if config.compressed else "fsdp=-1")
    if not config.mesh and not config.compressed and each % devices:
        mesh, devices = "fsdp=1", 1
    sizes = parse_mesh(mesh, devices)
    # Every micro-batch is cut over all devices, so both numbers must divide the rows.
    parts = math.prod(sizes[axis] for axis in ROWS) * config.micro_batches
    if config.batch_size % parts:
        raise UsageError(
            f"{config.batch_size} rows in {config.micro_batches} micro-batches cannot "
            f"be cut over data x fsdp = {parts // config.micro_batches} devices; the "
            f"nearest that works is --batch-size "
            f"{-(-config.batch_size // parts) * parts}"
        )
    config = dataclasses.replace(config, mesh=mesh)
    return Run(config, model, topology, sizes, memory)


def verdict(total: int, topology: lro.Topology, memory: int = 0) -> str:
    """In words; an estimate close to what a device has decides nothing."""
    room = memory or memory_bytes(topology)
    if total > room:
        return "too much"
    return "fits" if total <= MARGIN * room else "close: --compile"


def breakdown(parts: Parts, topology: lro.Topology, memory: int = 0) -> str:
    """A line for each part."""
    sizes = dataclasses.asdict(parts)
    host = sizes.pop("host")
    room = memory or memory_bytes(topology)
    rows = [*sizes.items(), ("at the fullest", parts.total), ("a device has", room)]
    if host:
        rows.append(("state in host", host))
    return "\n".join(f"  {name:<14} {size / MIB:>12,.1f} MiB" for name, size in rows)


def what_fits(plan: PlanConfig) -> Iterator[tuple[str, int | None, str, Parts]]:
    """(optimizer, rank, type of parameters, parts) of the run under each of them."""
    own = plan_run(plan, optimizer="galore").config.rank  # of the flag, or the preset
    ranks = dict.fromkeys((own, max(own // 4, 1)))
    for dtype in ("float32", "bfloat16"):
        base = plan_run(plan, param_dtype=dtype).parts()  # all but the state is equal
        for name in dict.fromkeys((plan.optimizer, *COMPARED)):
            for rank in (None,) if name in NO_RANK else ranks:
                run = plan_run(plan, optimizer=name, rank=rank, param_dtype=dtype)
                yield name, rank, dtype, run.with_state(base)


def ways_out(plan: PlanConfig) -> Iterator[str]:
    """Changes, each alone, with which the run would fit."""
    config, topology = plan_run(plan).config, devices_of(plan)
    changes: list[tuple[str, dict[str, Any]]] = [
        (f"--activation-policy {name}", {"activation_policy": name})
        for name in ("adacc", "full")
        if name != config.activation_policy and not plan.activation_budget
    ]
    number = config.micro_batches
    while config.batch_size % (2 * number) == 0:
        number *= 2
        changes.append((f"--micro-batches {number}", {"micro_batches": number}))
    changes += [
        (f"--topology {name} --mesh fsdp=-1", {"topology": name, "mesh": "fsdp=-1"})
        for name in (topology.larger() if plan.topology or not plan.memory else ())
    ]
    found: set[str] = set()
    for text, change in changes:
        kind = text.split()[0]
        if kind in found:  # the nearest of its kind is there
            continue
        # A change that the other flags forbid is no way out.
        with contextlib.suppress(UsageError):
            run = plan_run(plan, **change)
            total = run.parts().total
            if total <= MARGIN * run.memory_bytes:
                found.add(kind)
                yield f"{text} would take {total / MIB:,.0f} MiB"
    run = plan_run(plan)
    parts, room = run.parts(), MARGIN * run.memory_bytes
    for name in COMPARED[1:]:
        rank = None if name in NO_RANK else plan.rank
        total = plan_run(plan, optimizer=name, rank=rank).with_state(parts).total
        if total <= room:
            yield f"--optimizer {name} would take {total / MIB:,.0f} MiB"


def two_ways_out(plan: PlanConfig) -> Iterator[str]:
    """Recomputation, and one change besides, with which the run would fit."""
    full = dataclasses.replace(plan, activation_policy="full", activation_budget="")
    yield from (f"--activation-policy full {way}" for way in ways_out(full))


def report(plan: PlanConfig) -> bool:
    """Prints the plan; whether it fits."""
    run = plan_run(plan)
    if plan.compile:
        if run.config.state_memory != "device":
            raise UsageError(
                "--compile counts a state on the device; leave --state-memory "
                f"{run.config.state_memory} out, or --compile"
            )
        require_compiler(run.topology)
    parts, topology, memory = run.parts(), run.topology, run.memory
    config = run.config
    _, params = abstract_model(run.model)
    used = math.prod(run.sizes.values())
    if used < topology.devices:
        print(
            f"one of {topology.devices} devices is used, as in training: the rows of a "
            "micro-batch cannot be cut over all; a --batch-size, --micro-batches or "
            "--mesh that fits uses more"
        )
    mesh = ", ".join(f"{axis} {run.sizes[axis]}" for axis in AXES)
    rank = "" if plan.optimizer in NO_RANK else f", rank {config.rank}"
    print(
        f"{plan.preset} ({count_params(params):,} parameters) with "
        f"{plan.optimizer}{rank}, on {used} devices of "
        f"{topology.name} ({mesh}); {config.batch_size} rows of {config.seq_len} "
        "tokens\n"
        f"estimate for one device: {verdict(parts.total, topology, memory)}\n"
        f"{breakdown(parts, topology, memory)}\nthe same run with:\n"
        f"  {'optimizer':<14}{'rank':>6}{'parameters':>12}{'state':>16}{'all':>18}"
    )
    for name, number, dtype, row in what_fits(plan):
        state = row.state + row.host
        print(
            f"  {name:<14}{number or '-':>6}{dtype:>12}{state / MIB:>12,.1f} MiB"
            f"{row.total / MIB:>14,.1f} MiB  {verdict(row.total, topology, memory)}"
        )
    room = run.memory_bytes
    # The exit code knows no "close": an estimate within the memory fits.
    fits = parts.total <= room
    if not fits:
        ways = [*ways_out(plan)] or [*two_ways_out(plan)]
        less = "fewer rows, more devices or a smaller --preset would"
        print("it does not fit; " + ("; ".join(ways) or less))
    if not plan.compile:
        return fits
    try:
        found = compile_run(run)
    except NoRoom as error:
        print(error)
        return False
    print(beside(parts, found))
    return found.total <= room


def main(args: Sequence[str] | None = None) -> int:
    try:
        plan = parsed(
            PlanConfig,
            "python -m examples.plan",
            args,
            CODES,
            lambda plan: vars(plan) | vars(plan_run(plan).config),
        )
        return 0 if report(plan) else 1
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
