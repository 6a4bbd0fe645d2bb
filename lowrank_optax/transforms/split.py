"""``split_weights`` trains bfloat16 parameters as if they were float32 ones.

What a bfloat16 is off by is a small integer in the state (``quantization.split``)::

    W = join(p, c);    N, state = inner.update(G, state, W)
    p', c' = split(W + N);    the update is u with bfloat16(p + u) = p'

`u = p' - p` in float32 does that wherever p' is not smaller than `2^-15 p` and the
distance is a normal number. There is no such u for all pairs of bfloat16: next to 1 the
float32 are `2^-24` apart, and no sum of 1 and one of them is `2^-30`. A float32 run
does not go from 1 to there in one step either. What is lost is below one rounding of
float32 at the size of p, since c' is counted from where the sum lands, whatever p' was.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.boxes import is_box, refill, unbox
from lowrank_optax.leaves.matrix import path_string
from lowrank_optax.quantization.split import (
    CORRECTIONS,
    code_of,
    join,
    nearest_bfloat16,
    same_bits,
)


class SplitWeightsState(NamedTuple):
    """State of ``split_weights``.

    Attributes:
      correction: a tree like the parameters, of int8 or int16; ``MaskedNode`` for
        those that are not split.
      inner_state: of the inner transformation, for float32 parameters.
    """

    correction: Any
    inner_state: Any


def split_weights(
    inner: optax.GradientTransformation, correction: Any = "int8"
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps of each bfloat16 parameter what it lacks to float32, in an int8 or int16.

    The model reads bfloat16 parameters; ``inner`` sees and moves float32 ones, which
    are put together and taken apart at every step::

        W = p + c / M * ulp(p) / 2        M = 127 for int8, 32767 for int16
        N, state = inner.update(float32(G), state, W)
        p' = bfloat16(W + N),   c' = round((W + N - p') / (ulp(p') / 2) * M)

    With the update that it returns, ``optax.apply_updates`` makes p'. A parameter and
    its correction take 3 bytes with int8, 4 with int16. A step is wrong by half a code
    at most, 1.54e-5 of the power of two not above p', with int8, and with int16 by one
    unit in the last place of a float32. Smaller steps are lost, as in bfloat16 alone
    are those below ``2^-9``: take int16 where the learning rate times the update's size
    falls below 1e-5 of a weight. Leaves with fewer than two axes, such as the gains of
    norms, take int16 in any case, and hardly a byte.

    It belongs outside of whatever scales, clips or guards an update:
    ``split_weights(optax.apply_if_finite(tx, 5))``. Updates of split leaves are float32
    whatever the gradient is, since in bfloat16 they would not lead where they should.
    ``optax.inject_hyperparams`` goes inside, too: of bfloat16 parameters it would round
    the learning rate to their type.
    Nothing but ``optax.apply_updates`` may change parameters without
    ``lro.set_full_weights``.

    Args:
      inner: the whole optimizer, learning rate and decay included.
      correction: "int8" or "int16", or a function ``(path, leaf)`` that returns one of
        them or None (not split) for each bfloat16 leaf, whatever its axes.

    Returns:
      The transformation. Leaves of other dtypes, or without elements, are left to
      ``inner`` as they are.

    Raises:
      TypeError: if ``inner`` is no transformation.
      ValueError: if ``correction`` is none of these, or ``update`` is called without
        parameters or with others than ``init``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = lro.split_weights(optax.sgd(1.0), correction="int16")
      >>> params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
      >>> state = tx.init(params)
      >>> for _ in range(8):  # an eighth of the distance to the next number
      ...     grads = {"w": jnp.full((2, 2), -(2.0**-10))}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"].dtype, state.correction["w"].dtype, float(params["w"][0, 0])
      (dtype(bfloat16), dtype('int16'), 1.0078125)
      >>> round(float(lro.full_weights(params, state)["w"][0, 0]), 6)
      1.007813

    References:
      FlashOptim: Optimizers for Memory Efficient Training (2026),
      https://arxiv.org/abs/2602.23349

    Differences from the authors' code:
      * It is a transformation around any other, not a part of three optimizers.
      * Weights are put together and taken apart in integers, exactly, subnormal numbers
        and both zeros too (the step between is the backend's, which may flush them),
        and what does not move keeps its bits.
      * Vectors take 16 bits: in 24, gains of 1 no longer follow small steps.
    """
    inner = optax.with_extra_args_support(
        _checks.transformation("inner", inner, "adamw(1e-3)")
    )
    if not _checks.is_function(correction):
        _checks.choice("correction", correction, CORRECTIONS)

    def kind(path: Any, leaf: Any) -> str | None:
        if not _checks.is_function(correction):
            return "int16" if leaf.ndim < 2 else str(correction)
        found = correction(path_string(path), leaf)
        return _checks.choice("correction", found, (*CORRECTIONS, None))

    def first(path: Any, param: Any) -> Any:
        leaf = unbox(param)
        splits = leaf.dtype == jnp.bfloat16 and leaf.size
        found = kind(path, leaf) if splits else None
        if found is None:
            return optax.MaskedNode()
        return refill(param, jnp.zeros_like(leaf, dtype=CORRECTIONS[found]))

    def init(params: Any) -> SplitWeightsState:
        codes = jax.tree_util.tree_map_with_path(first, params, is_leaf=is_box)
        full = _each(_joined, params, codes)
        return SplitWeightsState(codes, inner.init(full))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "split_weights needs the parameters: call tx.update(updates, state, "
                "params)."
            )
        codes = state.correction
        _check("split_weights", params, codes)
        full = _each(_joined, params, codes)
        wide = _each(_widened, updates, codes)
        steps, inner_state = inner.update(wide, state.inner_state, full, **extra_args)
        moved = _each(_moved, full, codes, steps)
        updates = _each(_update, steps, codes, params, full, moved)
        landed = _each(_landed, params, codes, updates)
        codes = _each(_corrected, codes, codes, landed, moved)
        return updates, SplitWeightsState(codes, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def full_weights(params: Any, state: Any) -> Any:
    """Returns what ``split_weights`` trains: parameters and corrections in float32.

    For evaluation in full precision and for export; ``set_full_weights`` is the way
    back.

    Args:
      params: the parameters.
      state: of an optimizer with ``split_weights`` inside.

    Returns:
      A tree like ``params``, in float32 where they are split.

    Raises:
      ValueError: if there is no ``split_weights`` in the state, or the parameters are
        not those that it was made for.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> full = {"w": jnp.full((2, 2), 0.3)}
      >>> params = {"w": jnp.zeros((2, 2), jnp.bfloat16)}
      >>> state = lro.split_weights(optax.sgd(1.0), "int16").init(params)
      >>> params, state = lro.set_full_weights(full, state)
      >>> float(params["w"][0, 0]), float(lro.full_weights(params, state)["w"][0, 0])
      (0.30078125, 0.30000001192092896)
    """
    for _, codes in _corrections("full_weights", state):
        _check("full_weights", params, codes)
        params = _each(_joined, params, codes)
    return params


def set_full_weights(full: Any, state: Any) -> tuple[Any, Any]:
    """Returns parameters and state of ``split_weights`` that stand for given weights.

    To start from float32 weights, which ``tx.init(params)`` in bfloat16 knows only
    rounded, and after any other change of the weights.

    Args:
      full: weights of any float dtype, a tree like the parameters.
      state: of an optimizer with ``split_weights`` inside.

    Returns:
      The parameters, in bfloat16 where they are split and else as in ``full``, and the
      state with their corrections.

    Raises:
      ValueError: if there is no ``split_weights`` in the state.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> weights = {"w": jnp.full((2, 2), 0.3)}
      >>> tx = lro.split_weights(optax.sgd(1.0), correction="int16")
      >>> params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
      >>> params, state = lro.set_full_weights(weights, tx.init(params))
      >>> bool((lro.full_weights(params, state)["w"] == weights["w"]).all())
      True
    """
    params = full
    for path, codes in _corrections("set_full_weights", state):
        params = _each(_rounded, params, codes)
        fresh = _each(_corrected, codes, codes, params, full)
        state = optax.tree_utils.tree_set(
            state, lambda at, _, path=path: at == path, correction=fresh
        )
    return params, state


def _is_leaf(node: Any) -> bool:
    return is_box(node) or isinstance(node, optax.MaskedNode)


def _each(do: Callable[..., Any], tree: Any, codes: Any, *rest: Any) -> Any:
    """Returns ``do(leaf, code, *others)`` for leaves that are split, others as in tree.

    ``do`` is given arrays, and what it returns is put into the box of ``leaf``.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_leaf)
    columns = map(treedef.flatten_up_to, (codes, *rest))

    def one(leaf: Any, code: Any, *others: Any) -> Any:
        if isinstance(code, optax.MaskedNode):
            return leaf
        return refill(leaf, do(unbox(leaf), unbox(code), *map(unbox, others)))

    return treedef.unflatten(map(one, leaves, *columns))


def _joined(param: Array, code: Array) -> Array:
    return join(param, code)


def _widened(gradient: Array, code: Array) -> Array:
    return gradient.astype(jnp.float32)


def _moved(full: Array, code: Array, step: Array) -> Array:
    return full + step.astype(jnp.float32)


def _rounded(weight: Array, code: Array) -> Array:
    return nearest_bfloat16(weight.astype(jnp.float32))


def _update(step: Array, code: Array, param: Array, full: Array, moved: Array) -> Array:
    low = nearest_bfloat16(moved)
    way = low.astype(jnp.float32) - param.astype(jnp.float32)
    # What stays is not made +0 where it is -0, nor NaN where it is infinite, and half
    # way between two bfloat16 it stays with its own.
    stays = same_bits(low, param) | (moved == full)
    return jnp.where(stays, jnp.float32(-0.0), way)


def _landed(param: Array, code: Array, update: Array) -> Array:
    """What ``optax.apply_updates`` makes, whose sum is one of float32."""
    return nearest_bfloat16(param.astype(jnp.float32) + update)


def _corrected(code: Array, _: Array, low: Array, full: Array) -> Array:
    return code_of(full.astype(jnp.float32), low, code.dtype)


def _corrections(caller: str, state: Any) -> list[tuple[Any, Any]]:
    """Finds all corrections by name: wrappers may have changed a state's types."""
    found = optax.tree_utils.tree_get_all_with_path(state, "correction")
    if not found:
        raise ValueError(
            f"{caller} found no corrections in the state: the optimizer must have "
            "lro.split_weights around it, and `state` be what its init and update "
            "returned."
        )
    return found


def _check(caller: str, params: Any, codes: Any) -> None:
    """Raises unless the parameters are those that the corrections belong to."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_leaf)
    for (path, leaf), code in zip(pairs, treedef.flatten_up_to(codes), strict=True):
        if isinstance(code, optax.MaskedNode):
            continue
        leaf, shape = unbox(leaf), unbox(code).shape
        if leaf.dtype != jnp.bfloat16 or leaf.shape != shape:
            raise ValueError(
                f"{caller}: the parameter {path_string(path)!r} was bfloat16"
                f"{[*shape]} when the state was made, and is {leaf.dtype}"
                f"{[*leaf.shape]}. Give the bfloat16 parameters; "
                "lro.set_full_weights makes them of others."
            )
