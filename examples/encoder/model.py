"""`Encoder` in Flax NNX: BERT and RoBERTa, which read a text from both sides.

Normalization stands behind each sum, everything has a bias, and positions have a table.
Parameters are stacked and scanned as those of `examples/llama/model.py`, whose letters
names have here, too; T kinds of tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from examples.llama import model as llama
from examples.llama.layers import Drawn, Embed, Linear
from examples.llama.model import Params, Wrap
from lowrank_optax import activations


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder; the defaults are BERT's.

    Attributes:
      max_length: rows of the table of positions.
      types: kinds of tokens (first and second text), rows of their table.
      pad_position: None: positions count from 0. A number: that is the position of
        padding, and those of real tokens count from the next, as in RoBERTa.
      pooler: a layer on the first position, `Encoder.pooled`.
      mlm: a head for tokens that were masked, `Encoder.logits`.
    """

    vocab_size: int
    width: int
    ff_width: int
    layers: int
    heads: int
    max_length: int = 512
    types: int = 2
    norm_eps: float = 1e-12
    pad_position: int | None = None
    pooler: bool = False
    mlm: bool = False
    init_std: float = 0.02
    param_dtype: str = "float32"
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")


class LayerNorm(nnx.Module):
    """Mean 0 and variance 1, then gain and bias, computed in float32."""

    def __init__(self, shape: tuple[int, ...], eps: float, config: Drawn):
        self.scale = nnx.Param(jnp.ones(shape, config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(shape, config.param_dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32)
        return (y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention to all that the mask leaves."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        shape = (config.layers, config.width, config.width)
        self.q, self.k, self.v, self.o = (
            Linear(shape, config, rngs, bias=True) for _ in range(4)
        )
        self.heads = config.heads

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.heads, -1)

        q = checkpoint_name(heads(self.q(x)), "q")
        k = checkpoint_name(heads(self.k(x)), "k")
        v = checkpoint_name(heads(self.v(x)), "v")
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return self.o(checkpoint_name(y.reshape(x.shape), "attn"))


class MLP(nnx.Module):
    """Feed-forward layer with the exact GELU."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        layers, width, ff_width = config.layers, config.width, config.ff_width
        self.up = Linear((layers, width, ff_width), config, rngs, bias=True)
        self.down = Linear((layers, ff_width, width), config, rngs, bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        up = checkpoint_name(self.up(x), "up")
        return self.down(checkpoint_name(nnx.gelu(up, approximate=False), "act"))


class Block(nnx.Module):
    """A layer; holds the whole stack and is applied to one slice of it."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        shape = (config.layers, config.width)
        self.attn = Attention(config, rngs)
        self.norm1 = LayerNorm(shape, config.norm_eps, config)
        self.mlp = MLP(config, rngs)
        self.norm2 = LayerNorm(shape, config.norm_eps, config)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        h = checkpoint_name(self.norm1(x + self.attn(x, mask)), "h")
        return self.norm2(h + self.mlp(h))


class MaskedHead(nnx.Module):
    """What stands between an encoder and the table that gives logits."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.dense = Linear((config.width, config.width), config, rngs, bias=True)
        self.norm = LayerNorm((config.width,), config.norm_eps, config)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), config.param_dtype))

    def __call__(self, hidden: jax.Array, table_VxD: jax.Array) -> jax.Array:
        y = self.norm(nnx.gelu(self.dense(hidden), approximate=False))
        y = y @ table_VxD.astype(y.dtype).T
        return (y + self.bias[...].astype(y.dtype)).astype(jnp.float32)


class Encoder(nnx.Module):
    """Tokens `[B, S]` to what the last layer makes of them, `[B, S, D]`."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        width = config.width
        self.config = config
        self.embed = Embed((config.vocab_size, width), config, rngs)
        self.positions = Embed((config.max_length, width), config, rngs)
        self.types = Embed((config.types, width), config, rngs)
        self.norm = LayerNorm((width,), config.norm_eps, config)
        self.layers = Block(config, rngs)
        if config.pooler:
            self.pooler = Linear((width, width), config, rngs, bias=True)
        if config.mlm:
            self.mlm = MaskedHead(config, rngs)

    def __call__(
        self,
        tokens_BxS: jax.Array,
        mask_BxS: jax.Array,
        types: jax.Array | None = None,
        *,
        scan: bool = True,
        wrap_layer: Callable[[Callable], Callable] = lambda layer: layer,
    ) -> jax.Array:
        """The last layer's result.

        Args:
          tokens_BxS: numbers of tokens.
          mask_BxS: 1 for tokens, 0 for padding, which no position sees.
          types: `[B, S]`, which text a token is of; None: all of the first.
          scan: a loop over the layers; otherwise each has its own part of the program.
          wrap_layer: wraps the scanned layer, for example in `jax.checkpoint`.
        """
        definition, stack = nnx.split(self.layers)
        seen_Bx1x1xS = (mask_BxS > 0)[:, None, None, :]

        def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return nnx.merge(definition, params)(x, seen_Bx1x1xS), None

        layer = wrap_layer(layer)
        x_BxSxD = self.enter(tokens_BxS, mask_BxS, types)
        if scan:
            return jax.lax.scan(layer, x_BxSxD, stack)[0]
        for index in range(self.config.layers):
            one = jax.tree.map(lambda leaf, at=index: leaf[at], stack)
            x_BxSxD, _ = layer(x_BxSxD, one)
        return x_BxSxD

    def enter(
        self, tokens: jax.Array, mask: jax.Array, types: jax.Array | None = None
    ) -> jax.Array:
        """What the first layer reads, `[B, S, D]`."""
        config, length = self.config, tokens.shape[1]
        # Beyond the table, a look-up would silently give its last row.
        start = 0 if config.pad_position is None else config.pad_position + 1
        room = config.max_length - start
        if length > room:
            raise ValueError(
                f"the table of positions has room for {room} tokens; got {length}: "
                "cut the texts"
            )
        if config.pad_position is None:
            positions = jnp.arange(length)[None]
        else:
            real = (mask > 0).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + config.pad_position
        types = jnp.zeros_like(tokens) if types is None else types
        x = self.embed(tokens) + self.types(types) + self.positions(positions)
        return self.norm(x.astype(config.compute_dtype))

    def pooled(self, hidden_BxSxD: jax.Array) -> jax.Array:
        """The first position as BERT's classifiers read it, `[B, D]`."""
        return jnp.tanh(self.pooler(hidden_BxSxD[:, 0]))

    def logits(self, hidden_BxSxD: jax.Array) -> jax.Array:
        """Of the tokens that a masked position may hold, `[B, S, V]` in float32."""
        return self.mlm(hidden_BxSxD, self.embed.embedding[...])


def abstract_model(config: EncoderConfig) -> tuple[Any, Params]:
    """The encoder's definition and its parameters' shapes; nothing is allocated."""
    model = nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0)))
    definition, state = nnx.split(model)
    return definition, nnx.to_pure_dict(state)


def init_params(config: EncoderConfig, seed: int) -> Params:
    """Parameters as nested dicts, drawn from N(0, init_std)."""

    def draw() -> Params:
        return nnx.to_pure_dict(nnx.state(Encoder(config, nnx.Rngs(seed))))

    return jax.jit(draw)()


# The tags that a layer has in common with a decoder's: there is no gate.
_ROLES = {
    "q": "query_key",
    "k": "query_key",
    "v": "value",
    "attn": "value",
    "up": "feed_forward",
    "h": "residual",
}


def adacc(layer: Callable) -> Callable:
    """What matrix products made and the residual stream, in 4 and 8 bits."""
    policy = activations.transformer_policy(_ROLES)
    return activations.compressed_checkpoint(layer, policy)


# What a layer keeps for its backward pass, as for a decoder.
ACTIVATIONS: dict[str, Wrap | None] = {**llama.ACTIVATIONS, "adacc": adacc}
