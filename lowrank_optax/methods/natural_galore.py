"""``natural_galore``: the projected gradient, preconditioned by its own history."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.leaves.part import made
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.methods.galore import leading
from lowrank_optax.transforms import scale_by_natural_gradient


class _Options(has.Base, has.Moments, has.Bases, has.Conventions): ...


@method("Natural GaLore", "2410.16029", "Das (2024)", defaults={"side": "both"})
def natural_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    history: int = 20,
    damping: float | Array = 1e-3,
    **options: Unpack[_Options],
) -> Transformation:
    """Natural GaLore: GaLore on an empirical natural gradient.

    GaLore (``lro.galore``) with one stage more. With g = vec(R) of the projection R
    and H the last s = ``history`` of them, the current one included::

        R  = P^T G Q                                     [r, r]
        g <- (damping I + H H^T)^{-1} g                  by an s x s Cholesky
        N  = Adam's direction from g
        W <- W - lr (scale P N Q^T + weight_decay W)

    **The history dominates the state**: s numbers per element of R, ten times Adam's
    two moments at s = 20. Per matrix, in numbers::

        side="both"     (m + n) r + 22 r^2 + 20
        side="short"    min(m, n) r + 22 r max(m, n) + 20         Adam: 2 m n

    On one side that is more than Adam's own from ``r = min(m, n) / 11`` on, and such
    leaves then stay full (``lro.selection_report`` names them). The history is neither
    cleared nor rotated when the basis is new, and is stored in ``mu_dtype``, None for
    the parameter's. Leaves that are not projected get plain Adam. Accumulate gradients
    outside: the history takes every gradient it sees.

    Args:
      history: number s of projections kept.
      damping: lambda > 0.
      side: "both" (released code), or another of ``lro.project``'s: "short" for the
        paper's.

    Examples:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> one_sided = lro.natural_galore(1e-2, rank=4, side="short", select="kernel")
      >>> one_sided.init(params).inner_state[0].history["kernel"].shape
      (20, 4, 64)

    Differences from the authors' code:
      * It projects by a Tucker decomposition of the matrix; here both bases are
        leading singular bases, and from block power steps unless
        ``conventions="authors"``.
      * The solve is ``H (damping I + H^T H)^{-1} e`` for the current column, equal to
        Woodbury's form and without its cancellation.
      * Everything listed under ``lro.galore``.
    """
    its = Recipe(**options)
    adam = its.corrected_adam()
    # Else leaves that stay full would have a history, too, s times their size.
    if its.full is None:
        its.full = adam
    tx = chain(
        its.open(leading(its, rank)),
        made(scale_by_natural_gradient, history, damping),
        adam,
        backproject(its.scale, learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_natural_galore = direction(natural_galore)
