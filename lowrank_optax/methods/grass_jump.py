"""GrassJump: SubTrack++ with a new random subspace in place of tracking."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import takes
from lowrank_optax.methods._tracked import tracked
from lowrank_optax.projectors import grassmann


@takes(tracked)
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    update_proj_gap: int = 200,
    basis_dtype: Any = jnp.float32,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    jump = grassmann(rank, update_proj_gap, basis_dtype, move="jump")
    return tracked(jump, learning_rate, **options)


@takes(_bracket)
def scale_by_grass_jump(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of GrassJump, without learning rate and weight decay.

    Args:
      rank: see ``lro.grass_jump``, like all others.
      **options: as in ``lro.grass_jump``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.grass_jump``.
      ValueError: as ``lro.grass_jump``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_grass_jump(rank=4), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].basis["kernel"].shape
      (32, 4)
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def grass_jump(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GrassJump: a new random subspace at every refresh, the rest as SubTrack++.

    ``lro.subtrack`` with another move of the basis: every ``update_proj_gap`` steps,
    the first included, ``S = orth(X)`` for a Gaussian ``X [m, r]``. Moments follow by
    ``C = S_new^T S_old``, whose entries are of size ``1 / sqrt(m)``: most of the
    momentum is forgotten, and of the second moment all but a share of about r / m, so
    that the steps after a jump are longer.

    Args:
      learning_rate: a number or an Optax schedule.
      rank: basis vectors r, as in ``lro.galore``.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      conventions: "optax" or "authors", as in ``lro.subtrack``.
      update_proj_gap: steps from one subspace to the next.
      basis_dtype: storage dtype of the basis.
      **options: as in ``lro.subtrack``, without those of its projector.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.subtrack``.
      ValueError: as ``lro.subtrack``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.grass_jump(learning_rate=1e-3, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)

    References:
      Randomized Gradient Subspaces for Efficient Large Language Model Training (2025),
      https://arxiv.org/abs/2510.01878

    Differences from the authors' code:
      * None is known: no code was published.
    """
    tx = _bracket(learning_rate, rank, conventions=conventions, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)
