"""What a training step takes per device, from shapes alone: nothing is allocated."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType

import lowrank_optax as lro
from examples.llama.activations import PRODUCTS
from examples.llama.config import Resolved, UsageError
from examples.llama.mesh import param_shardings
from examples.llama.model import ModelConfig, abstract_model, count_params
from examples.llama.optimizers import tree_bytes
from examples.llama.plan_layers import find_layers, of_one_device, plan_from_shapes
from lowrank_optax import activations


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
      name: as it was given, such as "v5e:16x16" or "h100:8".
      profile: the planner's name of the chip.
      devices: how many JAX sees.
      memory_bytes: of one device.
    """

    name: str
    profile: str
    devices: int
    memory_bytes: int


# Extents of slices; of v4 and v5p any with three sizes.
_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
TPUS = {"v4": None, "v5e": _FLAT, "v5p": None, "v6e": _FLAT}
_GPUS = ("a100", "h100", "h200")


def parse_topology(text: str) -> Topology:
    """Reads "v5e:16x16": a TPU's name and its extent, or a GPU's and a number.

    JAX sees one device per chip, of a v4 too, whose two cores are one.
    """
    chip, _, extent = text.lower().partition(":")
    sizes = extent.split("x")
    good = all(size.isdecimal() and int(size) > 0 for size in sizes)
    if chip in _GPUS:
        good &= len(sizes) == 1
    elif chip in TPUS:
        known = TPUS[chip]
        good &= extent in known if known else len(sizes) == 3
    else:
        good = False
    if not good:
        raise UsageError(
            f"unknown topology {text!r}: expected v5e or v6e with an extent "
            f"({', '.join(_FLAT)}), such as v5e:16x16; v4 or v5p with three sizes, "
            f"such as v4:4x4x8; or a GPU ({', '.join(_GPUS)}) with a number, such as "
            "h100:8"
        )
    memory = activations.hardware_profile(chip).memory_bytes
    return Topology(text, chip, math.prod(map(int, sizes)), memory)


def larger(text: str) -> Iterator[str]:
    """Larger slices of the same chip, the nearest first."""
    chip, _, extent = text.lower().partition(":")
    if known := TPUS.get(chip):
        yield from (f"{chip}:{more}" for more in known[known.index(extent) + 1 :])
        return
    sizes = [*map(int, extent.split("x"))]
    for _ in range(5):
        sizes[sizes.index(min(sizes))] *= 2
        yield f"{chip}:{'x'.join(map(str, sorted(sizes)))}"


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh without devices: enough for shardings."""
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes on one device.

    Parameters and optimizer state are exact, the rest is an estimate. A step is fullest
    at the loss or in the backward pass of a layer; what the layers keep is there in
    both. Not counted is the optimizer's work space, which is needed later.

    Attributes:
      parameters: as they are stored.
      state: of the optimizer.
      sums: of the gradients of micro-batches, in float32; 0 where there is one.
      kept: by all layers for their backward pass, their inputs included.
      loss: logits as the head computes them and in float32, what enters the head, and
        its weights twice (whole, the second time on their way to the backward pass).
      gradients: of all parameters.
      working: the most that the backward pass of one layer holds at once.
      gathered: whole weights of two layers, one in use and one on its way.
    """

    parameters: int
    state: int
    sums: int
    kept: int
    loss: int
    gradients: int
    working: int
    gathered: int

    @property
    def temporaries(self) -> int:
        backward = self.gradients + self.working + self.gathered
        return self.sums + self.kept + max(self.loss, backward)

    @property
    def total(self) -> int:
        return self.parameters + self.state + self.temporaries


def shard_bytes(tree: Any, shardings: Any) -> int:
    """Bytes on one device of arrays, or shapes, that are laid out like this."""
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def state_bytes(tx: optax.GradientTransformation, params: Any, shardings: Any) -> int:
    """Bytes of the optimizer's state on one device, exactly."""
    layout = lro.state_shardings(tx, params, shardings)
    return shard_bytes(jax.eval_shape(tx.init, params), layout)


def estimate(
    config: Resolved,
    model: ModelConfig,
    tx: optax.GradientTransformation,
    sizes: dict[str, int],
    profile: str,
) -> Parts:
    """What a step of this configuration takes on a mesh of these sizes."""
    mesh = abstract_mesh(sizes)
    _, params = abstract_model(model)
    shardings = param_shardings(mesh, params)
    own = shard_bytes(params, shardings)
    one = of_one_device(config, sizes)
    whole, cut, working = _activations(one, model, profile)
    count = count_params(params)
    return Parts(
        parameters=own,
        state=state_bytes(tx, params, shardings),
        sums=4 * own * count // tree_bytes(params) if config.micro_batches > 1 else 0,
        kept=whole + cut // sizes["tensor"],
        loss=_loss(one, model, sizes),
        gradients=own,
        working=working // sizes["tensor"],
        gathered=_gathered(model, params, sizes),
    )


@functools.cache
def _activations(
    config: Resolved, model: ModelConfig, profile: str
) -> tuple[int, int, int]:
    """What all layers keep, whole or cut over `tensor`, and the working set of one.

    Inputs of layers and the like, as wide as the model, are whole.
    """
    if config.activation_budget:
        found = plan_from_shapes(config, model, profile).predicted
        return found.input_bytes, found.kept_bytes, found.working_bytes
    layers, count = find_layers(config, model), model.layers
    args = jax.eval_shape(layers.args, abstract_model(model)[1])
    policies = {
        "full": {},
        "names": dict.fromkeys(PRODUCTS, "save"),
        "adacc": activations.transformer_policy(),
    }
    policy = policies.get(config.activation_policy, {})
    found = activations.predict(layers.block, args, count, policy, hardware=profile)
    if config.activation_policy != "none":
        return found.input_bytes, found.kept_bytes, found.working_bytes
    # What reverse mode keeps by itself: the leaves of the function that it returns.
    own, x = args
    stack = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct((count, *p.shape), p.dtype), own
    )

    def run(stack: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, own: (layers.block(own, x), None), x, stack)[0]

    pulled = jax.eval_shape(lambda p, x: jax.vjp(run, p, x)[1], stack, x)
    kept = max(tree_bytes(pulled) - tree_bytes(stack), 0)
    wide = [leaf for leaf in jax.tree.leaves(pulled) if leaf.shape[1:] == x.shape]
    return tree_bytes(wide), kept - tree_bytes(wide), found.working_bytes


def _loss(config: Resolved, model: ModelConfig, sizes: dict[str, int]) -> int:
    each = jnp.dtype(model.compute_dtype).itemsize
    positions = config.batch_size * config.seq_len
    logits = (each + 4) * positions * model.vocab_size // sizes["tensor"]
    head = each * model.width * model.vocab_size // sizes["tensor"]
    return (
        logits + each * positions * model.width + (2 * head if sizes["fsdp"] > 1 else 0)
    )


def _gathered(model: ModelConfig, params: Any, sizes: dict[str, int]) -> int:
    """The weights of two layers (one in use, one on its way), whole."""
    if sizes["fsdp"] == 1:
        return 0
    dtype = jnp.dtype(model.compute_dtype)
    of_layer = sum(x.size for x in jax.tree.leaves(params["layers"])) // model.layers
    return 2 * of_layer * dtype.itemsize // sizes["tensor"]
