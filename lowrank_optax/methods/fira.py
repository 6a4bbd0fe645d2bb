"""Fira: GaLore, and the rest of the gradient scaled to match."""

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
from lowrank_optax.recovery import recover_scale
from lowrank_optax.transport import Transport


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    update_proj_gap: int = 200,
    scale: float | Array = 0.25,
    growth_limit: float | Array | None = 1.01,
    granularity: str = "column",
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array | None = None,
    base_optimizer: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    basis_dtype: Any = None,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    authors = _recipe.is_authors(conventions)
    tx = chain(
        open_bracket(
            rank, update_proj_gap, projector, transport, basis_dtype, authors, options
        ),
        _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors),
        recover_scale(
            granularity=granularity,
            growth_limit=growth_limit,
            residual="authors" if authors else "paper",
        ),
        backproject(scale, learning_rate),
    )
    return _recipe.correct_bias(tx, base_optimizer, b1, b2, authors)


@takes(_bracket)
def scale_by_fira(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of Fira, without learning rate and weight decay.

    Args:
      rank: see ``lro.fira``, like all others.
      **options: as in ``lro.fira``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.fira``.
      ValueError: as ``lro.fira``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_fira(rank=4), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].recovery_state["kernel"].shape
      ()
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Fira: Adam in a subspace, and a step in the rest of the same size.

    GaLore's step (``lro.galore``: basis P, projection ``R = P^T G``, Adam's direction
    N, both ``[r, n]``), and what GaLore drops, column by column as far as Adam went::

        phi_j  = |N_j| / (|R_j| + 1e-8)                      n numbers
        Lambda = (G - P R) diag(phi)
        Lambda <- Lambda min(1, growth_limit |Lambda_before| / |Lambda|)
        W <- W - lr (scale P N + Lambda + weight_decay W)

    The weights move at full rank with GaLore's state and one number per matrix. See
    ``lro.recover_scale`` for how, without forming the residual, and for the limiter's
    reset.

    Args:
      learning_rate: a number or an Optax schedule (0.01 in the paper's pretraining,
        0.005 at 7B).
      rank: basis vectors r, as in ``lro.galore`` (paper: a quarter of the hidden
        size; 512 at 1B).
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      conventions: "optax", or "authors" to reproduce the released code.
      update_proj_gap: steps from one basis to the next (paper: 200; 500 at 7B).
      scale: factor on ``P N``, not on Lambda (paper: 0.25 below 1B, 0.0625 from 1B).
      growth_limit: largest ratio of ``|Lambda|`` to the step before (paper: 1.01);
        None for no limit.
      granularity: phi per "column" (paper), or one per matrix: "tensor".
      b1: decay of the first moment (paper: 0.9).
      b2: decay of the second moment (paper: 0.999).
      eps: added to the root; None is 1e-8, or the released code's 1e-6 with
        ``conventions="authors"``.
      base_optimizer: the inner transformation in place of Adam.
      projector: as in ``lro.galore``.
      transport: what a new basis does to the moments; None aligns signs.
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      basis_dtype: storage dtype of the basis; None is float32.
      **options: the arguments above that the signature lists after ``conventions``,
        and those of ``lro.project`` (``side``, ``select``, ``layer_axis``, ...).

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
      >>> tx = lro.fira(learning_rate=1e-2, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> lro.state_bytes(tx, params).by_role["recovery"]
      4

    References:
      Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint? (2024), https://arxiv.org/abs/2410.01623

    Differences from the authors' code:
      * The residual is the paper's ``G - P P^T G``; the code's ``G - scale P P^T G``
        still holds part of the gradient inside the subspace.
      * Everything listed under ``lro.galore``. ``conventions="authors"`` restores all
        of it, with the bias correction behind the limiter.
    """
    tx = _bracket(learning_rate, rank, conventions=conventions, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)
