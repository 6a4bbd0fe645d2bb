"""``affine``: even steps between a group's smallest and largest entry."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.quantization import scaling
from lowrank_optax.quantization._protocol import Codec
from lowrank_optax.quantization.blocks import Cut
from lowrank_optax.quantization.rounding import round_with


@dataclasses.dataclass(frozen=True)
class affine(Codec):
    r"""Even steps over each group's range, which always includes zero.

    For a group ``x`` and ``h = 2^bits - 1``::

        lo, hi = min(x, 0), max(x, 0)
        s = (hi - lo) / h
        z = clip(-round(lo / s), 0, h)              round: half to even
        q = clip(round(x / s) + z, 0, h)
        x' = (q - z) s

    Zeros are exact and ``|x - x'| <= s / 2``. With a key ``round(x / s)`` is
    ``floor(x / s) + [u < x / s - floor(x / s)]``: the mean of x' is x, except for
    entries within a step of lo or hi, where the clip can take off up to half a step.
    The codes of 4 bits lie two to a byte. N elements take ``N bits / 8 + 5 ceil(N /
    group)`` bytes: a group has a float32 step and a zero of one byte.

    Args:
      bits: 4 (bases) or 8 (weights).
      group: elements per step (256, as released).
      blocks: "last" or "flat", see ``Codec``.
      keep_nonzero: an entry that is not zero never gets the code of 0 but the next one
        on its side, if the group has one there. None for False, but True where
        ``lro.quantize_state`` stores a second moment. Rounding at random is without
        bias only if it is off.

    Raises:
      TypeError: if ``group`` is not a Python int.
      ValueError: if ``bits``, ``group`` or ``blocks`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import quantization
      >>> codec = quantization.affine(bits=4)
      >>> encoded = codec.encode(jnp.array([-1.0, 0.0, 3.3, 14.0]))
      >>> codec.decode(encoded, (4,)).tolist()
      [-1.0, 0.0, 3.0, 14.0]
      >>> codec.nbytes((1024, 4096)) / 4096 / 1024
      0.51953125

    References:
      Zhang et al., Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
      Low-Rank Gradients (2024), https://arxiv.org/abs/2407.08296

    Differences from the authors' code:
      * The range includes zero. Theirs does not, but their z is clipped all the same:
        a group that lies on one side of zero, such as weights in [0.5, 1], decodes to
        little more than one number. Groups with both signs have the same codes.
      * Steps are not held above ``1e-5 / h``, so groups of tiny numbers survive.
      * 4-bit codes are packed, and a zero is a byte. The last group may be short.
    """

    bits: int = 4  # pyright: ignore[reportIncompatibleMethodOverride]
    group: int = 256
    blocks: str = "last"
    keep_nonzero: bool | None = None

    has_zeros = True
    stochastic = True

    def __post_init__(self):
        """Checks the numbers that fix shapes."""
        _checks.choice("bits", self.bits, (4, 8))
        _checks.positive_int("group", self.group)
        _ = self.cut

    @property
    def cut(self) -> Cut:
        """Where the groups lie."""
        return Cut(self.group, self.blocks)

    @property
    def _levels(self) -> int:
        return 2**self.bits - 1

    def fit(self, x: Array) -> tuple[Array, Array]:
        """Returns steps and zeros."""
        low, high = scaling.finite_range(x)
        # A group of one number, such as a row of a basis of rank 1, has no range of its
        # own: from zero to the number, which is then kept exactly.
        alone = low == high
        low = jnp.where(alone, jnp.minimum(low, 0.0), low)
        high = jnp.where(alone, jnp.maximum(high, 0.0), high)
        scale = self._step(low, high)
        zero = jnp.clip(-jnp.round(low / _divisor(scale)), 0, self._levels)
        return scale, zero.astype(jnp.uint8)

    def code(self, x: Array, scale: Array, zero: Any, draws: Array | None) -> Array:
        """Returns codes, those of 4 bits not yet packed."""
        q = scaling.divided(x, _divisor(scale))
        q = jnp.round(q) if draws is None else round_with(q, draws)
        # NaN becomes the code of 0; the clip takes care of infinities.
        q = jnp.where(jnp.isnan(q), 0.0, q)
        if self.keep_nonzero:
            q = scaling.unit_from_zero(q, x)
        q += zero.astype(jnp.float32)
        return jnp.clip(q, 0, self._levels).astype(jnp.uint8)

    def value(self, codes: Array, scale: Array, zero: Any) -> Array:
        """Returns ``(q - z) s``."""
        return (codes.astype(jnp.float32) - zero.astype(jnp.float32)) * scale

    def _step(self, low: Array, high: Array) -> Array:
        """Returns ``(high - low) / h``, which is finite where the range is not."""
        levels = jnp.float32(self._levels)
        step = scaling.divided(high - low, levels)
        halved = scaling.divided(0.5 * high - 0.5 * low, levels)
        # The difference overflows where both ends are near float32's largest number;
        # that of their halves does not.
        return jnp.where(jnp.isfinite(step), step, 2.0 * halved)


def _divisor(scale: Array) -> Array:
    """Returns the steps, and 1 for those too small to divide by: zeros."""
    return jnp.where(scale > 0, scale, 1.0)
