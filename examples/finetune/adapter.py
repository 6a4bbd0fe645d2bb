"""`adapt` puts LoRA beside the linear layers of a model, and `merge` takes it off.

`y = x W + (alpha / rank) (x A) B`, with `A` `[in, r]` and `B` `[r, out]` of zeros
(Hu et al., https://arxiv.org/abs/2106.09685). Neither `W + A B` nor a gradient of the
size of `W` is formed. Flax's own `nnx.LoRA` has no alpha and takes sizes, not stacks
`[L, in, out]`; the parameters here are its `nnx.LoRAParam`.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama.config import UsageError
from examples.llama.layers import Linear
from examples.llama.model import Params

# `--lora-targets`: the modules that an adapter stands beside.
TARGETS = {
    "all-linear": r"layers/(attn/[qkvo]|mlp/(gate|up|down))",
    "attention": r"layers/attn/[qkvo]",
    "qv": r"layers/attn/[qv]",
    "mlp": r"layers/mlp/(gate|up|down)",
}


class Adapted(nnx.Module):
    """A linear layer and the two factors beside it."""

    def __init__(self, base: Linear, rank: int, alpha: float):
        *stack, inward, outward = base.kernel.shape
        dtype = base.kernel.dtype
        self.base, self.scale = base, alpha / rank
        self.lora_a = nnx.LoRAParam(jnp.zeros((*stack, inward, rank), dtype))
        self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, rank, outward), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = (leaf[...].astype(x.dtype) for leaf in (self.lora_a, self.lora_b))
        return self.base(x) + (x @ a @ b) * self.scale


def adapt(
    definition: Any, params: Params, targets: str, rank: int, alpha: float
) -> Any:
    """The definition and the shapes of a model with adapters at its targets.

    Raises:
        UsageError: no module is a target.
    """
    model = nnx.eval_shape(lambda: nnx.merge(definition, zeros(params)))
    found = []
    for path in linear_paths(params):
        if not re.fullmatch(TARGETS[targets], path):
            continue
        *parents, name = path.split("/")
        owner = model
        for parent in parents:
            owner = getattr(owner, parent)
        base = getattr(owner, name)
        made = nnx.eval_shape(lambda base=base: Adapted(base, rank, alpha))
        setattr(owner, name, made)
        found.append(path)
    if not found:
        raise UsageError(f"--lora-targets {targets}: the model has no such layer")
    definition, state = nnx.split(model)
    return definition, nnx.to_pure_dict(state)


def zeros(shapes: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def linear_paths(params: Params, prefix: str = "") -> list[str]:
    """The paths of all modules with a kernel."""
    found = [prefix[:-1]] if "kernel" in params else []
    for name, value in params.items():
        if isinstance(value, dict):
            found += linear_paths(value, f"{prefix}{name}/")
    return found


def with_factors(params: Params, adapted: Params, seed: int) -> Params:
    """Parameters of a model without adapters, and fresh ones: `A` drawn, `B` zero.

    `A` is drawn as `nnx.LoRA` does it: uniform, of variance 2 / in.
    """
    draw = nnx.initializers.he_uniform()

    def walk(own: Any, shapes: Any, key: jax.Array) -> Any:
        if not isinstance(shapes, dict):
            return own
        if "lora_a" in shapes:
            a, b = shapes["lora_a"], shapes["lora_b"]
            return {
                "base": own,
                "lora_a": _each_layer(draw, key, a),
                "lora_b": jnp.zeros(b.shape, b.dtype),
            }
        names = sorted(own)
        keys = jax.random.split(key, len(names))
        return {
            name: walk(own[name], shapes[name], keys[i]) for i, name in enumerate(names)
        }

    return walk(params, adapted, jax.random.key(seed))


def _each_layer(draw: Callable, key: jax.Array, shape: Any) -> jax.Array:
    """Of a stack every layer by itself, so that its length counts for nothing."""
    *stack, inward, rank = shape.shape
    if not stack:
        return draw(key, (inward, rank), shape.dtype)
    keys = jax.random.split(key, stack[0])
    return jnp.stack([draw(k, (inward, rank), shape.dtype) for k in keys])


def merge(params: Params, rank: int, alpha: float) -> Params:
    """The parameters of the model without adapters that computes the same.

    The product is added in float32 and rounded once, to the type of the kernel.
    """
    if "lora_a" in params:
        base = dict(params["base"])
        a, b = (params[name].astype(jnp.float32) for name in ("lora_a", "lora_b"))
        kernel = base["kernel"]
        product = jnp.matmul(a, b, precision="highest") * (alpha / rank)
        base["kernel"] = (kernel.astype(jnp.float32) + product).astype(kernel.dtype)
        return base
    return {
        name: merge(value, rank, alpha) if isinstance(value, dict) else value
        for name, value in params.items()
    }
