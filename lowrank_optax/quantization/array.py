"""``QuantizedArray``: codes and scales that know their codec, in an array's place."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array

from lowrank_optax.quantization._protocol import Codec, Encoded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """Stands in an array's place in a tree; its leaves are the arrays it is made of.

    Codec and shape are static, so that the array can be decoded wherever it is met.
    Leading axes may be added or taken away, as ``jax.vmap`` and ``jax.lax.map`` do.

    Attributes:
      codes: see ``Encoded``, like scales and zeros.
      scales: one per block.
      zeros: one per block, or ``()``.
      codec: the one that encoded it.
      tail: the last two sizes of the array (the only one of a vector).
    """

    codes: Any
    scales: Any
    zeros: Any
    codec: Codec = dataclasses.field(metadata={"static": True})
    tail: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array behind it."""
        # Only the last two sizes are stored: `jax.vmap` changes the others silently.
        batch = self.codes.ndim - len(self.codec.code_shape(self.tail))
        return (*self.codes.shape[:batch], *self.tail)

    def decode(self) -> Array:
        """Returns the array, in float32."""
        encoded = Encoded(self.codes, self.scales, self.zeros)
        return self.codec.decode(encoded, self.shape)

    def encode(self, x: Array, key: Any = None) -> "QuantizedArray":
        """Returns another array of the same shape and codec."""
        return quantize(x, self.codec, key)


def quantize(x: Array, codec: Codec, key: Any = None) -> QuantizedArray:
    """Encodes an array.

    Args:
      x: the array, of any float dtype.
      codec: how it is stored.
      key: as in ``Codec.encode``.

    Returns:
      Its encoded form.
    """
    codes, scales, zeros = codec.encode(x, key)
    return QuantizedArray(codes, scales, zeros, codec, tuple(x.shape[-2:]))


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is a ``QuantizedArray``."""
    return isinstance(node, QuantizedArray)


def dequantize(node: Any) -> Any:
    """Decodes a ``QuantizedArray``; anything else stays."""
    return node.decode() if is_quantized(node) else node
