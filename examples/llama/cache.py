"""`Cache` keeps keys and values, so that a new token runs through the model alone.

Letters in names as in `model.py`, and T positions of the cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from examples.llama.model import LLaMA, ModelConfig


class Cache(NamedTuple):
    """Of all layers, in the type of the activations; keys are turned already."""

    keys: jax.Array  # [L, B, T, K, H]
    values: jax.Array  # [L, B, T, K, H]


def empty_cache(config: ModelConfig, rows: int, length: int) -> Cache:
    """Zeros; a position is written before another one sees it."""
    shape = (config.layers, rows, length, config.key_heads, config.head_size)
    zeros = jnp.zeros(shape, config.compute_dtype)
    return Cache(zeros, zeros)


def extend(
    model: LLaMA, tokens_BxS: jax.Array, cache: Cache, start: jax.Array | int
) -> tuple[jax.Array, Cache]:
    """What the head reads, `[B, S, D]`, of tokens at `start` and behind it.

    The cache holds all positions before `start`, and then those of the tokens, too;
    `start + S` may be T at most. The result is that of `model.hidden` for whole rows.
    """
    definition, stack = nnx.split(model.layers)
    positions = start + jnp.arange(tokens_BxS.shape[1])
    behind_SxT = positions[:, None] - jnp.arange(cache.keys.shape[2])
    mask_SxT = behind_SxT >= 0
    if model.config.window is not None:
        mask_SxT &= behind_SxT < model.config.window

    def layer(x: jax.Array, slices: tuple[Any, Cache]) -> tuple[jax.Array, Cache]:
        params, own = slices
        block = nnx.merge(definition, params)
        q, *new = block.attn.project(block.enter(x), positions)
        own = Cache(
            *(
                jax.lax.dynamic_update_slice(old, part, (0, start, 0, 0))
                for old, part in zip(own, new, strict=True)
            )
        )
        y = jax.nn.dot_product_attention(q, *own, mask=mask_SxT[None, None])
        return block.leave(x, block.attn.join(y)), own

    x_BxSxD, cache = jax.lax.scan(layer, model.enter(tokens_BxS), (stack, cache))
    return model.norm(x_BxSxD), cache
