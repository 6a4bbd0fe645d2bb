"""Adam-mini's second moment: one number per column of every matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.leaves.boxes import is_box, rebox, refill, unbox
from lowrank_optax.leaves.moments import weight_seen
from lowrank_optax.leaves.stand_in import hidden


class ScaleByAdamMiniState(NamedTuple):
    """State of ``scale_by_adam_mini``.

    Attributes:
      count: steps taken.
      mu: first moment.
      col: second moment, averaged over rows, ``[..., n]``; whole on leaves with fewer
        than two axes.
    """

    count: Array
    mu: Any
    col: Any


def scale_by_adam_mini(
    b1: float | Array = 0.9, b2: float | Array = 0.999, eps: float | Array = 1e-8
) -> optax.GradientTransformation:
    r"""Adam with one second moment for every column of a matrix ``R [m, n]``.

    With ``m^ = mu / (1 - b1^t)`` and ``v^ = col / (1 - b2^t)``::

        mu  = b1 mu + (1 - b1) R                                  [m, n]
        col = b2 col + (1 - b2) mean_rows(R^2)                    [n]
        N   = m^ / (sqrt(v^) + eps)

    The columns are the last axis: one number per output of a Flax kernel
    ``(in, out)``, averaged over its inputs. Axes before the last two are batch axes;
    leaves with fewer than two get Adam itself. An embedding ``(tokens, features)``
    would be averaged over its tokens: give it Adam (``full=`` of ``lro.project``).

    Args:
      b1: decay of the first moment (Adam-mini: 0.9).
      b2: decay of the second moment (Adam-mini: 0.999; 0.95 for LLaMA).
      eps: added to the corrected root (Adam-mini: 1e-8).

    Returns:
      The transformation.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_adam_mini()
      >>> state = tx.init({"w": jnp.zeros((3, 4, 5))})
      >>> state.mu["w"].shape, state.col["w"].shape
      ((3, 4, 5), (3, 5))

    References:
      Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More (2024),
      https://arxiv.org/abs/2406.16793

    Differences from the authors' code:
      * Blocks are columns everywhere; there the block depends on the layer (heads for
        queries and keys, tokens for embeddings).
    """

    def init(params: Any) -> ScaleByAdamMiniState:
        def col(leaf):
            p = unbox(leaf)
            if p.ndim < 2:
                return jax.tree.map(jnp.zeros_like, leaf)
            # Rows are averaged away, and their name leaves the box with them.
            axes = tuple((i,) for i in (*range(p.ndim - 2), p.ndim - 1))
            # As a sum has it: sharded like the parameter, and each device's own if that
            # is.
            zeros = jnp.zeros_like(jnp.sum(p, -2), dtype=p.dtype)
            return rebox(leaf, zeros, axes)

        return ScaleByAdamMiniState(
            jnp.zeros([], jnp.int32),
            jax.tree.map(jnp.zeros_like, params),
            hidden(params, jax.tree.map(col, params, is_leaf=is_box)),
        )

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = count.astype(float)
        seen1, seen2 = weight_seen(b1, steps), weight_seen(b2, steps)
        mu = optax.tree_utils.tree_update_moment(updates, state.mu, b1, 1)

        def second(update, before):
            squared = jnp.square(unbox(update))
            mean = squared if squared.ndim < 2 else jnp.mean(squared, -2)
            return refill(before, b2 * unbox(before) + (1 - b2) * mean)

        def direction(update, m, v):
            root = jnp.sqrt(unbox(v) / seen2) + eps
            root = root if unbox(m).ndim < 2 else root[..., None, :]
            scaled = unbox(m) / seen1 / root
            return refill(update, scaled.astype(unbox(update).dtype))

        col = jax.tree.map(second, updates, state.col, is_leaf=is_box)
        out = jax.tree.map(direction, updates, mu, col, is_leaf=is_box)
        return out, ScaleByAdamMiniState(count, mu, col)

    return optax.GradientTransformation(init, update)
