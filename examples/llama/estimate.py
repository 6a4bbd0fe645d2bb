"""What a training step takes per device, from shapes alone: nothing is allocated."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType

import lowrank_optax as lro
from examples.llama.activations import PRODUCTS
from examples.llama.config import Resolved, UsageError
from examples.llama.mesh import ROWS, param_shardings
from examples.llama.model import ModelConfig, abstract_model
from examples.llama.plan_layers import Layers, find_layers, parse_budget
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


# Chips of which JAX sees two devices, each with half of the memory.
_HALVES = ("v4",)
_GPUS = ("a100", "h100", "h200")
_TPUS = ("v4", "v5e", "v5p")


def parse_topology(text: str) -> Topology:
    """Reads "v5e:16x16": a TPU's name and its extent, or a GPU's and a number."""
    chip, _, extent = text.lower().partition(":")
    sizes = extent.split("x")
    good = all(size.isdecimal() and int(size) > 0 for size in sizes)
    if chip not in (*_TPUS, *_GPUS) or not good or (chip in _GPUS and len(sizes) > 1):
        raise UsageError(
            f"unknown topology {text!r}: expected a TPU ({', '.join(_TPUS)}) with its "
            f"extent, such as v5e:16x16 or v4:4x4x8, or a GPU ({', '.join(_GPUS)}) "
            "with a number, such as h100:8"
        )
    parts = 2 if chip in _HALVES else 1
    memory = activations.hardware_profile(chip).memory_bytes
    return Topology(text, chip, parts * math.prod(map(int, sizes)), memory // parts)


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh without devices: enough for shardings."""
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes on one device.

    Parameters and optimizer state are exact. The rest is an estimate. A step is fullest
    where the logits are, or in the backward pass of a layer:

    * what the layers keep is there in both;
    * the logits, with what is computed from them, only in the first;
    * gradients, the working set of one layer's backward pass (see
      `lowrank_optax.activations.predict`) and the whole weights of two layers, one in
      use and one on its way, only in the second.

    Not counted is work space of the optimizer and of what is sent.
    """

    parameters: int
    state: int
    kept: int
    logits: int
    gradients: int
    working: int
    gathered: int

    @property
    def temporaries(self) -> int:
        return self.kept + max(
            self.logits, self.gradients + self.working + self.gathered
        )

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
    rows = config.batch_size // config.micro_batches
    local = max(rows // math.prod(sizes[axis] for axis in ROWS), 1)
    one = dataclasses.replace(config, batch_size=local, micro_batches=1)
    layers = find_layers(one, model)
    kept, working = _activations(config, layers, params, profile)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    in_float32 = config.micro_batches > 1  # sums of micro-batches
    return Parts(
        parameters=own,
        state=state_bytes(tx, params, shardings),
        kept=kept // sizes["tensor"],
        logits=_logits(config, model, local) // sizes["tensor"],
        gradients=own + (4 * own * count // _bytes(params) if in_float32 else 0),
        working=working // sizes["tensor"],
        gathered=_gathered(model, params, sizes),
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _activations(
    config: Resolved, layers: Layers, params: Any, profile: str
) -> tuple[int, int]:
    """What all layers keep, their inputs included, and the working set of one."""
    args, count = jax.eval_shape(layers.args, params), layers.model.layers
    if config.activation_budget:
        plan = activations.plan_activations(
            layers.block,
            args,
            count,
            hardware=profile,
            error_budget=config.activation_error or None,
            **parse_budget(config.activation_budget),
        )
        found = plan.predicted
        return found.kept_bytes + found.input_bytes, found.working_bytes
    policies = {
        "full": {},
        "names": dict.fromkeys(PRODUCTS, "save"),
        "adacc": activations.transformer_policy(),
    }
    policy = policies.get(config.activation_policy, {})
    found = activations.predict(layers.block, args, count, policy, hardware=profile)
    if config.activation_policy != "none":
        return found.kept_bytes + found.input_bytes, found.working_bytes
    # What reverse mode keeps by itself: the leaves of the function that it returns.
    pulled = jax.eval_shape(lambda p, x: jax.vjp(layers.block, p, x)[1], *args)
    residuals = max(_bytes(pulled) - _bytes(args[0]), 0)
    return count * residuals, found.working_bytes


def _logits(config: Resolved, model: ModelConfig, rows: int) -> int:
    """Logits as the head computes them, and in float32 for the loss."""
    each = jnp.dtype(model.compute_dtype).itemsize + 4
    return each * rows * config.seq_len * model.vocab_size


def _gathered(model: ModelConfig, params: Any, sizes: dict[str, int]) -> int:
    """The weights of two layers (one in use, one on its way), whole."""
    if sizes["fsdp"] == 1:
        return 0
    dtype = jnp.dtype(model.compute_dtype)
    of_layer = sum(x.size for x in jax.tree.leaves(params["layers"])) // model.layers
    return 2 * of_layer * dtype.itemsize // sizes["tensor"]
