"""An empirical natural gradient from the last few gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax._meshes import vary_like
from lowrank_optax.leaves.boxes import is_box, rebox, refill, unbox
from lowrank_optax.leaves.clock import next_count
from lowrank_optax.leaves.stand_in import hidden
from lowrank_optax.linalg.products import unit_norm, wide, wider
from lowrank_optax.linalg.woodbury import solve_member


class ScaleByNaturalGradientState(NamedTuple):
    """State of ``scale_by_natural_gradient``.

    Attributes:
      count: steps taken; the next gradient goes to place ``count % history``.
      history: the last gradients, each divided by its norm, ``[*batch, s, r, n]``
        (``[s, n]`` for a vector, ``[s]`` for a scalar); zero where there was none yet.
      norms: their norms, ``[*batch, s]``.
    """

    count: Array
    history: Any
    norms: Any


def scale_by_natural_gradient(
    history: int = 20,
    damping: float | Array = 1e-3,
    history_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Solves with the empirical Fisher matrix of the last gradients.

    For every matrix, ``g = vec(G)`` and ``H = [g_t, ..., g_{t-s+1}]`` the last s =
    ``history`` gradients, the current one included (missing ones are zero)::

        g <- (damping I + H H^T)^{-1} g = H (damping I + H^T H)^{-1} e_t

    by one Cholesky factorization of s x s. The second form, which holds because g is a
    column of H, has none of the cancellation of Woodbury's. The last two axes of a leaf
    are a matrix, leading axes are batch; a vector or a scalar is one g.

    **The state is s times the gradient** (Adam's: twice): s = 20 makes it ten times
    Adam's. A step reads all of it twice, and may copy it. The Gram matrix is formed
    anew each step, ``2 s^2`` operations per element of the gradient.

    A gradient along earlier ones shrinks by ``damping + |g|^2 + ...``, one orthogonal
    to them by ``damping + |g|^2``. Any scale is safe. How well g is told from nearly
    parallel ones is a matter of ``|g|^2 / damping``: the relative error grows to about
    ``eps s |g|^2 / damping``, and a damping below ``8 s eps`` of ``damping + |g_i|^2``
    (2e-5 at s = 20 in float32) acts as that much. A gradient that is not finite stays
    in the history for s steps: guard the whole optimizer with
    ``optax.apply_if_finite``.

    Args:
      history: number s of gradients kept (released code: 20).
      damping: lambda > 0 (released code: 1e-3). May be traced.
      history_dtype: storage dtype of the history, None for the parameter's; bfloat16
        takes half the bytes of float32 and rounds the gradient to it.

    Returns:
      A transformation with a ``ScaleByNaturalGradientState``.

    Raises:
      TypeError: if ``history`` is not a Python int.
      ValueError: if it is below 1, or ``damping`` a number that is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_natural_gradient(history=4, damping=1.0)
      >>> g = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
      >>> updates, state = tx.update(g, tx.init(g))
      >>> bool(jnp.allclose(updates["w"], g["w"] / (1.0 + 5.0)))
      True
      >>> state.history["w"].shape
      (4, 2, 2)

    References:
      Das, Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and
      Fine-tuning (2024), https://arxiv.org/abs/2410.16029
    """
    _checks.positive_int("history", history)
    if isinstance(damping, int | float) and damping <= 0:
        raise ValueError(f"`damping` must be positive, got {damping}.")

    def init(params: Any) -> ScaleByNaturalGradientState:
        def columns(leaf):
            p = unbox(leaf)
            shape = (*p.shape[:-2], history, *p.shape[-2:])
            zeros = vary_like(jnp.zeros(shape, history_dtype or p.dtype), p)
            return rebox(leaf, zeros, _axes(p.ndim, p.ndim))

        def lengths(leaf):
            p = unbox(leaf)
            zeros = vary_like(jnp.zeros((*p.shape[:-2], history), _wide(p.dtype)), p)
            return rebox(leaf, zeros, _axes(p.ndim, max(p.ndim - 2, 0)))

        return ScaleByNaturalGradientState(
            jnp.zeros([], jnp.int32),
            hidden(params, jax.tree.map(columns, params, is_leaf=is_box)),
            hidden(params, jax.tree.map(lengths, params, is_leaf=is_box)),
        )

    def update(updates, state, params=None):
        del params
        # A ring: the newest gradient takes the place of the oldest.
        place = state.count % history
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_box)
        trees = (
            leaves,
            treedef.flatten_up_to(state.history),
            treedef.flatten_up_to(state.norms),
        )
        out = [
            _one(unbox(update), unbox(columns), unbox(norms), place, damping)
            for update, columns, norms in zip(*trees, strict=True)
        ]
        solved, columns, norms = (
            treedef.unflatten([refill(b, x[i]) for b, x in zip(tree, out, strict=True)])
            for i, tree in enumerate(trees)
        )
        count = next_count(state.count, history)
        return solved, ScaleByNaturalGradientState(count, columns, norms)

    return optax.GradientTransformation(init, update)


def _one(
    update: Array, history: Array, norms: Array, place: Array, damping: Any
) -> tuple[Array, Array, Array]:
    """Returns one leaf's solution, and its state with the gradient in its place."""
    # A vector counts as a matrix of one row, a scalar as one of one element.
    short = (1,) * (2 - update.ndim)
    # Direction and length apart, so that no square of a gradient overflows or vanishes.
    unit, norm = unit_norm(wide(update).reshape(short + update.shape))
    batch, kept = norms.ndim - 1, history.shape
    units = history.reshape(*kept[: batch + 1], *short, *kept[batch + 1 :])
    units = jax.lax.dynamic_update_index_in_dim(
        units, unit.astype(units.dtype), place, batch
    )
    norms = jax.lax.dynamic_update_index_in_dim(
        norms, norm.astype(norms.dtype), place, batch
    )
    solved = solve_member(units, norms, place, damping)
    solved = solved.reshape(update.shape).astype(update.dtype)
    return solved, units.reshape(kept), norms


def _wide(dtype: Any) -> Any:
    return wider(jnp.float32, dtype)


def _axes(ndim: int, kept: int) -> tuple[tuple[int, ...], ...]:
    """Returns the axes behind ``[*batch, s, ...]``, the first ``kept`` of a leaf's."""
    batch = max(ndim - 2, 0)
    axes = tuple((axis,) for axis in range(kept))
    return (*axes[:batch], (), *axes[batch:])
