"""``coap``: the basis follows the correlation of momentum and gradient."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Options, Recipe, Transformation
from lowrank_optax.projectors import correlation


@method(
    "COAP",
    "2412.00071",
    "Xiao et al. (2024)",
    defaults={"update_proj_gap": 32, "scale": 1.0},
    ignored=("reproject_factor, basis_learning_rate, normalize beside projector",),
)
def coap(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    reproject_factor: int = 5,
    basis_learning_rate: float | Array = 0.1,
    normalize: bool | None = None,
    **options: Unpack[Options],
) -> Transformation:
    """COAP: correlation-aware steps of the basis between cheap decompositions.

    GaLore's step on a basis that is refreshed as ``lro.correlation`` says: every
    ``update_proj_gap`` steps it takes one gradient step on reconstruction error times
    (1 - cosine of momentum and gradient), every ``reproject_factor``-th time one
    warm-started power sweep::

        P <- refresh(P, G, mu) when due;   R = P^T G;   N, state = Adam(R)
        W <- W - lr (scale P N + weight_decay W)

    The state is GaLore's: ``m r + 2 r n`` elements per matrix.

    Convolutions are Tucker-2, with one basis for the input channels and one for the
    output channels at all positions of the kernel: ``side="both"`` and dimension
    numbers with a ``shared_axis``, as in the example. The state of a kernel ``[h, w, i,
    o]`` is then ``(i + o) r + 2 h w r^2`` elements.

    Args:
      reproject_factor: refreshes from one decomposition to the next.
      basis_learning_rate: of the step on the basis.
      normalize: divide the gradient by its rms in that step; None is True, and False
        with ``conventions="authors"``, where the step does next to nothing.
      base_optimizer: the inner transformation in place of Adam. The projector reads
        its ``mu``, ``trace`` or ``ema`` as a direction of the gradient: a momentum of
        updates that were negated already would point the other way.
      transport: what a new basis does to the moments; None aligns signs. The released
        option ``restore_state`` is ``lro.rotate_moments(form="root")``;
        ``lro.rotate_moments()`` rotates variances as variances.

    Examples:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> numbers = lro.MatrixDimensionNumbers(2, 3, shared_axis=(0, 1))
      >>> conv = lro.coap(1e-2, 4, side="both", weight_dimension_numbers=numbers)
      >>> conv.init(jnp.ones((3, 3, 16, 32))).inner_state.mu.shape
      (4, 36)

    Differences from the authors' code:
      * See ``lro.correlation`` for the refresh. New singular vectors keep the old
        ones' signs; there they come as the backend has them, and the momentum with
        them.
      * ``eps`` stands on the bias-corrected root, and decay uses the weights before
        the step. ``conventions="authors"`` restores both.
      * A convolution has the same rank on both sides.
    """
    its = Recipe(**options)
    projector = its.bases(
        correlation,
        rank,
        its.update_proj_gap,
        reproject_factor=reproject_factor,
        learning_rate=basis_learning_rate,
        normalize=not its.authors if normalize is None else normalize,
        cold_start="svd" if its.authors else "power",
    )
    # No limiter stands behind Adam, so the bias can be corrected inside in both modes.
    tx = chain(
        its.open(projector),
        its.corrected_adam(),
        backproject(its.scale, learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_coap = direction(coap)
