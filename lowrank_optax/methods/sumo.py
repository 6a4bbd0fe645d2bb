"""SUMO: orthogonalized momentum in a subspace."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.chain import backproject, chain, project
from lowrank_optax.methods._options import (
    ProjectOptions,
    takes,
    takes_project_options,
)
from lowrank_optax.methods._recipe import adam, decay
from lowrank_optax.projectors import Projector, power
from lowrank_optax.recovery import complement
from lowrank_optax.transforms import orthogonalize
from lowrank_optax.transforms.orthogonalize import METHODS
from lowrank_optax.transport import Transport, rotate_moments


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    update_proj_gap: int = 200,
    scale: float | Array = 1.0,
    b1: float | Array = 0.95,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    orthogonalization: str = "svd",
    steps: int = 30,
    shape_factor: str = "sqrt_long",
    residual: float | Array | None = 1.0,
    projector: Projector | None = None,
    transport: Transport | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    basis_dtype: Any = None,
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    _checks.choice("orthogonalization", orthogonalization, METHODS)
    if projector is None:
        basis = {} if basis_dtype is None else {"basis_dtype": basis_dtype}
        projector = power(rank, update_proj_gap, **basis)
    if options.get("full") is None:
        options["full"] = adam(None, 0.9, b2, eps, mu_dtype, nu_dtype, False)
    return chain(
        project(projector, transport=transport or rotate_moments(), **options),
        optax.ema(b1, debias=False, accumulator_dtype=mu_dtype),
        orthogonalize(orthogonalization, steps, shape_factor),
        *([] if residual is None else [complement(scale=residual)]),
        backproject(scale, learning_rate),
    )


@takes(_bracket)
def scale_by_sumo(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of SUMO, without learning rate and weight decay.

    Args:
      rank: see ``lro.sumo``, like all others.
      **options: as in ``lro.sumo``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.sumo``.
      ValueError: as ``lro.sumo``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_sumo(rank=4), optax.scale(-1e-3))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> optax.tree_utils.tree_get(state, "ema")["kernel"].shape
      (4, 64)
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def sumo(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SUMO: the momentum in a subspace, orthogonalized exactly.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient G, every
    ``update_proj_gap`` steps P becomes the leading left singular basis of G and the
    momentum goes along, ``M <- (P^T P_old) M``; each step is::

        R  = P^T G                                     [r, n]
        M  = b1 M + (1 - b1) R
        O  = U V^T                                     M = U S V^T
        N  = 0.2 sqrt(n) O
        W <- W - lr (scale P N + residual (G - P R) + weight_decay W)

    State per matrix: ``m r + r n`` numbers, no second moment (GaLore: ``m r + 2 r n``).
    The step inside the subspace has the same length whatever the gradient's, the
    residual has the gradient's. Every step costs one SVD of ``r x n`` per matrix;
    ``orthogonalization="newton_schulz"`` uses matrix products alone, and says in
    ``lro.orthogonalize`` how exactly. Leaves that are not projected get plain Adam.

    Args:
      learning_rate: a number or an Optax schedule.
      rank: basis vectors r, as in ``lro.galore``.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      update_proj_gap: steps from one basis to the next (200, as GaLore).
      scale: factor on ``P N`` (1, ours: with the shape factor, elements of ``P N``
        have a root mean square of ``0.2 sqrt(r / m)``).
      b1: decay of the momentum (0.95, usual with orthogonalization).
      b2: of Adam on the leaves that stay full, whose first decay is 0.9.
      eps: of the same.
      orthogonalization: "svd" (paper) or "newton_schulz".
      steps: steps of "newton_schulz".
      shape_factor: "sqrt_long", ``0.2 sqrt(max(r, n))``, or "none".
      residual: factor on what lies outside the subspace (paper: 1); None leaves it out.
      projector: how bases are formed, in place of ``lro.power``; it brings its own
        rank and gap.
      transport: what a new basis does to the momentum; None rotates it.
      mu_dtype: storage dtype of the momentum; None is float32.
      nu_dtype: storage dtype of the second moment of full leaves; None is float32.
      basis_dtype: storage dtype of the default projector's basis; None is float32.
      **options: the arguments above that the signature lists after ``mask``, and those
        of ``lro.project`` (``side``, ``select``, ``full``, ``layer_axis``, ...).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number, or an
        argument is unknown.
      ValueError: if one is out of range or a choice is unknown; at init, if a leaf
        selected explicitly cannot be projected.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.sumo(learning_rate=1e-3, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> lro.state_bytes(tx, params).by_role["mu"] == 4 * 4 * 64
      True

    References:
      SUMO: Subspace-Aware Moment-Orthogonalization for Accelerating Memory-Efficient
      LLM Training (2025), https://arxiv.org/abs/2505.24749

    Differences from the authors' code:
      * Written from the paper, not from code. Its limiter of 1.1 on the growth of
        ``|O|`` is left out, as it never binds: that norm is sqrt(r) at every step at
        which M has full rank.
      * Bases come from block power steps in place of a randomized SVD, and the default
        ``scale`` and factor are this package's choice, for want of the paper's.
      * Directions in which M is zero up to rounding get no step.
    """
    tx = _bracket(learning_rate, rank, **options)
    return decay(tx, learning_rate, weight_decay, mask)
