"""Decoupled weight decay behind the learning rate, in the released codes' orders."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.linalg.products import wider


class DecayState(NamedTuple):
    """Number of steps taken, kept where the learning rate is a schedule."""

    count: Array


def decay_before(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | Array,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Decays the weights as they were: ``u <- u - lr * wd * W``.

    Stands after the learning rate; equals ``optax.add_decayed_weights`` before it.

    Args:
      learning_rate: a number or a schedule of the step.
      weight_decay: strength, per unit of learning rate.
      mask: leaves to decay, as in ``optax.masked``.

    Returns:
      The transformation; its update needs ``params``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.decay_before(0.5, 0.5)
      >>> w = {"w": jnp.ones(1)}
      >>> tx.update({"w": jnp.zeros(1)}, tx.init(w), w)[0]["w"]
      Array([-0.25], dtype=float32)
    """
    return _masked(_decay(learning_rate, weight_decay, moved=False), mask)


def decay_after(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | Array,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Decays the weights after their step: ``u <- u - lr * wd * (W + u)``.

    Stands after the learning rate. ``W <- (1 - lr wd) (W + u)``, the order of the
    released AdamW codes.

    Args:
      learning_rate: a number or a schedule of the step.
      weight_decay: strength, per unit of learning rate.
      mask: leaves to decay, as in ``optax.masked``.

    Returns:
      The transformation; its update needs ``params``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.decay_after(0.5, 0.5)
      >>> w = {"w": jnp.ones(1)}
      >>> tx.update({"w": jnp.ones(1)}, tx.init(w), w)[0]["w"]
      Array([0.5], dtype=float32)
    """
    return _masked(_decay(learning_rate, weight_decay, moved=True), mask)


def _masked(
    tx: optax.GradientTransformation, mask: Any
) -> optax.GradientTransformation:
    if mask is None:
        return tx
    # Optax would call a module.
    return optax.masked(tx, mask if _checks.is_function(mask) else lambda _: mask)


def _decay(learning_rate, weight_decay, moved: bool) -> optax.GradientTransformation:
    # Known when the transformation is made: a number needs no counter in the state.
    scheduled = callable(learning_rate)

    def init(params: Any) -> Any:
        del params
        return DecayState(jnp.zeros([], jnp.int32)) if scheduled else optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(
                "Weight decay needs the parameters: pass params to update."
            )
        rate = learning_rate(state.count) if scheduled else learning_rate

        def decay(u, w):
            wide = wider(jnp.float32, u.dtype, w.dtype)
            before, step = w.astype(wide), u.astype(wide)
            strength = jnp.asarray(rate * weight_decay, wide)
            if not moved:
                return (step - strength * before).astype(u.dtype)
            # The weights are stored between step and decay, and so rounded twice.
            after = _rounded(before + step, w.dtype)
            after = _rounded(after - strength * after, w.dtype)
            # Optax adds this to the weights as they were.
            return (after - before).astype(u.dtype)

        updates = jax.tree.map(decay, updates, params)
        if scheduled:
            state = DecayState(jnp.asarray(optax.safe_increment(state.count)))
        return updates, state

    return optax.GradientTransformation(init, update)


def _rounded(x: Array, dtype: Any) -> Array:
    """Rounds to the precision of ``dtype`` (XLA drops a cast there and back)."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)
