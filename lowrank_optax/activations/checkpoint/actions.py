"""``Action``: a tagged value as it is kept for the backward pass, and its bytes."""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank_optax import _checks, quantization
from lowrank_optax.activations.checkpoint import codecs

_KNOWN = (
    "'save', 'recompute', 'offload', 'int8', 'int4', and with k outlier channels "
    "'int8+k' and 'int4+k', for example 'int4+8'"
)


class Action:
    """The treatment of a tagged value: static and hashable, without arrays.

    An action turns a value into the arrays that are kept from the forward to the
    backward pass, turns these into the array that the backward pass reads in the
    value's place, and counts their bytes. Subclass it for
    a format of your own; an instance can stand wherever a string such as ``"int4"``
    can.
    """

    keeps = True  # False for actions that compute the value again

    def nbytes(self, shape: Sequence[int], dtype: Any) -> int:
        """Returns the bytes on the device that are kept of a value, exactly."""
        raise NotImplementedError

    def compress(self, x: Array, key: Any = None) -> Any:
        """Returns the kept form of a value: a pytree of arrays.

        Args:
          x: the value.
          key: a PRNG key for actions that round at random; None derives one from x.
        """
        raise NotImplementedError

    def decompress(self, kept: Any, like: Any) -> Array:
        """Returns the array that the backward pass reads.

        Args:
          kept: the result of ``compress``.
          like: an array, tracer or ShapeDtypeStruct with the value's shape and dtype.
        """
        raise NotImplementedError

    def round_trip(self, x: Array, key: Any = None) -> Array:
        """Returns the array that the backward pass reads in place of x."""
        return self.decompress(self.compress(x, key), x)


@dataclasses.dataclass(frozen=True)
class Save(Action):
    """Kept as it is."""

    def nbytes(self, shape: Sequence[int], dtype: Any) -> int:
        """Returns the value's own bytes."""
        return math.prod(shape) * dtype_of(dtype).itemsize

    def compress(self, x: Array, key: Any = None) -> Any:
        """Returns x."""
        del key
        return x

    def decompress(self, kept: Any, like: Any) -> Array:
        """Returns x."""
        del like
        return kept

    def __str__(self) -> str:
        """Returns "save"."""
        return "save"


@dataclasses.dataclass(frozen=True)
class Recompute(Save):
    """Computed again in the backward pass, from values kept before it; 0 bytes."""

    keeps = False

    def nbytes(self, shape: Sequence[int], dtype: Any) -> int:
        """Returns 0."""
        del shape, dtype
        return 0

    def __str__(self) -> str:
        """Returns "recompute"."""
        return "recompute"


@dataclasses.dataclass(frozen=True)
class Offload(Save):
    """Kept as it is in the host's pinned memory, and brought back for the backward.

    Where the default device has no memory of that kind (``pinned_host`` among
    ``jax.devices()[0].addressable_memories()``) it is kept on the device, like "save",
    and ``nbytes`` says so.
    """

    def nbytes(self, shape: Sequence[int], dtype: Any) -> int:
        """Returns 0, or the value's own bytes if they stay on the device."""
        return 0 if has_host_memory() else super().nbytes(shape, dtype)

    def compress(self, x: Array, key: Any = None) -> Any:
        """Returns x in the host's memory."""
        del key
        return jax.device_put(x, jax.memory.Space.Host) if has_host_memory() else x

    def decompress(self, kept: Any, like: Any) -> Array:
        """Returns x in the device's memory."""
        del like
        space = jax.memory.Space.Device
        return jax.device_put(kept, space) if has_host_memory() else kept

    def __str__(self) -> str:
        """Returns "offload"."""
        return "offload"


@functools.cache
def has_host_memory() -> bool:
    """Whether the default device can put arrays into pinned host memory."""
    memories = jax.devices()[0].addressable_memories()
    return any(memory.kind == "pinned_host" for memory in memories)


