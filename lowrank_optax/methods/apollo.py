"""``apollo``: the gradient, stepped as far as Adam would in a random subspace."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method, recipe_of
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.projectors import gaussian
from lowrank_optax.recovery import recover_scale


class _Options(has.Usual, has.Given, has.Conventions): ...


@method("APOLLO", "2412.05270", "Zhu et al. (2024)", defaults={"scale": 1.0})
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    granularity: str = "column",
    growth_limit: float | Array | None = 1.01,
    entry_limit: float | Array | None = 10.0,
    **options: Unpack[_Options],
) -> Transformation:
    """APOLLO: SGD's direction with Adam's step sizes, estimated in a random subspace.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G``, and
    ``P [m, r] ~ N(0, 1/r)`` drawn anew every ``update_proj_gap`` steps::

        R     = P^T G                                  [r, n]
        N     = Adam's direction from R                [r, n]
        phi_j = |N_j| / (|R_j| + 1e-8)                 n numbers, limited
        U     = G diag(phi)
        U    <- U min(1, growth_limit |U_before| / |U|)
        W    <- W - lr (sqrt(scale) U + weight_decay W)

    Only norms are used of what happens in the subspace, so nothing is lifted back, the
    update has full rank, and the basis is regenerated at each step from the bracket's
    key, the same on every replica and after a resume. The moments stay as they are when
    it is redrawn. State per matrix: ``2 r n`` numbers and one.

    Args:
      scale: enters as its square root; full leaves are not scaled.
      projector: another projection in place of the Gaussian (``lro.svd(rank)`` is the
        paper's "APOLLO w. SVD"); it brings its own rank and gap, and is stored.
      transport: what a new basis does to the moments, for such a projector.

    Differences from the authors' code:
      * The code keeps P between two draws, ``m r`` numbers more per matrix.
      * Its draws come from a chain of seeds per parameter, counted in the order of the
        parameters; these from one key, the parameter's path and the epoch.
      * Its ``scale_front`` multiplies by ``sqrt(scale)`` before the limiter instead of
        behind it. The limiter only compares norms, so there is no such option here.
      * The limiter sees Adam's bias-corrected direction, ``eps`` stands on the
        corrected root, and decay uses the weights before the step;
        ``conventions="authors"`` restores the code's order in all three.
      * A step without gradient does not hold the limiter down afterwards.
      * phi is limited: a draw that hardly sees the gradient, likely at rank 1, stepped
        as far as that is unlikely.
    """
    its = Recipe(**options)
    tx = chain(
        its.open(its.bases(gaussian, rank, its.update_proj_gap)),
        its.adam(),
        # Adam's direction tells the size of the step alone: G takes its place, column
        # by column. No residual and no basis vector enters the update.
        recover_scale(
            of="gradient",
            granularity=granularity,
            growth_limit=growth_limit,
            entry_limit=None if its.authors else entry_limit,
        ),
        backproject(its.scale**0.5, learning_rate),
    )
    # The authors' limiter compares directions whose bias is not corrected yet.
    return its.decayed(its.correct(tx), learning_rate)


scale_by_apollo = direction(apollo)


@method("APOLLO-Mini", "2412.05270", "Zhu et al. (2024)", defaults={"scale": 128.0})
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 1,
    *,
    granularity: str = "tensor",
    growth_limit: float | Array | None = 1.01,
    entry_limit: float | Array | None = 10.0,
    **options: Unpack[_Options],
) -> Transformation:
    """APOLLO-Mini: APOLLO with rank 1 and one step size per matrix.

    ``lro.apollo`` with other defaults: for a matrix ``W [m, n]`` with gradient ``G``
    and ``P [m, 1] ~ N(0, 1)``, Adam's direction N from ``R = P^T G [1, n]``::

        phi  = |N| / (|R| + 1e-8)                      one number
        phi <- phi min(1, growth_limit (phi |G|)_before / (phi |G|))
        W   <- W - lr (sqrt(scale) phi G + weight_decay W)

    One row estimates the size of a step smaller than all m rows would by about
    ``sqrt(m)``: ``sqrt(scale)`` makes up for it. State per matrix: ``2 n + 1`` numbers.

    Args:
      granularity: one phi per "tensor" (paper), or per "column".
      scale: enters as its square root; full leaves are not scaled.

    Differences from the authors' code:
      * Those of ``lro.apollo``.
    """
    return recipe_of(apollo)(
        learning_rate,
        rank,
        granularity=granularity,
        growth_limit=growth_limit,
        entry_limit=entry_limit,
        **options,
    )


scale_by_apollo_mini = direction(apollo_mini)
