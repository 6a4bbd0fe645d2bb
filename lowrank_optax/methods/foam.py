"""``foam``: Adam with one pair of moments for a block of neighbours."""

from typing import Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.leaves.part import made
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.transforms import scale_by_folded_adam


class _Options(has.Scale, has.Decay, has.Matrices, has.Moments, has.Conventions): ...


@method(
    "FOAM",
    "2512.07112",
    "FOAM: Blocked State Folding for Memory-Efficient LLM Training (2025)",
    defaults={"b2": 0.95, "eps": 1e-8},
)
def foam(
    learning_rate: optax.ScalarOrSchedule,
    level: int = 2,
    *,
    residual: float | Array = 1.0,
    axis: int = -2,
    **options: Unpack[_Options],
) -> Transformation:
    """FOAM: Adam with one pair of moments for a block of neighbours.

    For a matrix ``W [m, n]`` with gradient ``G``, blocks of ``f = 2^level`` rows of one
    column, ``D = G - unfold(fold(G))`` what their means leave, at step t::

        mu = b1 mu + (1 - b1) fold(G)                       m / f  x  n
        nu = b2 nu + (1 - b2) fold(G * G)
        N  = (unfold(mu / (1 - b1^t)) + residual D)
             / (sqrt(unfold(nu / (1 - b2^t)) + residual^2 D^2) + eps)
        W <- W - lr (scale N + weight_decay W)

    State per matrix: ``2 m n / f`` numbers, GWT's at the same level, as ``fold`` is
    Haar's approximation up to a factor; no basis, and nothing to find. The update has
    full rank, and no entry exceeds Adam's by more than 1. Leaves that are not chosen
    get Adam itself, unscaled.

    Args:
      level: of the fold; each halves the moments (2 in the scripts, 8 for fine-tuning).
      residual: factor on D.
      axis: along which is folded: -2, the input axis of Flax kernels ``(in, out)``; -1,
        that of torch's weights. Neighbours share a moment, so take the axis whose order
        means least, and one that its sharding leaves in whole blocks.
      scale: factor on the matrices' direction.
      b2: decay of the second moment (0.95, scripts).
      eps: added to the root.

    Examples:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> sizes = lro.state_bytes(lro.foam(1e-2, level=2), params).by_role
      >>> sizes["mu"] == sizes["nu"] == 4 * 64 * 32 // 4
      True

    Differences from the authors' code:
      * Moments are corrected for their start; the code multiplies the whole of N, D
        too, by ``sqrt(1 - b2^t) / (1 - b1^t)``, which at the first step is 2.2.
      * A last block that is not full is averaged over what it has; there, over zeros,
        too.
      * ``conventions="authors"`` has that factor, eps on the uncorrected root, and
        decay after the step.
      * Every matrix is selected by ``lro.project``'s rule.
    """
    its = Recipe(**options)
    folded = made(
        scale_by_folded_adam,
        its.b1,
        its.b2,
        its.eps,
        level=level,
        residual=residual,
        axis=axis,
        debias=not its.authors,
    )
    tx = chain(its.matrices(), folded, backproject(its.scale, learning_rate))
    return its.decayed(its.correct(tx), learning_rate)


scale_by_foam = direction(foam)
