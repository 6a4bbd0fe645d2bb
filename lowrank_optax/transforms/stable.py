"""``stabilize_gradients``: spikes clipped and norms evened, tensor by tensor."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.boxes import is_box, rebox, refill, unbox
from lowrank_optax.leaves.moments import weight_seen
from lowrank_optax.leaves.stand_in import hidden
from lowrank_optax.linalg.products import has_square, kept_if, wide


class StabilizeGradientsState(NamedTuple):
    """State of ``stabilize_gradients``; a number for every tensor in each tree.

    Attributes:
      count: steps taken.
      peak: running mean of the largest magnitude.
      norm: running mean of the norm after clipping.
      root: root of the running mean of its square.
    """

    count: Array
    peak: Any
    norm: Any
    root: Any


def stabilize_gradients(
    norm_decay: float | Array = 0.7,
    square_decay: float | Array = 0.9,
    peak_decay: float | Array = 0.999,
    eps: float | Array = 1e-8,
    layer_axis: int | None = None,
) -> optax.GradientTransformation:
    r"""Clips spikes and evens out norms, in front of any optimizer (Stable-SPAM).

    For every tensor ``g`` at step t, all means corrected for their start at zero::

        peak   <- mean of max|g|                         peak_decay
        g_i    <- g_i peak / max|g|     where |g_i| > peak
        norm   <- mean of |g|                            norm_decay
        square <- mean of |g|^2                          square_decay
        g      <- g / |g| * norm / (sqrt(square) + eps)

    What comes out has a norm near 1, whatever the loss is multiplied by: learning rates
    of optimizers that look at a gradient's size have another meaning behind it, Adam's
    do not. Three numbers per tensor are kept. Numbers whose squares cannot be summed,
    and those that are not finite, are zeros.

    Args:
      norm_decay: of the mean norm (code: 0.7).
      square_decay: of its mean square (code: 0.9).
      peak_decay: of the mean of the largest magnitude (code: 0.999).
      eps: added to the root.
      layer_axis: axis that counts layers in leaves with two axes or more, so that every
        layer is a tensor of its own.

    Returns:
      The transformation.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.stabilize_gradients(), lro.galore(1e-2, rank=4))
      >>> first = lro.stabilize_gradients()
      >>> updates, _ = first.update(jnp.array([30.0, 40.0]), first.init(jnp.zeros(2)))
      >>> bool(jnp.allclose(updates, jnp.array([0.6, 0.8])))
      True

    References:
      Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
      (2025), https://arxiv.org/abs/2502.17055

    Differences from the authors' code:
      * It is in front of the optimizer; the code is one with an Adam whose moments it
        sets to zero every 1000 steps. With its step it sets back the count that
        corrects ``peak``, after which for some hundred steps nothing is clipped.
      * A tensor of zeros stays zero.
    """
    if layer_axis is not None:
        _checks.positive_int("layer_axis", abs(layer_axis), least=0)

    def axes(x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the axes that are summed over, and those that count tensors."""
        layers = ()
        if layer_axis is not None and x.ndim >= 2:
            layers = (layer_axis % x.ndim,)
        return tuple(i for i in range(x.ndim) if i not in layers), layers

    def init(params: Any) -> StabilizeGradientsState:
        def zeros(leaf: Any) -> Any:
            p = unbox(leaf)
            gone, layers = axes(p)
            # As a sum has it: each device's own if the parameter is.
            number = jnp.zeros_like(jnp.sum(p, gone), jnp.float32)
            return rebox(leaf, number, tuple((i,) for i in layers))

        trees = [
            hidden(params, jax.tree.map(zeros, params, is_leaf=is_box))
            for _ in range(3)
        ]
        return StabilizeGradientsState(jnp.zeros([], jnp.int32), *trees)

    def update(updates, state, params=None):
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = count.astype(jnp.float32)
        seen = [weight_seen(b, steps) for b in (peak_decay, norm_decay, square_decay)]

        def one(update: Array, *means: Array) -> tuple[Array, ...]:
            gone, _ = axes(update)
            g = wide(update)
            g = kept_if(has_square(g), g)
            over = tuple(jnp.expand_dims(x, gone) for x in means)
            most = jnp.max(jnp.abs(g), gone, keepdims=True, initial=0.0)
            peak = peak_decay * over[0] + (1 - peak_decay) * most
            bound = peak / seen[0]
            # At most 1: the bound is met by what is above it.
            shrunk = g * (bound / jnp.where(most > 0, most, 1))
            g = jnp.where(jnp.abs(g) > bound, shrunk, g)
            # In two steps, as squares of small numbers vanish.
            top = jnp.minimum(most, bound)
            unit = g / jnp.where(top > 0, top, 1)
            length = jnp.sqrt(jnp.sum(unit * unit, gone, keepdims=True))
            size = top * length
            norm = norm_decay * over[1] + (1 - norm_decay) * size
            # Not the square itself, which ends at 1e-38.
            old, new = jnp.sqrt(square_decay) * over[2], jnp.sqrt(1 - square_decay)
            root = jnp.hypot(old, new * size)
            least = jnp.where(root > 0, 0.0, 1.0)  # no tensor so far but zeros
            level = norm / seen[1] / (root / jnp.sqrt(seen[2]) + eps + least)
            out = unit * (level / jnp.where(length > 0, length, 1))
            kept = [jnp.squeeze(x, gone) for x in (peak, norm, root)]
            return (out.astype(update.dtype), *kept)

        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_box)
        trees = (state.peak, state.norm, state.root)
        columns = [leaves, *map(treedef.flatten_up_to, trees)]
        out = [one(*map(unbox, kept)) for kept in zip(*columns, strict=True)]
        new = (
            treedef.unflatten(
                [refill(b, x[i]) for b, x in zip(column, out, strict=True)]
            )
            for i, column in enumerate(columns)
        )
        first, *means = new
        return first, StabilizeGradientsState(count, *means)

    return optax.GradientTransformation(init, update)
