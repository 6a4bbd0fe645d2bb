"""``symmetric``: even steps about zero, one bfloat16 step per group."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.quantization import scaling
from lowrank_optax.quantization._protocol import Codec
from lowrank_optax.quantization.blocks import Cut
from lowrank_optax.quantization.rounding import round_with

_TINY = np.float32(2.0**-126)  # a smaller step is flushed to zero
_SLACK = 16  # float32 spacings: a decoded largest entry keeps its group's step


@dataclasses.dataclass(frozen=True)
class symmetric(Codec):
    r"""Even steps about zero, one step per group, stored in bfloat16.

    For a group ``x`` and ``h = 2^(bits - 1) - 1``, that is 7 or 127::

        s  = max|x| / h            rounded up to a bfloat16
        q  = round(x / s)          half to even; -h..h
        x' = q s

    so that ``|x - x'| <= s / 2``, zeros are exact, and nothing is clipped: rounded at
    random with a key, the mean of x' is x. The stored code is ``q + h + 1``; those of 4
    bits lie two to a byte. N elements take ``N bits / 8 + 2 ceil(N / group)`` bytes,
    half the overhead of float32 scales. Made for activations, whose bytes are read
    once.

    *Entries that are not finite are not hidden*: a group that has one decodes to NaN.
    A group whose step is below 1.2e-38 decodes to zeros.

    Args:
      bits: 4 or 8.
      group: elements per step.
      blocks: "last" or "flat", see ``Codec``.
      keep_nonzero: an entry that is not zero never gets the code of 0 but one step with
        its sign. None for False, but True where ``lro.quantize_state`` stores a second
        moment. Rounding at random is without bias only if it is off.

    Raises:
      TypeError: if ``group`` is not a Python int.
      ValueError: if ``bits``, ``group`` or ``blocks`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import quantization
      >>> codec = quantization.symmetric(bits=4)
      >>> encoded = codec.encode(jnp.array([-7.0, 2.2, 0.0, 3.5]))
      >>> codec.decode(encoded, (4,)).tolist()
      [-7.0, 2.0, 0.0, 4.0]
      >>> codec.nbytes((1024, 4096)) / 4096 / 1024
      0.515625
    """

    bits: int = 4  # pyright: ignore[reportIncompatibleMethodOverride]
    group: int = 128
    blocks: str = "last"
    keep_nonzero: bool | None = None

    stochastic = True
    subtractive = True
    scale_dtype = jnp.bfloat16

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
    def zero_code(self) -> int:
        """128, or two nibbles of 8."""
        return self._zero if self.bits == 8 else self._zero * 17

    @property
    def _zero(self) -> int:
        return 2 ** (self.bits - 1)

    def fit(self, x: Array) -> tuple[Array, Any]:
        """Returns steps."""
        # Not `scaling.absmax`: NaN and infinities must reach the step, and by the step
        # the whole group.
        most = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0)
        return _bfloat16_up(most / (self._zero - 1)).astype(self.scale_dtype), ()

    def code(self, x: Array, scale: Array, zero: Any, draws: Array | None) -> Array:
        """Returns codes, those of 4 bits not yet packed."""
        del zero
        levels = self._zero - 1
        # A step of 0 decodes to 0 all the same.
        q = x * (1 / jnp.maximum(scale.astype(jnp.float32), _TINY))
        q = jnp.round(q) if draws is None else round_with(q, draws)
        if self.keep_nonzero:
            q = scaling.unit_from_zero(q, x)
        # The step may be too small by the slack, and a draw could then round the
        # largest entry up to h + 1.
        return (jnp.clip(q, -levels, levels) + self._zero).astype(jnp.uint8)

    def value(self, codes: Array, scale: Array, zero: Any) -> Array:
        """Returns ``q s``."""
        del zero
        q = codes.astype(jnp.float32) - self._zero
        most = jnp.finfo(jnp.float32).max  # h s may lie a little above max|x|
        return jnp.clip(q * scale.astype(jnp.float32), -most, most)


def _bfloat16_up(size: Array) -> Array:
    """Rounds magnitudes up to bfloat16; NaN if not finite, 0 if too small.

    A bfloat16 is the upper half of a float32; a lower half above the slack carries.
    There are no arrays of constants: a loop around this would hold them in memory.
    """
    bits = jax.lax.bitcast_convert_type(size, jnp.uint32)
    up = (bits + np.uint32(0xFFFF - _SLACK)) & np.uint32(0xFFFF0000)
    out = jax.lax.bitcast_convert_type(up, jnp.float32)
    out = out * (size >= _TINY).astype(out.dtype)
    return jnp.where(jnp.isfinite(size), out, size * jnp.nan)
