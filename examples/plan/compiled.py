"""`compile_step` has the TPU's own compiler make a training step; nothing runs."""

import importlib.util
import time
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

import lowrank_optax as lro
from examples.llama import optimizers
from examples.llama.budget import of_one_device, plan_from_shapes, wrap_with
from examples.llama.choose_steps import layers_outermost, steps_by_layers
from examples.llama.config import Resolved, UsageError
from examples.llama.model import ACTIVATIONS, ModelConfig, Wrap, abstract_model
from examples.llama.placement import (
    Placement,
    batch_sharding,
    make_mesh,
    param_shardings,
)
from examples.llama.step import MODEL, OPTIMIZER, abstract_batch, make_steps
from examples.plan.estimate import Parts
from lowrank_optax import activations

MIB = 2**20


class NoRoom(Exception):
    """The compiler finds no room on a device."""


class Compiled(NamedTuple):
    """The compiler's account, for one device."""

    audit: activations.Audit
    program_bytes: int
    seconds: float
    cpu_seconds: float
    collectives: list[lro.Collective]
    text: str

    @property
    def total(self) -> int:
        """Arguments, results that reuse none of them, and temporaries."""
        return self.audit.total_bytes


def require_compiler(topology: lro.Topology) -> None:
    """Raises if there is no compiler for these devices."""
    if not topology.is_tpu:
        raise UsageError(
            f"--compile has the TPU's compiler alone; {topology.name} is no TPU, so "
            "there is only the estimate"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            "--compile needs the TPU's compiler, the package libtpu: pip install "
            "'.[tpu]'; the estimate works without it"
        )


def compile_step(
    config: Resolved,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    wrap_layer: Wrap | None,
) -> Compiled:
    """Compiles the step that the trainer runs on this mesh.

    `optimizer` comes without clipping and guard: how a step has both is its own.
    """
    tx = optimizers.guarded(config, optimizer)
    definition, params = abstract_model(model)
    weights = lro.weight_storage(config.weights, config.param_dtype, layer_axis=0)
    layout = Placement(mesh, None).layout(params, tx, weights)
    if config.layerwise:
        layout = layers_outermost(layout, tx, weights, params)
        steps = steps_by_layers(config, model, optimizer, wrap_layer, layout)
        step: Any = steps.train
    else:
        step = make_steps(definition, tx, weights, wrap_layer, layout).train
    stored = jax.eval_shape(weights.store, params)
    state = jax.eval_shape(tx.init, params)
    batch = abstract_batch(config, batch_sharding(mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.rest)
    # Shapes with shardings are enough to compile for devices that are not there.
    arguments = placed(stored, layout.stored), placed(state, layout.state), batch, key
    return compiled(step.lower(*arguments))


def compile_run(run: Any) -> Compiled:
    """Compiles what `plan.py` planned."""
    try:
        mesh = make_mesh(run.sizes, lro.topology_devices(run.topology))
    except ValueError as error:  # the compiler makes no such slice
        raise UsageError(str(error)) from error
    config = run.config
    policy = ACTIVATIONS[config.activation_policy]
    if config.activation_budget:
        # The planner counts the rows of one device, as it does in the trainer.
        one = of_one_device(config, run.sizes)
        policy = wrap_with(plan_from_shapes(one, run.model, run.topology.chip))
    return compile_step(config, run.model, run.optimizer, mesh, policy)


def beside(parts: Parts, found: Compiled) -> str:
    """The compiler's account, and how far the estimate is from it."""
    rows = [
        ("arguments", found.audit.argument_bytes, parts.parameters + parts.state),
        ("temporaries", found.audit.temp_bytes, parts.temporaries),
        ("together", found.total, parts.total),
    ]
    lines = [
        f"compiled in {found.seconds:.0f} s ({found.cpu_seconds:.0f} s of a CPU), for "
        "one device:"
    ]
    for name, size, expected in rows:
        off = 100 * (expected / max(size, 1) - 1)
        lines.append(
            f"  {name:<14} {size / MIB:>12,.1f} MiB, the estimate {off:+.1f} %"
        )
    lines.append(f"  {'program':<14} {found.program_bytes / MIB:>12,.1f} MiB")
    # The guard against gradients that are not finite is a branch around the optimizer.
    for owner in (MODEL, OPTIMIZER):
        sums = sent(found.collectives, owner, int(owner == OPTIMIZER))
        text = "; ".join(
            f"{count} {op}, {size / MIB:,.1f} MiB"
            for op, (count, size) in sorted(sums.items())
        )
        lines.append(f"  sent by the {owner}: {text or 'nothing'}")
    return "\n".join(lines)


def compile_update(
    model: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> Compiled:
    """Compiles the optimizer's part alone: update, and sum with the parameters."""
    _, params = abstract_model(model)
    shardings = param_shardings(mesh, params)
    layout = lro.state_shardings(tx, params, shardings)

    def update(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(update, donate_argnums=(1, 2), out_shardings=(shardings, layout))
    weights = placed(params, shardings)
    state = placed(jax.eval_shape(tx.init, params), layout)
    return compiled(step.lower(weights, state, weights))


def placed(shapes: Any, shardings: Any) -> Any:
    """The same shapes, laid out."""

    def place(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)


def compiled(lowered: Any) -> Compiled:
    """Compiles, and reads what the compiler says."""
    # On a busy host the seconds of the CPU say more than those of the clock.
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # So the compiler says that a device has no room; all else is a real error.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0][:300]
        raise NoRoom(f"the TPU's compiler finds no room for it: {said}") from error
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    text = program.as_text() or ""
    return Compiled(
        activations.audit(program),
        program.memory_analysis().generated_code_size_in_bytes,
        wall,
        cpu,
        lro.collectives(text),
        text,
    )


def sent(
    items: list[lro.Collective], owner: str, around: int = 0
) -> dict[str, tuple[int, int]]:
    """Number and bytes of the collectives of a part of the step, by operation.

    Those of a refresh, which few steps run, stand in branches and are apart; `around`
    counts the branches in which all of the part stands. What moves a stored parameter
    is the model's; what the compiler tells nothing of is the optimizer's if it stands
    in a branch, of which the model has none.
    """
    sums: dict[str, tuple[int, int]] = {}
    for item in items:
        named = f"/{OPTIMIZER}/" in item.scope or item.scope.startswith("opt_state")
        its = named or (not item.scope and item.conditional)
        if (OPTIMIZER if its else MODEL) == owner:
            name = item.op + " (refresh)" * (item.branches > around)
            count, total = sums.get(name, (0, 0))
            sums[name] = count + item.times, total + item.total
    return sums
