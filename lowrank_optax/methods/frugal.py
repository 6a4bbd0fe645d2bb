"""FRUGAL: Adam in the subspace, an optimizer without state outside it."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import (
    ProjectOptions,
    takes,
    takes_project_options,
)
from lowrank_optax.methods.galore import open_bracket
from lowrank_optax.projectors import Projector
from lowrank_optax.recovery import complement
from lowrank_optax.transport import Transport, rotate_moments


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    update_proj_gap: int = 200,
    scale: float | Array = 1.0,
    state_free: Any = None,
    state_free_scale: float | Array = 1.0,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    base_optimizer: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    basis_dtype: Any = None,
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    if transport is None:
        transport = rotate_moments(b1, b2)
    outside = optax.scale_by_sign() if state_free is None else state_free
    return chain(
        open_bracket(
            rank, update_proj_gap, projector, transport, basis_dtype, False, options
        ),
        _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, False),
        complement(outside, state_free_scale),
        backproject(scale, learning_rate),
    )


@takes(_bracket)
def scale_by_frugal(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of FRUGAL, without learning rate and weight decay.

    Args:
      rank: see ``lro.frugal``, like all others.
      **options: as in ``lro.frugal``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.frugal``.
      ValueError: as ``lro.frugal``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_frugal(rank=4), optax.scale(-1e-3))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def frugal(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""FRUGAL: every direction is trained, a few of them with state.

    For every projected matrix ``G [m, n]`` with basis ``P [m, r]``::

        R = P^T G;   N, state = Adam(R)                              [r, n]
        W <- W - lr (scale P N + state_free_scale sign(G - P R) + weight_decay W)

    The update has full rank and the state is GaLore's, ``m r + 2 r n`` elements: the
    sign keeps none. The residual is formed, which takes temporaries of m x n.

    Args:
      learning_rate: a number or an Optax schedule, of both parts.
      rank: basis vectors r, as in ``lro.galore``.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      update_proj_gap: steps from one basis to the next.
      scale: factor on ``P N``.
      state_free: the optimizer outside, a direction without learning rate; None is
        ``optax.scale_by_sign()``, the paper's. It may keep state, at full size.
      state_free_scale: factor on its result: the ratio of the two learning rates.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.
      base_optimizer: the inner transformation in place of Adam.
      projector: as in ``lro.galore``; ``lro.sampled_svd`` and ``lro.dct`` suit it.
      transport: what a new basis does to the moments; None rotates them into it.
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      basis_dtype: storage dtype of the basis; None is float32.
      **options: the arguments above that the signature lists after ``mask``, and
        those of ``lro.project`` (``side``, ``select``, ``layer_axis``, ...).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number,
        ``state_free`` no transformation, or an argument is unknown.
      ValueError: if one is out of range; at init, if a leaf selected explicitly cannot
        be projected.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.frugal(learning_rate=1e-3, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> "recovery" in lro.state_bytes(tx, params).by_role
      False

    References:
      Zmushko et al., FRUGAL: Memory-Efficient Optimization by Reducing State Overhead
      for Scalable Training (2024), https://arxiv.org/abs/2411.07837

    Differences from the authors' code:
      * Written from the paper's description; its code was not read. The subspace is
        the gradient's leading one, where the paper also chooses columns and blocks at
        random.
      * The moments are rotated into a new basis by ``lro.rotate_moments``.
    """
    tx = _bracket(learning_rate, rank, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask)
