"""`Placement` says where all of a run lies: parameters, state, batches and activations.

That is one device or a mesh of several. Every axis of a parameter has a logical name,
and a rule says which axis of the mesh cuts axes of that name. An axis that its mesh
axis does not divide stays whole. All rules are in this file.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

import lowrank_optax as lro
from examples.llama.config import Resolved, UsageError
from examples.llama.model import ModelConfig, Params, Wrap, init_params
from examples.llama.step import Layout

# data: whole copies; fsdp: parameters and state cut, gathered for use; tensor: products
# cut. Rows of a batch are cut over the first two.
AXES: tuple[str, ...] = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Logical axis -> axis of the mesh.
RULES: dict[str, str | None] = {
    "layers": None,
    "width": "fsdp",
    "heads": "tensor",
    "ff_width": "tensor",
    "vocabulary": "tensor",
    "gain": None,
    "rows": None,
    "rank": None,
}

# Pattern of a parameter's path -> logical names of its axes.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    r"embed/embedding": ("vocabulary", "width"),
    r"layers/attn/[qkv]/kernel": ("layers", "width", "heads"),
    r"layers/attn/[qkv]/bias": ("layers", "heads"),
    r"layers/attn/o/kernel": ("layers", "heads", "width"),
    r"layers/attn/o/bias": ("layers", "gain"),
    r"layers/attn/[qk]_norm/scale": ("layers", "gain"),
    r"layers/mlp/(gate|up)/kernel": ("layers", "width", "ff_width"),
    r"layers/mlp/up/bias": ("layers", "ff_width"),
    r"layers/mlp/down/kernel": ("layers", "ff_width", "width"),
    r"layers/mlp/down/bias": ("layers", "gain"),
    r"layers/norm[12]/(scale|bias)": ("layers", "gain"),
    r"norm/(scale|bias)": ("gain",),
    r"lm_head/kernel": ("width", "vocabulary"),
    # Of the encoder: its other tables, and what reads its result.
    r"(positions|types)/embedding": ("rows", "width"),
    r"(pooler|mlm/dense)/kernel": ("width", "gain"),
    r"(pooler|mlm/dense)/bias": ("gain",),
    r"mlm/norm/(scale|bias)": ("gain",),
    r"mlm/bias": ("vocabulary",),
    # Of a classifier.
    r"classifier/kernel": ("width", "gain"),
    r"classifier/bias": ("gain",),
}


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """Sizes of the mesh's axes: "data=2,fsdp=-1" is fsdp=4, tensor=1 on 8 devices."""
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, re.split(r"[,\s]+", text)):
        match = re.fullmatch(r"(\w+)=(-1|[1-9]\d*)", part)
        if match is None or match[1] not in AXES:
            raise UsageError(
                f"--mesh takes sizes of {', '.join(AXES)}, such as data=2,fsdp=4 or "
                f"fsdp=-1 for all that is left; got {part!r}"
            )
        sizes[match[1]] = int(match[2])
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UsageError(
            f"--mesh may leave one axis open (-1), not {' and '.join(open_axes)}"
        )
    given = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % given == 0:
        sizes[open_axes[0]] = devices // given
    elif open_axes or given != devices:
        raise UsageError(
            f"--mesh {text} names {given} devices{' or a multiple' * bool(open_axes)}, "
            f"and there are {devices}; for example {_nearest(sizes, devices)}"
        )
    return sizes


