"""``companded``: codes after a curve that spreads out what is near zero."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.quantization import scaling
from lowrank_optax.quantization._protocol import Codec
from lowrank_optax.quantization.blocks import Cut

_FLOOR = 1e-12  # of the released scales


@dataclasses.dataclass(frozen=True)
class companded(Codec):
    r"""Codes in even steps of a curve of the number, scaled block by block.

    For a block ``x`` with ``a = max|x|``, signed (gradients and first moments)::

        n = x / a,   y = 2 n / (1 + |n|),   q = floor(h y + 1/2)       h = 127 or 7
        x' = a y' / (2 - |y'|)              y' = q / h

    and unsigned (second moments)::

        q = floor(h sqrt(x / a) + 1/2)                                 h = 255 or 15
        x' = a (q / h)^2

    A signed entry is off by at most ``a / h`` near the largest one and a fourth of that
    near zero; the root of an unsigned one by at most ``sqrt(a) / (2 h)``. Zeros and the
    largest entry are exact. With a key the two nearest codes are drawn from so that the
    mean of x' is x. An array of N elements takes ``N bits / 8 + 4 ceil(N / block)``
    bytes; 4-bit codes, ``q + 8`` if signed, lie two to a byte.

    Beside ``blockwise_int8``: one curve in place of seven decades, so that entries of a
    tenth of the largest are kept better and those below a hundredth worse, in a third
    of its time on a CPU; ``python -m benchmarks.moment_errors`` compares both.

    Args:
      block: elements per scale.
      bits: 8 or 4.
      signed: whether there are negative values; without, they count as 0.
      blocks: "last" or "flat", see ``Codec``.
      keep_nonzero: an entry that is not zero never gets the code of 0 but the smallest
        value on its side. None for ``not signed``; False as released. Rounding at
        random is without bias only if it is off.
      half_scale: scales in float16, as released, 2 bytes in place of 4, those of
        unsigned blocks as ``sqrt(a)``. It divides by the float32 scale and multiplies
        by the rounded one. Blocks below 3e-8 decode to zeros, as those of second
        moments do at the first steps of gradients below 1e-6 (``b2 = 0.999``), and
        blocks above 65504 to no numbers.

    Raises:
      TypeError: if ``block`` is not a Python int.
      ValueError: if ``block``, ``bits`` or ``blocks`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import quantization
      >>> codec = quantization.companded()
      >>> codec.encode(jnp.array([[0.0, 1.0, -0.5, 0.01]])).codes.tolist()
      [[0, 127, -85, 3]]
      >>> codec.nbytes((1024, 4096)) / 4096 / 1024
      1.0625

    References:
      FlashOptim: Optimizers for Memory Efficient Training (2026),
      https://arxiv.org/abs/2602.23349

    Differences from the authors' code:
      * ``companded(32, blocks="flat", half_scale=True)``, for second moments with
        ``signed=False, keep_nonzero=False``, gives the released codes and scales. By
        default scales are float32 for blocks of 64, in as many bytes, second moments
        never vanish, and blocks lie along the last axis.
    """

    block: int = 64
    signed: bool = True
    blocks: str = "last"
    keep_nonzero: Any = None
    half_scale: bool = False
    bits: int = 8  # pyright: ignore[reportIncompatibleMethodOverride]

    stochastic = True

    def __post_init__(self):
        """Checks what fixes shapes, and settles ``keep_nonzero``."""
        _ = self.cut
        _checks.choice("bits", self.bits, (4, 8))
        _checks.choice("half_scale", self.half_scale, (False, True))
        if self.keep_nonzero is None and not self.signed:
            object.__setattr__(self, "keep_nonzero", True)

    @property
    def cut(self) -> Cut:
        """Where the blocks lie."""
        return Cut(self.block, self.blocks)

    @property
    def code_dtype(self) -> Any:
        """int8 for signed codes of 8 bits, else uint8."""
        return jnp.dtype(jnp.int8 if self.signed and self.bits == 8 else jnp.uint8)

    @property
    def zero_code(self) -> int:
        """0, or two nibbles of 8."""
        return self._zero * 17

    @property
    def _zero(self) -> int:
        return 8 if self.signed and self.bits == 4 else 0

    @property
    def _levels(self) -> int:
        return 2 ** (self.bits - self.signed) - 1

    @property
    def scale_dtype(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """float32, or float16."""
        return jnp.float16 if self.half_scale else jnp.float32

    def fit(self, x: Array) -> tuple[Array, Any]:
        """Returns scales in float32, before they are stored."""
        scale = scaling.absmax(x)
        if not self.half_scale:
            return scale, ()
        return jnp.maximum(scale if self.signed else jnp.sqrt(scale), _FLOOR), ()

    def code(self, x: Array, scale: Array, zero: Any, draws: Array | None) -> Array:
        """Returns the nearest codes."""
        del zero
        rooted = not self.signed and self.half_scale
        size = jnp.sqrt(jnp.maximum(x, 0)) if rooted else x
        # Each quotient is used once: XLA writes out a division that has two users.
        size = jnp.where(jnp.isnan(size), 0.0, size)
        n = scaling.divided(size, jnp.where(scale > 0, scale, 1.0))
        n = jnp.clip(n, -1.0, 1.0)
        if self.signed:
            place = self._levels * (2 * n / (1 + jnp.abs(n)))
        else:
            n = n if rooted else jnp.sqrt(jnp.maximum(n, 0))
            place = self._levels * n
        if draws is None:
            q = jnp.floor(place + 0.5)
        else:
            q = self._drawn(place, draws)
        if self.keep_nonzero:
            q = scaling.unit_from_zero(q, x) if self.signed else self._raised(q, x)
        codes = q.astype(jnp.int32) + self._zero
        return codes.astype(self.code_dtype)

    def _drawn(self, place: Array, draws: Array) -> Array:
        """Returns the code below or above, so that the mean of the values is right."""
        low = jnp.floor(place)
        below, here, above = map(self._number, (low, place, low + 1))
        return low + (draws * (above - below) < here - below).astype(low.dtype)

    def _raised(self, q: Array, x: Array) -> Array:
        moves = scaling.is_nonzero(x) & ~scaling.is_negative(x) & (q == 0)
        return jnp.where(moves, 1.0, q)

    def _number(self, q: Array) -> Array:
        """Returns what a code stands for in a block of scale 1."""
        y = scaling.divided(q, jnp.float32(self._levels))
        return y / (2 - jnp.abs(y)) if self.signed else y * y

    def value(self, codes: Array, scale: Array, zero: Any) -> Array:
        """Returns the numbers that codes stand for."""
        del zero
        scale = scale.astype(jnp.float32)
        q = codes.astype(jnp.float32) - self._zero
        if self.signed or not self.half_scale:
            return self._number(q) * scale
        return jnp.square(scaling.divided(q, jnp.float32(self._levels)) * scale)
