"""A small model trained for 20 steps on one device, and on meshes of both types."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from examples.llama import optimizers
from examples.llama.batches import as_batch
from examples.llama.config import TrainConfig, resolve
from examples.llama.mesh import make_mesh, parse_mesh
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.placement import Placement, fresh_state
from examples.llama.step import Layout, make_steps, mean_gradient, split_rows
from examples.llama.weights import PLAIN

STEPS = 20
METHODS = ("adamw", "galore", "subtrack", "gwt", "galore_8bit")
# 341 stands for 5461, the width of LLaMA-1B's layers: odd, so that no axis cuts it.
MODEL = ModelConfig(vocab_size=264, width=64, ff_width=341, layers=2, heads=2)
RECIPE = {"rank": 16, "update_proj_gap": 6, "warmup": 2, "lr": 0.01, "steps": STEPS}


@functools.cache
def batches() -> tuple[Any, ...]:
    """Rows of varied text, a batch a step: no gradient is zero but for its rounding."""
    draw = np.random.default_rng(0)

    def batch() -> Any:
        lengths = draw.integers(3, 18, 8)
        rows = [draw.integers(0, MODEL.vocab_size, n).tolist() for n in lengths]
        return split_rows(as_batch(rows, 8, 16), 1)

    found = [batch() for _ in range(4)]
    return tuple(found[step % 4] for step in range(STEPS))


def make_optimizer(method: str, shardings: Any = None) -> Any:
    flags = TrainConfig(preset="tiny", optimizer=method, **RECIPE)
    config, _ = resolve(flags)
    return optimizers.guarded(config, optimizers.build_optimizer(config, shardings))


def run(step: Any, placement: Placement, layout: Layout, tx: Any) -> tuple[Any, Any]:
    """The losses of all steps, and the last state."""
    params, state = fresh_state(layout, MODEL, 0, tx, PLAIN)
    losses = []
    for batch in batches():
        params, state, metrics = step(params, state, placement.batch(batch))
        losses.append(metrics["loss"])
    return np.array(losses), (params, state)


@functools.cache
def on_one_device(method: str) -> tuple[Any, Any]:
    definition, shapes = abstract_model(MODEL)
    placement, tx = Placement(None, jax.devices()[0]), make_optimizer(method)
    layout = placement.layout(shapes, tx, PLAIN)
    return run(make_steps(definition, tx).train, placement, layout, tx)


def on_auto_mesh(method: str, sizes: str, devices: int) -> tuple[Any, Any]:
    """The trainer's own step."""
    definition, shapes = abstract_model(MODEL)
    mesh = make_mesh(parse_mesh(sizes, devices), jax.devices()[:devices])
    placement = Placement(mesh, jax.devices()[0])
    tx = make_optimizer(method, placement.params(shapes))
    layout = placement.layout(shapes, tx, PLAIN)
    steps = make_steps(definition, tx, layout=layout)
    return run(steps.train, placement, layout, tx)


def on_explicit_mesh(method: str, sizes: str, devices: int) -> tuple[Any, Any]:
    """The model leaves layouts to the compiler; the optimizer sees explicit types."""
    definition, shapes = abstract_model(MODEL)
    axes = parse_mesh(sizes, devices)
    mesh = jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Explicit,) * len(axes),
        devices=jax.devices()[:devices],
    )
    placement = Placement(mesh, jax.devices()[0])
    tx = make_optimizer(method, placement.params(shapes))
    layout = placement.layout(shapes, tx, PLAIN)
    gradient = jax.sharding.auto_axes(
        functools.partial(mean_gradient, definition),
        out_sharding=(layout.rest, layout.params),
    )

    def step(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return PLAIN.apply(params, updates, None), state, {"loss": loss}

    out = layout.stored, layout.state, layout.rest
    with jax.set_mesh(mesh):
        return run(jax.jit(step, out_shardings=out), placement, layout, tx)


MESHES = {"auto": on_auto_mesh, "explicit": on_explicit_mesh}


def deviation(kind: str, method: str, sizes: str, devices: int) -> float:
    """The largest relative difference between losses, of all steps."""
    expected, _ = on_one_device(method)
    found, _ = MESHES[kind](method, sizes, devices)
    return float(np.max(np.abs(found - expected) / expected))
