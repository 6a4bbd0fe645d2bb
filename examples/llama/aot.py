"""A training step compiled by the TPU's own compiler: no TPU is needed."""

import contextlib
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

import lowrank_optax as lro
from examples.llama import optimizers
from examples.llama.activations import ACTIVATIONS
from examples.llama.config import Resolved, UsageError
from examples.llama.estimate import Parts, Topology
from examples.llama.mesh import batch_sharding, constrained, param_shardings
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.plan_layers import plan_from_shapes, wrap_with
from examples.llama.step import make_steps
from lowrank_optax import activations

# The compiler must look neither for a TPU nor for another process that has one.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_MIN_LOG_LEVEL": "3",
}
MIB = 2**20


class Compiled(NamedTuple):
    """The compiler's account, for one device; `program` is what `compile` returned."""

    audit: activations.Audit
    program_bytes: int
    seconds: float
    program: Any

    @property
    def total(self) -> int:
        """Arguments, results that reuse none of them, and temporaries."""
        return self.audit.total_bytes


def find_devices(topology: Topology) -> Any:
    """The devices of a topology that need not be there."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(RuntimeError):  # a backend is there already
        jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name
        )
    except Exception as error:
        raise UsageError(
            f"no TPU compiler for {topology.name}: it is in the package libtpu (pip "
            f"install '.[tpu]') and knows TPUs only; it said: {error}"
        ) from error
    return found.devices


def compile_step(
    config: Resolved, model: ModelConfig, topology: Topology, sizes: dict[str, int]
) -> Compiled:
    """Compiles the trainer's step for a mesh on the topology."""
    mesh = jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=find_devices(topology),
    )
    step, arguments = traced(config, model, mesh)
    started = time.perf_counter()
    program = step.lower(*arguments).compile()
    seconds = time.perf_counter() - started
    memory: Any = program.memory_analysis()
    return Compiled(
        activations.audit(program),
        memory.generated_code_size_in_bytes,
        seconds,
        program,
    )


def traced(config: Resolved, model: ModelConfig, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted step and the shapes of its arguments, laid out on the mesh."""
    definition, params = abstract_model(model)
    tx = optimizers.guarded(config, optimizers.build_optimizer(config))
    shardings = param_shardings(mesh, params)
    layout = lro.state_shardings(tx, params, shardings)
    policy = ACTIVATIONS[config.activation_policy]
    if config.activation_budget:
        policy = wrap_with(plan_from_shapes(config, model))
    on_mesh = constrained(mesh)

    def wrap(layer: Any) -> Any:
        return on_mesh(layer if policy is None else policy(layer))

    def train(params: Any, state: Any, batch: Any) -> Any:
        params, state, metrics = make_steps(definition, tx, wrap_layer=wrap).train(
            params, state, batch
        )
        return params, state, metrics["loss"]

    step = jax.jit(
        train, donate_argnums=(0, 1), out_shardings=(shardings, layout, None)
    )
    rows = config.batch_size // config.micro_batches
    shape = (config.micro_batches, rows, config.seq_len)
    kinds = {"tokens": jnp.int32, "targets": jnp.int32, "mask": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
    arguments = (params, jax.eval_shape(tx.init, params), batch)
    layouts = (shardings, layout, dict.fromkeys(batch, batch_sharding(mesh)))
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        arguments,
        layouts,
    )
    return step, placed


def compared(parts: Parts, compiled: Compiled) -> str:
    """The compiler's account beside the estimate."""
    audit = compiled.audit
    rows = [
        ("arguments", audit.argument_bytes, parts.parameters + parts.state),
        ("temporaries", audit.temp_bytes, parts.temporaries),
        ("together", compiled.total, parts.total),
    ]
    lines = [f"compiled in {compiled.seconds:.0f} s, for one device:"]
    for name, found, expected in rows:
        off = 100 * (expected / max(found, 1) - 1)
        lines.append(
            f"  {name:<14} {found / MIB:>12,.1f} MiB, the estimate {off:+.1f} %"
        )
    lines.append(f"  {'program':<14} {compiled.program_bytes / MIB:>12,.1f} MiB")
    return "\n".join(lines)
