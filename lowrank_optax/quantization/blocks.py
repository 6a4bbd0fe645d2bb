"""``Cut``: where blocks lie in an array; 4-bit codes of a block, two to a byte."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from lowrank_optax import _checks

Width = Callable[[int], int]


def one(size: int) -> int:
    """The width of scales and zeros, of which a block has one."""
    del size
    return 1


@dataclasses.dataclass(frozen=True)
class Cut:
    """Blocks of consecutive elements along rows; a row's last block may be short.

    With ``rule="last"`` the rows are those of the last axis. With ``rule="flat"`` a row
    is one whole matrix, the last two axes in row-major order. Axes before those are
    batch axes either way; a vector or a scalar is one row. Where ``size`` divides the
    last axis both rules form the same blocks.

    Arrays never grow: a row whose length ``size`` does not divide is taken in two
    pieces, the full blocks and the short one, not padded.

    Args:
      size: elements per block.
      rule: "last" or "flat".
    """

    size: int
    rule: str

    def __post_init__(self):
        """Checks both."""
        _checks.positive_int("block", self.size)
        _checks.choice("blocks", self.rule, ("last", "flat"))

    def row_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns ``(*batch, n)``, rows last, for an array of this shape."""
        if not shape:
            return (1,)
        if self.rule == "flat":
            return (*shape[:-2], math.prod(shape[-2:]))
        return tuple(shape)

    def row_count(self, shape: Sequence[int]) -> int:
        """Returns how many rows an array of this shape has."""
        return math.prod(self.row_shape(shape)[:-1])

    def pieces(self, n: int) -> list[tuple[int, int]]:
        """Returns how a row of n elements is taken: ``(blocks, block size)`` each."""
        full, rest = divmod(n, self.size)
        found = [(full, self.size), (1, rest)]
        # One empty block for an empty row, so that `join` has something to join.
        return [(count, size) for count, size in found if count and size] or [(1, 0)]

    def length(self, n: int, width: Width = one) -> int:
        """Returns the length of a row of n elements with ``width(size)`` per block."""
        return sum(count * width(size) for count, size in self.pieces(n))

    def split(self, rows: Array, n: int, width: Width) -> list[Array]:
        """Returns ``[*batch, blocks, width]`` for each piece of rows of n elements."""
        out, start = [], 0
        for count, size in self.pieces(n):
            stop = start + count * width(size)
            piece = rows[..., start:stop]
            out.append(piece.reshape((*rows.shape[:-1], count, width(size))))
            start = stop
        return out

    def spread(self, per_block: Array, n: int) -> Array:
        """Returns ``[*batch, n]``: each block's number for each of its entries."""
        # A short block's numbers are spread like those of a full one, then cut off.
        *batch, count = per_block.shape
        size = min(self.size, n)
        wide = jnp.broadcast_to(per_block[..., None], (*batch, count, size))
        return wide.reshape((*batch, count * size))[..., :n]

    def join(self, pieces: Sequence[Array]) -> Array:
        """Inverse of ``split``."""
        rows = [p.reshape((*p.shape[:-2], p.shape[-2] * p.shape[-1])) for p in pieces]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, -1)


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
