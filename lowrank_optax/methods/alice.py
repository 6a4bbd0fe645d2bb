"""``alice``: Adam in a subspace that switches, and the rest by its column's energy."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.projectors import switched
from lowrank_optax.recovery import recover_scale
from lowrank_optax.transport import rotate_moments


class _Options(has.Base, has.Adam, has.Bases): ...


@method(
    "Alice",
    "2502.07752",
    "Gong et al., Towards Efficient Optimizer Design for LLM via Structured Fisher "
    "Approximation with a Low-Rank Extension (2025)",
    defaults={"scale": 0.3, "b2": 0.9, "eps": 1e-8},
    ignored=(
        "b1, b2 beside base_optimizer, transport, compensation",
        "leading, tracking beside projector",
        "growth_limit without compensation",
    ),
)
def alice(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    leading: int | float | None = None,
    tracking: float | Array | None = 0.999,
    compensation: float | Array | None = 0.4,
    growth_limit: float | Array | None = 1.01,
    **options: Unpack[_Options],
) -> Transformation:
    """Alice: Adam in a subspace that switches, and the rest by its column's energy.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G`` and basis
    ``U [m, r]``, at step t::

        R   = U^T G;   N = Adam's direction from R                          [r, n]
        Q   = tracking Q + (1 - tracking) R R^T                             [r, r]
        e_j = b1 e_j + (1 - b1) |(G - U R)_j|^2                             [n]
        C_j = sqrt(m - r) (G - U R)_j / sqrt(e_j / (1 - b1^t))
        C  <- C min(1, growth_limit |C_before| / |C|)
        W  <- W - lr (scale (U N + compensation C) + weight_decay W)

    and every ``update_proj_gap`` steps U keeps its leading columns, as Q and G tell
    them, and draws the others anew (``lro.switched``). State per matrix: ``m r + 2 r n
    + r^2 + n + 1`` numbers, GaLore's and a little more. The update has full rank, and
    nothing of ``m x n`` is formed for it. Leaves that are not projected get Adam.

    Args:
      leading: columns of U that a switch keeps, an int or a share of r; None is the
        paper's 40 of 128.
      tracking: decay of Q; None has none, "Alice-0".
      compensation: factor on C; None leaves what is outside the subspace out.
      growth_limit: largest ratio of one ``|C|`` to the one before it; None for no
        limit.
      b1: decay of the first moment, and of the energies, of ``base_optimizer``'s as
        well.
      b2: decay of the second moment, likewise.
      scale: factor on the whole update of a matrix.
      transport: what a switch does to the moments; None rotates them into the new
        basis, ``lro.rotate_moments(b1, b2)``.

    Differences from the authors' code:
      * None was to be found; the rule is the paper's as others have it. There, moments
        and Q stay as they are while the columns of U change their meaning.
      * Moments and energies are corrected for their start at zero.
      * U is on the short side of any matrix, and its first columns come from power
        steps.
    """
    its = Recipe(**options)
    projector = its.bases(
        switched,
        rank,
        its.update_proj_gap,
        leading=40 / 128 if leading is None else leading,
        tracking=tracking,
    )
    outside = []
    if compensation is not None:
        outside = [
            recover_scale(
                growth_limit=growth_limit,
                entry_limit=None,
                energy_decay=its.b1,
                factor=its.scale * compensation,
            )
        ]
    tx = chain(
        its.open(projector, rotate_moments(its.b1, its.b2)),
        its.adam(),
        *outside,
        backproject(its.scale, learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_alice = direction(alice)
