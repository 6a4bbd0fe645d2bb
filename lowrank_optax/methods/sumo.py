"""``sumo``: orthogonalized momentum in a subspace."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.leaves.part import made
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.methods.galore import leading
from lowrank_optax.recovery import complement
from lowrank_optax.transforms import orthogonalize
from lowrank_optax.transport import rotate_moments


class _Options(has.Base, has.Moments, has.Bases): ...


@method(
    "SUMO",
    "2505.24749",
    "SUMO: Subspace-Aware Moment-Orthogonalization (2025)",
    defaults={"scale": 1.0, "b1": 0.95, "eps": 1e-8},
    ignored=("b2, eps beside full", "steps without orthogonalization"),
    uses=("scale",),
)
def sumo(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    orthogonalization: str = "svd",
    steps: int = 30,
    shape_factor: str = "sqrt_long",
    residual: float | Array | None = 1.0,
    **options: Unpack[_Options],
) -> Transformation:
    """SUMO: the momentum in a subspace, orthogonalized exactly.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient G, every
    ``update_proj_gap`` steps P becomes the leading left singular basis of G and the
    momentum goes along, ``M <- (P^T P_old) M``; each step is::

        R  = P^T G                                     [r, n]
        M  = b1 M + (1 - b1) R
        O  = U V^T                                     M = U S V^T
        N  = 0.2 sqrt(n) O
        W <- W - lr (scale P N + residual (G - P R) + weight_decay W)

    State per matrix: ``m r + r n`` numbers, no second moment (GaLore: ``m r + 2 r n``).
    The step inside the subspace has the same length whatever the gradient's, the
    residual has the gradient's. Every step costs one SVD of ``r x n`` per matrix;
    ``orthogonalization="newton_schulz"`` uses matrix products alone, and says in
    ``lro.orthogonalize`` how exactly. Leaves that are not projected get plain Adam.

    Args:
      orthogonalization: "svd" (paper) or "newton_schulz".
      steps: steps of "newton_schulz".
      shape_factor: "sqrt_long", ``0.2 sqrt(max(r, n))``, or "none".
      residual: factor on what lies outside the subspace (paper: 1); None leaves it out.
      scale: factor on ``P N`` (1, ours: with the shape factor, elements of ``P N``
        have a root mean square of ``0.2 sqrt(r / m)``).
      b1: decay of the momentum (0.95, usual with orthogonalization).
      b2: of Adam on the leaves that stay full, whose first decay is 0.9.
      eps: of the same.
      transport: what a new basis does to the momentum; None rotates it.

    Differences from the authors' code:
      * Written from the paper, not from code. Its limiter of 1.1 on the growth of
        ``|O|`` is left out, as it never binds: that norm is sqrt(r) at every step at
        which M has full rank.
      * Bases come from block power steps in place of a randomized SVD, and the default
        ``scale`` and factor are this package's choice, for want of the paper's.
      * Directions in which M is zero up to rounding get no step.
    """
    its = Recipe(**options)
    _checks.choice("orthogonalization", orthogonalization, ("svd", "newton_schulz"))
    # b1 is the momentum's; Adam on the leaves that stay full has its usual 0.9.
    if its.full is None:
        its.full = Recipe(**{**options, "b1": 0.9}).adam()
    tx = chain(
        its.open(leading(its, rank), rotate_moments()),
        # A polar factor does not depend on the scale of M, so no bias is corrected.
        made(optax.ema, its.b1, debias=False),
        made(orthogonalize, orthogonalization, steps, shape_factor),
        # Without a transformation of its own, so the residual is never formed.
        *([] if residual is None else [complement(scale=residual)]),
        backproject(its.scale, learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_sumo = direction(sumo)
