"""`LLaMA` in Flax NNX: RMSNorm, RoPE, SwiGLU, an untied head, no biases.

The parameters of all layers are stacked on a leading axis and the forward pass scans
over it, so compile time does not grow with depth. Letters in names: B rows, S
positions, D model width, F feed-forward width, N heads, H head width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lowrank_optax import activations

Params = dict[str, Any]
Wrap = Callable[[Callable], Callable]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; the presets are in `presets.py`."""

    vocab_size: int
    width: int
    ff_width: int
    layers: int
    heads: int
    max_length: int = 1024
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    init_std: float = 0.02
    param_dtype: str = "float32"
    compute_dtype: str = "float32"


class Linear(nnx.Module):
    """A kernel `[in, out]`, or `[L, in, out]` for a stack of layers."""

    def __init__(self, shape: tuple[int, ...], config: ModelConfig, rngs: nnx.Rngs):
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * config.init_std
        self.kernel = nnx.Param(kernel.astype(config.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root mean square normalization with a gain, computed in float32."""

    def __init__(self, shape: tuple[int, ...], config: ModelConfig):
        self.scale = nnx.Param(jnp.ones(shape, config.param_dtype))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def rotate(x_BxSxNxH: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding; the two halves of a head are the pairs."""
    half = x_BxSxNxH.shape[-1] // 2
    # In float32: in bfloat16 late positions would share their angles.
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x_BxSxNxH.shape[1], dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    a, b = jnp.split(x_BxSxNxH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BxSxNxH.dtype)


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.layers, config.width, config.width)
        self.q, self.k, self.v, self.o = (Linear(shape, config, rngs) for _ in range(4))
        self.heads, self.rope_base = config.heads, config.rope_base

    def __call__(self, x: jax.Array) -> jax.Array:
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.heads, -1)

        q = checkpoint_name(rotate(heads(self.q(x)), self.rope_base), "q")
        k = checkpoint_name(rotate(heads(self.k(x)), self.rope_base), "k")
        v = checkpoint_name(heads(self.v(x)), "v")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.o(checkpoint_name(y.reshape(x.shape), "attn"))


class MLP(nnx.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        inward = (config.layers, config.width, config.ff_width)
        outward = (config.layers, config.ff_width, config.width)
        self.gate = Linear(inward, config, rngs)
        self.up = Linear(inward, config, rngs)
        self.down = Linear(outward, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = checkpoint_name(self.gate(x), "gate")
        up = checkpoint_name(self.up(x), "up")
        return self.down(checkpoint_name(nnx.silu(gate) * up, "act"))


class Block(nnx.Module):
    """A layer; holds the whole stack and is applied to one slice of it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.norm1 = RMSNorm((config.layers, config.width), config)
        self.attn = Attention(config, rngs)
        self.norm2 = RMSNorm((config.layers, config.width), config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x + self.attn(checkpoint_name(self.norm1(x), "norm1"))
        h = checkpoint_name(h, "h")
        return h + self.mlp(checkpoint_name(self.norm2(h), "norm2"))


class Embed(nnx.Module):
    """Token embedding `[V, D]`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.width)
        table = jax.random.normal(rngs.params(), shape, jnp.float32) * config.init_std
        self.embedding = nnx.Param(table.astype(config.param_dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[...][tokens]


class LLaMA(nnx.Module):
    """Tokens `[B, S]` to float32 logits `[B, S, V]`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(config, rngs)
        self.layers = Block(config, rngs)
        self.norm = RMSNorm((config.width,), config)
        self.lm_head = Linear((config.width, config.vocab_size), config, rngs)

    def __call__(
        self,
        tokens_BxS: jax.Array,
        *,
        scan: bool = True,
        wrap_layer: Callable[[Callable], Callable] = lambda layer: layer,
    ) -> jax.Array:
        """`wrap_layer` wraps the scanned layer, for example in `jax.checkpoint`."""
        # The definition is static; the arrays are a tree that a scan can slice.
        definition, stack = nnx.split(self.layers)

        def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return nnx.merge(definition, params)(x), None

        layer = wrap_layer(layer)
        x_BxSxD = self.embed(tokens_BxS).astype(self.config.compute_dtype)
        if scan:
            x_BxSxD, _ = jax.lax.scan(layer, x_BxSxD, stack)
        else:
            for index in range(self.config.layers):
                one = jax.tree.map(lambda leaf, at=index: leaf[at], stack)
                x_BxSxD, _ = layer(x_BxSxD, one)
        return self.lm_head(self.norm(x_BxSxD)).astype(jnp.float32)


def abstract_model(config: ModelConfig) -> tuple[Any, Params]:
    """The model's definition and its parameters' shapes; nothing is allocated."""
    model = nnx.eval_shape(lambda: LLaMA(config, nnx.Rngs(0)))
    definition, state = nnx.split(model)
    return definition, nnx.to_pure_dict(state)


def init_params(config: ModelConfig, seed: int) -> Params:
    """Parameters as nested dicts, drawn from N(0, init_std)."""

    def draw() -> Params:
        return nnx.to_pure_dict(nnx.state(LLaMA(config, nnx.Rngs(seed))))

    return jax.jit(draw)()


def count_params(params: Params) -> int:
    """Number of parameters, of arrays or of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# What a layer keeps for its backward pass, one way per `--activation-policy`.

# Tags of what the block's matrix products made.
PRODUCTS = ("q", "k", "v", "attn", "gate", "up")


def full(layer: Callable) -> Callable:
    """Nothing but the layer's input: all of it is computed again."""
    # The layer is the body of a loop, which the compiler cannot merge with another's.
    return jax.checkpoint(layer, prevent_cse=False)


def names(layer: Callable) -> Callable:
    """What the matrix products made, as it is."""
    policy = jax.checkpoint_policies.save_only_these_names(*PRODUCTS)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def adacc(layer: Callable) -> Callable:
    """The same and the residual stream, in 4 and 8 bits."""
    policy = activations.transformer_policy()
    return activations.compressed_checkpoint(layer, policy)


# None: the layer as it is; the gradient's own rules say what is kept.
ACTIVATIONS: dict[str, Wrap | None] = {
    "none": None,
    "full": full,
    "names": names,
    "adacc": adacc,
}
