"""``split``: a float32 as a bfloat16 and a small integer beside it, and ``join``.

The integer counts fractions of half a unit in the last place of the bfloat16, which is
as far as rounding to the nearest can be off::

    low  = bfloat16(x)                            to the nearest, ties to even
    code = round((x - low) / (ulp(low) / 2) * M)  halves away from zero
    x'   = low + code / M * ulp(low) / 2          to the nearest float32

with M = 127 for int8 and 32767 for int16, and ``ulp(low)`` that of low's own exponent.
Everything is computed on the bits as integers: next to a bfloat16 floats lie evenly, so
that their distance is a difference of their bits. No sum is rounded on the way, and no
backend's flush of subnormal numbers takes part.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, UInt32

CORRECTIONS = {"int8": jnp.int8, "int16": jnp.int16}

_MAGNITUDE = 0x7FFFFFFF
_INFINITE = 0x7F800000
_HALF_ULP = 15  # half a unit of a bfloat16 is 2^15 float32 of the same exponent


def split(
    x: Float[Array, "..."], dtype: Any
) -> tuple[BFloat16[Array, "..."], Int[Array, "..."]]:
    """Returns the nearest bfloat16 and what it is off by.

    Put together again, a number is off by half a code at most, ``2^-8 / (2 M)`` of the
    power of two not above ``low`` and 1.54e-5 with int8; with int16, whose codes lie a
    little wider apart than float32, by one unit in the last place of a float32.

    Args:
      x: floats of any shape; computed in float32. What no bfloat16 is near becomes an
        infinity, as in a cast.
      dtype: of the integers, int8 or int16.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import quantization
      >>> low, code = quantization.split(jnp.float32(1.003), jnp.int8)
      >>> float(low), int(code), round(float(quantization.join(low, code)), 5)
      (1.0, 98, 1.00301)
    """
    x = x.astype(jnp.float32)
    low = nearest_bfloat16(x)
    return low, code_of(x, low, dtype)


def join(low: BFloat16[Array, "..."], code: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns the float32 that ``split`` made them of, up to its error."""
    bits = _bits(low.astype(jnp.float32))
    size = _magnitude(bits)
    # Away from zero with the sign of the bfloat16, towards zero against it.
    outward = jnp.where(_is_negative(bits), -1, 1) * jnp.sign(code.astype(jnp.int32))
    count = jnp.abs(code.astype(jnp.int32))
    most = int(jnp.iinfo(code.dtype).max)
    # Nearest: `most` is odd, so that there are no ties.
    steps = ((count << _shift(size, outward)) + most // 2) // most
    moved = size + outward * steps
    # Only from a zero does a step towards zero lead to the other side.
    sign = (bits >> 31) ^ (moved < 0).astype(jnp.uint32)
    moved = jnp.abs(moved).astype(jnp.uint32) | (sign << 31)
    found = jnp.where(size < _INFINITE, moved, bits)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def code_of(
    x: Float[Array, "..."], low: BFloat16[Array, "..."], dtype: Any
) -> Int[Array, "..."]:
    """Returns what a bfloat16 is off by; the last code if it is not the nearest one."""
    bits, near = _bits(x), _bits(low.astype(jnp.float32))
    size, own = _magnitude(bits), _magnitude(near)
    far = 1 << (_HALF_ULP + 2)  # beyond what any code says, and its sums are small
    across = -(jnp.minimum(size, far) + jnp.minimum(own, far))
    outward = jnp.where((bits ^ near) >> 31 == 0, size - own, across)
    shift = _shift(own, outward)
    most = int(jnp.iinfo(dtype).max)
    steps = jnp.minimum(jnp.abs(outward), 1 << shift)
    # A shift rounds down, so that half of its unit makes halves go away from zero.
    count = (steps * most + (1 << (shift - 1))) >> shift
    sign = jnp.sign(outward) * jnp.where(_is_negative(near), -1, 1)
    finite = (size < _INFINITE) & (own < _INFINITE)
    return jnp.where(finite, sign * count, 0).astype(dtype)


def nearest_bfloat16(x: Float[Array, "..."]) -> BFloat16[Array, "..."]:
    """Rounds float32 to the nearest bfloat16, ties to even.

    A cast, which a compiler would drop where the result becomes a float32 again, and
    whose subnormal results some processors flush.
    """
    bits = _bits(x)
    up = bits + jnp.uint32(0x7FFF) + ((bits >> 16) & 1)
    # A carry must not make an infinity, or a zero, of a NaN.
    kept = jnp.where(_magnitude(bits) > _INFINITE, bits | jnp.uint32(0x400000), up)
    return jax.lax.bitcast_convert_type((kept >> 16).astype(jnp.uint16), jnp.bfloat16)


def same_bits(x: Array, y: Array) -> Array:
    """Whether two bfloat16 are the same, zeros by sign and NaN by kind."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) == (
        jax.lax.bitcast_convert_type(y, jnp.uint16)
    )


def _bits(x: Array) -> UInt32[Array, "..."]:
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _magnitude(bits: Array) -> Int[Array, "..."]:
    return (bits & jnp.uint32(_MAGNITUDE)).astype(jnp.int32)


def _is_negative(bits: Array) -> Array:
    return bits >> 31 == 1


def _shift(size: Array, outward: Array) -> Int[Array, "..."]:
    """Returns the logarithm of the float32 in half a unit, on the side asked for.

    Below a power of two they lie twice as close, but not below the smallest normal one.
    """
    closer = (size & 0x7FFFFF == 0) & (size > 1 << 23) & (outward < 0)
    return _HALF_ULP + closer.astype(jnp.int32)
