"""``fira``: GaLore, and the rest of the gradient scaled to match."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Options, Recipe, Transformation
from lowrank_optax.methods.galore import leading
from lowrank_optax.recovery import recover_scale


@method("Fira", "2410.01623", "Chen et al. (2024)", uses=("scale",))
def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    growth_limit: float | Array | None = 1.01,
    entry_limit: float | Array | None = 10.0,
    granularity: str = "column",
    **options: Unpack[Options],
) -> Transformation:
    """Fira: Adam in a subspace, and a step in the rest of the same size.

    GaLore's step (``lro.galore``: basis P, projection ``R = P^T G``, Adam's direction
    N, both ``[r, n]``), and what GaLore drops, column by column as far as Adam went::

        phi_j  = |N_j| / (|R_j| + 1e-8)                      n numbers, limited
        Lambda = (G - P R) diag(phi)
        Lambda <- Lambda min(1, growth_limit |Lambda_before| / |Lambda|)
        W <- W - lr (scale P N + Lambda + weight_decay W)

    The weights move at full rank with GaLore's state and one number per matrix. No
    residual is formed (``lro.recover_scale``).

    Differences from the authors' code:
      * The residual is the paper's ``G - P P^T G``; the code's ``G - scale P P^T G``
        still holds part of the gradient inside the subspace.
      * phi is limited: columns that the basis hardly sees take steps of 1e5 learning
        rates there.
      * Everything listed under ``lro.galore``. ``conventions="authors"`` restores all
        of it, with the bias correction behind the limiter.
    """
    its = Recipe(**options)
    tx = chain(
        its.open(leading(its, rank)),
        its.adam(),
        recover_scale(
            granularity=granularity,
            growth_limit=growth_limit,
            residual="authors" if its.authors else "paper",
            entry_limit=None if its.authors else entry_limit,
        ),
        backproject(its.scale, learning_rate),
    )
    # The authors' limiter sees Adam without bias correction, which comes behind it.
    return its.decayed(its.correct(tx), learning_rate)


scale_by_fira = direction(fira)
