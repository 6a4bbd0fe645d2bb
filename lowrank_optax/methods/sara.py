"""``sara``: GaLore on singular vectors drawn by importance."""

from typing import Any, Unpack

import optax

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.projectors import sampled_svd


class _Options(has.Options, has.Recovered): ...


@method(
    "SARA",
    "2502.05790",
    "Breaking the Frozen Subspace: Importance Sampling (2025)",
    uses=("scale",),  # beside a recovery
    ignored=("sampling beside projector",),
)
def sara(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    sampling: str = "sequential",
    **options: Unpack[_Options],
) -> Transformation:
    """SARA: GaLore whose basis is drawn from all singular vectors.

    GaLore's step (``lro.galore``) with another basis: every ``update_proj_gap`` steps
    r of the s = min(m, n) left singular vectors of G are drawn without replacement with
    probability proportional to their singular values (``lro.sampled_svd``)::

        P  = r columns of U, drawn            G = U diag(sigma) V^T
        R  = P^T G,  Adam's moments and direction N from R            [r, n]
        W <- W - lr (scale P N + weight_decay W)

    State as GaLore's. With ``recovery=lro.recover_scale()`` it is Fira on the same
    bases.

    Args:
      sampling: how: "sequential" as above, or "unbiased" (PLUMAGE), with weights that
        make ``P P^T G`` an unbiased estimate of G, see ``lro.sampled_svd``.
      recovery: what the update gets from outside the subspace, such as
        ``lro.recover_scale()``; None discards it, and
        ``lro.complement(probability=q)`` adds it now and then (GUM).
      transport: what a new basis does to the moments; None aligns signs. Row i of the
        moments changes its meaning at every draw; ``lro.rotate_moments()`` takes what
        the old and the new basis share along.

    Differences from the authors' code:
      * No official code was found: the rule is the paper's, and the order of the drawn
        columns (falling singular value), which it leaves open, is ours.
      * New basis vectors take the signs of the old ones they replace;
        ``conventions="authors"`` leaves them as they come, and runs the released
        GaLore code's Adam (``lro.galore``), as no other is known.
    """
    its = Recipe(**options)
    tx = chain(
        its.open(its.bases(sampled_svd, rank, its.update_proj_gap, sampling=sampling)),
        its.adam(),
        *([] if its.recovery is None else [its.recovery]),
        backproject(its.scale, learning_rate),
    )
    # The bias is corrected behind the bracket: a recovery in it may have a limiter.
    return its.decayed(its.correct(tx), learning_rate)


scale_by_sara = direction(sara)
