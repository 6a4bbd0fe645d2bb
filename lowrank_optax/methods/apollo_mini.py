"""APOLLO-Mini: one number per matrix, from a random subspace of rank one."""

from typing import Any

import optax
from jaxtyping import Array

from lowrank_optax.methods._options import takes
from lowrank_optax.methods.apollo import apollo, scale_by_apollo


@takes(scale_by_apollo)
def scale_by_apollo_mini(
    rank: Any = 1,
    *,
    scale: float | Array = 128.0,
    granularity: str = "tensor",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The direction of APOLLO-Mini, without learning rate and weight decay.

    Args:
      rank: see ``lro.apollo_mini``, like all others.
      scale: enters as its square root.
      granularity: one phi per "tensor", or per "column".
      **options: as in ``lro.apollo``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.apollo``.
      ValueError: as ``lro.apollo``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_apollo_mini(), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].inner_state.nu["kernel"].shape
      (1, 64)
    """
    return scale_by_apollo(rank, scale=scale, granularity=granularity, **options)


@takes(apollo)
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 1,
    *,
    scale: float | Array = 128.0,
    granularity: str = "tensor",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO-Mini: APOLLO with rank 1 and one step size per matrix.

    ``lro.apollo`` with other defaults: for a matrix ``W [m, n]`` with gradient ``G``
    and ``P [m, 1] ~ N(0, 1)``, Adam's direction N from ``R = P^T G [1, n]``::

        phi  = |N| / (|R| + 1e-8)                      one number
        phi <- phi min(1, growth_limit (phi |G|)_before / (phi |G|))
        W   <- W - lr (sqrt(scale) phi G + weight_decay W)

    One row estimates the size of a step smaller than all m rows would by about
    ``sqrt(m)``: ``sqrt(scale)`` makes up for it. State per matrix: ``2 n + 1`` numbers.

    Args:
      learning_rate: a number or an Optax schedule (paper: 0.01, in some rows 0.02).
      rank: rows of the projection (paper: 1).
      scale: enters as its square root (paper: 128).
      granularity: one phi per "tensor" (paper), or per "column".
      **options: every other argument of ``lro.apollo``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.apollo``.
      ValueError: as ``lro.apollo``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.apollo_mini(learning_rate=1e-2)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> lro.state_bytes(tx, params).by_role["mu"] == 4 * 64
      True

    References:
      Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance (2024),
      https://arxiv.org/abs/2412.05270

    Differences from the authors' code:
      * Those of ``lro.apollo``.
    """
    return apollo(learning_rate, rank, scale=scale, granularity=granularity, **options)
