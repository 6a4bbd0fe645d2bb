"""Where all of a run lies: parameters, state and batches, on one device or a mesh."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import lowrank_optax as lro
from examples.llama.config import Resolved
from examples.llama.mesh import (
    ROWS,
    batch_sharding,
    check_copies,
    check_rows,
    constrained,
    cut_heads,
    gathered,
    make_mesh,
    param_shardings,
    parse_mesh,
)
from examples.llama.model import ModelConfig, init_params
from examples.llama.presets import PRESETS
from examples.llama.step import Layout
from examples.llama.weights import Weights

PADDING = {"tpu"}  # platforms whose arrays are padded to tiles


@dataclasses.dataclass(frozen=True)
class Placement:
    """One device, or a mesh of several."""

    mesh: Mesh | None
    device: Any

    @property
    def name(self) -> str:
        """As `--mesh` takes it."""
        shape = {} if self.mesh is None else self.mesh.shape
        return ",".join(f"{axis}={size}" for axis, size in shape.items())

    def params(self, params: Any) -> Any:
        """A sharding for every parameter."""
        if self.mesh is None:
            return jax.tree.map(lambda leaf: SingleDeviceSharding(self.device), params)
        return param_shardings(self.mesh, params)

    def layout(
        self, params: Any, tx: optax.GradientTransformation, weights: Weights
    ) -> Layout:
        """Shardings of all that a step keeps; `params` are arrays or shapes."""
        stored = jax.eval_shape(weights.store, params)
        place = self.params(params)
        if self.mesh is None:
            one = SingleDeviceSharding(self.device)
            state = jax.eval_shape(tx.init, params)
            stored, state = jax.tree.map(lambda leaf: one, (stored, state))
            return Layout(params=place, stored=stored, state=state, rest=one)
        return Layout(
            params=place,
            stored=jax.tree.map(stored_shardings, place, params, stored),
            state=lro.state_shardings(tx, params, place),
            rest=NamedSharding(self.mesh, PartitionSpec()),
            wrap=constrained(self.mesh),
            use=gathered(self.mesh),
            mesh=self.mesh,
        )

    def batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`[micro-batches, rows, positions]` leaves, each device with its rows."""
        if self.mesh is None:
            return batch
        return _cut(batch, batch_sharding(self.mesh))

    def rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`[rows, positions]` leaves; rows that the mask leaves out make them even."""
        if self.mesh is None:
            return batch
        parts = math.prod(self.mesh.shape[axis] for axis in ROWS)

        def fill(x: np.ndarray) -> np.ndarray:
            return np.pad(x, ((0, -len(x) % parts), (0, 0)))

        sharding = NamedSharding(self.mesh, PartitionSpec(ROWS))
        return _cut({name: fill(x) for name, x in batch.items()}, sharding)


def _cut(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, Any]:
    """Every process holds the whole batch and gives its devices their part."""
    return {
        name: jax.make_array_from_callback(x.shape, sharding, lambda at, x=x: x[at])
        for name, x in batch.items()
    }


def layers_outermost(
    layout: Layout, tx: optax.GradientTransformation, weights: Weights, params: Any
) -> Layout:
    """The same, with every layer of a stack in one piece where that is not a given.

    A TPU pads the last two axes, and its compiler may lay layers inside to pad less.
    """
    shapes = jax.eval_shape(weights.store, params), jax.eval_shape(tx.init, params)
    if {device.platform for device in layout.rest.device_set} <= PADDING:
        stored, state = lro.layerwise.formats(shapes, (layout.stored, layout.state))
        return layout._replace(stored=stored, state=state)
    return layout


def laid_out(tree: Any, places: Any) -> Any:
    """Moves arrays to their layouts, one after another; the old ones are deleted."""

    def move(x: Any, place: Any) -> Any:
        if not isinstance(place, Format) or _order(x.format) == _order(place):
            return x
        moved = jax.block_until_ready(jax.jit(lambda x: x, out_shardings=place)(x))
        x.delete()
        return moved

    return jax.tree.map(move, tree, places)


def _order(format: Format) -> Any:
    layout: Any = format.layout
    return layout.major_to_minor


def stored_shardings(place: NamedSharding, param: Any, stored: Any) -> Any:
    """Of what is stored for a parameter, codes and scales: axes as long as its own are
    cut as its own."""

    def of(leaf: Any) -> NamedSharding:
        names = [*place.spec, *[None] * (len(param.shape) - len(place.spec))]
        axes = zip(names, param.shape, leaf.shape, strict=False)
        kept = [name if size == own else None for name, own, size in axes]
        spec = (
            PartitionSpec(*kept) if leaf.ndim == len(param.shape) else PartitionSpec()
        )
        return NamedSharding(place.mesh, spec)

    return jax.tree.map(of, stored)


def choose_placement(
    config: Resolved, devices: Sequence[Any] | None = None
) -> Placement:
    """The mesh that `--mesh` names; else all devices on fsdp, where rows allow it.

    `--compressed` needs the axis data, and has all devices there if nothing is said.

    Raises:
        UsageError: the mesh does not fit the devices, or the rows do not fit the mesh.
    """
    devices = list(jax.devices() if devices is None else devices)
    rows = config.batch_size // config.micro_batches
    one_device = Placement(None, devices[0])
    free = not config.mesh and not config.compressed and jax.process_count() == 1
    if free and rows % len(devices):
        print(
            f"one of {len(devices)} devices is used: {rows} rows of a micro-batch "
            f"cannot be cut over all; a --batch-size or --mesh that fits uses more",
            flush=True,
        )
        return one_device
    default = "data=-1" if config.compressed else "fsdp=-1"
    sizes = parse_mesh(config.mesh or default, len(devices))
    if config.compressed:
        check_copies(sizes)
    if math.prod(sizes.values()) == 1:
        return one_device
    mesh = make_mesh(sizes, devices)
    check_rows(mesh, rows)
    for line in cut_heads(mesh, PRESETS[config.preset].model.heads):
        print(line, flush=True)
    return Placement(mesh, devices[0])


def fresh_state(
    layout: Layout,
    model: ModelConfig,
    seed: int,
    tx: optax.GradientTransformation,
    weights: Weights,
) -> tuple[Any, Any]:
    """Stored parameters and optimizer state, each made where it lies."""

    def draw() -> Any:
        return init_params(model, seed)

    params = jax.jit(draw, out_shardings=layout.params)()
    params = jax.jit(weights.store, out_shardings=layout.stored)(params)

    def init(stored: Any) -> Any:
        return tx.init(weights.load(stored))

    return params, jax.jit(init, out_shardings=layout.state)(params)
