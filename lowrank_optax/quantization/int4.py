"""``linear_int4``: blocks of 4-bit codes with even steps, two to a byte."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.quantization import scaling
from lowrank_optax.quantization._protocol import Codec
from lowrank_optax.quantization.blocks import Cut
from lowrank_optax.quantization.rounding import round_with


@dataclasses.dataclass(frozen=True)
class linear_int4(Codec):
    r"""4-bit codes with even steps, scaled block by block, two to a byte.

    For a block ``x`` with ``a = max|x|`` and ``h = 7`` (unsigned 15)::

        q  = round(h x / a)      half to even; -7..7, unsigned 0..15
        x' = (q / h) a

    so that ``|x - x'| <= a / (2 h)``; zeros and the largest entry are exact. The stored
    nibble is ``q + 8``, or q if unsigned. An array of N elements takes
    ``N / 2 + 4 ceil(N / block)`` bytes, every block starting on a byte.

    Args:
      block: elements per scale (128, as in Li et al.).
      signed: whether there are negative values; without, they count as 0.
      blocks: "last" or "flat", see ``Codec``.
      keep_nonzero: an entry that is not zero never gets the code of 0 but the smallest
        value on its side. None for ``not signed``, for second moments. Rounding at
        random is without bias only if it is off.

    Raises:
      TypeError: if ``block`` is not a Python int.
      ValueError: if ``block`` or ``blocks`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import quantization
      >>> codec = quantization.linear_int4()
      >>> encoded = codec.encode(jnp.array([-7.0, 2.2, 0.0, 3.5]))
      >>> codec.decode(encoded, (4,)).tolist()
      [-7.0, 2.0, 0.0, 4.0]
      >>> codec.nbytes((1024, 4096)) / 4096 / 1024
      0.53125

    References:
      Li et al., Memory Efficient Optimizers with 4-bit States (2023),
      https://arxiv.org/abs/2309.01507
    """

    block: int = 128
    signed: bool = True
    blocks: str = "last"
    keep_nonzero: Any = None

    stochastic = True

    def __post_init__(self):
        """Checks the numbers that fix shapes, and settles ``keep_nonzero``."""
        _ = self.cut
        if self.keep_nonzero is None and not self.signed:
            object.__setattr__(self, "keep_nonzero", True)

    @property
    def cut(self) -> Cut:
        """Where the blocks lie."""
        return Cut(self.block, self.blocks)

    @property
    def bits(self) -> int:
        """Four."""
        return 4

    @property
    def zero_code(self) -> int:
        """Two nibbles of zero."""
        return self._zero * 17

    @property
    def _zero(self) -> int:
        return 8 if self.signed else 0

    @property
    def _levels(self) -> int:
        return 7 if self.signed else 15

    def fit(self, x: Array) -> tuple[Array, Any]:
        """Returns scales."""
        return scaling.absmax(x), ()

    def code(self, x: Array, scale: Array, zero: Any, draws: Array | None) -> Array:
        """Returns codes, not yet packed."""
        del zero
        q = scaling.normalized(x, scale) * self._levels
        q = jnp.round(q) if draws is None else round_with(q, draws)
        codes = jnp.clip(q + self._zero, 0, 15).astype(jnp.uint8)
        if self.keep_nonzero:
            codes = scaling.away_from_zero(codes, self._zero, x, scale)
        return codes

    def value(self, codes: Array, scale: Array, zero: Any) -> Array:
        """Returns ``((nibble - 8) / h) scale``."""
        del zero
        steps = codes.astype(jnp.float32) - self._zero
        # Correctly rounded, so that h / h is 1 and a block's largest entry comes back
        # exact.
        return scaling.divided(steps, jnp.float32(self._levels)) * scale
