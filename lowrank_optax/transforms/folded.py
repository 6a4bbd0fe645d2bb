"""``scale_by_folded_adam``: Adam on means over neighbours, the rest beside (FOAM)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.boxes import is_box, rebox, unbox
from lowrank_optax.leaves.moments import weight_seen
from lowrank_optax.leaves.stand_in import hidden
from lowrank_optax.linalg.products import wide
from lowrank_optax.transforms._matrices import (
    check_made,
    map_matrices,
    require_matrices,
)


class ScaleByFoldedAdamState(NamedTuple):
    """State of ``scale_by_folded_adam``.

    Attributes:
      count: steps taken.
      mu: first moment of the blocks' means, ``[..., ceil(m / 2^level), n]``.
      nu: mean of the blocks' mean squares, likewise.
    """

    count: Array
    mu: Any
    nu: Any


def scale_by_folded_adam(
    b1: float | Array = 0.9,
    b2: float | Array = 0.95,
    eps: float | Array = 1e-8,
    *,
    level: int = 2,
    residual: float | Array = 1.0,
    axis: int = -2,
    debias: bool = True,
) -> optax.GradientTransformation:
    r"""Adam with one pair of moments for every ``2^level`` neighbours.

    ``fold`` takes means over blocks of ``f = 2^level`` neighbours along one axis, the
    last block as long as it is, and ``unfold`` repeats them. With ``D = G -
    unfold(fold(G))``, at step t::

        mu = b1 mu + (1 - b1) fold(G)                       m / f  x  n
        nu = b2 nu + (1 - b2) fold(G * G)
        N  = (unfold(mu / (1 - b1^t)) + residual D)
             / (sqrt(unfold(nu / (1 - b2^t)) + residual^2 D^2) + eps)

    Every entry of D is divided by at least its own size, so that no entry of N exceeds
    Adam's by more than 1.

    The last two axes of a leaf are a matrix, leading axes are batch.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment (FOAM's scripts: 0.95).
      eps: added to the root.
      level: of the fold; 0 is Adam.
      residual: factor on D. May be traced.
      axis: which one is folded: -2, the input axis of Flax kernels ``(in, out)``, or
        -1, that of torch's weights. One that is cut over devices should have whole
        blocks on each.
      debias: whether moments are corrected for their start at zero; the released code
        multiplies the whole of N instead (``lro.scale_by_bias_correction``), D too.

    Returns:
      The transformation.

    Raises:
      TypeError: if ``level`` is not a Python int.
      ValueError: if a choice is unknown, or at init if a leaf has fewer than two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_folded_adam(level=2)
      >>> tx.init({"w": jnp.zeros((3, 10, 6))}).mu["w"].shape
      (3, 3, 6)

    References:
      FOAM: Blocked State Folding for Memory-Efficient LLM Training (2025),
      https://arxiv.org/abs/2512.07112
    """
    _checks.positive_int("level", level, least=0)
    _checks.choice("axis", axis, (-2, -1))
    size = 2**level

    def init(params: Any) -> ScaleByFoldedAdamState:
        require_matrices("lro.scale_by_folded_adam", params)

        def zeros(leaf: Any) -> Any:
            p = unbox(leaf)
            moment = jnp.zeros_like(_fold(p, size, axis), p.dtype)
            return rebox(leaf, moment, tuple((i,) for i in range(p.ndim)))

        mu, nu = (
            hidden(params, jax.tree.map(zeros, params, is_leaf=is_box))
            for _ in range(2)
        )
        return ScaleByFoldedAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def level_of(update: Array, mu: Array) -> int:
        """Returns the level of a moment, the asked one if it is among those it fits."""
        if mu.shape[axis] == -(-update.shape[axis] // size):
            return level
        long, blocks = update.shape[axis], mu.shape[axis]
        return next((j for j in range(64) if -(-long // 2**j) == blocks), level)

    def update(updates, state, params=None):
        del params
        check_made("level", lambda _: level, level_of, updates, state.mu)
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = count.astype(jnp.float32)
        seen = [weight_seen(b, steps) if debias else 1.0 for b in (b1, b2)]

        def one(update: Array, mu: Array, nu: Array, axis: int) -> tuple[Array, ...]:
            del axis  # The state has a shape, and so an axis, before there is a view.
            return step(update, mu, nu, *seen)

        # The view would say which axis is the input, which is not asked here.
        out, mu, nu = map_matrices(
            one, updates, state.mu, state.nu, subspace=None, axis=axis
        )
        return out, ScaleByFoldedAdamState(count, mu, nu)

    def step(update: Array, mu: Array, nu: Array, seen1: Any, seen2: Any) -> Any:
        g = wide(update)
        mean = _fold(g, size, axis)
        mu = b1 * mu + (1 - b1) * mean
        nu = b2 * nu + (1 - b2) * _fold(g * g, size, axis)
        rest = residual * (g - _unfold(mean, g.shape, size, axis))
        first = _unfold(mu / seen1, g.shape, size, axis)
        second = _unfold(nu / seen2, g.shape, size, axis)
        out = (first + rest) / (jnp.sqrt(second + rest * rest) + eps)
        return out.astype(update.dtype), mu, nu

    return optax.GradientTransformation(init, update)


def _fold(x: Array, size: int, axis: int) -> Array:
    """Returns the means of blocks along an axis, the last one as long as it is."""
    long = x.shape[axis]
    blocks = -(-long // size)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, blocks * size - long)
    place = x.ndim + axis
    shape = (*x.shape[:place], blocks, size, *x.shape[place + 1 :])
    total = jnp.sum(jnp.pad(x, pad).reshape(shape), place + 1)
    last = long - (blocks - 1) * size
    lengths = jnp.full((blocks,), size).at[-1:].set(last).astype(x.dtype)
    return total / (lengths[:, None] if axis == -2 else lengths)


def _unfold(x: Array, shape: tuple[int, ...], size: int, axis: int) -> Array:
    """Returns every mean as often as it has neighbours."""
    place = len(shape) + axis
    spread = (*x.shape[: place + 1], size, *x.shape[place + 1 :])
    repeated = jnp.broadcast_to(jnp.expand_dims(x, place + 1), spread)
    merged = (*shape[:place], x.shape[place] * size, *shape[place + 1 :])
    return jax.lax.slice_in_dim(repeated.reshape(merged), 0, shape[axis], axis=place)
