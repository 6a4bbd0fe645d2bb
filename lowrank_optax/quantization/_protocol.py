"""The interface of a codec: an array as codes with a scale per block, and back."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.quantization import explicit, packing
from lowrank_optax.quantization.blocks import Cut
from lowrank_optax.quantization.rounding import uniform


class Encoded(NamedTuple):
    """An encoded array; every field is an array, or ``()`` for none.

    Attributes:
      codes: small integers or float8. Codes of 8 bits have the array's own shape, so
        they can be sharded as it is; packed ones are bytes ``[*rows, bytes]``.
      scales: float32 ``[*rows, blocks]``.
      zeros: uint8 ``[*rows, blocks]``, the code of 0.0 where blocks differ in it.
    """

    codes: Any
    scales: Any
    zeros: Any = ()


@dataclasses.dataclass(frozen=True)
class Codec:
    """How an array is stored in fewer bytes: static, hashable, without arrays.

    Blocks of consecutive elements share a scale. ``blocks="last"`` cuts every row of
    the last axis into blocks of its own: codes and scales can be sharded like the
    array, along all of its axes. ``blocks="flat"`` runs over the row-major order of
    each matrix (the last two axes), as the released codes do. Both form the same blocks
    where the block divides the last axis; leading axes are batch axes.

    Everything is computed in float32. Entries that are not finite do not reach their
    block's scale: NaN becomes 0, and plus or minus infinity the last code on its side
    (``symmetric``, made for activations, decodes their whole group to NaN instead).
    Numbers below 1.2e-38 in magnitude count as zero where the backend flushes them.

    A subclass finds the scales of blocks (``fit``) and says what the code of an entry
    is (``code``) and what that stands for (``value``), given its block's scale.
    """

    has_zeros = False  # whether blocks differ in the code of 0.0
    stochastic = False  # whether encode can round at random
    scale_dtype = jnp.float32

    @property
    def cut(self) -> Cut:
        """Where the blocks lie."""
        raise NotImplementedError

    @property
    def bits(self) -> int:
        """Bits per code: 8, or 4 for two to a byte."""
        return 8

    @property
    def code_dtype(self) -> Any:
        """The dtype of the stored codes."""
        return jnp.dtype(jnp.uint8)

    @property
    def zero_code(self) -> int:
        """The stored byte of zeros, in a block of zeros."""
        return 0

    @property
    def empty_code(self) -> int:
        """The code of 0.0 in a block of zeros; of 4-bit codes, one of the two."""
        return self.zero_code & 15 if self.bits == 4 else self.zero_code

    def fit(self, x: Array) -> tuple[Array, Any]:
        """Returns scales and zeros ``[..., k, 1]`` of blocks ``[..., k, size]``."""
        raise NotImplementedError

    def code(self, x: Array, scale: Array, zero: Any, draws: Array | None) -> Array:
        """Returns the codes of entries, given uniform draws or None."""
        raise NotImplementedError

    def value(self, codes: Array, scale: Array, zero: Any) -> Array:
        """Returns what codes stand for, in float32."""
        raise NotImplementedError

    def encode(self, x: Any, key: Any = None) -> Encoded:
        """Encodes an array of any float dtype.

        Args:
          x: the array.
          key: None rounds to the nearest; a PRNG key, or draws from [0, 1) of x's
            shape, rounds at random without bias, if the codec is ``stochastic``.

        Raises:
          ValueError: if a key is given to a codec that rounds to the nearest only.
        """
        x = jnp.asarray(x).astype(jnp.float32)
        if key is not None:
            self._check_stochastic()
        axes = explicit.axes_of(x)
        if axes is None:
            return Encoded(*self._parts(x, key))
        blocks, codes = self._block_shape(x.shape), self.code_shape(x.shape)
        scales = explicit.rows_of(x, axes, len(blocks) - 1, blocks)
        if self.bits != 8:
            axes = explicit.rows_of(x, axes, len(codes) - 1, codes)
        out = [axes, scales, scales] if self.has_zeros else [axes, scales]
        return Encoded(*explicit.with_axes(self._parts, x, out, x, key))

    def _parts(self, x: Array, key: Any) -> tuple[Any, ...]:
        """Returns codes, scales and, if there are any, zeros."""
        rows = x.reshape(self.cut.row_shape(x.shape))
        draws = None
        if key is not None:
            draws = uniform(key, x.shape).reshape(rows.shape)
        fits = [self.fit(piece) for piece in self._pieces(rows)]
        scales = self.cut.join([scale for scale, _ in fits])
        zeros = self.cut.join([zero for _, zero in fits]) if self.has_zeros else ()
        # Entry by entry, not block by block: what follows is one pass, and where the
        # last block is short nothing is joined.
        spread = self._spread(scales, zeros, rows.shape[-1])
        codes = self.code(rows, *spread, draws)
        if self.bits == 4:
            packed = [packing.pack(p, self.empty_code) for p in self._pieces(codes)]
            codes = self.cut.join(packed)
        codes = codes.reshape(self.code_shape(x.shape))
        return (codes, scales, zeros) if self.has_zeros else (codes, scales)

    def decode(self, encoded: Encoded, shape: Sequence[int]) -> Array:
        """Returns the array of this shape, in float32.

        Raises:
          ValueError: if the codes are not those of an array of this shape.
        """
        shape, encoded = tuple(shape), jax.tree.map(jnp.asarray, encoded)
        if encoded.codes.shape != self.code_shape(shape):
            raise ValueError(
                f"`shape` must be that of the array that was encoded: {shape} has "
                f"codes of shape {self.code_shape(shape)}, got {encoded.codes.shape}."
            )
        axes = explicit.axes_of(encoded.codes)
        if axes is None:
            return self._array(encoded, shape)
        if self.bits != 8:
            batch = encoded.codes.ndim - 1
            axes = explicit.rows_of(encoded.codes, axes, batch, shape)

        def array(encoded: Encoded) -> tuple[Array]:
            return (self._array(encoded, shape),)

        found = explicit.with_axes(array, encoded.codes, [axes], encoded)
        return found[0]

    def _array(self, encoded: Encoded, shape: tuple[int, ...]) -> Array:
        rows = self.cut.row_shape(shape)
        codes, n = encoded.codes, rows[-1]
        if self.bits == 4:
            sizes = [size for _, size in self.cut.pieces(n)]
            pieces = zip(self.cut.split(codes, n, self._width), sizes, strict=True)
            codes = self.cut.join([packing.unpack(*piece) for piece in pieces])
        spread = self._spread(encoded.scales, encoded.zeros, n)
        return self.value(codes.reshape(rows), *spread).reshape(shape)

    def _spread(self, scales: Array, zeros: Any, n: int) -> tuple[Array, Any]:
        """Returns scale and zero of every entry of rows of n."""
        return (
            self.cut.spread(scales, n),
            self.cut.spread(zeros, n) if self.has_zeros else (),
        )

    def zeros(self, shape: Sequence[int]) -> Encoded:
        """Returns what zeros of this shape are encoded as."""
        blocks = self._block_shape(shape)
        return Encoded(
            jnp.full(self.code_shape(shape), self.zero_code, self.code_dtype),
            jnp.zeros(blocks, self.scale_dtype),
            jnp.zeros(blocks, jnp.uint8) if self.has_zeros else (),
        )

    def nbytes(self, shape: Sequence[int]) -> int:
        """Returns the bytes that an array of this shape is stored in.

        One per code, or one per two, and per block those of its scale (four, if that
        is a float32) and one for its zero if it has one.
        """
        each = jnp.dtype(self.scale_dtype).itemsize + self.has_zeros
        blocks = math.prod(self._block_shape(shape))
        return math.prod(self.code_shape(shape)) + blocks * each

    def _pieces(self, rows: Array) -> list[Array]:
        return self.cut.split(rows, rows.shape[-1], lambda size: size)

    def _width(self, size: int) -> int:
        """Bytes that the codes of a block take; every block starts on a byte."""
        return (size * self.bits + 7) // 8

    def _block_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        *batch, n = self.cut.row_shape(shape)
        return (*batch, self.cut.length(n))

    def code_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the codes of an array of this shape."""
        if self.bits == 8:
            return tuple(shape)
        *batch, n = self.cut.row_shape(shape)
        return (*batch, self.cut.length(n, self._width))

    def _check_stochastic(self):
        if not self.stochastic:
            raise ValueError(
                f"{type(self).__name__} rounds to the nearest and takes no `key`. For "
                "stochastic rounding use affine(bits=...) or linear_int4()."
            )