@dataclasses.dataclass(frozen=True)
class Quantize(Action):
    r"""Kept as codes of 8 or 4 bits with a bfloat16 step per group of the last axis.

    For a group ``x`` and ``h = 2^(bits - 1) - 1`` (see ``quantization.symmetric``)::

        s = max|x| / h,    q = round(x / s),    x' = q s,    |x - x'| <= s / 2

    With outliers, the k channels of the last axis with the largest ``max|x|`` over all
    leading axes are kept as they are, and the steps are formed without them. Their
    indices are data: when outliers drift to other channels nothing is compiled again.

    The bytes of ``[*tokens, C]`` are ``C bits / 8 + 2 ceil(C / group)`` per token (odd
    groups of 4-bit codes end on a byte), and per outlier channel 4 and one value per
    token. A value is kept as it is if codes would not take fewer bytes, or if it is no
    floating point number of at least 16 bits: integers, booleans, keys, tiny arrays.

    A value that is not finite is never hidden: its group, or its channel if that is an
    outlier, reads as not finite.

    Args:
      bits: 4 or 8.
      outliers: channels kept in the source's dtype.
      group: elements of the last axis per step. It need not divide the axis.
      stochastic: round at random instead of to the nearest, so that x' is x in the
        mean. The draws come from the value's own bits, its tag and index, not from a
        key that you pass: the same input gives the same gradient, and another step,
        layer or batch other draws.

    Raises:
      TypeError: if a number that fixes shapes is not a Python int.
      ValueError: if one is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lowrank_optax import activations
      >>> action = activations.Quantize(bits=4, outliers=1)
      >>> action.round_trip(jnp.array([[-7.0, 2.2, 0.0, 3.5, 800.0] * 4])).shape
      (1, 20)
      >>> action.nbytes((512, 4096), jnp.bfloat16) / 512 / 4096
      0.5161151885986328
    """

    bits: Any = 4
    outliers: Any = 0
    group: Any = 128
    stochastic: Any = False

    def __post_init__(self):
        """Checks the numbers that fix shapes."""
        _checks.positive_int("outliers", self.outliers, least=0)
        _checks.positive_int("group", self.group)
        _checks.choice("stochastic", self.stochastic, (True, False))
        _ = self.codec

    @property
    def codec(self) -> quantization.symmetric:
        """The codec of all channels that are no outliers."""
        return quantization.symmetric(self.bits, self.group)

    def encodes(self, shape: Sequence[int], dtype: Any) -> bool:
        """Whether a value is encoded; otherwise it is kept as it is."""
        dtype = dtype_of(dtype)
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2 or not shape:
            return False
        # Steps, outliers and odd groups can outweigh what codes save in a small array.
        coded = codecs.nbytes(tuple(shape), dtype, self.codec, self.outliers)
        return coded < math.prod(shape) * dtype.itemsize

    def nbytes(self, shape: Sequence[int], dtype: Any) -> int:
        """Returns the bytes of codes, steps and outliers."""
        if not self.encodes(shape, dtype):
            return Save().nbytes(shape, dtype)
        return codecs.nbytes(tuple(shape), dtype, self.codec, self.outliers)

    def compress(self, x: Array, key: Any = None) -> Any:
        """Returns ``Compressed`` codes, or x if it is kept as it is."""
        if not self.encodes(x.shape, x.dtype):
            return x
        # Outside of `compressed_checkpoint` nobody knows a tag to derive the key from.
        if self.stochastic and key is None:
            key = codecs.key_from(x)
        key = key if self.stochastic else None
        with jax.named_scope("activations/compress"):
            return codecs.compress(x, self.codec, self.outliers, key)

    def decompress(self, kept: Any, like: Any) -> Array:
        """Returns ``q s``, with the outlier channels in their places."""
        if not self.encodes(like.shape, like.dtype):
            return kept
        with jax.named_scope("activations/decompress"):
            return codecs.decompress(kept, self.codec, like)

    def __str__(self) -> str:
        """Returns "int4+8", then the group and the rounding if not the default."""
        text = f"int{self.bits}" + (f"+{self.outliers}" if self.outliers else "")
        text += f" group {self.group}" if self.group != 128 else ""
        return text + (" stochastic" if self.stochastic else "")


def dtype_of(dtype: Any) -> Any:
    """Returns a dtype object; NumPy does not know the dtypes of PRNG keys."""
    extended = jnp.issubdtype(dtype, jax.dtypes.extended)
    return dtype if extended else np.dtype(dtype)


_PLAIN = {"save": Save(), "recompute": Recompute(), "offload": Offload()}


def parse_action(text: Any, group: Any = 128, stochastic: Any = False) -> Action:
    """Returns the action that a string names.

    Args:
      text: "save", "recompute", "offload", "int8", "int4", or with k outlier channels
        "int8+k", "int4+k". An ``Action`` is returned as it is.
      group: see ``Quantize``.
      stochastic: see ``Quantize``.

    Raises:
      ValueError: if the string names no action.

    Examples:
      >>> from lowrank_optax import activations
      >>> activations.parse_action("int4+8")
      Quantize(bits=4, outliers=8, group=128, stochastic=False)
    """
    if isinstance(text, Action):
        return text
    name = text if isinstance(text, str) else ""
    if name in _PLAIN:
        return _PLAIN[name]
    match = re.fullmatch(r"int([48])(?:\+(\d+))?", name)
    if match is None:
        raise ValueError(f"An action must be one of {_KNOWN}; got {text!r}.")
    return Quantize(int(match[1]), int(match[2] or 0), group, stochastic)


def parse_actions(actions: Any) -> tuple[Action, ...]:
    """Returns distinct actions in their order."""
    if isinstance(actions, str | Action):
        actions = (actions,)
    found = tuple(dict.fromkeys(parse_action(action) for action in actions))
    if not found:
        raise ValueError(
            "`actions` must name at least one action, for example ('save', 'int8')."
        )
    return found


def is_exact(action: Action, shape: Sequence[int], dtype: Any) -> bool:
    """Whether an action keeps a value as it is, or computes it again."""
    if isinstance(action, Save):
        return True
    return action.nbytes(shape, dtype) >= Save().nbytes(shape, dtype)
