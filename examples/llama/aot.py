"""A training step compiled by the TPU's own compiler; no TPU is needed, none runs."""

import importlib.util
import os
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks._collectives import Collective, collectives
from examples.llama.activations import Wrap
from examples.llama.config import Resolved, UsageError
from examples.llama.mesh import batch_sharding
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.placement import Placement
from examples.llama.step import MODEL, OPTIMIZER, make_steps
from examples.llama.weights import WEIGHTS
from lowrank_optax import activations

# The compiler must look neither for a TPU nor for another process that has one.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_MIN_LOG_LEVEL": "3",
}
_TOO_LARGE = re.compile(
    r"(?:Used|required|allocate)\D{0,20}([\d.]+[KMGT]) of ([\d.]+[KMGT])"
)


class Compiled(NamedTuple):
    """The compiler's account, for one device."""

    audit: activations.Audit
    program_bytes: int
    seconds: float
    collectives: list[Collective]
    text: str

    @property
    def total(self) -> int:
        """Arguments, results that reuse none of them, and temporaries."""
        return self.audit.total_bytes


def find_devices(topology: str) -> Any:
    """The devices of a TPU slice that need not be there."""
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "--compile needs the TPU's compiler, the package libtpu: pip install "
            "'.[tpu]'; the estimate works without it"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        said = str(error).splitlines()[0][:300]
        raise UsageError(
            f"the TPU's compiler does not make a slice of {topology}: {said}"
        ) from error
    return found.devices


def compile_step(
    config: Resolved,
    model: ModelConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    wrap_layer: Wrap | None,
) -> Compiled:
    """Compiles the step that the trainer runs on this mesh."""
    definition, params = abstract_model(model)
    weights = WEIGHTS[config.weights](config.param_dtype)
    layout = Placement(mesh, None).layout(params, tx, weights)
    step: Any = make_steps(definition, tx, weights, wrap_layer, layout).train
    stored = jax.eval_shape(weights.store, params)
    state = jax.eval_shape(tx.init, params)
    rows = config.batch_size // config.micro_batches
    shape = (config.micro_batches, rows, config.seq_len)
    types = {"tokens": jnp.int32, "targets": jnp.int32, "mask": jnp.float32}
    cut = batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=cut)
        for name, dtype in types.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.rest)
    arguments = placed(stored, layout.stored), placed(state, layout.state), batch, key
    return compiled(step.lower(*arguments))


def placed(shapes: Any, shardings: Any) -> Any:
    """The same shapes, laid out."""

    def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)


def compiled(lowered: Any) -> Compiled:
    """Compiles, and reads what the compiler says."""
    started = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - started
    text = program.as_text() or ""
    return Compiled(
        activations.audit(program),
        program.memory_analysis().generated_code_size_in_bytes,
        seconds,
        collectives(text),
        text,
    )


def sent(items: list[Collective], owner: str) -> dict[str, tuple[int, int]]:
    """Number and bytes of the collectives of a part of the step, by operation.

    Those of a refresh, which stand in branches, are apart. What the compiler does not
    tell the origin of counts as the model's.
    """
    sums: dict[str, tuple[int, int]] = {}
    for item in items:
        whose = OPTIMIZER if f"/{OPTIMIZER}/" in item.scope else MODEL
        if whose == owner:
            name = item.op + " (refresh)" * item.conditional
            count, total = sums.get(name, (0, 0))
            sums[name] = count + item.times, total + item.total
    return sums
