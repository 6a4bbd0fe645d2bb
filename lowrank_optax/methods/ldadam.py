"""``ldadam``: a subspace that follows the momentum at every step."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.projectors import power_iteration
from lowrank_optax.recovery import error_feedback as feed_back
from lowrank_optax.transport import rotate_moments


class _Options(has.Base, has.Adam, has.Given, has.Stored, has.Conventions): ...


@method(
    "LDAdam",
    "2410.16103",
    "Robert et al. (2024)",
    defaults={
        "scale": 1.0,
        "b1": 0.908,
        "b2": 0.99,
        "eps": 1e-8,
    },
    ignored=("rho beside projector", "error_dtype without error_feedback"),
    uses=("b1", "b2"),  # the moments turn by them, whoever keeps them
)
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 16,
    *,
    rho: float | Array | None = None,
    error_feedback: bool = False,
    error_dtype: Any = None,
    **options: Unpack[_Options],
) -> Transformation:
    """LDAdam: a new basis every step, moments and errors carried along.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G``, after n steps::

        A  = G + E                                  E = 0 without error feedback
        B  = rho U_old mu / (1 - b1^n) + (1 - rho) A
        U  = orth(B (B^T U_old))                    one block power sweep
        C  = U^T U_old
        E <- A - U U^T A + b1 / (1 - b1) (U_old mu - U C mu)
        mu, nu <- C mu, and nu by lro.rotate_moments
        R  = U^T A,  Adam's moments and direction N from R
        W <- W - lr (scale U N + weight_decay W)

    State per matrix: ``m r + 2 r n``, **and m n more with error feedback** (Adam: 2 m
    n): gradients are values in JAX, so E is a state of its own. Every step costs about
    two refreshes of GaLore's default projector and, with error feedback, two products
    more.

    Args:
      rho: weight of the momentum in B; None is ``b1``, when B is the momentum after
        this step (authors: 0.908 both).
      error_feedback: keep E (authors: on). Off here for its memory.
      base_optimizer: the inner transformation in place of Adam; it needs moments with
        decays ``b1`` and ``b2``.

    Raises:
      ValueError: at init, if the inner optimizer has no moments or ``side`` is "both".

    Differences from the authors' code:
      * Error feedback is off by default, and E is a state instead of being kept in
        ``.grad``.
      * The first basis comes from block power steps (the SVD with
        ``conventions="authors"``), the others from shifted CholeskyQR.
      * A turned second moment has the square of the first as its floor, and what the
        basis lost of it is filled: ``lro.rotate_moments``. ``conventions="authors"``
        takes ``form="debiased"`` in its place.
      * A zero or non-finite gradient leaves the basis as it is, and a B of rank below
        r the directions it does not fill.
    """
    its = Recipe(**options)
    projector = its.bases(
        power_iteration,
        rank,
        its.b1,
        its.b1 if rho is None else rho,
        cold_start="svd" if its.authors else "power",
    )
    turn = rotate_moments(its.b1, its.b2, "debiased" if its.authors else "bounded")
    tx = chain(
        its.open(projector, turn),
        # The released code corrects the bias first and decays first, as Optax does.
        its.adam(authors=False),
        # Though behind Adam, E is added to the gradient before that is projected.
        *([feed_back(its.b1, error_dtype)] if error_feedback else []),
        backproject(its.scale, learning_rate),
    )
    return its.decayed(tx, learning_rate, authors=False)


scale_by_ldadam = direction(ldadam)
