"""A tagged LLaMA block on plain dicts, whose attention keeps no probabilities."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from examples.llama.model import Wrap
from examples.llama.positions import rotate


def shapes(
    layers: int, batch_size: int, seq_len: int, width: int, ff_width: int, dtype: str
) -> tuple[dict[str, Any], Any]:
    """Shapes of the stacked parameters and of what enters the first layer."""
    square, inward = (layers, width, width), (layers, width, ff_width)
    params = dict.fromkeys("qkvo", square) | dict.fromkeys(("gate", "up"), inward)
    params |= {"down": (layers, ff_width, width)}
    params |= dict.fromkeys(("norm1", "norm2"), (layers, width))
    found = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in params.items()}
    return found, jax.ShapeDtypeStruct((batch_size, seq_len, width), dtype)


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
    return y.astype(x.dtype) * gain


@jax.checkpoint  # its probabilities are computed again, whatever the policy
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    length = q.shape[1]
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
    probabilities = jax.nn.softmax(scores, -1).astype(q.dtype)
    return jnp.einsum("bhts,bshd->bthd", probabilities, v)


def block(params: Any, x: jax.Array, heads: int = 8) -> jax.Array:
    def split(y: jax.Array) -> jax.Array:
        return y.reshape(*x.shape[:2], heads, -1)

    y = checkpoint_name(rms_norm(x, params["norm1"]), "norm1")
    q = checkpoint_name(rotate(split(y @ params["q"]), 10_000.0), "q")
    k = checkpoint_name(rotate(split(y @ params["k"]), 10_000.0), "k")
    v = checkpoint_name(split(y @ params["v"]), "v")
    y = checkpoint_name(attend(q, k, v).reshape(x.shape), "attn")
    h = checkpoint_name(x + y @ params["o"], "h")
    y = checkpoint_name(rms_norm(h, params["norm2"]), "norm2")
    gate = checkpoint_name(y @ params["gate"], "gate")
    up = checkpoint_name(y @ params["up"], "up")
    return h + checkpoint_name(jax.nn.silu(gate) * up, "act") @ params["down"]


def value_and_grad(params: Any, x: jax.Array, wrap: Wrap) -> Any:
    """The mean square of what leaves the last layer, and both gradients."""

    def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
        return block(params, x), None

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y, _ = jax.lax.scan(wrap(layer), x, params)
        return jnp.mean(jnp.square(y.astype(jnp.float32)))

    return jax.value_and_grad(loss, (0, 1))(params, x)
