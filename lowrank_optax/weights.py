"""`weight_storage` keeps weights in few bits between steps; the parts it is made of.

They are rounded at random after a step, in bfloat16 or as 8-bit codes.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_optax import _checks
from lowrank_optax.bracket.selection import Selection
from lowrank_optax.leaves.boxes import is_box, unbox
from lowrank_optax.leaves.matrix import path_string
from lowrank_optax.leaves.structure import Seen
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
    select: Any = None,
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
        expression searched in the path, a list of words, "all-linear", a callable
        ``(path, leaf) -> bool``, or a tree of True and False. Leaves with fewer than
        two axes, without elements or not of a real float dtype stay.
      min_size: leaves with fewer elements stay.
      layer_axis: an axis of all leaves with three axes or more that counts layers;
        None concludes it from siblings.

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

    flat, treedef = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: is_quantized(x) or is_box(x)
    )
    paths = [path_string(path) for path, _ in flat]
    arrays = [leaf if is_quantized(leaf) else unbox(leaf) for _, leaf in flat]
    seen = selection.seen(paths, [tuple(array.shape) for array in arrays])

    def store(path: str, leaf: Any, array: Any, found: Seen, flag: Any) -> Any:
        if is_quantized(leaf) or selection.why_full(path, array, None, found, flag):
            return leaf
        return leaf if 0 in array.shape else quantize(array, codec)

    chosen = selection.chosen(treedef)
    stored = map(store, paths, [leaf for _, leaf in flat], arrays, seen, chosen)
    return treedef.unflatten(stored)


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
            # A sum in bfloat16 would be rounded to the nearest before any draw.
            total = leaf.astype(jnp.float32) + update.astype(jnp.float32)
            return stochastic_round_to_bfloat16(total, _leaf_key(key, path))
        return optax.apply_updates(leaf, update)

    # None counts as a leaf here, as in `optax.apply_updates`, which keeps it.
    with jax.named_scope("lowrank/apply_updates"):
        return jax.tree_util.tree_map_with_path(
            apply, params, updates, is_leaf=lambda x: x is None or is_quantized(x)
        )


class WeightStorage(NamedTuple):
    """A way to keep parameters from one step to the next, as ``weight_storage`` makes.

    The model, its gradients and the optimizer see ``load(stored)``.

    Attributes:
      store: parameters to what is kept of them.
      load: the reverse, up to rounding; in the type that a step computes with.
      apply: ``(stored, updates, key)`` to what is kept after the step.
    """

    store: Callable[[Any], Any]
    load: Callable[[Any], Any]
    apply: Callable[[Any, Any, Any], Any]


def weight_storage(
    kind: str = "plain", dtype: Any = jnp.float32, *, layer_axis: int | None = None
) -> WeightStorage:
    """Returns one of the ways to keep parameters between the steps of a training loop.

    * "plain": as they are, ``w + u`` by ``optax.apply_updates``;
    * "stochastic-bf16": two bytes a weight, each sum rounded at random to bfloat16;
    * "int8": the matrices by ``quantize_weights``, about one byte a weight, each sum
      rounded at random; the rest as it is;
    * "split": in bfloat16, for an optimizer with ``split_weights`` around it, whose
      state holds what they lack to float32, in one byte more.

    Args:
      kind: one of these.
      dtype: of the parameters that ``load`` returns, and so of gradients and moments.
        "plain" leaves it as it is, and of "split" it is bfloat16.
      layer_axis: of "int8": the axis of leaves with three axes that counts layers.

    Returns:
      The three functions.

    Raises:
      ValueError: if the kind is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> weights, tx = lro.weight_storage("int8"), optax.sgd(0.1)
      >>> stored = weights.store({"kernel": jnp.ones((128, 512))})
      >>> state = tx.init(weights.load(stored))
      >>> @jax.jit
      ... def step(stored, state, number):
      ...     params = weights.load(stored)
      ...     grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     key = lro.rounding_key(0, number)
      ...     return weights.apply(stored, updates, key), state
      >>> stored, state = step(stored, state, 0)
      >>> bool(jnp.allclose(weights.load(stored)["kernel"], 0.8, atol=0.01))
      True
    """
    kinds = {
        "plain": WeightStorage(
            store=lambda params: params,
            load=lambda stored: stored,
            apply=lambda stored, updates, key: optax.apply_updates(stored, updates),
        ),
        "stochastic-bf16": WeightStorage(
            store=lambda params: _floats(params, jnp.bfloat16),
            load=lambda stored: _floats(stored, dtype),
            apply=stochastic_round_apply_updates,
        ),
        "int8": WeightStorage(
            store=functools.partial(quantize_weights, layer_axis=layer_axis),
            load=functools.partial(dequantize_weights, dtype=dtype),
            apply=stochastic_round_apply_updates,
        ),
        "split": WeightStorage(
            store=lambda params: _floats(params, jnp.bfloat16),
            load=lambda stored: stored,
            apply=lambda stored, updates, key: optax.apply_updates(stored, updates),
        ),
    }
    return kinds[_checks.choice("kind", kind, kinds)]


def _floats(tree: Any, dtype: Any) -> Any:
    """Casts real floating-point leaves; counters and keys stay."""

    def cast(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


@functools.partial(jax.jit, static_argnums=0)
def rounding_key(seed: int, step: Any) -> jax.Array:
    """Makes the key that a step rounds with, so that a resumed run rounds as it would.

    Args:
      seed: of the run, a Python int. The stream is apart from ``jax.random.key(seed)``,
        which may draw the model and the optimizer's projections.
      step: number of the step, which may be traced.

    Returns:
      A PRNG key, another one at each step.

    Examples:
      >>> import jax
      >>> import lowrank_optax as lro
      >>> bool((lro.rounding_key(0, 3) == lro.rounding_key(0, 3)).all())
      True
      >>> bool((lro.rounding_key(0, 3) == lro.rounding_key(0, 4)).all())
      False
    """
    stream = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"weights"))
    return jax.random.fold_in(stream, step)


def weight_shardings(stored: Any, params: Any, param_shardings: Any) -> Any:
    """Returns a sharding for every array that is kept of the parameters.

    Codes, scales and zeros of a parameter are cut as it is, along the axes that are as
    long as its own; an axis that counts groups is whole.

    Args:
      stored: what is kept, or the shapes of it: ``jax.eval_shape(store, params)``.
      params: the parameters, or their shapes.
      param_shardings: a tree like ``params`` of ``NamedSharding``.

    Returns:
      A tree like ``stored`` of ``NamedSharding``.

    Raises:
      ValueError: if ``param_shardings`` is not a tree like ``params``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jax.ShapeDtypeStruct((64, 512), jnp.float32)}
      >>> mesh = lro.abstract_mesh({"fsdp": 4})
      >>> places = {"kernel": NamedSharding(mesh, P(None, "fsdp"))}
      >>> stored = jax.eval_shape(lro.weight_storage("int8").store, params)
      >>> kept = lro.weight_shardings(stored, params, places)["kernel"]
      >>> kept.codes.spec == P(None, "fsdp"), kept.scales.spec == P(None, None)
      (True, True)
    """

    def of(place: NamedSharding, param: Any, kept: Any) -> Any:
        names = [*place.spec, *[None] * (len(param.shape) - len(place.spec))]

        def cut(leaf: Any) -> NamedSharding:
            # With blocks="flat" rows are merged into one axis, and the axes do not
            # correspond one to one.
            if len(leaf.shape) != len(param.shape):
                return NamedSharding(place.mesh, PartitionSpec())
            axes = zip(names, param.shape, leaf.shape, strict=True)
            spec = [name if size == own else None for name, own, size in axes]
            return NamedSharding(place.mesh, PartitionSpec(*spec))

        return jax.tree.map(cut, kept)

    return jax.tree.map(of, param_shardings, params, stored)


def _leaf_key(key: Any, path: tuple[Any, ...]) -> Any:
    # Python's own hash of a string differs between processes, and replicas would round
    # differently.
    return jax.random.fold_in(key, zlib.crc32(path_string(path).encode()))


def _requantized(leaf: QuantizedArray, update: Any, key: Any) -> QuantizedArray:
    update = update.astype(jnp.float32)
    update = jnp.where(jnp.isfinite(update), update, 0.0)
    new = leaf.encode(leaf.decode() + update, key)
    # Encoding again what was decoded is no fixed point: where no entry of a group has
    # its last code the steps become smaller, and all entries are rounded anew.
    moved = jnp.any(update != 0)
    return jax.tree.map(lambda a, b: jnp.where(moved, a, b), new, leaf)
