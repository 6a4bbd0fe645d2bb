"""Moments of any inner optimizer, stored in eight bits and fewer."""

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import _checks
from lowrank_optax.leaves import moments as _moments
from lowrank_optax.leaves.boxes import is_box, rebox, refill, restore, unbox, unbox_tree
from lowrank_optax.leaves.matrix import path_string
from lowrank_optax.leaves.stand_in import hidden
from lowrank_optax.quantization import (
    Codec,
    blockwise_int8,
    dequantize,
    is_quantized,
    quantize,
)
from lowrank_optax.quantization.rounding import dither
from lowrank_optax.transforms.cast import keep_dtypes

_SIGNED = blockwise_int8(signed=True, signed_scale=True, exact=False)
_UNSIGNED = blockwise_int8(signed=False, exact=False)


def quantize_state(
    inner: Any,
    mu: Any = _SIGNED,
    nu: Any = _UNSIGNED,
    min_size: Any = 4096,
    leafwise: Any = False,
    stochastic: Any = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Stores the moments of ``inner`` encoded: 8-bit Adam, Lion, momentum, ...

    With a codec's ``encode`` and ``decode`` (``lowrank_optax.quantization``), each step
    is::

        N, state = inner.update(R, decode(state));    store encode(state)

    What is encoded becomes a ``QuantizedArray`` at the moment's place
    (``optax.tree_utils.tree_get`` finds it by name), N elements in N bytes and four per
    block of 256. Transports and recoveries of a bracket see the decoded moments.

    A second moment that is not zero is never stored as zero, whatever the codec: it is
    rounded up to the smallest level, by default 3e-7 of its block's largest. Adam would
    divide by ``eps`` alone, and step 1e5 times too far. A codec that can is told to
    (``Codec.for_second_moments``), one that cannot is refused;
    ``blockwise_int8(signed=False, keep_nonzero=False)`` is the released rule.

    Args:
      inner: any transformation whose states name their moments ``mu``, ``nu``,
        ``trace``, ``ema``.
      mu: codec of ``mu``, ``trace`` and ``ema``; None leaves them. The default is the
        signed 8-bit map in blocks of 256, whose scale keeps its sign, its codes
        computed and not looked up (``blockwise_int8(exact=False)``).
      nu: codec of ``nu``; None leaves it. The default is the unsigned 8-bit map,
        computed likewise.
      min_size: moments of matrices with fewer elements are float32 (4096 in the
        released code), layers of a stack counted one by one.
      leafwise: whether ``inner`` steps every leaf by itself, as Adam does and a clip by
        the global norm does not. True calls it leaf by leaf, each behind an
        optimization barrier, so that where the compiler keeps those (a TPU's does, the
        CPU's does not) only one leaf is decoded at a time.
      stochastic: whether codecs that can round at random do so: then the mean of what
        is stored is the moment, and changes of less than half a level add up. In four
        bits, rounded to the nearest, a momentum does not decay: 5 % of 7 levels is
        less than half of one. The numbers follow from the step and the leaf's path, in
        a bracket also from its key; so the next step can make them again, and take them
        off where levels are even (``Codec.decode``), which halves the variance.

    Returns:
      The transformation. Its updates have the gradients' dtypes. Leaves without
      elements are hidden from ``inner``.

    Raises:
      TypeError: if ``inner`` is no transformation, a codec no codec, or ``min_size`` no
        int.
      ValueError: if the codec of ``nu`` may store what is not zero as zero, or if
        ``stochastic`` and no codec can; at update, if it is and neither a bracket nor a
        ``count`` in the state of ``inner`` says which step it is.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = lro.quantize_state(optax.scale_by_adam())
      >>> nu = tx.init({"w": jnp.zeros((64, 256))}).nu["w"]
      >>> nu.codes.dtype, nu.scales.shape
      (dtype('uint8'), (64, 1))

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2021),
      https://arxiv.org/abs/2110.02861

    Differences from the authors' code:
      * Blocks lie along the last axis, so that codes and scales can be sharded as the
        moment is; ``blocks="flat"`` of the codec is the released order.
      * Second moments never vanish, and the largest entry of a block of first moments
        is exact whatever its sign.
    """
    inner = optax.with_extra_args_support(
        _checks.transformation("inner", inner, "scale_by_adam()")
    )
    codecs = {**dict.fromkeys(("mu", "trace", "ema"), mu), "nu": nu}
    for name, codec in codecs.items():
        if codec is not None and not isinstance(codec, Codec):
            raise TypeError(
                f"The codec of `{name}` must be one of lowrank_optax.quantization, "
                f"such as blockwise_int8(), got {codec!r}."
            )
    if nu is not None:
        codecs["nu"] = nu.for_second_moments()
    _checks.positive_int("min_size", min_size, least=0)
    _checks.choice("leafwise", leafwise, (False, True))
    _checks.choice("stochastic", stochastic, (False, True))
    if stochastic and not any(codec and codec.stochastic for codec in codecs.values()):
        raise ValueError(
            "`stochastic` needs a codec that can round at random, such as "
            "quantization.symmetric(bits=4) or quantization.linear_int4()."
        )

    def start(params: Any, state: Any) -> Any:
        moments = _moments.find(state)

        def encoded(name: str, tree: Any) -> Any:
            if codecs[name] is None:
                return tree
            return hidden(params, _encoded(tree, codecs[name], min_size))

        groups = tuple(
            {name: encoded(name, tree) for name, tree in group.items()}
            for group in moments.groups
        )
        return moments.rebuild(groups)

    def store(state: Any, before: Any, draws: Any) -> Any:
        # As it was, not by its size: a stack's layer is smaller than the stack.
        moments, old = _moments.find(state), _moments.find(before)
        return moments.rebuild(_encoded_like(moments.groups, old.groups, draws))

    def init(params: Any) -> Any:
        # Else the compiler would encode the zeros itself, at its leisure.
        return start(params, jax.lax.optimization_barrier(inner.init(params)))

    def update(updates, state, params=None, **extra_args):
        treedef = jax.tree.structure(updates, is_leaf=is_box)
        # nnx.Optimizer gives a state back with mappings in the place of tuples.
        if _moments.are_altered(treedef, state):
            state = restore(state, lambda: init(updates))

        seeds = _seeds(state, extra_args) if stochastic else None

        def step(updates, state, params, leaf=None):
            loaded = state
            if seeds is not None:
                # Those of the step before, which rounded what is decoded now.
                key, count, layer = seeds
                drawn = functools.partial(_draws, key, count - 1, layer, leaf)
                loaded = _undithered(state, updates, drawn)
            loaded = _decoded(loaded, updates)
            out, new = inner.update(updates, loaded, params, **extra_args)
            draws = None if seeds is None else functools.partial(_draws, *seeds, leaf)
            return out, store(new, state, draws)

        if leafwise and treedef.num_leaves > 1:
            return _one_by_one(step, treedef, updates, state, params)
        return step(updates, state, params)

    return keep_dtypes(optax.GradientTransformationExtraArgs(init, update))


def _one_by_one(step: Any, treedef: Any, updates: Any, state: Any, params: Any) -> Any:
    """Returns what ``step`` makes of all leaves, one after another.

    What every leaf has, its update and its moments, waits for what the leaf before it
    became.
    """
    moments = _moments.find(state)
    columns = [
        {name: treedef.flatten_up_to(tree) for name, tree in group.items()}
        for group in moments.groups
    ]
    weights = None if params is None else treedef.flatten_up_to(params)
    flat = jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_box)
    paths = [path_string(path) for path, _ in flat]
    # A token without meaning: every barrier takes it from the one before, which puts
    # the leaves in a row.
    done, found, turn = [], moments, jnp.zeros((), jnp.int32)
    for i, update in enumerate(treedef.flatten_up_to(updates)):
        groups = tuple(
            {name: [column[i]] for name, column in group.items()} for group in columns
        )
        update, groups, turn = jax.lax.optimization_barrier((update, groups, turn))
        weight = None if weights is None else [weights[i]]
        # `moments` is of the state before the step, so that counters advance once, not
        # once for every leaf.
        (out,), state = step([update], moments.rebuild(groups), weight, paths[i])
        found = _moments.find(state)
        # This leaf is encoded again before the next one may be decoded.
        groups, turn = jax.lax.optimization_barrier((found.groups, turn))
        for column, group in zip(columns, groups, strict=True):
            for name, (leaf,) in group.items():
                column[name][i] = leaf
        done.append(out)
    trees = tuple(
        {name: treedef.unflatten(leaves) for name, leaves in column.items()}
        for column in columns
    )
    return treedef.unflatten(done), found.rebuild(trees)


def _encoded(tree: Any, codec: Codec, min_size: int) -> Any:
    """Encodes the large matrices of a tree; a box is put around codes and scales."""

    def encode(leaf: Any) -> Any:
        x = unbox(leaf)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return leaf
        if math.prod(x.shape[-2:]) < min_size:
            return refill(leaf, x.astype(jnp.float32))
        return _quantized(leaf, codec)

    return jax.tree.map(encode, tree, is_leaf=is_box)


def _encoded_like(groups: Any, before: Any, draws: Any) -> Any:
    """Encodes what was encoded before."""

    def encode(path: Any, old: Any, leaf: Any) -> Any:
        if not is_quantized(old):
            return leaf
        if draws is None or not old.codec.stochastic:
            return _quantized(leaf, old.codec)
        return _quantized(leaf, old.codec, draws(path, unbox(leaf).shape))

    return jax.tree_util.tree_map_with_path(
        encode, before, groups, is_leaf=lambda x: is_quantized(x) or is_box(x)
    )


def _seeds(state: Any, extra_args: Any) -> tuple[Any, Any, Any]:
    """Returns key and count of a step, and which layer the first of a stack is."""
    subspace, layer = extra_args.get("subspace"), extra_args.get("layer")
    if subspace is not None:
        clock = subspace.clock
        return clock.key_data, clock.count, clock.layer
    counts = optax.tree_utils.tree_get_all_with_path(state, "count")
    if not counts:
        raise ValueError(
            "lro.quantize_state(stochastic=True) needs to know which step it is. "
            "Outside a bracket `inner` has to count its steps, in a field `count` of "
            "its state, as optax.ema and lro.momentum do."
        )
    return (), counts[0][1], 0 if layer is None else layer.index


def _draws(
    key: Any, count: Any, layer: Any, leaf: str | None, path: Any, shape: Any
) -> Any:
    """Returns draws from [0, 1) for a moment, a layer's as it has them in its stack.

    The path is that in the groups of moments; where a leaf is alone in them, ``leaf``
    says which it is.
    """
    group, field, *own = path
    leaf = path_string(tuple(own)) if leaf is None else leaf
    name = zlib.crc32(f"{path_string((group, field))}/{leaf}".encode())
    noise = dither((*key, count, name), shape, layer * math.prod(shape))
    return noise.astype(jnp.float32) * 2.0**-16


def _quantized(leaf: Any, codec: Codec, draws: Any = None) -> Any:
    found = quantize(unbox(leaf), codec, draws)
    fields = {name: _boxed(leaf, getattr(found, name)) for name in found._fields}
    return found._replace(**fields)


def _boxed(leaf: Any, array: Any) -> Any:
    """Names the axes of codes and scales as far as they are the array's own."""
    rows = array.ndim == unbox(leaf).ndim
    axes = tuple((axis,) if rows else () for axis in range(array.ndim))
    return rebox(leaf, array, axes)


def _undithered(state: Any, updates: Any, draws: Any) -> Any:
    """Decodes the moments of which codecs can take off the draws."""
    boxes, treedef = jax.tree.flatten(updates, is_leaf=is_box)
    flat = jax.tree_util.tree_leaves_with_path(updates, is_leaf=is_box)
    paths, moments = [path for path, _ in flat], _moments.find(state)

    def decoded(to: Any, path: Any, box: Any, leaf: Any) -> Any:
        if not (is_quantized(leaf) and leaf.codec.subtractive):
            return leaf
        whole = unbox_tree(leaf)
        return refill(box, whole.decode(draws((*to, *path), whole.shape)))

    groups = []
    for i, group in enumerate(moments.groups):
        columns = {}
        for name, tree in group.items():
            to = (jax.tree_util.SequenceKey(i), jax.tree_util.DictKey(name))
            leaves = zip(paths, boxes, treedef.flatten_up_to(tree), strict=True)
            columns[name] = treedef.unflatten(decoded(to, *each) for each in leaves)
        groups.append(columns)
    return moments.rebuild(tuple(groups))


def _decoded(state: Any, updates: Any) -> Any:
    """Decodes the moments, each into a box like its update's."""
    boxes, treedef = jax.tree.flatten(updates, is_leaf=is_box)
    if not any(map(is_box, boxes)):
        return jax.tree.map(dequantize, state, is_leaf=is_quantized)

    def decoded(box: Any, leaf: Any) -> Any:
        return refill(box, dequantize(unbox_tree(leaf))) if is_quantized(leaf) else leaf

    moments = _moments.find(state)
    groups = tuple(
        {
            name: treedef.unflatten(map(decoded, boxes, treedef.flatten_up_to(tree)))
            for name, tree in group.items()
        }
        for group in moments.groups
    )
    return moments.rebuild(groups)
