"""`LLaMA` in Flax NNX: RMSNorm, RoPE, a gated feed-forward layer; and its family.

A `ModelConfig` says in what Llama, TinyLlama, SmolLM2, Mistral, Qwen 2, 2.5 and 3 and
the first Gemma differ; its defaults are the Llama of the papers on optimizers.

The parameters of all layers are stacked on a leading axis and the forward pass scans
over it, so compile time does not grow with depth. Letters in names: B rows, S
positions, D model width, F feed-forward width, N heads, K heads of keys and values,
H head width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from examples.llama.layers import Embed, Linear
from examples.llama.positions import RopeScaling, Segments, find_segments, rotate
from lowrank_optax import activations

Params = dict[str, Any]
Wrap = Callable[[Callable], Callable]


_FAMILY = (
    "kv_heads", "head_width", "tied", "qkv_bias", "out_bias", "qk_norm",
    "rope_scaling", "window", "activation", "norm_offset", "embedding_scale",
)  # fmt: skip


ACTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "gelu_tanh": lambda x: nnx.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; the presets are in `presets.py`.

    Attributes:
      kv_heads: heads of keys and values, a divisor of `heads`; None: as many.
      head_width: numbers in a head; None: `width / heads`.
      tied: the head is the embedding; there is no `lm_head`.
      qkv_bias: queries, keys and values have a bias.
      out_bias: what leaves the attention has one.
      qk_norm: queries and keys are normalized before they are turned, head by head.
      rope_scaling: how the rotations of Llama 3.1 and later are slowed down.
      window: positions that a position sees, itself and those before; None: all.
      activation: of the feed-forward layer's gate, a name in `ACTS`.
      norm_offset: is added to the gains of norms, whose leaves are then near 0.
      embedding_scale: multiplies what is looked up, not the tied head.
    """

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
    kv_heads: int | None = None
    head_width: int | None = None
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    activation: str = "silu"
    norm_offset: float = 0.0
    embedding_scale: float = 1.0

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads if self.head_width is None else self.head_width

    def __post_init__(self) -> None:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"{self.heads} heads do not divide the width {self.width}; give a "
                "head_width"
            )
        if self.heads % self.key_heads:
            raise ValueError(
                f"{self.key_heads} heads of keys and values do not divide "
                f"{self.heads} heads"
            )
        if self.head_size % 2:
            raise ValueError(
                f"rotations need heads of even width; got {self.head_size}"
            )
        if self.activation not in ACTS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTS)}; got {self.activation!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """For a record of a run. The family's fields are there if they say something:
        a record of the plain LLaMA is what it was before there was a family."""
        values = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            if field.name in _FAMILY and values[field.name] == field.default:
                del values[field.name]
        if self.rope_scaling is not None:
            values["rope_scaling"] = [*self.rope_scaling]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ModelConfig":
        """The opposite; TypeError or ValueError if it is no such record."""
        found = dict(values)
        if found.get("rope_scaling") is not None:
            found["rope_scaling"] = RopeScaling(*found["rope_scaling"])
        return cls(**found)


class RMSNorm(nnx.Module):
    """Root mean square normalization with a gain, computed in float32."""

    def __init__(self, shape: tuple[int, ...], config: ModelConfig):
        gain = jnp.full(shape, 1 - config.norm_offset, config.param_dtype)
        self.scale = nnx.Param(gain)
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        gain = self.scale[...].astype(jnp.float32)
        if self.offset:
            gain = gain + self.offset
        return (y * gain).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention; groups of heads may share keys and values."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        layers, width, size = config.layers, config.width, config.head_size
        wide, narrow = config.heads * size, config.key_heads * size

        def linear(into: int, out: int, bias: bool) -> Linear:
            return Linear((layers, into, out), config, rngs, bias)

        self.q = linear(width, wide, config.qkv_bias)
        self.k = linear(width, narrow, config.qkv_bias)
        self.v = linear(width, narrow, config.qkv_bias)
        self.o = linear(wide, width, config.out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm((layers, size), config)
            self.k_norm = RMSNorm((layers, size), config)
        self.config = config

    def __call__(self, x: jax.Array, segments: Segments | None = None) -> jax.Array:
        positions, mask = (None, None) if segments is None else segments
        window = self.config.window
        y = jax.nn.dot_product_attention(
            *self.project(x, positions),
            mask=mask,
            is_causal=True,
            # A window of w is the position itself and w - 1 before it.
            local_window_size=None if window is None else (window - 1, 0),
        )
        return self.join(y)

    def project(
        self, x: jax.Array, positions: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys, turned by their positions, and values."""
        config = self.config

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], -1, config.head_size)

        def turn(y: jax.Array) -> jax.Array:
            return rotate(y, config.rope_base, config.rope_scaling, positions)

        q, k = heads(self.q(x)), heads(self.k(x))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = checkpoint_name(turn(q), "q"), checkpoint_name(turn(k), "k")
        return q, k, checkpoint_name(heads(self.v(x)), "v")

    def join(self, y_BxSxNxH: jax.Array) -> jax.Array:
        """What leaves the attention, of what every head has seen."""
        y = y_BxSxNxH.reshape(*y_BxSxNxH.shape[:-2], -1)
        return self.o(checkpoint_name(y, "attn"))


class MLP(nnx.Module):
    """Gated feed-forward layer: SwiGLU, or Gemma's with GELU."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        inward = (config.layers, config.width, config.ff_width)
        outward = (config.layers, config.ff_width, config.width)
        self.gate = Linear(inward, config, rngs)
        self.up = Linear(inward, config, rngs)
        self.down = Linear(outward, config, rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = checkpoint_name(self.gate(x), "gate")
        up = checkpoint_name(self.up(x), "up")
        return self.down(checkpoint_name(ACTS[self.activation](gate) * up, "act"))


class Block(nnx.Module):
    """A layer; holds the whole stack and is applied to one slice of it."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.norm1 = RMSNorm((config.layers, config.width), config)
        self.attn = Attention(config, rngs)
        self.norm2 = RMSNorm((config.layers, config.width), config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array, segments: Segments | None = None) -> jax.Array:
        return self.leave(x, self.attn(self.enter(x), segments))

    def enter(self, x: jax.Array) -> jax.Array:
        """What the attention reads."""
        return checkpoint_name(self.norm1(x), "norm1")

    def leave(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """The layer's result, of its input and what the attention made of it."""
        h = checkpoint_name(x + attended, "h")
        return h + self.mlp(checkpoint_name(self.norm2(h), "norm2"))


class LLaMA(nnx.Module):
    """Tokens `[B, S]` to float32 logits `[B, S, V]`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed((config.vocab_size, config.width), config, rngs)
        self.layers = Block(config, rngs)
        self.norm = RMSNorm((config.width,), config)
        if not config.tied:
            self.lm_head = Linear((config.width, config.vocab_size), config, rngs)

    def __call__(
        self,
        tokens_BxS: jax.Array,
        *,
        segments: jax.Array | None = None,
        scan: bool = True,
        wrap_layer: Callable[[Callable], Callable] = lambda layer: layer,
    ) -> jax.Array:
        """Logits of every position.

        Args:
          tokens_BxS: numbers of tokens.
          segments: `[B, S]`, a number for the document of every position, 0 for
            padding. A position sees its document only, and counts from its start.
          scan: a loop over the layers; otherwise each has its own part of the program.
          wrap_layer: wraps the scanned layer, for example in `jax.checkpoint`.
        """
        hidden = self.hidden(
            tokens_BxS, segments=segments, scan=scan, wrap_layer=wrap_layer
        )
        return self.logits(hidden)

    def hidden(
        self,
        tokens_BxS: jax.Array,
        *,
        segments: jax.Array | None = None,
        scan: bool = True,
        wrap_layer: Callable[[Callable], Callable] = lambda layer: layer,
    ) -> jax.Array:
        """What the head reads, `[B, S, D]`: the last layer's result, normalized."""
        # The definition is static; the arrays are a tree that a scan can slice.
        definition, stack = nnx.split(self.layers)
        documents = None if segments is None else find_segments(segments)

        def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return nnx.merge(definition, params)(x, documents), None

        layer = wrap_layer(layer)
        x_BxSxD = self.enter(tokens_BxS)
        if scan:
            x_BxSxD, _ = jax.lax.scan(layer, x_BxSxD, stack)
        else:
            for index in range(self.config.layers):
                one = jax.tree.map(lambda leaf, at=index: leaf[at], stack)
                x_BxSxD, _ = layer(x_BxSxD, one)
        return self.norm(x_BxSxD)

    def enter(self, tokens_BxS: jax.Array) -> jax.Array:
        """What the first layer reads, `[B, S, D]`."""
        x_BxSxD = self.embed(tokens_BxS).astype(self.config.compute_dtype)
        if self.config.embedding_scale == 1:
            return x_BxSxD
        return x_BxSxD * jnp.asarray(self.config.embedding_scale, x_BxSxD.dtype)

    def logits(self, hidden_BxSxD: jax.Array) -> jax.Array:
        """The head alone."""
        if self.config.tied:
            table_VxD = self.embed.embedding[...].astype(hidden_BxSxD.dtype)
            return (hidden_BxSxD @ table_VxD.T).astype(jnp.float32)
        return self.lm_head(hidden_BxSxD).astype(jnp.float32)


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
