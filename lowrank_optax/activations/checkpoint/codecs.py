"""``Compressed``: an array as codes and outlier channels, and back, on any mesh."""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from lowrank_optax import quantization
from lowrank_optax._meshes import with_auto_axes


class Compressed(NamedTuple):
    """A compressed array ``[*tokens, C]``; every field is an array, or ``()`` for none.

    Attributes:
      codes: uint8 ``[*tokens, bytes]``.
      scales: bfloat16 ``[*tokens, groups]``.
      channels: int32 ``[k]``, the outlier channels; the codes have zeros there.
      outliers: ``[k, tokens]`` in the source's dtype, the channels' own values. By
        channels: a last axis of k would be padded to 128 on a TPU.
    """

    codes: Any
    scales: Any
    channels: Any = ()
    outliers: Any = ()


def compress(x: Array, codec: Any, outliers: int, key: Any = None) -> Compressed:
    """Encodes ``[*tokens, C]``, except the channels with the largest magnitudes.

    A channel's rank is its ``max|x|`` over all tokens; one that is not finite comes
    first. On an Explicit mesh the results keep the sharding of the leading axes.
    """

    def whole(x: Array, *key: Any) -> Compressed:
        if not outliers:
            encoded = codec.encode(x, *key)
            return Compressed(encoded.codes, encoded.scales)
        most = jnp.max(jnp.abs(x), axis=tuple(range(x.ndim - 1)))
        channels = jax.lax.top_k(most, outliers)[1].astype(jnp.int32)
        taken = jnp.moveaxis(jnp.take(x, channels, axis=-1, mode="clip"), -1, 0)
        index = jnp.arange(x.shape[-1], dtype=jnp.int32)
        # Clipping to 0 takes an outlier channel out of its group's step without a
        # scatter; the other channels are clipped to infinity, which changes nothing.
        limit = jnp.where(jnp.any(index == channels[:, None], axis=0), 0, jnp.inf)
        limit = limit.astype(x.dtype)
        encoded = codec.encode(jnp.clip(x, -limit, limit), *key)
        taken = taken.reshape(outliers, -1)
        return Compressed(encoded.codes, encoded.scales, channels, taken)

    mesh = _explicit_mesh(x)
    arguments = (x,) if key is None else (x, key)
    if mesh is None:
        return whole(*arguments)
    out = _sharding(x, codec.group, outliers)
    return with_auto_axes(mesh, out, whole, *arguments)


def decompress(kept: Compressed, codec: Any, like: Any) -> Array:
    """Inverse of ``compress``: an array with the shape, dtype and sharding of ``like``.

    Finite values stay finite in narrow dtypes: half a step above float16's largest
    number is not infinity.
    """
    like = jax.typeof(like) if isinstance(like, Array) else like

    def whole(kept: Compressed) -> Array:
        encoded = quantization.Encoded(kept.codes, kept.scales)
        x = codec.decode(encoded, like.shape)
        most = float(jnp.finfo(like.dtype).max)
        # The codec clips to float32 itself.
        if most < float(jnp.finfo(jnp.float32).max):
            x = jnp.clip(x, -most, most)
        x = x.astype(like.dtype)
        if isinstance(kept.channels, tuple):
            return x
        index = jnp.arange(like.shape[-1], dtype=jnp.int32)
        # One select per channel: a scatter into the last axis would be slow.
        for at, values in zip(kept.channels, kept.outliers, strict=True):
            x = jnp.where(index == at, values.reshape(*like.shape[:-1], 1), x)
        return x

    mesh = _explicit_mesh(like)
    if mesh is None:
        return whole(kept)
    return with_auto_axes(mesh, like.sharding, whole, kept)


def nbytes(shape: tuple[int, ...], dtype: Any, codec: Any, outliers: int) -> int:
    """Returns the bytes of ``compress`` of an array of this shape and dtype."""
    tokens = math.prod(shape[:-1])
    each = 4 + tokens * np.dtype(dtype).itemsize
    return codec.nbytes(shape) + outliers * each


def key_from(x: Array, name: str = "") -> Array:
    """Returns a PRNG key that depends on a name and on the bits of x.

    The bits enter by their sum as integers, which no order of summation changes: equal
    values have equal keys in every layout on a mesh, and those of another step or layer
    have others.
    """
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    seed = jax.random.key(zlib.crc32(name.encode()))
    return jax.random.fold_in(seed, jnp.sum(bits, dtype=jnp.uint32))


def _explicit_mesh(x: Any) -> Any:
    sharding = getattr(jax.typeof(x) if isinstance(x, Array) else x, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return mesh if mesh is not None and mesh.explicit_axes else None


def _sharding(x: Array, group: int, outliers: int) -> Compressed:
    """Returns the shardings of the compressed x.

    The last axis is sharded like that of x where every shard holds whole groups.
    """
    of_x = jax.typeof(x).sharding
    *lead, last = (*of_x.spec, *[None] * (x.ndim - len(of_x.spec)))
    # A group that lies on two devices would need a collective for its step.
    local = of_x.shard_shape(x.shape)[-1]
    codes = NamedSharding(
        of_x.mesh, PartitionSpec(*lead, None if local % group else last)
    )
    if not outliers:
        return Compressed(codes, codes)
    # All axes of tokens are one axis of the outliers, in which only shards of the first
    # one are contiguous.
    tokens = lead[0] if lead else None
    return Compressed(
        codes,
        codes,
        NamedSharding(of_x.mesh, PartitionSpec(None)),
        NamedSharding(of_x.mesh, PartitionSpec(None, tokens)),
    )
