"""``Codec``: an array as codes with a scale per block, and back, on any mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from lowrank_optax._meshes import with_auto_axes
from lowrank_optax.quantization.blocks import Cut, pack, unpack
from lowrank_optax.quantization.rounding import uniform

_CANNOT = object()

Axes = tuple[Any, ...]  # the mesh axes that each axis of an array is cut over


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


def _at_once(*static: int) -> Callable[[Callable], Callable]:
    """Outside of a trace, runs a method as one program in the place of dozens.

    Each of them would be compiled for every shape, which makes an ``init`` of encoded
    state that is not under ``jit`` a matter of seconds.

    Args:
      static: numbers of the arguments that are no arrays.
    """

    def decorate(method: Callable) -> Callable:
        compiled = jax.jit(method, static_argnums=static)

        @functools.wraps(method)
        def run(*args: Any) -> Any:
            arrays = [x for i, x in enumerate(args) if i not in static]
            leaves = jax.tree.leaves(arrays)
            traced = any(isinstance(x, Tracer) for x in leaves)
            return (method if traced else compiled)(*args)

        return run

    return decorate


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

    A subclass finds the scales of blocks (``fit``), and given its block's scale turns
    an entry into a code (``code``) and a code into a number (``value``). If it has a
    field ``keep_nonzero``, it can serve second moments (``for_second_moments``).
    """

    # Without annotations, so that these are no fields of the dataclasses below.
    has_zeros = False  # whether blocks differ in the code of 0.0
    stochastic = False  # whether encode can round at random
    subtractive = False  # whether decode can take off what was added to round
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
        """Returns the numbers that codes stand for, in float32."""
        raise NotImplementedError

    def for_second_moments(self) -> "Codec":
        """Returns this codec so that no entry but zero is stored as zero.

        Adam divides by the root of a second moment and ``eps``: by ``eps`` alone where
        a small one became zero, which steps as far as 1e5 learning rates. A codec says
        by a field ``keep_nonzero`` that it can: None is switched on here, and False,
        asked for, stays.

        Raises:
          ValueError: if the codec has no such field.
        """
        keeps = getattr(self, "keep_nonzero", _CANNOT)
        if keeps is _CANNOT:
            raise ValueError(
                f"{type(self).__name__} may store small numbers as zero, and cannot "
                "serve a second moment: the optimizer would divide by eps alone. Use "
                "blockwise_int8(signed=False), or give the codec a field `keep_nonzero`"
                " (None by default) with which codes of zero are for zeros alone."
            )
        return dataclasses.replace(self, keep_nonzero=True) if keeps is None else self

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
        if key is not None and not self.stochastic:
            raise ValueError(
                f"{type(self).__name__} rounds to the nearest and takes no `key`. For "
                "stochastic rounding use affine(bits=...) or linear_int4()."
            )
        axes = _axes_of(x)
        if axes is None:
            return Encoded(*self._parts(x, key))
        # A block may lie on several devices, and then no type says how its array is
        # cut: the compiler finds a way between the layouts at both ends.
        mesh = jax.typeof(x).sharding.mesh
        blocks, codes = self._block_shape(x.shape), self.code_shape(x.shape)
        scales = _rows_of(mesh, axes, len(blocks) - 1, blocks)
        if self.bits != 8:
            axes = _rows_of(mesh, axes, len(codes) - 1, codes)
        out = [axes, scales, scales] if self.has_zeros else [axes, scales]
        places = tuple(NamedSharding(mesh, PartitionSpec(*each)) for each in out)
        return Encoded(*with_auto_axes(mesh, places, self._parts, x, key))

    @_at_once(0)
    def _parts(self, x: Array, key: Any) -> tuple[Any, ...]:
        """Returns codes, scales and, if there are any, zeros."""
        rows = x.reshape(self.cut.row_shape(x.shape))
        draws = None
        if key is not None:
            # In the shape of x, which is that of draws given in place of a key.
            draws = uniform(key, x.shape).reshape(rows.shape)
        fits = [self.fit(piece) for piece in self._pieces(rows)]
        scales = self.cut.join([scale for scale, _ in fits])
        zeros = self.cut.join([zero for _, zero in fits]) if self.has_zeros else ()
        # Entry by entry, not block by block: the rest is one pass, and where the last
        # block is short nothing is joined.
        spread = self._spread(scales, zeros, rows.shape[-1])
        codes = self.code(rows, *spread, draws)
        if self.bits == 4:
            packed = [pack(p, self.empty_code) for p in self._pieces(codes)]
            codes = self.cut.join(packed)
        codes = codes.reshape(self.code_shape(x.shape))
        scales = scales.astype(self.scale_dtype)
        return (codes, scales, zeros) if self.has_zeros else (codes, scales)

    def decode(
        self, encoded: Encoded, shape: Sequence[int], draws: Any = None
    ) -> Array:
        """Returns the array of this shape, in float32.

        Args:
          encoded: what ``encode`` made of it.
          shape: that of the array.
          draws: those that it was rounded with, if the codec is ``subtractive``. They
            are taken off again: the error is then uniform within half a step, with half
            the variance of rounding at random, and as free of bias. A zero, which
            rounds to zero whatever is drawn, comes back as such an error.

        Raises:
          ValueError: if the codes are not those of an array of this shape, or if there
            are draws and the codec has uneven steps.
        """
        if draws is not None and not self.subtractive:
            raise ValueError(
                f"{type(self).__name__} has uneven steps and cannot take `draws` off "
                "again; decode without them, or use quantization.symmetric()."
            )
        shape, encoded = tuple(shape), jax.tree.map(jnp.asarray, encoded)
        if encoded.codes.shape != self.code_shape(shape):
            raise ValueError(
                f"`shape` must be that of the array that was encoded: {shape} has "
                f"codes of shape {self.code_shape(shape)}, got {encoded.codes.shape}."
            )
        axes = _axes_of(encoded.codes)
        if axes is None:
            return self._array(encoded, shape, draws)
        mesh = jax.typeof(encoded.codes).sharding.mesh
        if self.bits != 8:
            axes = _rows_of(mesh, axes, encoded.codes.ndim - 1, shape)
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return with_auto_axes(
            mesh, place, lambda e, d: self._array(e, shape, d), encoded, draws
        )

    @_at_once(0, 2)
    def _array(
        self, encoded: Encoded, shape: tuple[int, ...], draws: Any = None
    ) -> Array:
        rows = self.cut.row_shape(shape)
        codes, n = encoded.codes, rows[-1]
        if self.bits == 4:
            sizes = [size for _, size in self.cut.pieces(n)]
            pieces = zip(self.cut.split(codes, n, self._width), sizes, strict=True)
            codes = self.cut.join([unpack(*piece) for piece in pieces])
        spread, codes = (
            self._spread(encoded.scales, encoded.zeros, n),
            codes.reshape(rows),
        )
        if draws is not None:
            # x was rounded to floor(x) + [u < x - floor(x)] = floor(x + 1 - u), which
            # lies between x - u and x + 1 - u.
            codes = codes.astype(jnp.float32) + (draws.reshape(rows) - 0.5)
        return self.value(codes, *spread).reshape(shape)

    def _spread(self, scales: Array, zeros: Any, n: int) -> tuple[Array, Any]:
        """Returns scale and zero of every entry of rows of n."""
        return (
            self.cut.spread(scales, n),
            self.cut.spread(zeros, n) if self.has_zeros else (),
        )

    def zeros(self, shape: Sequence[int]) -> Encoded:
        """Returns the encoded form of zeros of this shape."""
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


def _axes_of(x: Any) -> Axes | None:
    """Returns the axes of an array, None if it is on no Explicit mesh."""
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.explicit_axes:
        return None
    return (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))


def _rows_of(mesh: Any, axes: Axes, batch: int, shape: Sequence[int]) -> Axes:
    """Returns the axes of an array with as many batch axes, and rows, as another.

    Args:
      mesh: an Explicit one.
      axes: those of the other array.
      batch: how many axes come before rows.
      shape: the array's own; rows that the devices do not divide are whole.
    """
    out = [*axes[:batch], *[None] * (len(shape) - batch)]
    # With blocks="flat" a row is a whole matrix, across any cut of its columns.
    if len(axes) == len(shape) == batch + 1:
        last = axes[-1] or ()
        names = (last,) if isinstance(last, str) else last
        if shape[-1] % math.prod(mesh.shape[name] for name in names) == 0:
            out[-1] = axes[-1]
    return tuple(out)
