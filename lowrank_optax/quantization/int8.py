"""``blockwise_int8``: blocks of 8-bit codes of a dynamic map."""

import dataclasses
from typing import Any

from jaxtyping import Array

from lowrank_optax.quantization import dynamic_map, scaling
from lowrank_optax.quantization._protocol import Codec
from lowrank_optax.quantization.blocks import Cut


@dataclasses.dataclass(frozen=True)
class blockwise_int8(Codec):
    r"""8-bit codes of a map whose values lie densest near zero, scaled block by block.

    For a block ``x`` with ``a = max|x|``::

        code = argmin_c |x / a - map[c]|      exact, midpoints to the lower code
        x'   = map[code] a

    The signed map serves gradients and first moments, the unsigned one second moments:
    seven decades of 1, 2, ..., 64 (unsigned 2, ..., 128) values, 0 and 1. An entry is
    off by at most 0.0071 a (unsigned 0.0036 a). A block of zeros has the scale 0 and
    decodes to zeros. An array of N elements takes ``N + 4 ceil(N / block)`` bytes, by
    rows of the last axis or by matrices.

    Args:
      block: elements per scale (256, as in bitsandbytes today; 2048 in the paper).
      signed: whether there are negative values; without, they count as 0.
      blocks: "last" or "flat", see ``Codec``.
      keep_nonzero: an entry that is not zero never gets the code of 0 but the smallest
        value on its side: a second moment that vanishes beside a first moment that does
        not makes Adam's step enormous. None for ``not signed``; False as released.
      signed_scale: the scale is the entry of largest magnitude with its sign. The map
        has 1 but not -1, so with ``a = max|x|`` a negative largest entry loses 0.7 %
        each time it is encoded; so it stays, and decoding and encoding again changes
        nothing. False as released.
      exact: codes and values from tables, as released. False computes them: entries
        within 4 ulps of a midpoint may get the other code, values are off by as much.
        Nothing is looked up then: on a TPU that costs far more than arithmetic does
        (``python -m benchmarks.tpu_aot`` compiles both).

    Raises:
      TypeError: if ``block`` is not a Python int.
      ValueError: if ``block`` or ``blocks`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import quantization
      >>> codec = quantization.blockwise_int8(signed=False)
      >>> encoded = codec.encode(jnp.array([[0.0, 1e-9, 0.5, 2.0]]))
      >>> encoded.codes.tolist(), encoded.scales.tolist()
      ([[0, 1, 148, 255]], [[2.0]])
      >>> codec.nbytes((1024, 4096)) / 4096 / 1024
      1.015625

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2021),
      https://arxiv.org/abs/2110.02861

    Differences from the authors' code:
      * ``blocks="last"`` and, for the unsigned map, ``keep_nonzero`` are the defaults;
        ``blocks="flat"`` and ``keep_nonzero=False`` give the released codes.
      * Codes are those of the exact nearest values; the packaged CPU kernel looks a
        truncated number up and can be several codes off near zero.
      * NaN and infinities do not reach their block's scale.
    """

    block: int = 256
    signed: bool = True
    blocks: str = "last"
    keep_nonzero: Any = None
    signed_scale: bool = False
    exact: bool = True

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
    def zero_code(self) -> int:
        """127 in the signed map, 0 in the unsigned one."""
        return dynamic_map.zero_code(self.signed)

    def fit(self, x: Array) -> tuple[Array, Any]:
        """Returns scales."""
        return (scaling.signed_absmax if self.signed_scale else scaling.absmax)(x), ()

    def code(self, x: Array, scale: Array, zero: Any, draws: Array | None) -> Array:
        """Returns the nearest codes."""
        del zero, draws
        find = dynamic_map.nearest if self.exact else dynamic_map.computed_nearest
        codes = find(scaling.normalized(x, scale), self.signed)
        if self.keep_nonzero:
            codes = scaling.away_from_zero(codes, self.zero_code, x, scale)
        return codes

    def value(self, codes: Array, scale: Array, zero: Any) -> Array:
        """Returns ``map[code] scale``."""
        del zero
        found = dynamic_map.values if self.exact else dynamic_map.computed_values
        return found(codes, self.signed) * scale
