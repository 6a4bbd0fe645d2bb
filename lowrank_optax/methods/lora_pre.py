"""``lora_pre``: Adam whose moments are products of thin factors, without a basis."""

from typing import Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.leaves.part import made
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.transforms import scale_by_regressed_adam


class _Options(has.Scale, has.Decay, has.Matrices, has.Moments): ...


@method(
    "LoRA-Pre",
    "2602.24283",
    "Taming Momentum: Rethinking Optimizer States Through Low-Rank Approximation "
    "(2026)",
    defaults={"scale": 1.0, "eps": 1e-8},
)
def lora_pre(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float = 16,
    *,
    entry_limit: float | Array | None = 10.0,
    seed: int = 0,
    **options: Unpack[_Options],
) -> Transformation:
    """LoRA-Pre: Adam whose moments are products of thin factors, without a basis.

    For a matrix ``W [m, n]`` with gradient ``G``, ``B [m, r]`` and ``A [r, n]``, with
    ``c = sqrt(b1)``, at step t::

        B' = c B + (1 - c) G A^T (A A^T)^-1
        A' = c A + (1 - c) (B^T B)^-1 B^T G                     with the old B
        mu = b1 B' A' + (1 - b1) G
        nu = b2 (D' C')^2 + (1 - b2) G^2        D, C likewise of |G|, c = b2^(1/4)
        N  = mu / (sqrt(nu) + eps)              all corrected for their start at zero
        W <- W - lr (scale N + weight_decay W)

    State per matrix: ``2 r (m + n)`` float32 numbers; the update has full rank and no
    step costs more than another. Moments are formed, ``m x n``, for the step that they
    serve. Leaves that are not chosen get Adam itself, unscaled.

    Args:
      rank: r, an int or a fraction of min(m, n); the paper has an eighth of GaLore's.
      entry_limit: largest entry of N, see ``lro.scale_by_regressed_adam``; None for the
        paper's form.
      seed: of the random A and C that it starts with; B and D are zero.
      scale: factor on the matrices' direction (1, ours).

    Examples:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}
      >>> used = lro.state_bytes(lro.lora_pre(1e-3, rank=4), params)
      >>> used.total - 4 * 2 * 4 * (64 + 32) - 4 * 2 * 32 < 32  # counters
      True

    Differences from the authors' code:
      * None was published when this was written; the rule is the paper's at second
        hand. How factors start and are corrected for it, the ridge of 1e-5 in both
        inverses and the limit of entries are ours.
    """
    its = Recipe(**options)
    adam = made(
        scale_by_regressed_adam,
        rank,
        its.b1,
        its.b2,
        its.eps,
        entry_limit=entry_limit,
        seed=seed,
    )
    tx = chain(its.matrices(), adam, backproject(its.scale, learning_rate))
    return its.decayed(tx, learning_rate)


scale_by_lora_pre = direction(lora_pre)
