"""Stochastic rounding: up or down at random, so that the mean is the number itself."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float16, UInt32

_EXPONENT = 0x7F80  # of a bfloat16; all ones in infinities and NaN


def uniform(key: Any, shape: Sequence[int]) -> Float[Array, "..."]:
    """Returns draws from [0, 1): by the key, or ``key`` itself if it holds floats.

    Raises:
      ValueError: if given draws have another shape.
    """
    key = jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jnp.floating):
        return jax.random.uniform(key, tuple(shape), jnp.float32)
    if key.shape != tuple(shape):
        raise ValueError(
            f"Uniform draws given in place of a key must have the array's shape "
            f"{tuple(shape)}, got {key.shape}."
        )
    return key.astype(jnp.float32)


def round_with(x: Float[Array, "..."], draws: Float[Array, "..."]) -> Array:
    """Returns ``floor(x) + [u < x - floor(x)]``."""
    floor = jnp.floor(x)
    return floor + (draws < x - floor).astype(floor.dtype)


def stochastic_round(x: Any, key: Any) -> Float[Array, "..."]:
    """Rounds to an integer at random, without bias.

    ``floor(x) + [u < x - floor(x)]`` with u uniform in [0, 1), so that the mean over
    draws is x. Integers, infinities and NaN do not change.

    Args:
      x: floats of any shape; computed in float32.
      key: a PRNG key, or the draws u themselves, floats of x's shape.

    Returns:
      Integers in float32.

    Raises:
      ValueError: if given draws have another shape than x.

    Examples:
      >>> import jax
      >>> from lowrank_optax import quantization
      >>> x = jax.numpy.full((1000,), 0.25)
      >>> up = quantization.stochastic_round(x, jax.random.key(0))
      >>> bool(abs(up.mean() - 0.25) < 0.05)
      True
    """
    x = jnp.asarray(x).astype(jnp.float32)
    return round_with(x, uniform(key, x.shape))


def stochastic_round_to_bfloat16(x: Any, key: Any) -> BFloat16[Array, "..."]:
    """Rounds float32 to one of the two nearest bfloat16 at random, without bias.

    A bfloat16 is the upper half of a float32: 16 random bits are added to the lower
    half, then the upper one is kept, so the carry comes with a probability of the lower
    half times ``2^-16``. Numbers that a bfloat16 holds exactly stay; infinities and NaN
    stay; numbers beyond the largest bfloat16 become that, not infinity.

    Args:
      x: floats of any shape; computed in float32.
      key: a PRNG key.

    Returns:
      bfloat16 of the same shape.

    Examples:
      >>> import jax
      >>> from lowrank_optax import quantization
      >>> x = jax.numpy.full((1000,), 1 + 2.0**-9)
      >>> y = quantization.stochastic_round_to_bfloat16(x, jax.random.key(0))
      >>> sorted({float(v) for v in y})
      [1.0, 1.0078125]
    """
    x = jnp.asarray(x).astype(jnp.float32)
    noise = jax.random.bits(key, x.shape, jnp.uint16)
    return round_to_bfloat16(x, noise.astype(jnp.uint32))


def round_to_bfloat16(x: Array, noise: UInt32[Array, "..."]) -> BFloat16[Array, "..."]:
    """Returns the same of 16 random bits per number, given in place of a key."""
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = ((bits + noise) >> 16).astype(jnp.uint16)
    down = (bits >> 16).astype(jnp.uint16)
    # A carry out of the largest exponent would make an infinity.
    kept = jnp.where((up & _EXPONENT) == _EXPONENT, down, up)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    # Cut to its upper half, a NaN with bits in the lower half alone would become an
    # infinity. A cast keeps it a NaN.
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def round_to_float16(x: Array, noise: UInt32[Array, "..."]) -> Float16[Array, "..."]:
    """Rounds to one of the two nearest float16, by 16 random bits per number.

    Without bias, as ``round_to_bfloat16`` does, also among the small numbers that have
    fewer than 11 digits.
    """
    x = x.astype(jnp.float32)
    _, exponent = jnp.frexp(x)
    # Numbers in [2^(e-1), 2^e) are 2^(e-11) apart, the smallest ones 2^-24.
    exponent = jnp.clip(exponent - 11, -24, 5)
    draws = noise.astype(jnp.float32) * jnp.float32(2.0**-16)
    nearby = jnp.ldexp(round_with(jnp.ldexp(x, -exponent), draws), exponent)
    largest = jnp.float32(jnp.finfo(jnp.float16).max)
    kept = jnp.clip(nearby, -largest, largest)
    return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.float16)


def dither(seeds: Sequence[Any], shape: Sequence[int], first: Any = 0) -> Array:
    """Returns 16 pseudorandom bits per number, a hash of the seeds and its place.

    A tenth of the arithmetic of ``jax.random.bits``, so that it vanishes behind the
    reading and writing of what is rounded. Good enough to round with, and no more.

    Args:
      seeds: integers.
      shape: of the numbers.
      first: the place of the first one; the others follow in row-major order.

    Returns:
      Integers below 2^16, ``uint32[*shape]``.
    """
    seed = jnp.uint32(0)
    for number in seeds:
        seed = _hash(seed ^ jnp.asarray(number, jnp.uint32))
    place, stride = jnp.asarray(first, jnp.uint32), 1
    # Axis by axis, so that a sharded array is rounded where it lies.
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
        place, stride = place + along * jnp.uint32(stride), stride * shape[axis]
        stride %= 1 << 32
    return _hash(_hash(place) ^ seed) >> 16


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Mixes 32 bits (Wellons' lowbias32, in the public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
