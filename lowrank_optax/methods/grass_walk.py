"""``grass_walk`` and ``grass_jump``: SubTrack++ with random moves of the subspace."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.methods.subtrack import TURNED, TrackedOptions, tracked
from lowrank_optax.projectors import grassmann


@method(
    "GrassWalk",
    "2510.01878",
    "Randomized Gradient Subspaces (2025)",
    ignored=(TURNED,),
    uses=("scale",),
)
def grass_walk(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    step: str | float | Array = 0.1,
    renew_below: float | Array | None = 0.2,
    growth_limit: float | Array | None = 1.01,
    entry_limit: float | Array | None = 10.0,
    **options: Unpack[TrackedOptions],
) -> Transformation:
    """GrassWalk: the subspace walks at random, moments and residual as SubTrack++.

    ``lro.subtrack`` with another move of the basis: from the gradient's leading
    subspace, every ``update_proj_gap`` steps all directions turn by the angle ``step``
    along a random geodesic::

        X Gaussian [m, r],   U = orth((I - S S^T) X)
        S <- S cos a + U sin a

    (with fewer than r directions left outside, random r - k of them stay). A basis that
    has lost the gradient starts again from its leading subspace. Moments
    follow by ``C = S_new^T S_old = cos(a) I``.

    Args:
      step: angle of a turn in radians (0.1 is ours: no code was published), or
        "line_search" for the best angle along the random geodesic.

    Differences from the authors' code:
      * None is known: no code was published. A Gaussian tangent's singular values are
        taken as equal, which they are in the limit of m much larger than r.
    """
    its = Recipe(**options)
    # Only the move of the basis differs from SubTrack++: at random, by a fixed angle.
    walk = its.bases(
        grassmann,
        rank,
        its.update_proj_gap,
        step=step,
        move="walk",
        renew_below=None if its.authors else renew_below,
    )
    return tracked(its, learning_rate, walk, growth_limit, entry_limit)


scale_by_grass_walk = direction(grass_walk)


@method(
    "GrassJump",
    "2510.01878",
    "Randomized Gradient Subspaces (2025)",
    ignored=(TURNED,),
    uses=("scale",),
)
def grass_jump(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    growth_limit: float | Array | None = 1.01,
    entry_limit: float | Array | None = 10.0,
    **options: Unpack[TrackedOptions],
) -> Transformation:
    """GrassJump: a new random subspace at every refresh, the rest as SubTrack++.

    ``lro.subtrack`` with another move of the basis: every ``update_proj_gap`` steps,
    the first included, ``S = orth(X)`` for a Gaussian ``X [m, r]``. Moments follow by
    ``C = S_new^T S_old``, whose entries are of size ``1 / sqrt(m)``: most of the
    momentum is forgotten, and of the second moment all but a share of about r / m, so
    that the steps after a jump are longer.

    Differences from the authors' code:
      * None is known: no code was published.
    """
    its = Recipe(**options)
    jump = its.bases(grassmann, rank, its.update_proj_gap, move="jump")
    return tracked(its, learning_rate, jump, growth_limit, entry_limit)


scale_by_grass_jump = direction(grass_jump)
