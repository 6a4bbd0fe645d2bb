"""``racs``: a second moment of one number for every row and every column."""

from typing import Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.leaves.part import made
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.transforms import scale_by_rank_one_rms


class _Options(has.Scale, has.Decay, has.Matrices, has.Moments): ...


@method(
    "RACS",
    "2502.07752",
    "Gong et al., Towards Efficient Optimizer Design for LLM via Structured Fisher "
    "Approximation with a Low-Rank Extension (2025)",
    defaults={"scale": 0.05, "eps": 1e-8},
    ignored=("b1, b2, eps beside full",),
)
def racs(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float | Array = 0.9,
    growth_limit: float | Array | None = 1.01,
    iterations: int = 5,
    debias: bool = True,
    **options: Unpack[_Options],
) -> Transformation:
    """RACS: every row and every column of a gradient scaled by a number of its own.

    For every matrix ``W [m, n]`` with gradient ``G``, whose squares are nearest to
    ``s q^T`` among the matrices of rank one::

        s' = decay s' + (1 - decay) s               [m]; q' likewise, [n]
        U  = G / sqrt(s' q'^T)                      corrected for their bias
        U <- U min(1, growth_limit |U_before| / |U|)
        W <- W - lr (scale U + weight_decay W)

    State per matrix: ``m + n + 1`` float32 numbers. Leaves that are not chosen, which
    are vectors, embeddings and heads, get Adam, unscaled; ``select="."`` takes every
    matrix.

    Args:
      decay: of s' and q'.
      growth_limit: largest ratio of one ``|U|`` to the one before it; None for no
        limit.
      iterations: of the fit of s and q, see ``lro.scale_by_rank_one_rms``.
      debias: whether s' and q' are corrected for their start at zero.
      scale: factor on the matrices' direction, whose entries are near 1 where squares
        are nearly of rank one.
      b1: of Adam on the leaves that are not chosen.
      b2: of the same.
      eps: of the same.

    Examples:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}
      >>> sizes = lro.state_bytes(lro.racs(2e-2), params).by_role
      >>> sizes["nu"] == 4 * (64 + 32) + 4 * 32  # the bias' second moment, too
      True

    Differences from the authors' code:
      * There is none to compare with; the rule is the paper's. How often the fit is
        iterated, and how s' and q' start, are ours: without the correction of the bias
        the first step is ten times as long.
      * Learning rate 0.02 and scale 0.05 are known at second hand.
    """
    its = Recipe(**options)
    tx = chain(
        its.matrices(),
        made(scale_by_rank_one_rms, decay, growth_limit, iterations, debias),
        backproject(its.scale, learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_racs = direction(racs)
