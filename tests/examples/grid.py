"""A small model trained for 20 steps on one device, and on meshes of both types."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from examples.llama import optimizers
from examples.llama.batches import as_batch
from examples.llama.config import TrainConfig, resolve
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.placement import Placement, fresh_state, make_mesh, parse_mesh
from examples.llama.step import (
    PLAIN,
    Layout,
    make_steps,
    mean_gradient,
    split_rows,
)

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


def run(
    step: Any, placement: Placement, layout: Layout, tx: Any, backwards: bool = False
) -> np.ndarray:
    """The losses of all steps."""
    params, state = fresh_state(layout, MODEL, 0, tx, PLAIN)
    losses = []
    for batch in batches():
        if backwards:
            batch = {name: x[:, ::-1] for name, x in batch.items()}
        params, state, metrics = step(params, state, placement.batch(batch))
        losses.append(metrics["loss"])
    return np.array(losses)


def laid_out(method: str, mesh: Any) -> tuple[Any, Placement, Layout, Any]:
    """The model's definition, where all lies, and the optimizer."""
    definition, shapes = abstract_model(MODEL)
    placement = Placement(mesh, jax.devices()[0])
    tx = make_optimizer(method, placement.params(shapes) if mesh else None)
    return definition, placement, placement.layout(shapes, tx, PLAIN), tx


@functools.cache
def run_on_one(method: str, backwards: bool = False) -> np.ndarray:
    """On one device, with the rows of every batch in their order or backwards."""
    definition, *rest = laid_out(method, None)
    return run(make_steps(definition, rest[-1]).train, *rest, backwards)


def run_on_auto(method: str, sizes: dict[str, int], devices: Any) -> np.ndarray:
    """The trainer's own step."""
    definition, placement, layout, tx = laid_out(method, make_mesh(sizes, devices))
    steps = make_steps(definition, tx, layout=layout)
    return run(steps.train, placement, layout, tx)


def run_on_explicit(method: str, sizes: dict[str, int], devices: Any) -> np.ndarray:
    """The model leaves layouts to the compiler; the optimizer sees explicit types."""
    types = (AxisType.Explicit,) * len(sizes)
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices
    )
    definition, placement, layout, tx = laid_out(method, mesh)
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


def run_on(kind: str, method: str, sizes: str, devices: int) -> np.ndarray:
    """The losses on a mesh of either kind, of the first devices."""
    make = {"auto": run_on_auto, "explicit": run_on_explicit}[kind]
    return make(method, parse_mesh(sizes, devices), jax.devices()[:devices])
