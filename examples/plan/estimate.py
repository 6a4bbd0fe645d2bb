"""`estimate` counts the bytes of a training step per device, from shapes alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lowrank_optax as lro
from examples.llama.budget import find_layers, of_one_device, plan_from_shapes
from examples.llama.config import AS_STORED, Resolved
from examples.llama.model import PRODUCTS, ModelConfig, abstract_model, count_params
from examples.llama.placement import param_shardings
from lowrank_optax import activations


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes on one device.

    Parameters and optimizer state are exact, the rest is an estimate. A step is fullest
    at the loss or in the backward pass of a layer; what the layers keep is there in
    both. Not counted is the optimizer's work space, which is needed later.

    Attributes:
      parameters: as they are stored.
      loaded: the same in the type of the step, where they are stored in another.
      state: of the optimizer, unless it lies in the host's memory between steps.
      host: its bytes if it does. They are no part of `total`, though a step fetches
        them: how many are on the device at once is the compiler's choice.
      sums: of the gradients of micro-batches, in float32; 0 where there is one.
      kept: by all layers for their backward pass, their inputs included.
      loss: logits as the head computes them and in float32, what enters the head, and
        its weights twice (whole, the second time on their way to the backward pass).
      gradients: of all parameters.
      working: the most that the backward pass of one layer holds at once.
      gathered: whole weights of two layers, one in use and one on its way.
    """

    parameters: int
    loaded: int
    state: int
    sums: int
    kept: int
    loss: int
    gradients: int
    working: int
    gathered: int
    host: int = 0

    @property
    def temporaries(self) -> int:
        backward = self.gradients + self.working + self.gathered
        return self.loaded + self.sums + self.kept + max(self.loss, backward)

    @property
    def total(self) -> int:
        return self.parameters + self.state + self.temporaries


def memory_bytes(topology: lro.Topology) -> int:
    """Of one device."""
    return activations.hardware_profile(topology.chip).memory_bytes


def state_parts(config: Resolved, size: int) -> dict[str, int]:
    """The fields `state` and `host` of `Parts`, of a state of so many bytes."""
    near = config.state_memory == "device"
    return {"state": size if near else 0, "host": 0 if near else size}


def state_bytes(tx: optax.GradientTransformation, params: Any, shardings: Any) -> int:
    """Bytes of the optimizer's state on one device, exactly."""
    layout = lro.state_shardings(tx, params, shardings)
    return lro.bytes_per_device(jax.eval_shape(tx.init, params), layout)


def estimate(
    config: Resolved,
    model: ModelConfig,
    tx: optax.GradientTransformation,
    sizes: dict[str, int],
    profile: str,
) -> Parts:
    """What a step of this configuration takes on a mesh of these sizes."""
    mesh = lro.abstract_mesh(sizes)
    _, params = abstract_model(model)
    shardings = param_shardings(mesh, params)
    own = lro.bytes_per_device(params, shardings)
    weights = lro.weight_storage(config.weights, config.param_dtype, layer_axis=0)
    stored = lro.bytes_per_device(jax.eval_shape(weights.store, params))
    one = of_one_device(config, sizes)
    whole, cut, working = _activations(one, model, profile)
    count, whole_bytes = count_params(params), lro.bytes_per_device(params)
    gradients = own
    if config.layerwise:  # of one layer, and of the largest that is in none
        layers = lro.bytes_per_device(params["layers"]) // model.layers
        rest = [x for name, x in params.items() if name != "layers"]
        sizes_of = [lro.bytes_per_device(x) for x in jax.tree.leaves(rest)]
        gradients = own * (layers + max(sizes_of)) // whole_bytes
    return Parts(
        parameters=own * stored // whole_bytes,
        loaded=own if config.weights not in AS_STORED else 0,
        **state_parts(config, state_bytes(tx, params, shardings)),
        # Numbers on one device, of four bytes each.
        sums=4 * own * count // whole_bytes if config.micro_batches > 1 else 0,
        kept=whole + cut // sizes["tensor"],
        loss=_loss(one, model, sizes),
        gradients=gradients,
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
    chosen = config.activation_policy
    if config.layerwise:  # each layer is computed again
        chosen = "full"
    policy = policies.get(chosen, {})
    found = activations.predict(layers.block, args, count, policy, hardware=profile)
    if chosen != "none":
        return found.input_bytes, found.kept_bytes, found.working_bytes
    # What reverse mode keeps by itself: the leaves of the function that it returns.
    own, x = args
    stack = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct((count, *p.shape), p.dtype), own
    )

    def run(stack: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, own: (layers.block(own, x), None), x, stack)[0]

    pulled = jax.eval_shape(lambda p, x: jax.vjp(run, p, x)[1], stack, x)
    # The returned function holds the weights as well, which are counted elsewhere.
    kept = max(lro.bytes_per_device(pulled) - lro.bytes_per_device(stack), 0)
    wide = [leaf for leaf in jax.tree.leaves(pulled) if leaf.shape[1:] == x.shape]
    whole = lro.bytes_per_device(wide)
    return whole, kept - whole, found.working_bytes


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
