"""`Linear` and `Embed` are the layers that decoders and encoders share."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx


class Drawn(Protocol):
    """What a configuration says about how parameters are drawn."""

    @property
    def init_std(self) -> float: ...

    @property
    def param_dtype(self) -> str: ...


class Linear(nnx.Module):
    """A kernel `[in, out]`, or `[L, in, out]` for a stack of layers; maybe a bias."""

    def __init__(
        self,
        shape: tuple[int, ...],
        config: Drawn,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * config.init_std
        self.kernel = nnx.Param(kernel.astype(config.param_dtype))
        if bias:
            zeros = jnp.zeros((*shape[:-2], shape[-1]), config.param_dtype)
            self.bias = nnx.Param(zeros)
        self.has_bias = bias

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y


class Embed(nnx.Module):
    """A table `[V, D]`, of tokens or of what else has a number."""

    def __init__(self, shape: tuple[int, int], config: Drawn, rngs: nnx.Rngs):
        table = jax.random.normal(rngs.params(), shape, jnp.float32) * config.init_std
        self.embedding = nnx.Param(table.astype(config.param_dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[...][tokens]
