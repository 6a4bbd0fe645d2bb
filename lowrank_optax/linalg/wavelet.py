"""The discrete wavelet transform along one axis: orthogonal filters, zero boundary.

One level takes ``x`` of length n, padded with zeros, to an approximation and a detail
of ``floor((n + L - 1) / 2)`` coefficients each, L the filter's length::

    a[k] = sum_j h[j] x[2 k + j - (L - 2)]        d[k] = sum_j g[j] x[2 k + j - (L - 2)]

with ``g[j] = (-1)^j h[L - 1 - j]``; the next level does the same to ``a``. The map is
an isometry, so its adjoint is its inverse. Even and odd samples are separate arrays
here and a level is a sum of L shifted ones: no convolution, for Haar (L = 2) two
additions.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

WAVELETS = ("haar", *(f"db{order}" for order in range(1, 11)))


class Bands(NamedTuple):
    """What a transform of ``l`` levels returns.

    Attributes:
      approximation: coarsest band, low-pass at every level.
      details: the l detail bands, coarsest first.
    """

    approximation: Array
    details: tuple[Array, ...]


@functools.cache
def filter_taps(wavelet: str) -> tuple[float, ...]:
    """Returns the low-pass filter h, orthonormal to its shifts by even numbers.

    Daubechies' filter of order N has 2 N taps: the root inside the unit circle of each
    pair of ``sum_k binomial(N - 1 + k, k) ((2 - z - 1/z) / 4)^k``, and N times -1.
    """
    order = 1 if wavelet == "haar" else int(wavelet.removeprefix("db"))
    halfway = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    roots = [-1.0 + 0j] * order
    for y in halfway:
        # y = (2 - z - 1/z) / 4, so z^2 + (4 y - 2) z + 1 = 0, with roots z and 1/z.
        pair = np.roots([1.0, 4.0 * y - 2.0, 1.0])
        roots.append(pair[np.argmin(np.abs(pair))])
    # Roots come in conjugate pairs: an imaginary part is rounding. A sum of sqrt(2)
    # makes the filter orthonormal.
    taps = np.real(np.poly(roots))
    return tuple(float(tap) for tap in taps * math.sqrt(2.0) / taps.sum())


def band_sizes(n: int, level: int, wavelet: str) -> tuple[int, ...]:
    """Returns the length of the input and of the bands of each level, finest first."""
    sizes, taps = [n], len(filter_taps(wavelet))
    for _ in range(level):
        sizes.append((sizes[-1] + taps - 1) // 2)
    return tuple(sizes)


def dwt(x: Array, level: int, wavelet: str = "haar", axis: int = -1) -> Bands:
    """Transforms ``x`` along one axis; level 0 returns it as it is."""
    axis, details = axis % x.ndim, []
    for _ in range(level):
        x, detail = _analyze(x, wavelet, axis)
        details.append(detail)
    return Bands(x, tuple(reversed(details)))


def idwt(bands: Bands, n: int, wavelet: str = "haar", axis: int = -1) -> Array:
    """Inverse (and adjoint) of ``dwt``, ``n`` long."""
    x, details = bands
    axis = axis % x.ndim
    sizes = band_sizes(n, len(details), wavelet)
    for size, detail in zip(sizes[-2::-1], details, strict=True):
        x = _synthesize(x, detail, size, wavelet, axis)
    return x


def lift(
    approximation: Array, n: int, level: int, wavelet: str = "haar", axis: int = -1
) -> Array:
    """Returns ``idwt`` of the approximation alone, all details zero."""
    x, axis = approximation, axis % approximation.ndim
    # Haar's levels without details are one repetition, in a single pass.
    if len(filter_taps(wavelet)) == 2:
        return repeat(x, n, level, axis) * 2.0 ** (-level / 2)
    for size in band_sizes(n, level, wavelet)[-2::-1]:
        x = _synthesize(x, None, size, wavelet, axis)
    return x


def repeat(x: Array, n: int, level: int, axis: int = -1) -> Array:
    """Repeats every coefficient ``2^level`` times and cuts after ``n``."""
    axis = axis % x.ndim
    before, after, times = x.shape[:axis], x.shape[axis + 1 :], 2**level
    wide = jnp.broadcast_to(
        jnp.expand_dims(x, axis + 1), (*before, x.shape[axis], times, *after)
    )
    return _cut(wide.reshape((*before, x.shape[axis] * times, *after)), 0, n, axis)


def _analyze(x: Array, wavelet: str, axis: int) -> tuple[Array, Array]:
    """One level: the approximation and the detail."""
    low, high, taps = _filters(wavelet)
    odd, margin = x.shape[axis] % 2, taps - 2
    # An even length lets a reshape tell even from odd samples.
    even_, odd_ = _polyphase(_pad(x, margin, margin + odd, axis), axis)
    size = (x.shape[axis] + taps - 1) // 2
    terms = [
        (_cut(even_, j, size, axis), _cut(odd_, j, size, axis))
        for j in range(taps // 2)
    ]

    def correlate(h: tuple[float, ...]) -> Array:
        parts = [h[2 * j] * e + h[2 * j + 1] * o for j, (e, o) in enumerate(terms)]
        return functools.reduce(jnp.add, parts)

    return correlate(low), correlate(high)


def _synthesize(
    approximation: Array, detail: Array | None, n: int, wavelet: str, axis: int
) -> Array:
    """The adjoint of ``_analyze``; a detail of None is zero."""
    low, high, taps = _filters(wavelet)
    if taps == 2:
        return _interleave(approximation, detail, n, axis)
    shifts = taps // 2
    pairs = [(approximation, low)] + ([] if detail is None else [(detail, high)])
    size = approximation.shape[axis] + shifts - 1
    padded = [(_pad(x, shifts - 1, shifts - 1, axis), h) for x, h in pairs]

    # x[2 i + phase] = sum_j h[2 j + phase] a[i - j], and likewise g and d
    def samples(phase: int) -> Array:
        parts = [
            h[2 * j + phase] * _cut(x, shifts - 1 - j, size, axis)
            for x, h in padded
            for j in range(shifts)
        ]
        return functools.reduce(jnp.add, parts)

    both = jnp.stack([samples(0), samples(1)], axis + 1)
    shape = (*both.shape[:axis], 2 * size, *both.shape[axis + 2 :])
    return _cut(both.reshape(shape), taps - 2, n, axis)


def _interleave(approximation: Array, detail: Array | None, n: int, axis: int) -> Array:
    """Haar's inverse, ``(a + d, a - d) / sqrt(2)``, without joining two arrays."""
    half = math.sqrt(0.5)
    x = repeat(approximation, n, 1, axis) * half
    if detail is None:
        return x
    shape = [1] * x.ndim
    shape[axis] = n
    signs = jnp.where(jnp.arange(n) % 2 == 0, half, -half).astype(x.dtype)
    return x + repeat(detail, n, 1, axis) * signs.reshape(shape)


