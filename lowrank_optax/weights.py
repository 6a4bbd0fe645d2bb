"""Weights in few bits: rounded at random after a step, stored as 8-bit codes."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.bracket.selection import Selection
from lowrank_optax.leaves.matrix import path_string, unbox
from lowrank_optax.quantization import (
    Codec,
    QuantizedArray,
    affine,
    dequantize,
    is_quantized,
    quantize,
    stochastic_round_to_bfloat16,
)


def quantize_weights(
    params: Any,
    codec: Codec | None = None,
    *,
    select: str | Callable[[str, Any], bool] | None = None,
    min_size: int = 0,
    layer_axis: int | None = None,
) -> Any:
    """Stores matrices as codes with a step per group; the rest stays what it is.

    The codes of each chosen leaf are rounded to the nearest. Train on the result with
    ``dequantize_weights`` before the forward pass and
    ``stochastic_round_apply_updates`` after the optimizer. The default codec takes
    ``N + 5 ceil(n / 256) N / n`` bytes for a leaf of N entries in rows of n.

    Args:
      params: parameters, Flax-boxed or not. Leaves that are quantized already stay.
      codec: how they are stored: ``affine(bits=8, group=256)`` (None; as released), or
        another codec that can round at random.
      select: which leaves, as in ``lro.project``: its default rule (None), a regular
        expression searched in the path, or a callable ``(path, leaf) -> bool``. Leaves
        with fewer than two axes, without elements or not of a real float dtype stay.
      min_size: leaves with fewer elements stay.
      layer_axis: an axis of all leaves with three axes that counts layers, for the
        default rule.

    Returns:
      A tree like ``params`` with a ``QuantizedArray`` in place of each chosen leaf.

    Raises:
      ValueError: if the codec cannot round at random.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((128, 512)), "bias": jnp.zeros(512)}
      >>> stored = lro.quantize_weights(params)
      >>> jax.tree.map(lambda x: (x.dtype.name, x.shape), stored)["kernel"].codes
      ('uint8', (128, 512))
      >>> sum(x.nbytes for x in jax.tree.leaves(stored["kernel"])) / (128 * 512)
      1.01953125
      >>> shapes = jax.eval_shape(lro.dequantize_weights, stored)
      >>> state = lro.galore(1e-3, rank=4).init(lro.dequantize_weights(stored))

    References:
      Zhang et al., Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
      Low-Rank Gradients (2024), https://arxiv.org/abs/2407.08296

    Differences from the authors' code:
      * See ``quantization.affine``: groups on one side of zero keep their values.
    """
    codec = affine(bits=8) if codec is None else codec
    if not codec.stochastic:
        raise ValueError(
            "`codec` must be able to round at random, or updates below half a step are "
            f"lost; got {codec}. Use affine(bits=8) or linear_int4()."
        )
    selection = Selection(select=select, min_size=min_size, layer_axis=layer_axis)

    def store(path: Any, leaf: Any) -> Any:
        if is_quantized(leaf):
            return leaf
        array = unbox(leaf)
        stays = selection.why_full(path_string(path), array, None)
        return leaf if stays or 0 in array.shape else quantize(array, codec)

    return jax.tree_util.tree_map_with_path(store, params, is_leaf=is_quantized)


def dequantize_weights(params: Any, dtype: Any = jnp.float32) -> Any:
    """Returns parameters with every ``QuantizedArray`` decoded; other leaves stay.

    Gradients are taken with respect to what this returns, and the optimizer is given
    that as its parameters. The shapes alone, for ``lro.state_bytes`` and the like, are
    ``jax.eval_shape(lro.dequantize_weights, params)``.

    Args:
      params: a tree from ``quantize_weights``.
      dtype: of the decoded leaves.

    Returns:
      A tree of arrays.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> stored = lro.quantize_weights({"kernel": jnp.ones((128, 512))})
      >>> bool((lro.dequantize_weights(stored)["kernel"] == 1).all())
      True
    """

    def load(leaf: Any) -> Any:
        return dequantize(leaf).astype(dtype) if is_quantized(leaf) else leaf

    return jax.tree.map(load, params, is_leaf=is_quantized)


def stochastic_round_apply_updates(params: Any, updates: Any, key: Any) -> Any:
    """Adds updates; what is stored in few bits is rounded at random, without bias.

    ``optax.apply_updates`` for parameters in bfloat16 or quantized ones. There an
    update below half of the distance to the next number is lost at every step; here
    it is made with the probability that makes the mean right:

    * bfloat16: the sum in float32, then ``stochastic_round_to_bfloat16``;
    * a ``QuantizedArray``: ``encode(decode(w) + u, key)`` in float32, with new steps.
      One leaf is decoded at a time. A leaf whose updates are all zero keeps its codes;
      entries of an update that are not finite count as zero, since codes cannot hold
      them (guard the optimizer by ``optax.apply_if_finite`` to notice);
    * every other dtype: ``optax.apply_updates``.

    A leaf's random bits follow from ``key`` and its path alone: with the same key all
    replicas round the same way.

    Args:
      params: parameters, Flax-boxed or not; None leaves stay.
      updates: a tree of arrays like ``dequantize_weights(params)``, of any float dtype
        (float32 keeps its precision).
      key: a PRNG key, another one at each step.

    Returns:
      The new parameters, stored as ``params`` are.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"w": jnp.ones(1000, jnp.bfloat16)}
      >>> updates = {"w": jnp.full(1000, 2.0**-10)}  # the next number is 2^-7 away
      >>> new = lro.stochastic_round_apply_updates(params, updates, jax.random.key(0))
      >>> bool(50 < (new["w"] > 1).sum() < 200)
      True

    References:
      Zhang et al., Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
      Low-Rank Gradients (2024), https://arxiv.org/abs/2407.08296
    """

    def apply(path: Any, leaf: Any, update: Any) -> Any:
        if is_quantized(leaf):
            return _requantized(leaf, update, _leaf_key(key, path))
        if getattr(leaf, "dtype", None) == jnp.bfloat16:
            total = leaf.astype(jnp.float32) + update.astype(jnp.float32)
            return stochastic_round_to_bfloat16(total, _leaf_key(key, path))
        return optax.apply_updates(leaf, update)

    with jax.named_scope("lowrank/apply_updates"):
        return jax.tree_util.tree_map_with_path(
            apply, params, updates, is_leaf=lambda x: x is None or is_quantized(x)
        )


def _leaf_key(key: Any, path: tuple[Any, ...]) -> Any:
    return jax.random.fold_in(key, zlib.crc32(path_string(path).encode()))


def _requantized(leaf: QuantizedArray, update: Any, key: Any) -> QuantizedArray:
    update = update.astype(jnp.float32)
    update = jnp.where(jnp.isfinite(update), update, 0.0)
    new = leaf.encode(leaf.decode() + update, key)
    # Encoding again what was decoded is no fixed point: where no entry of a group has
    # its last code the steps become smaller, and all entries are rounded anew.
    moved = jnp.any(update != 0)
    return jax.tree.map(lambda a, b: jnp.where(moved, a, b), new, leaf)
