"""The dynamic 8-bit maps, and the code of the value nearest to a number.

Levels ``v_0 = 0 < v_1 < ... < 1``: decade i = 0..6 holds ``n_i`` of them, the centers
of ``n_i`` equal cells of ``[0.1, 1]`` times ``10^(i-6)``, and 1 follows. The unsigned
map has ``n_i = 2^(i+1)``, 256 levels. The signed one has ``n_i = 2^i``, 129 levels, and
their negatives without -1: code ``127 + k`` is ``v_k`` and ``127 - k`` is ``-v_k``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

_LOW = np.float32(0.1)
_DECADES = range(7)


def _first(signed: bool) -> int:
    """Cells in the lowest decade; the next ones have twice as many."""
    return 1 if signed else 2


def _centers(n: int) -> np.ndarray:
    """Centers of n cells of [0.1, 1].

    Borders as multiples of a float32 step from the nearer end, rounded once: the last
    digit of the released map depends on it.
    """
    k = np.arange(n + 1)
    step = np.float64((1 - _LOW) / np.float32(n))
    from_low, from_high = np.float64(_LOW) + step * k, 1.0 - step * (n - k)
    borders = np.where(k < (n + 1) // 2, from_low, from_high).astype(np.float32)
    return (borders[:-1] + borders[1:]) / np.float32(2)


@functools.cache
def code_values(signed: bool) -> np.ndarray:
    """Returns the 256 values in ascending order, float32."""
    decades = [
        np.float32(10.0 ** (i - 6)) * _centers(_first(signed) << i) for i in _DECADES
    ]
    ends = np.zeros(1, np.float32), np.ones(1, np.float32)
    levels = np.concatenate([ends[0], *decades, ends[1]])
    negative = -levels[1:-1][::-1] if signed else levels[:0]
    return np.concatenate([negative, levels])


@functools.cache
def borders(signed: bool) -> np.ndarray:
    """Returns 255 numbers: a float32 above the c-th has a code above c.

    Midpoints of neighbors, which go to the lower code themselves, rounded down where
    float32 does not hold them.
    """
    values = code_values(signed)
    exact = (values[:-1].astype(np.float64) + values[1:]) / 2
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-2)), near)


def zero_code(signed: bool) -> int:
    """Returns the code of 0."""
    return 127 if signed else 0


def nearest(q: Float[Array, "..."], signed: bool) -> UInt8[Array, "..."]:
    """Returns the code of the value nearest to q in [-1, 1], midpoints to the lower.

    The decade follows from six comparisons, the nearest border between two cells from a
    product, and which side of it q is on from one exact comparison. Only the last has
    to be exact: near a border both of its sides name that border.
    """
    first = _first(signed)
    size = jnp.abs(q) if signed else jnp.maximum(q, 0)
    cells, slope = jnp.full_like(q, first), jnp.full_like(q, first * 1e6 / 0.9)
    for i in _DECADES[1:]:
        above = size > np.float32(10.0 ** (i - 7))
        cells = jnp.where(above, np.float32(first << i), cells)
        slope = jnp.where(
            above, np.float32((first << i) * 10.0 ** (6 - i) / 0.9), slope
        )
    # The k-th border of a decade is at slope |q| - cells / 9 = k, and below the decade
    # lie as many levels (with zero) as it has cells, less one in the unsigned map.
    below = slope * size + cells * np.float32(8 / 9)
    border = jnp.floor(below + np.float32(0.5 if signed else -0.5)).astype(jnp.int32)
    if signed:
        border = jnp.where(q < 0, 128 - border, 127 + border)
    lower = jnp.clip(border - 1, 0, 254)
    exact = _looked_up(borders(signed), lower)
    return (lower + (q > exact).astype(lower.dtype)).astype(jnp.uint8)


def values(codes: UInt8[Array, "..."], signed: bool) -> Float[Array, "..."]:
    """Returns the values of codes."""
    return _looked_up(code_values(signed), codes.astype(jnp.int32))


def computed_nearest(q: Float[Array, "..."], signed: bool) -> UInt8[Array, "..."]:
    """``nearest`` without a table: within 4 ulps of a midpoint it may take the other.

    Between two levels of a decade the midpoint is the border of their cells, so the
    cell that q lies in is the code. The borders between decades are compared with.
    """
    zero, first = zero_code(signed), _first(signed)
    between = borders(signed)[zero:]  # the k-th level and the next
    size = jnp.abs(q) if signed else q
    cells, slope = jnp.full_like(q, first), jnp.full_like(q, first * 1e6 / 0.9)
    for i in _DECADES[1:]:
        above = size > between[_below(i, signed)]
        cells = jnp.where(above, np.float32(first << i), cells)
        slope = jnp.where(
            above, np.float32((first << i) * 10.0 ** (6 - i) / 0.9), slope
        )
    cell = jnp.floor(slope * size - cells * np.float32(1 / 9))
    # Near a border the product may be rounded into a cell of the neighboring decade.
    # The comparisons have settled the decade, so the clip keeps to it.
    level = jnp.clip(cell, 0, cells - 1) + cells - np.float32(first - 1)
    level = jnp.where(size > between[0], level, 0.0)
    level = jnp.where(size > between[-1], np.float32(255 - zero), level)
    if signed:  # -1 is missing
        level = jnp.where(q < 0, zero - jnp.minimum(level, zero), zero + level)
    return level.astype(jnp.int32).astype(jnp.uint8)


def computed_values(codes: UInt8[Array, "..."], signed: bool) -> Float[Array, "..."]:
    """``values`` without a table, within 4 ulps; 0 and 1 are exact."""
    zero, first = zero_code(signed), _first(signed)
    place = codes.astype(jnp.int32).astype(jnp.float32) - zero
    level = jnp.abs(place)
    # Level k of decade i, which has n cells, is n - first + 1 + k.
    cells, step = jnp.full_like(level, first), jnp.full_like(level, 0.9e-6 / first)
    for i in _DECADES[1:]:
        above = level > _below(i, signed)
        cells = jnp.where(above, np.float32(first << i), cells)
        step = jnp.where(above, np.float32(0.9 * 10.0 ** (i - 6) / (first << i)), step)
    # 0.1 of the decade is a ninth of its cells.
    size = (
        level - (cells - np.float32(first - 0.5)) + cells * np.float32(1 / 9)
    ) * step
    size = jnp.where(level > 0, size, 0.0)
    size = jnp.where(level == 255 - zero, 1.0, size)
    return jnp.where(place < 0, -size, size) if signed else size


def _below(i: int, signed: bool) -> int:
    """Returns the largest level below decade i."""
    return sum(_first(signed) << j for j in range(i))


def _looked_up(table: np.ndarray, index: Int32[Array, "..."]) -> Float[Array, "..."]:
    """Returns ``table[index]``, sharded as the index is, on Explicit meshes too."""
    sharding = jax.typeof(index).sharding
    out = sharding if sharding.mesh.explicit_axes else None
    # Every index is a code of eight bits or was clipped, so a check of bounds would be
    # in vain.
    found = jnp.asarray(table).at[index]
    return found.get(mode="promise_in_bounds", out_sharding=out)
