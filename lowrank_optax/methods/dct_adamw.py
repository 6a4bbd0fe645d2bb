"""``dct_adamw``: Adam on the cosine columns that see most of the gradient."""

from typing import Any, Unpack

import optax

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.projectors import dct
from lowrank_optax.recovery import error_feedback as feed_back
from lowrank_optax.transport import align_signs, gather_moments


class _Options(has.Usual, has.Given, has.Conventions): ...


@method(
    "DCT-AdamW",
    "2505.17967",
    "Modoranu et al. (2025)",
    defaults={"update_proj_gap": 1, "scale": 1.0, "eps": 1e-8},
    ignored=("kind, norm beside projector", "error_dtype without error_feedback"),
)
def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    kind: str = "dct3",
    norm: int = 1,
    error_feedback: bool = False,
    error_dtype: Any = None,
    **options: Unpack[_Options],
) -> Transformation:
    """DCT-AdamW: Adam on r columns of a fixed cosine basis, chosen anew at each step.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G`` and an orthogonal
    cosine matrix ``D [m, m]`` (``lro.dct``)::

        A  = G + E                                  E = 0 without error feedback
        P  = the r columns of D with the largest |D^T A| (summed over n)  when due
        mu, nu: those of columns that stay go along; a new column's mu is zero, its nu
              that of a typical column that stays
        R  = P^T A,   E <- A - P R
        N  = Adam's direction from R                [r, n]
        W <- W - lr (scale P N + weight_decay W)

    State per matrix: ``2 r n`` numbers and r indices, **and m n more with error
    feedback**. Each choice costs a product of ``m x m`` with ``m x n``.

    Args:
      kind: "dct3" or "dct2", see ``lro.dct`` (authors: both, two bases).
      norm: columns by their sum of magnitudes, 1 (authors), or of squares, 2.
      error_feedback: keep E (authors: optional).
      transport: what a new choice does to the moments; None is ``lro.gather_moments()``
        (with another projector, align signs).
      conventions: with "authors" a new column's nu starts at zero; else both are the
        same here: the released code corrects the bias before eps and decays before the
        step.

    Differences from the authors' code:
      * Those of ``lro.dct``.
      * Moments are gathered. The code multiplies them by the matrix of inner products
        of old and new columns, which leaves rounding where nothing should be.
      * The second moment of a new column starts at that of the others, in the code at
        zero, after which its first step is three times too large.
      * Error feedback is off by default and is kept in float32 or bfloat16; the 8-bit
        and 4-bit codecs of the code are not offered.
    """
    its = Recipe(**options)
    projector = its.bases(dct, rank, its.update_proj_gap, kind, norm)
    # Vectors of one fixed basis stay as they are or go: there is nothing to rotate.
    gather = align_signs()
    if projector.selects:
        gather = gather_moments(fill=not its.authors)
    # E is what the projection left out; gathered moments have no further part in it.
    feedback = [feed_back(dtype=error_dtype, momentum=False)] if error_feedback else []
    tx = chain(
        its.open(projector, gather),
        its.adam(authors=False),
        *feedback,
        backproject(its.scale, learning_rate),
    )
    return its.decayed(tx, learning_rate, authors=False)


scale_by_dct_adamw = direction(dct_adamw)