def _nearest(sizes: dict[str, int], devices: int) -> str:
    """The same mesh cut down to divisors of the devices, the rest on fsdp."""
    left, found = devices, {}
    for name in ("tensor", "data"):
        found[name] = math.gcd(max(sizes[name], 1), left)
        left //= found[name]
    return f"data={found['data']},fsdp={left},tensor={found['tensor']}"


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh whose layout the compiler chooses (Auto), neighbours on fast links."""
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices,
    )


def logical_axes(path: str) -> tuple[str, ...]:
    """The names of a parameter's axes; the path's keys are joined by "/"."""
    # An adapter stands around a layer, and has two factors beside its kernel.
    own = re.sub(r"/(base/)?(kernel|bias|lora_[ab])$", _own_name, path)
    for pattern, names in LOGICAL_AXES.items():
        if re.fullmatch(pattern, own):
            factors = {
                "lora_a": (*names[:-1], "rank"),
                "lora_b": (*names[:-2], "rank", names[-1]),
            }
            return factors.get(path.rpartition("/")[2], names)
    raise ValueError(f"LOGICAL_AXES in {__name__} has no pattern for {path!r}.")


def _own_name(found: re.Match[str]) -> str:
    return "/kernel" if found[2].startswith("lora_") else f"/{found[2]}"


def param_shardings(mesh: Mesh | AbstractMesh, params: Any) -> Any:
    """A sharding for every parameter, of arrays or of shapes."""

    def place(keys: Any, leaf: Any) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        axes = [RULES[name] for name in logical_axes(path)]
        spec = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, params)


def whole_axes(mesh: Mesh, params: Any) -> list[str]:
    """Says of every axis that a rule would cut and its mesh axis does not divide."""
    lines = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        for name, size in zip(logical_axes(path), leaf.shape, strict=True):
            axis = RULES[name]
            if axis and size % mesh.shape[axis]:
                lines.append(
                    f"{path} {leaf.shape}: {name} stays whole, {axis}="
                    f"{mesh.shape[axis]} does not divide {size}"
                )
    return lines


def cut_heads(mesh: Mesh, heads: int) -> list[str]:
    """Says so where the mesh cuts inside of heads."""
    parts = mesh.shape["tensor"]
    if heads % parts == 0:
        return []
    return [
        f"tensor={parts} does not divide {heads} heads: every layer's attention sends "
        f"parts of them between devices; tensor={math.gcd(heads, parts)} keeps them "
        "whole"
    ]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch `[micro-batches, rows, positions]`: its rows."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS))


def check_rows(mesh: Mesh, rows: int) -> None:
    """Raises if the rows of a micro-batch cannot be cut evenly."""
    parts = math.prod(mesh.shape[axis] for axis in ROWS)
    if rows % parts:
        least = -(-rows // parts) * parts
        raise UsageError(
            f"{rows} rows of a micro-batch cannot be cut over data x fsdp = {parts} "
            f"devices; the nearest --batch-size gives {least} rows each"
        )


def _constrain(x: Any, mesh: Mesh, axes: tuple[str, ...]) -> Any:
    """Cuts the first axis over axes of the mesh, and no other.

    Inside `jax.shard_map` some axes of the mesh are cut already, by hand; only what is
    left to the compiler can be asked of it.
    """
    here = jax.sharding.get_abstract_mesh()
    left = tuple(name for name in axes if name not in here.manual_axes)
    place = NamedSharding(here if here.manual_axes else mesh, PartitionSpec(left))
    return jax.lax.with_sharding_constraint(x, place)


def check_copies(sizes: dict[str, int]) -> None:
    """Raises if no copies of the parameters send gradients to each other."""
    devices = math.prod(sizes.values())
    if sizes["data"] == 1:
        if devices == 1:
            raise UsageError(
                "--compressed sends projections to other devices, and there is one; "
                "leave it out"
            )
        least = next(n for n in range(2, devices + 1) if devices % n == 0)
        raise UsageError(
            "--compressed sends projections over the axis data, which is 1; "
            f"for example --mesh data={least},fsdp={devices // least}"
        )


def gathered(mesh: Mesh) -> Callable[[Any], Any]:
    """For parameters about to be used: the embedding is whole along its width.

    A lookup in a table that is cut along it would replicate what is looked up, on its
    way to being cut along rows.
    """

    def use(params: Any) -> Any:
        if "embed" not in params:  # among those that are not trained, or none
            return params
        table = params["embed"]["embedding"]
        (axis, *_) = param_shardings(mesh, params)["embed"]["embedding"].spec
        axes = (axis,) if axis else ()
        return params | {"embed": {"embedding": _constrain(table, mesh, axes)}}

    return use


def constrained(mesh: Mesh) -> Wrap:
    """Wraps a scanned layer: activations are cut along their rows and nothing else."""

    def wrap(layer: Callable) -> Callable:
        def on_mesh(x: Any, params: Any) -> Any:
            x, out = layer(_constrain(x, mesh, ROWS), params)
            return _constrain(x, mesh, ROWS), out

        return on_mesh

    return wrap


@dataclasses.dataclass(frozen=True)
class Placement:
    """One device, or a mesh of several."""

    mesh: Mesh | None
    device: Any
    state_memory: str = "device"

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
        self, params: Any, tx: optax.GradientTransformation, weights: lro.WeightStorage
    ) -> Layout:
        """Shardings of all that a step keeps; `params` are arrays or shapes."""
        layout = self._on_devices(params, tx, weights)
        if self.state_memory == "device":
            return layout
        # A state follows its parameters into their memory, and counters stay.
        mesh = self.mesh or make_mesh(dict.fromkeys(AXES, 1), [self.device])
        near = param_shardings(mesh, params)
        far = jax.tree.map(lambda x: x.with_memory_kind(self.state_memory), near)
        near, far = (lro.state_shardings(tx, params, each) for each in (near, far))
        return layout._replace(state=far, near=near)

    def _on_devices(
        self, params: Any, tx: optax.GradientTransformation, weights: lro.WeightStorage
    ) -> Layout:
        stored = jax.eval_shape(weights.store, params)
        place = self.params(params)
        if self.mesh is None:
            one = SingleDeviceSharding(self.device)
            state = jax.eval_shape(tx.init, params)
            stored, state = jax.tree.map(lambda leaf: one, (stored, state))
            return Layout(params=place, stored=stored, state=state, rest=one)
        return Layout(
            params=place,
            stored=lro.weight_shardings(stored, params, place),
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
    memory = config.state_memory
    check_memory(memory, devices[0])
    one_device = Placement(None, devices[0], memory)
    # Only a run of one process may leave devices unused.
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
    for line in cut_heads(mesh, config.key_heads):
        print(line, flush=True)
    return Placement(mesh, devices[0], memory)


def check_memory(kind: str, device: Any) -> None:
    """Raises if a device cannot keep anything in such a memory."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in ("device", *kinds):
        raise UsageError(
            f"--state-memory {kind}: device {device} reaches {', '.join(kinds)} alone; "
            "leave it out"
        )


def fresh_state(
    layout: Layout,
    model: ModelConfig,
    seed: int,
    tx: optax.GradientTransformation,
    weights: lro.WeightStorage,
) -> tuple[Any, Any]:
    """Stored parameters and optimizer state, each made where it lies."""
    return started(layout, drawn(model, seed, layout.params), tx, weights)


def drawn(model: ModelConfig, seed: int, places: Any) -> Params:
    """Random parameters, made where they lie."""
    return jax.jit(lambda: init_params(model, seed), out_shardings=places)()


def started(
    layout: Layout,
    params: Params,
    tx: optax.GradientTransformation,
    weights: lro.WeightStorage,
) -> tuple[Any, Any]:
    """The parameters as they are stored, and the optimizer's first state for them."""
    params = jax.jit(weights.store, out_shardings=layout.stored)(params)

    def init(stored: Any) -> Any:
        return tx.init(weights.load(stored))

    return params, jax.jit(init, out_shardings=layout.state)(params)
