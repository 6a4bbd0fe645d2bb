"""``float8``: blocks of 8-bit floats with a float32 scale."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.quantization import scaling
from lowrank_optax.quantization._protocol import Codec
from lowrank_optax.quantization.blocks import Cut

_NAMES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclasses.dataclass(frozen=True)
class float8(Codec):
    r"""8-bit floats, scaled so that a block's largest entry is the format's largest.

    For a block ``x`` with ``a = max|x|`` and a format with the largest number F (448 in
    e4m3, 57344 in e5m2)::

        code = float8(F x / a)      to the nearest, ties to even
        x'   = (code / F) a

    The stored scale is ``a`` itself, which float32 holds whatever the size of x.
    Nothing overflows, so no code is an infinity or NaN. An entry is off by at most 2^-4
    (e5m2: 2^-3) of itself, or by 2.2e-6 a (1.4e-10 a) if it is smaller than the
    format's normal numbers. An array of N elements takes ``N + 4 ceil(N / block)``
    bytes.

    Args:
      dtype: "e4m3" (three bits of mantissa, five decades), "e5m2" (two bits, nine
        decades), or the JAX dtype of either.
      block: elements per scale.
      blocks: "last" or "flat", see ``Codec``.
      keep_nonzero: an entry that is not zero never gets a code of 0 but the format's
        smallest number with its sign. None for False, but True where
        ``lro.quantize_state`` stores a second moment.

    Raises:
      TypeError: if ``block`` is not a Python int.
      ValueError: if the dtype is another one, or ``block`` or ``blocks`` out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import quantization
      >>> codec = quantization.float8("e4m3")
      >>> encoded = codec.encode(jnp.array([0.25, 1e30]))
      >>> codec.decode(encoded, (2,)).tolist() == [0.0, jnp.float32(1e30)]
      True

    References:
      Micikevicius et al., FP8 Formats for Deep Learning (2022),
      https://arxiv.org/abs/2209.05433
    """

    dtype: Any = "e4m3"
    block: int = 256
    blocks: str = "last"
    keep_nonzero: bool | None = None

    def __post_init__(self):
        """Checks the format and the numbers that fix shapes."""
        _ = self.cut
        name = self.dtype if isinstance(self.dtype, str) else jnp.dtype(self.dtype).name
        name = _NAMES.get(name, name)
        _checks.choice("dtype", name, tuple(_NAMES.values()))
        object.__setattr__(self, "dtype", name)

    @property
    def cut(self) -> Cut:
        """Where the blocks lie."""
        return Cut(self.block, self.blocks)

    @property
    def code_dtype(self) -> Any:
        """The format."""
        return jnp.dtype(self.dtype)

    def fit(self, x: Array) -> tuple[Array, Any]:
        """Returns scales."""
        return scaling.absmax(x), ()

    def code(self, x: Array, scale: Array, zero: Any, draws: Array | None) -> Array:
        """Returns the nearest codes."""
        del zero, draws
        format_ = jnp.finfo(self.code_dtype)
        # At most the format's largest number: e4m3 has no infinity to overflow to.
        codes = scaling.normalized(x, scale) * jnp.float32(format_.max)
        if self.keep_nonzero:
            least = jnp.float32(format_.smallest_subnormal)
            signed = jnp.where(scaling.is_negative(x), -least, least)
            lost = scaling.is_nonzero(x) & (jnp.abs(codes) < least)
            codes = jnp.where(lost, signed, codes)
        return codes.astype(self.code_dtype)

    def value(self, codes: Array, scale: Array, zero: Any) -> Array:
        """Returns ``(code / F) scale``."""
        del zero
        most = jnp.float32(jnp.finfo(self.code_dtype).max)
        # Correctly rounded, so that F / F is 1 and a block's largest entry comes back
        # exact.
        return scaling.divided(codes.astype(jnp.float32), most) * scale
