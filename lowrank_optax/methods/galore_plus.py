"""``galore_plus``: one basis for all heads of an attention kernel."""

from typing import Any, Unpack

import optax

from lowrank_optax import _checks
from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.projectors import power


class _Options(has.Usual, has.Stored): ...


@method(
    "GaLore+",
    "2412.19820",
    "GaLore+: Boosting Low-Rank Adaptation (2024)",
    defaults={"eps": 1e-8},
    ignored=("head without heads",),
)
def galore_plus(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    heads: Any = 1,
    head: str = "first",
    **options: Unpack[_Options],
) -> Transformation:
    """GaLore+: GaLore, with the basis found on one head and shared by all.

    The gradient of an attention kernel is ``G = [G_1, ..., G_h]``, one ``[m, n / h]``
    for every head. A refresh looks at one of them and all heads use what it finds::

        P <- orth(G_1 G_1^T P)                                       [m, r]
        R = P^T G;   N, state = Adam(R)                              [r, n]
        W <- W - lr (scale P N + weight_decay W)

    The refresh costs a share ``1 / h`` of GaLore's; step and state are GaLore's. A
    basis smaller than that, on the axis inside a head, comes with dimension numbers:
    ``MatrixDimensionNumbers(0, 2, shared_axis=1)`` for a kernel ``[embed, heads,
    head_dim]``.

    Args:
      heads: into how many equal parts the kept axis falls, or a callable of the
        leaf's path, 1 for leaves without heads: ``lambda path: 16 if "attn/q" in path
        else 1``. The heads must lie on the kept axis: give ``side="left"`` for kernels
        ``[embed, heads * head_dim]`` that are narrower than ``embed``.
      head: the basis is formed from the "first" part, or from the "mean" of all.

    Differences from the authors' code:
      * No code was found: written from the paper's description. Its sparse storage of
        what the projection leaves out of the moments is not here.
    """
    its = Recipe(**options)
    _checks.choice("head", head, ("first", "mean"))
    if not callable(heads):
        _checks.positive_int("heads", heads)
    # Only the search for the basis looks at one head; the step is GaLore's.
    projector = its.bases(power, rank, its.update_proj_gap, blocks=heads, block=head)
    tx = chain(its.open(projector), its.adam(), backproject(its.scale, learning_rate))
    return its.decayed(tx, learning_rate)


scale_by_galore_plus = direction(galore_plus)
