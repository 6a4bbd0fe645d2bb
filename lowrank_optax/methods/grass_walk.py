"""GrassWalk: SubTrack++ with a random walk in place of tracking."""

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
    step: str | float | Array = 0.1,
    basis_dtype: Any = jnp.float32,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    walk = grassmann(rank, update_proj_gap, basis_dtype, step=step, move="walk")
    return tracked(walk, learning_rate, **options)


@takes(_bracket)
def scale_by_grass_walk(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of GrassWalk, without learning rate and weight decay.

    Args:
      rank: see ``lro.grass_walk``, like all others.
      **options: as in ``lro.grass_walk``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.grass_walk``.
      ValueError: as ``lro.grass_walk``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_grass_walk(rank=4), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].basis["kernel"].shape
      (32, 4)
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def grass_walk(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GrassWalk: the subspace walks at random, moments and residual as SubTrack++.

    ``lro.subtrack`` with another move of the basis: from the gradient's leading
    subspace, every ``update_proj_gap`` steps all directions turn by the angle ``step``
    along a random geodesic::

        X Gaussian [m, r],   U = orth((I - S S^T) X)
        S <- S cos a + U sin a

    (with fewer than r directions left outside, random r - k of them stay). Moments
    follow by ``C = S_new^T S_old = cos(a) I``.

    Args:
      learning_rate: a number or an Optax schedule.
      rank: basis vectors r, as in ``lro.galore``.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      conventions: "optax" or "authors", as in ``lro.subtrack``.
      update_proj_gap: steps from one turn to the next.
      step: angle of a turn in radians (0.1 is ours: no code was published), or
        "line_search" for the best angle along the random geodesic.
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
      >>> tx = lro.grass_walk(learning_rate=1e-3, rank=4, step=0.3)
      >>> updates, state = tx.update(params, tx.init(params), params)

    References:
      Randomized Gradient Subspaces for Efficient Large Language Model Training (2025),
      https://arxiv.org/abs/2510.01878

    Differences from the authors' code:
      * None is known: no code was published. A Gaussian tangent's singular values are
        taken as equal, which they are in the limit of m much larger than r.
    """
    tx = _bracket(learning_rate, rank, conventions=conventions, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)
