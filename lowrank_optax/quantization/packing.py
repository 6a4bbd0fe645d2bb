"""Two 4-bit codes in a byte."""

import jax.numpy as jnp
from jaxtyping import Array, UInt8


def pack(codes: UInt8[Array, "*b k size"], fill: int = 0) -> UInt8[Array, "*b k bytes"]:
    """Packs each block's first half into low nibbles and its second into high ones.

    Halves of a block, not neighbors: they are contiguous, and a shard that holds whole
    blocks holds whole bytes. A block of odd size has ``fill`` in its last high nibble.
    """
    half = (codes.shape[-1] + 1) // 2
    low, high = codes[..., :half], codes[..., half:]
    if high.shape[-1] < half:
        last = jnp.full((*codes.shape[:-1], 1), fill, jnp.uint8)
        high = jnp.concatenate([high, last], -1)
    return low | (high << 4)


def unpack(packed: UInt8[Array, "*b k bytes"], size: int) -> UInt8[Array, "*b k size"]:
    """Inverse of ``pack`` for blocks of ``size`` codes."""
    both = jnp.concatenate([packed & 15, packed >> 4], -1)
    return both[..., :size]
