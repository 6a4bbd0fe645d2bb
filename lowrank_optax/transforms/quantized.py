"""Moments of any inner optimizer, stored in eight bits and fewer."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lowrank_optax import _checks
from lowrank_optax.leaves import moments as _moments
from lowrank_optax.leaves.boxes import is_box, rebox, refill, restore, unbox, unbox_tree
from lowrank_optax.leaves.stand_in import hidden
from lowrank_optax.quantization import (
    Codec,
    blockwise_int8,
    dequantize,
    is_quantized,
    quantize,
)
from lowrank_optax.quantization.rounding import own_draws
from lowrank_optax.transforms.cast import keep_dtypes

_SIGNED = blockwise_int8(signed=True, signed_scale=True, exact=False)
_UNSIGNED = blockwise_int8(signed=False, exact=False)


class RandomlyRoundedState(NamedTuple):
    """State of ``quantize_state(stochastic=True)``.

    Attributes:
      steps: how many there were, from which draws are made.
      inner_state: of the inner transformation, its moments encoded.
    """

    steps: Any
    inner_state: Any


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
      stochastic: whether moments are rounded at random to one of the two nearest codes,
        so that their mean is right, by codecs that can. With few codes rounding to the
        nearest loses what a step changes, all of it where b2 is 0.999. The draws are
        hashes of the numbers, their places in a matrix and a count of steps: there is
        no key, and every replica rounds the same way.

    Returns:
      The transformation. Its updates have the gradients' dtypes. Leaves without
      elements are hidden from ``inner``.

    Raises:
      TypeError: if ``inner`` is no transformation, a codec no codec, or ``min_size`` no
        int.
      ValueError: if the codec of ``nu`` may store what is not zero as zero, or no codec
        can round at random that should.

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
    if stochastic and not any(c is not None and c.stochastic for c in codecs.values()):
        raise ValueError(
            "`stochastic` needs a codec that can round at random, such as companded() "
            f"or linear_int4(), got mu={mu} and nu={nu}."
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

    def store(state: Any, before: Any, at: Any) -> Any:
        # As it was, not by its size: a stack's layer is smaller than the stack.
        moments, old = _moments.find(state), _moments.find(before)
        groups = tuple(
            {name: _encoded_like(tree, last[name], at) for name, tree in group.items()}
            for group, last in zip(moments.groups, old.groups, strict=True)
        )
        return moments.rebuild(groups)

    def init(params: Any) -> Any:
        # Else the compiler would encode the zeros itself, at its leisure.
        return start(params, jax.lax.optimization_barrier(inner.init(params)))

    def update(updates, state, params=None, *, at=None, **extra_args):
        treedef = jax.tree.structure(updates, is_leaf=is_box)
        # nnx.Optimizer gives a state back with mappings in the place of tuples.
        if _moments.are_altered(treedef, state):
            state = restore(state, lambda: init(updates))

        def step(updates, state, params):
            loaded = _decoded(state, updates)
            out, new = inner.update(updates, loaded, params, **extra_args)
            return out, store(new, state, at)

        if leafwise and treedef.num_leaves > 1:
            return _one_by_one(step, treedef, updates, state, params)
        return step(updates, state, params)

    def counted(updates, state, params=None, **extra_args):
        at, inner_state = state
        out, new = update(updates, inner_state, params, at=at, **extra_args)
        return out, RandomlyRoundedState(optax.safe_increment(at), new)

    if stochastic:
        return keep_dtypes(
            optax.GradientTransformationExtraArgs(
                lambda params: RandomlyRoundedState(jnp.int32(0), init(params)), counted
            )
        )
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
        (out,), state = step([update], moments.rebuild(groups), weight)
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


def _encoded_like(tree: Any, before: Any, at: Any) -> Any:
    """Encodes what was encoded before."""

    def encode(old: Any, leaf: Any) -> Any:
        if not is_quantized(old):
            return leaf
        draw = at is not None and old.codec.stochastic
        return _quantized(leaf, old.codec, own_draws(unbox(leaf), at) if draw else None)

    return jax.tree.map(
        encode, before, tree, is_leaf=lambda x: is_quantized(x) or is_box(x)
    )


def _quantized(leaf: Any, codec: Codec, draws: Any = None) -> Any:
    found = quantize(unbox(leaf), codec, draws)
    fields = {name: _boxed(leaf, getattr(found, name)) for name in found._fields}
    return found._replace(**fields)


def _boxed(leaf: Any, array: Any) -> Any:
    """Names the axes of codes and scales as far as they are the array's own."""
    rows = array.ndim == unbox(leaf).ndim
    axes = tuple((axis,) if rows else () for axis in range(array.ndim))
    return rebox(leaf, array, axes)


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