def _filters(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    low = filter_taps(wavelet)
    high = tuple((-1) ** j * tap for j, tap in enumerate(reversed(low)))
    return low, high, len(low)


def _polyphase(x: Array, axis: int) -> tuple[Array, Array]:
    """Returns the even and the odd samples."""
    shape = (*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    pairs, before = x.reshape(shape), (slice(None),) * (axis + 1)
    return pairs[(*before, 0)], pairs[(*before, 1)]


def _pad(x: Array, before: int, after: int, axis: int) -> Array:
    if not before and not after:
        return x
    width = [(0, 0)] * x.ndim
    width[axis] = (before, after)
    return jnp.pad(x, width)


def _cut(x: Array, start: int, size: int, axis: int) -> Array:
    if start == 0 and size == x.shape[axis]:
        return x
    return x[(*(slice(None),) * axis, slice(start, start + size))]


# Static, so that `vmap` and loops hand it on where other projectors have an array.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class WaveletBasis:
    """What ``lro.wavelet`` uses in a basis' place: no arrays.

    Attributes:
      level: number of levels.
      wavelet: name of the filter.
    """

    level: int
    wavelet: str

    @property
    def is_haar(self) -> bool:
        """Whether every coefficient belongs to ``2^level`` rows, and they to it."""
        return len(filter_taps(self.wavelet)) == 2
