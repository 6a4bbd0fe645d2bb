"""Adafactor's pieces, per matrix: stacks are batches, small factors are kept."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.boxes import is_box, rebox, refill, unbox
from lowrank_optax.leaves.stand_in import hidden


class MatrixFactoredRmsState(NamedTuple):
    """State of ``scale_by_matrix_factored_rms``.

    Attributes:
      count: steps taken.
      row: running mean over columns, ``[..., r]``; the whole second moment of
        leaves with fewer than two axes, or shorter ones than ``min_dim``.
      col: running mean over rows, ``[..., n]``; ``MaskedNode`` on such leaves.
    """

    count: Array
    row: Any
    col: Any


def scale_by_matrix_factored_rms(
    decay_rate: float | Array = 0.8,
    eps: float | Array = 1e-30,
    min_dim: int = 1,
) -> optax.GradientTransformation:
    r"""Adafactor's factored second moment over the last two axes of every leaf.

    With ``S = R * R + eps`` and ``b = 1 - t^(-decay_rate)`` (t from 1)::

        row <- b row + (1 - b) mean_columns(S)
        col <- b col + (1 - b) mean_rows(S)
        U   = R / sqrt(row / mean(row)) / sqrt(col)

    ``optax.scale_by_factored_rms`` factors over the two LARGEST axes, which mixes
    the layers of a stack.

    Args:
      decay_rate: exponent of the decay.
      eps: added to the squared gradient.
      min_dim: a leaf of which one of these axes is shorter keeps its whole second
        moment, as vectors do: stacks of vectors are no matrices. Optax has 128.

    Returns:
      The transformation.

    Raises:
      TypeError: if ``min_dim`` is not a Python int.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_matrix_factored_rms()
      >>> state = tx.init({"w": jnp.zeros((3, 4, 5))})
      >>> state.row["w"].shape, state.col["w"].shape
      ((3, 4), (3, 5))

    References:
      Shazeer and Stern, Adafactor (2018), https://arxiv.org/abs/1804.04235
    """
    _checks.positive_int("min_dim", min_dim)

    def whole(x: Any) -> bool:
        return x.ndim < 2 or min(x.shape[-2:]) < min_dim

    def init(params: Any) -> MatrixFactoredRmsState:
        def row(leaf):
            p = unbox(leaf)
            axes = tuple((i,) for i in range(p.ndim))
            if whole(p):
                return rebox(leaf, jnp.zeros_like(p), axes)
            # As sums have it: sharded like the parameter, and each device's own if that
            # is.
            return rebox(leaf, jnp.zeros_like(jnp.sum(p, -1), dtype=p.dtype), axes[:-1])

        def col(leaf):
            p = unbox(leaf)
            if whole(p):
                return optax.MaskedNode()
            axes = tuple((i,) for i in (*range(p.ndim - 2), p.ndim - 1))
            return rebox(leaf, jnp.zeros_like(jnp.sum(p, -2), dtype=p.dtype), axes)

        return MatrixFactoredRmsState(
            jnp.zeros([], jnp.int32),
            hidden(params, jax.tree.map(row, params, is_leaf=is_box)),
            hidden(params, jax.tree.map(col, params, is_leaf=is_box)),
        )

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        # 0 at the first step: the first gradient counts whole, and there is no bias.
        decay = 1.0 - count.astype(jnp.float32) ** -decay_rate

        def one(update, row, col):
            # With eps a row of zeros is divided by a number that is not zero.
            squared = update * update + eps
            if whole(update):
                row = decay * row + (1 - decay) * squared
                return update * jax.lax.rsqrt(row), row, col
            row = decay * row + (1 - decay) * jnp.mean(squared, axis=-1)
            col = decay * col + (1 - decay) * jnp.mean(squared, axis=-2)
            # Adafactor's estimate of the second moment is row col^T / mean(row).
            relative = row / jnp.mean(row, axis=-1, keepdims=True)
            scaled = update * jax.lax.rsqrt(relative)[..., None]
            return scaled * jax.lax.rsqrt(col)[..., None, :], row, col

        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_box)
        boxes = (
            leaves,
            treedef.flatten_up_to(state.row),
            treedef.flatten_up_to(state.col),
        )
        out = [one(*map(unbox, args)) for args in zip(*boxes, strict=True)]
        new = (
            treedef.unflatten([refill(b, x[i]) for b, x in zip(box, out, strict=True)])
            for i, box in enumerate(boxes)
        )
        scaled, rows, cols = new
        return scaled, MatrixFactoredRmsState(count, rows, cols)

    return optax.GradientTransformation(init, update)


def clip_by_matrix_rms(threshold: float | Array = 1.0) -> optax.GradientTransformation:
    """Divides every matrix by ``max(1, rms / threshold)``, its own rms.

    ``optax.clip_by_block_rms`` takes one rms over a whole stack.

    Args:
      threshold: largest root mean square let through.

    Returns:
      The transformation.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.clip_by_matrix_rms(1.0)
      >>> g = {"w": jnp.full((2, 2), 4.0)}
      >>> float(tx.update(g, tx.init(g))[0]["w"].max())
      1.0
    """

    def clip(updates, params=None):
        del params
        return jax.tree.map(
            lambda u: u / jnp.maximum(1.0, _rms(u, keepdims=True) / threshold), updates
        )

    return optax.stateless(clip)


def scale_by_parameter_rms(
    min_scale: float | Array = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies every matrix by ``max(min_scale, rms(W))`` of the FULL parameter.

    Inside a bracket the parameters seen are projected ones; this reads the full
    parameters from the view, elsewhere ``params``.

    Args:
      min_scale: smallest factor.

    Returns:
      The transformation; its update needs ``params``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_parameter_rms()
      >>> w = {"w": jnp.full((2, 2), 3.0)}
      >>> float(tx.update({"w": jnp.ones((2, 2))}, tx.init(w), w)[0]["w"][0, 0])
      3.0
    """

    def update(updates, state, params=None, *, subspace=None, **extra_args):
        del extra_args
        # A root mean square `[*batch, 1, 1]` broadcasts over a projection of any shape.
        full = params if subspace is None else subspace.params
        if full is None:
            raise ValueError("scale_by_parameter_rms needs params in update.")
        scaled = jax.tree.map(
            lambda u, w: (
                u * jnp.maximum(min_scale, _rms(w, keepdims=True)).astype(u.dtype)
            ),
            updates,
            full,
        )
        return scaled, state

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(init, update)


def _rms(x: Array, keepdims: bool) -> Array:
    axes = tuple(range(-min(x.ndim, 2), 0))
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=keepdims)
    return jnp.sqrt(mean)
