"""`rotate` turns heads by their positions; `find_segments` has those of packed rows.

Letters in names: B rows, S positions, N heads, H head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RopeScaling(NamedTuple):
    """Llama 3's slower rotations, for texts longer than `original_length`.

    A pair that turns fewer than `low` times within that length turns `factor` times
    slower, one that turns more than `high` times as before, and between them the change
    is linear in the number of turns.
    """

    factor: float
    low: float
    high: float
    original_length: int


class Segments(NamedTuple):
    """What a row's documents mean to a layer: each is a text of its own."""

    positions: jax.Array  # [B, S], from 0 in every document
    mask: jax.Array  # [B, 1, S, S], whether two positions are of one document


def rope_frequencies(
    half: int, base: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Radians per position of a head's pairs, `[half]` in float32."""
    # In float64 first: an error of one part in ten million is 0.01 at position 100,000.
    frequency = base ** (-np.arange(half) / half)
    if scaling is not None:
        turns = scaling.original_length * frequency / (2 * np.pi)
        share = (turns - scaling.low) / (scaling.high - scaling.low)
        share = np.clip(share, 0, 1)
        frequency = frequency * (share + (1 - share) / scaling.factor)
    return frequency.astype(np.float32)


def rotate(
    x_BxSxNxH: jax.Array,
    base: float,
    scaling: RopeScaling | None = None,
    positions_BxS: jax.Array | None = None,
) -> jax.Array:
    """Rotary position embedding; the two halves of a head are the pairs."""
    frequency = rope_frequencies(x_BxSxNxH.shape[-1] // 2, base, scaling)
    if positions_BxS is None:
        positions_BxS = jnp.arange(x_BxSxNxH.shape[1])
    # In float32: in bfloat16 late positions would share their angles.
    angle = positions_BxS.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    a, b = jnp.split(x_BxSxNxH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BxSxNxH.dtype)


def find_segments(segments_BxS: jax.Array) -> Segments:
    """Positions and mask of packed rows; a document is a run of equal numbers.

    Padding, a run of zeros, is a document like another: what it sees reaches nobody.
    """
    index = jnp.arange(segments_BxS.shape[1])
    first = index == 0
    starts = first | (segments_BxS != jnp.roll(segments_BxS, 1, axis=1))
    run = jnp.cumsum(starts, axis=1)
    begin = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return Segments(index - begin, (run[:, :, None] == run[:, None, :])[:, None])
