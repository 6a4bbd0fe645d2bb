"""``column_sgd``: columns of one size, and momentum on the head alone (SCALE)."""

import functools
import re
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.bases import Lifted
from lowrank_optax.bracket.match import CHOICES, Sample, resized, start, wanted
from lowrank_optax.leaves.boxes import is_box, unbox
from lowrank_optax.leaves.matrix import Matrix, path_string
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.transforms import cast_moments
from lowrank_optax.transforms.cast import keep_dtypes, without_overflow

_VECTOR = re.compile(r"norm|(^|/)(scale|bias)$")


class _Options(has.Decay, has.Moments): ...


@method("SCALE", "2506.16659", "Minimalist LLM pretraining, SCALE (2025)")
def column_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | Array = 0.9,
    head: str | None = None,
    axis: int = -2,
    vector_scale: float | Array = 1.0,
    layer_axis: int | None = None,
    state_dtype: Any = None,
    match: str | None = None,
    **options: Unpack[_Options],
) -> Transformation:
    """SCALE: column-normalized SGD, with momentum in the last layer alone.

    For a matrix ``W [m, n]`` with gradient ``G``, column by column::

        G <- M = momentum M + (1 - momentum) G              on the output head alone
        U_j = G_j / max(rms(G_j), 1e-8)                     n columns of m numbers
        W  <- W - lr (U + weight_decay W)

    and Adam on the vectors. A matrix has no state, the head ``m n`` numbers, a vector
    Adam's. Nothing depends on the size of a gradient, so clipping does nothing outside
    the head, and gradients are accumulated before the step.

    Args:
      momentum: decay of the head's momentum.
      head: regular expression that finds the head's path; None is ``lm_head``, where
        there is one. With tied embeddings give the embedding's path, or none has
        momentum.
      axis: along which the rms is taken: -2, the input axis of Flax kernels ``(in,
        out)`` and the vocabulary of embeddings; -1, the input axis of torch's weights.
      vector_scale: learning rate of the vectors per unit of that of the matrices
        (authors: 1 up to 350M, 5 at 1B, 10 at 7B).
      layer_axis: axis that stacks layers; stacked vectors are vectors.
      state_dtype: storage dtype of the momentum; None is the parameter's. Moments of
        vectors are float32.
      match: "adamw" makes the updates of matrices as long as AdamW's, see
        ``lro.project``; None leaves them as they are.

    Raises:
      ValueError: at init, if ``head`` is given and finds no matrix.

    Differences from the authors' code:
      * The paper divides by the norm of a column, the code by its rms, which is
        smaller by ``sqrt(m)``: learning rates are the code's.
      * There, the decay of a vector takes the vectors' learning rate.
      * There, a matrix whose name is unknown is the head, and Adam adds eps to the root
        before its bias is corrected.
    """
    its = Recipe(**options)
    columns = optax.stateless_with_tree_map(lambda g, _: _divided(g, axis))
    # Nothing stands in a bracket, so the vectors' Adam is made at once.
    adam = optax.scale_by_adam(its.b1, its.b2, 1e-8 if its.eps is None else its.eps)
    adam = cast_moments(adam, jnp.float32, jnp.float32)
    matrices = {
        "head": optax.chain(_average(momentum, state_dtype), columns),
        "matrix": columns,
    }
    if match is not None:
        _checks.choice("match", match, CHOICES)
        matrices = {k: _matched(tx, layer_axis) for k, tx in matrices.items()}
    tx = optax.partition(
        {
            **matrices,
            "vector": optax.chain(adam, optax.scale(vector_scale)),
        },
        functools.partial(_roles, head, layer_axis),
    )
    # No bracket stands here to cast what leaves it.
    tx = without_overflow(keep_dtypes(tx))
    if learning_rate is not None:
        tx = optax.chain(tx, optax.scale_by_learning_rate(learning_rate))
    return its.decayed(optax.with_extra_args_support(tx), learning_rate, authors=False)


def _average(decay: Any, dtype: Any) -> optax.GradientTransformation:
    """Returns the mean of the gradients so far, without a correction of its bias.

    The bias is a factor of whole columns, and their rms divides it out again.
    """

    def init(params: Any) -> optax.TraceState:
        return optax.TraceState(
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
        )

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        mean = jax.tree.map(
            lambda m, g: decay * m + (1 - decay) * jnp.asarray(g, jnp.float32),
            state.trace,
            updates,
        )
        kept = jax.tree.map(lambda x, m: x.astype(m.dtype), mean, state.trace)
        return mean, optax.TraceState(kept)

    return optax.GradientTransformation(init, update)


class _Matched(NamedTuple):
    """Steps so far, AdamW's moments of some entries, and the other's state."""

    count: Array
    sample: Any
    inner_state: Any


def _matched(
    tx: optax.GradientTransformation, layer_axis: int | None
) -> optax.GradientTransformation:
    """Returns a direction that is in every matrix as long as AdamW's."""

    def init(params: Any) -> _Matched:
        sample = jax.tree.map(lambda p: start(_seen(p, layer_axis).matrix), params)
        return _Matched(jnp.zeros([], jnp.int32), sample, tx.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        directions, inner = tx.update(updates, state.inner_state, params)

        def matched(gradient: Any, direction: Any, sample: Sample) -> Any:
            leaf = _seen(gradient, layer_axis)
            seen, long = map(leaf.matrix.operand, (gradient, direction))
            size, sample = wanted(leaf, seen, sample, state.count)
            return leaf.matrix.leaf(resized(leaf, long, size)), sample

        flat, treedef = jax.tree.flatten(updates)
        trees = treedef.flatten_up_to(directions), treedef.flatten_up_to(state.sample)
        pairs = list(map(matched, flat, *trees))
        out, sample = (treedef.unflatten(pair[i] for pair in pairs) for i in (0, 1))
        count = jnp.asarray(optax.safe_increment(state.count))
        return out, _Matched(count, sample, inner)

    return optax.GradientTransformation(init, update)


def _seen(leaf: Any, layer_axis: int | None) -> Lifted:
    """Returns a leaf as matrices, of its last two axes that stack no layers."""
    axes = list(range(leaf.ndim))
    if layer_axis is not None and leaf.ndim > 2:
        axes.insert(0, axes.pop(layer_axis))
    *batch, row, column = axes
    # No basis stands behind it: side and rank say nothing.
    matrix = Matrix("", leaf.shape, tuple(batch), (row,), (column,), "left", 1)
    return Lifted(matrix)


def _divided(gradient: Any, axis: int) -> Array:
    wide = jnp.asarray(gradient, jnp.float32)
    rms = jnp.sqrt(jnp.mean(wide**2, axis, keepdims=True))
    # The bound keeps a column of zeros at zero.
    return (wide / jnp.maximum(rms, 1e-8)).astype(gradient.dtype)


def _roles(head: str | None, layer_axis: int | None, params: Any) -> Any:
    """Labels every leaf, a box as a whole."""

    def role(path: Any, leaf: Any) -> str:
        axes = jnp.ndim(unbox(leaf))
        # Where layers are stacked, a leaf of two axes may be one vector for each.
        stacked = layer_axis is not None and axes == 2
        if axes < 2 or (stacked and _VECTOR.search(path_string(path))):
            return "vector"
        return "head" if re.search(head or "lm_head", path_string(path)) else "matrix"

    roles = jax.tree_util.tree_map_with_path(role, params, is_leaf=is_box)
    if head is not None and "head" not in jax.tree.leaves(roles):
        raise ValueError(f"lro.column_sgd: `head` {head!r} finds no matrix.")
    return roles


scale_by_column_sgd = direction(column_sgd)
