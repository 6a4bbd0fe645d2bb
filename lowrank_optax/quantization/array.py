"""``QuantizedArray``: codes and scales that know their codec, in an array's place."""

import collections
import copyreg
import functools
import math
import threading
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.quantization._protocol import Codec, Encoded


class _Kind(type):
    """The class of the classes below, none of which a module has by name."""


class QuantizedArray(metaclass=_Kind):
    """Stands in an array's place in a tree; its leaves are the arrays it is made of.

    It is a named tuple of arrays, which every software that saves states takes apart by
    field and puts together by class. So codec and shape belong to the class: there is
    one for every pair of them, and the array can be decoded wherever it is met. Leading
    axes may be added or taken away, as ``jax.vmap`` and ``jax.lax.map`` do. It is made
    by ``quantize``.

    Attributes:
      codes: see ``Encoded``, like scales and zeros.
      scales: one per block.
      zeros: one per block; a field where the codec has them, and else ``()``.
      codec: the one that encoded it.
      tail: the last two sizes of the array (the only one of a vector).
    """

    __slots__ = ()

    # The named tuple that a class below is made of has these, and so they are not
    # assigned here.
    codes: Any
    scales: Any
    zeros: Any
    codec: Codec
    tail: tuple[int, ...]
    _fields: tuple[str, ...]
    _replace: Any
    __iter__: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array behind it."""
        # Only the last two sizes are known: `jax.vmap` changes the others silently.
        batch = self.codes.ndim - len(self.codec.code_shape(self.tail))
        return (*self.codes.shape[:batch], *self.tail)

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of its entries."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype that it is decoded to."""
        return jnp.dtype(jnp.float32)

    def decode(self, draws: Any = None) -> Array:
        """Returns the array, in float32; ``draws`` as in ``Codec.decode``."""
        encoded = Encoded(self.codes, self.scales, self.zeros)
        if draws is None:  # which a codec of your own need not know of
            return self.codec.decode(encoded, self.shape)
        return self.codec.decode(encoded, self.shape, draws)

    def encode(self, x: Array, key: Any = None) -> "QuantizedArray":
        """Returns another array of the same shape and codec."""
        return quantize(x, self.codec, key)

    def with_tail(self, tail: tuple[int, ...]) -> "QuantizedArray":
        """Returns the same codes as those of an array with other last sizes."""
        return _restored(self.codec, tail, *self)

    def __reduce__(self) -> Any:
        """Tells ``pickle`` what it is made of."""
        return _restored, (self.codec, self.tail, *self)


_LOCK = threading.Lock()


def _class(codec: Codec, tail: tuple[int, ...]) -> Any:
    with _LOCK:  # two classes for one pair would be two structures to JAX
        return _class_of(codec, tail)


@functools.cache
def _class_of(codec: Codec, tail: tuple[int, ...]) -> Any:
    fields = ["codes", "scales", "zeros"] if codec.has_zeros else ["codes", "scales"]
    known = {"codec": codec, "tail": tail, "__slots__": (), "__module__": __name__}
    if not codec.has_zeros:
        known["zeros"] = ()
    base = collections.namedtuple("QuantizedArray", fields)
    return _Kind("QuantizedArray", (QuantizedArray, base), known)


def _found(kind: Any) -> Any:
    """Tells ``pickle``, of a tree's structure too, how to find a class again."""
    return (
        (_class, (kind.codec, kind.tail))
        if hasattr(kind, "codec")
        else "QuantizedArray"
    )


copyreg.pickle(_Kind, _found)  # pyright: ignore[reportArgumentType]


def _restored(codec: Codec, tail: tuple[int, ...], *fields: Any) -> Any:
    return _class(codec, tuple(tail))(*fields)


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
    fields = (codes, scales, zeros) if codec.has_zeros else (codes, scales)
    return _restored(codec, x.shape[-2:], *fields)


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is a ``QuantizedArray``."""
    return isinstance(node, QuantizedArray)


def dequantize(node: Any) -> Any:
    """Decodes a ``QuantizedArray``; anything else stays."""
    return node.decode() if is_quantized(node) else node
