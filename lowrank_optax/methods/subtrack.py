"""``subtrack``: a tracked subspace, moments that follow it, recovery scaling."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.projectors import Projector, grassmann
from lowrank_optax.recovery import recover_scale
from lowrank_optax.transport import rotate_moments

# The moments turn by b1 and b2, whoever keeps them.
TURNED = "b1, b2 beside base_optimizer, transport"


class TrackedOptions(has.Usual, has.Recovered, has.Stored, has.Conventions):
    """What a method takes whose subspace is tracked, besides its own."""


def tracked(
    its: Recipe,
    learning_rate: Any,
    projector: Projector,
    growth_limit: Any,
    entry_limit: Any,
) -> Transformation:
    """Returns SubTrack++'s pipeline around any projector."""
    # As printed, the paper's formula corrects the bias of the second moment twice.
    turn = rotate_moments(its.b1, its.b2, "paper" if its.authors else "bounded")
    limit = None if its.authors else entry_limit
    recovery = recover_scale(growth_limit=growth_limit, entry_limit=limit)
    tx = chain(
        its.open(projector, turn),
        its.adam(),
        its.recovery or recovery,
        backproject(its.scale, learning_rate),
    )
    return its.decayed(its.correct(tx), learning_rate)


@method(
    "SubTrack++",
    "2502.01586",
    "Rajabi et al. (2025)",
    ignored=(TURNED,),
    uses=("scale",),
)
def subtrack(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    step: str | float | Array = "line_search",
    max_angle: float | Array | None = None,
    damping: float | Array = 1.0,
    renew_below: float | Array | None = 0.2,
    growth_limit: float | Array | None = 1.01,
    entry_limit: float | Array | None = 10.0,
    **options: Unpack[TrackedOptions],
) -> Transformation:
    """SubTrack++: the basis turns, the moments turn with it, nothing is dropped.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G`` and orthonormal
    ``S [m, r]``, every ``update_proj_gap`` steps S takes one step along the Grassmann
    geodesic that captures more of G (``lro.grassmann``; if it has lost G, it is found
    anew), and the moments follow by
    ``C = S_new^T S_old`` (``lro.rotate_moments``). Each step is::

        R  = S^T G;   N = Adam's direction from R               [r, n]
        Lambda = (G - S R) diag(|N_j| / (|R_j| + 1e-8))         limited in growth
        W <- W - lr (scale S N + Lambda + weight_decay W)

    with Lambda as in ``lro.recover_scale``, its ratio limited. State per matrix:
    ``m r + 2 r n`` and one number.

    Args:
      step: "line_search" turns by the exact minimizer; a number is the paper's eta
        (10000 there, 10 in its scripts), whose effect goes with the square of the
        gradient's scale.
      max_angle: largest angle of a turn in radians; None for no limit.
      damping: factor on the angle, in (0, 1]; below 1 for noisy gradients.
      scale: factor on ``S N``, not on Lambda.
      base_optimizer: the inner transformation in place of Adam; it needs moments with
        decays ``b1`` and ``b2``, or another ``transport``.
      transport: in place of ``lro.rotate_moments(b1, b2)``.
      recovery: in place of ``lro.recover_scale`` with ``growth_limit`` and
        ``entry_limit``.

    Differences from the authors' code:
      * Where it contradicts the paper, the paper is followed. Tall and square matrices
        are tracked as well; the code leaves all but the wide ones at their first basis.
      * Moments turn from the previous basis to the new one, in the step that turns it;
        the code turns them from the first basis, a step early.
      * The second moment keeps its size: the code multiplies it by ``1 - b2`` at every
        turn, and the formula as printed corrects its bias twice.
      * The residual is ``G - S R``, the code's ``G - scale S R``.
      * The ratio ``|N_j| / |R_j|`` is limited.
      * A basis that has lost the gradient is found anew.
      * The turn is the exact line search, and the first basis comes from block power
        steps.
      * ``conventions="authors"`` puts Adam's eps on the uncorrected root (1e-6), the
        bias correction behind the limiter and the decay after the step, starts from
        the SVD, never finds a basis anew, and transports by the paper's formula as
        printed.
    """
    its = Recipe(**options)
    projector = its.bases(
        grassmann,
        rank,
        its.update_proj_gap,
        step=step,
        max_angle=max_angle,
        damping=damping,
        cold_start="svd" if its.authors else "power",
        renew_below=None if its.authors else renew_below,
    )
    return tracked(its, learning_rate, projector, growth_limit, entry_limit)


scale_by_subtrack = direction(subtrack)
