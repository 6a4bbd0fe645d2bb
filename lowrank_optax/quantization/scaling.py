"""A block's scale, its entries divided by it, and entries that are not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Blocks = Float[Array, "*b k size"]
Scales = Float[Array, "*b k 1"]

_RUN = 16


def absmax(x: Blocks) -> Scales:
    """Returns the largest magnitude among the finite entries, 0 if there are none."""
    return _most(x, lambda v: jnp.abs(_finite(v)), jax.lax.max, _reduced(jax.lax.max))


def finite_range(x: Blocks) -> tuple[Scales, Scales]:
    """Returns the smallest and the largest of zero and the finite entries."""
    low = _most(x, _finite, jax.lax.min, _reduced(jax.lax.min))
    return low, _most(x, _finite, jax.lax.max, _reduced(jax.lax.max))


def signed_absmax(x: Blocks) -> Scales:
    """Returns the finite entry of the largest magnitude; the positive one of two."""

    def larger(a: Array, b: Array) -> Array:
        size, other = jnp.abs(a), jnp.abs(b)
        one = jnp.where(size > other, a, b)
        return jnp.where(size == other, jnp.maximum(a, b), one)

    def whole(v: Array) -> Array:
        low, high = _reduced(jax.lax.min)(v), _reduced(jax.lax.max)(v)
        return jnp.where(-low > high, low, high)

    return _most(x, _finite, larger, whole)


def _reduced(pick: Any) -> Any:
    """Returns the reduction over the last axis and 0."""
    return lambda x: jax.lax.reduce(x, np.float32(0), pick, (x.ndim - 1,))


def _finite(x: Array) -> Array:
    """Returns x with zeros for entries that are not finite."""
    # A comparison with NaN is false, so that one test finds NaN and infinities.
    return jnp.where(jnp.abs(x) < jnp.inf, x, jnp.zeros_like(x))


def _most(x: Blocks, of: Any, pick: Any, whole: Any) -> Scales:
    """Returns ``whole`` of each block of ``of(x)``; ``of(of(v)) == of(v)``.

    XLA on CPU writes ``of(x)``, as large as x, out before it reduces. There runs of 16
    are reduced first, to one of their entries, by a function that contains ``of``,
    which is enough where every run lies inside one shard. Where shards are smaller, XLA
    would join the parts of a run by a collective with that function, which a CPU does
    not have. The parts of a reduction with two results XLA gathers instead and joins by
    any function, so the reduction has a second result without meaning, which the
    barrier keeps.
    """

    def by_runs(x: Array) -> Array:
        runs = x.reshape((*x.shape[:-1], -1, _RUN))

        def both(a: Any, b: Any) -> Any:
            return pick(of(a[0]), of(b[0])), a[1] | b[1]

        # The second result of the docstring.
        nothing = jnp.zeros_like(runs, bool)
        start = np.float32(0), np.False_
        found = jax.lax.reduce((runs, nothing), start, both, (x.ndim,))
        return whole(jax.lax.optimization_barrier(found)[0])

    if x.shape[-1] % _RUN or not x.size:
        return whole(of(x))[..., None]
    return jax.lax.platform_dependent(x, cpu=by_runs, default=lambda x: whole(of(x)))[
        ..., None
    ]


def normalized(x: Float[Array, "..."], scale: Array) -> Float[Array, "..."]:
    """Returns ``x (1 / scale)`` in [-1, 1]; 0 for NaN and where the scale is 0.

    The reciprocal is rounded to float32 before the product, as the released 8-bit
    kernels do. That of 1e38 would be flushed to zero, so large scales are brought into
    range by a power of two, which rounds nothing. Scales whose reciprocal would
    overflow count as 0.
    """
    size = jnp.abs(scale)
    factor = jnp.where(size > 2.0**100, jnp.float32(2.0**-64), 1.0)
    empty = size < 2.0**-126
    # Both sides of a `where` are computed: without the inner one, 0 would divide.
    reciprocal = jnp.where(empty, 0.0, 1.0) / jnp.where(empty, 1.0, scale * factor)
    out = x * factor * reciprocal
    return jnp.clip(jnp.where(jnp.isnan(out), 0.0, out), -1.0, 1.0)


def divided(x: Array, by: Array) -> Array:
    """Returns ``x / by`` correctly rounded, ``by`` broadcast; x itself if not finite.

    XLA turns a division by a broadcast, constants included, into a product with the
    reciprocal, which rounds twice. It leaves one by a choice between two values alone.
    """
    return x / jnp.where(jnp.abs(x) < jnp.inf, by, 1.0)


def is_nonzero(x: Array) -> Bool[Array, "..."]:
    """Whether an entry is a number other than zero.

    Read off the bits, because floats below 1.2e-38 are compared as if they were zero;
    in one comparison, because LLVM makes one of floats of a test of bits for zero.
    """
    size = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7FFFFFFF)
    return size - 1 < np.uint32(0x7F800000)  # zero wraps around, NaN lies above


def is_negative(x: Array) -> Bool[Array, "..."]:
    """Whether an entry's sign bit is set."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) < 0


def away_from_zero(codes: Array, zero: int, x: Array, scale: Array) -> Array:
    """Moves codes that read as zero, of entries that are not, by one to their side.

    Codes ascend with ``x / scale``. If code 0 is zero there are no negative codes, and
    negative entries stay at it.
    """
    below = is_negative(x) != is_negative(scale)
    moves = is_nonzero(x) & (codes == zero)
    if zero == 0:
        return jnp.where(moves & ~below, 1, codes)
    return jnp.where(moves, jnp.where(below, zero - 1, zero + 1), codes)


def unit_from_zero(q: Array, x: Array) -> Array:
    """Moves whole steps that are zero, of entries that are not, by one."""
    one = jnp.where(is_negative(x), jnp.float32(-1), jnp.float32(1))
    return jnp.where(is_nonzero(x) & (q == 0), one, q)
