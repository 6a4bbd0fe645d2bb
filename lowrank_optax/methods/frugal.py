"""``frugal``: Adam in the subspace, an optimizer without state outside it."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.methods.galore import leading
from lowrank_optax.recovery import complement
from lowrank_optax.transport import rotate_moments


class _Options(has.Base, has.Adam, has.Bases): ...


@method(
    "FRUGAL",
    "2411.07837",
    "Zmushko et al. (2024)",
    defaults={"scale": 1.0, "eps": 1e-8},
    ignored=("b1, b2 beside base_optimizer, transport",),
    uses=("scale",),
)
def frugal(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    state_free: Any = None,
    state_free_scale: float | Array = 1.0,
    **options: Unpack[_Options],
) -> Transformation:
    """FRUGAL: every direction is trained, a few of them with state.

    For every projected matrix ``G [m, n]`` with basis ``P [m, r]``::

        R = P^T G;   N, state = Adam(R)                              [r, n]
        W <- W - lr (scale P N + state_free_scale sign(G - P R) + weight_decay W)

    The update has full rank and the state is GaLore's, ``m r + 2 r n`` elements: the
    sign keeps none. The residual is formed, which takes temporaries of m x n.

    Args:
      state_free: the optimizer outside, a direction without learning rate; None is
        ``optax.scale_by_sign()``, the paper's. It may keep state, at full size.
      state_free_scale: factor on its result: the ratio of the two learning rates.
      b1: decay of the first moment, of ``base_optimizer``'s as well.
      b2: decay of the second moment, likewise.
      projector: as in ``lro.galore``; ``lro.sampled_svd`` and ``lro.dct`` suit it.
      transport: what a new basis does to the moments; None rotates them into it,
        ``lro.rotate_moments(b1, b2)``.

    Differences from the authors' code:
      * Written from the paper's description; its code was not read. The subspace is
        the gradient's leading one, where the paper also chooses columns and blocks at
        random.
      * The moments are rotated into a new basis by ``lro.rotate_moments``.
    """
    its = Recipe(**options)
    # Two optimizers of one gradient: Adam of P^T G, the sign of the rest. Both share
    # the learning rate; the scales are their ratio.
    outside = optax.scale_by_sign() if state_free is None else state_free
    tx = chain(
        its.open(leading(its, rank), rotate_moments(its.b1, its.b2)),
        its.adam(),
        complement(outside, state_free_scale),
        backproject(its.scale, learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_frugal = direction(frugal)
