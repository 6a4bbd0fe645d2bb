"""``normal``: Gaussian numbers of which each follows from its place alone.

Threefry-2x32, as ``jax.random`` has it, written out as elementwise operations on the
places of the numbers. A compiler merges them with what the numbers are added to, so
that ``W + c Z`` is made in one pass and Z never lies in memory; a slice of Z is drawn
without the rest; and on a mesh every device draws what it needs, the same numbers as
one device would. ``jax.random.normal`` takes four times the bytes of Z on a CPU, where
its rounds are a loop.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from lowrank_optax.quantization.rounding import (
    dither,
    round_to_bfloat16,
    round_to_float16,
)

# How far the second word turns in each of four rounds, by turns.
_TURNS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(seed: Array, x0: Any, x1: Any) -> tuple[Array, Array]:
    """Returns the two words that Threefry-2x32 makes of two words in 20 rounds.

    Args:
      seed: the key, ``uint32[2]``.
      x0: first word of every counter, ``uint32``.
      x1: second word, of the same shape.

    References:
      Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """
    keys = (seed[0], seed[1], seed[0] ^ seed[1] ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(5):
        for turn in _TURNS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << jnp.uint32(turn)) | (x1 >> jnp.uint32(32 - turn)))
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


@jax.jit
def fold_in(seed: UInt32[Array, "2"], first: Any, second: Any = 0) -> Array:
    """Returns another seed for every pair of numbers, ``uint32[*numbers, 2]``."""
    first, second = jnp.asarray(first, jnp.uint32), jnp.asarray(second, jnp.uint32)
    shape = jnp.broadcast_shapes(first.shape, second.shape)
    first, second = (jnp.broadcast_to(x, shape) for x in (first, second))
    return jnp.stack(threefry(seed, first, second), axis=-1)


def bits(
    seed: UInt32[Array, "2"], shape: tuple[int, ...], row: Any = None
) -> UInt32[Array, "..."]:
    """Returns 32 random bits for every place in an array.

    Args:
      seed: another one for every array.
      shape: of the array, or of its slice ``row`` along its first axis.
      row: which slice; None for the whole array.
    """
    rest = shape[1:] if row is None else shape
    if math.prod(rest) > 1 << 32:
        raise ValueError(
            f"A slice of shape {rest} has more than 2^32 numbers, which are counted in "
            "32 bits. Cut the leaf into several."
        )
    x0 = jnp.zeros(shape, jnp.uint32)
    if row is not None:
        x0 = x0 + jnp.asarray(row, jnp.uint32)
    elif shape:
        x0 = jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    x1, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape) - len(rest), len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        x1, stride = x1 + along * jnp.uint32(stride), stride * shape[axis]
    first, second = threefry(seed, x0, x1)
    return first ^ second


@functools.partial(jax.jit, static_argnames="shape")
def normal(
    seed: UInt32[Array, "2"], shape: tuple[int, ...], row: Any = None
) -> Float[Array, "..."]:
    """Returns standard normal float32 numbers; arguments as those of ``bits``."""
    # 23 bits are the fraction of a number in [1, 2).
    word = (bits(seed, shape, row) >> jnp.uint32(9)) | jnp.uint32(0x3F800000)
    unit = jax.lax.bitcast_convert_type(word, jnp.float32) - jnp.float32(1)
    lowest = jnp.nextafter(jnp.float32(-1), jnp.float32(0))
    uniform = jnp.maximum(lowest, unit * (jnp.float32(1) - lowest) + lowest)
    return jnp.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)


def rounded(x: Float[Array, "..."], dtype: Any, seeds: Sequence[Any]) -> Array:
    """Returns numbers in another dtype; 16-bit ones are rounded at random.

    The mean over seeds is the number itself. Rounded to the nearest, a step of less
    than half the distance to the next number would be lost.
    """
    if dtype == jnp.bfloat16:
        return round_to_bfloat16(x, dither(seeds, x.shape))
    if dtype == jnp.float16:
        return round_to_float16(x, dither(seeds, x.shape))
    return x.astype(dtype)
