"""LDAdam: a subspace that follows the momentum at every step."""

from typing import Any, Unpack

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain, project
from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import (
    ProjectOptions,
    takes,
    takes_project_options,
)
from lowrank_optax.projectors import Projector, power_iteration
from lowrank_optax.recovery import error_feedback as feed_back
from lowrank_optax.transport import rotate_moments


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    rho: float | Array | None = None,
    error_feedback: bool = False,
    error_dtype: Any = jnp.float32,
    scale: float | Array = 1.0,
    b1: float | Array = 0.908,
    b2: float | Array = 0.99,
    eps: float | Array = 1e-8,
    base_optimizer: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    basis_dtype: Any = jnp.float32,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    authors = _recipe.is_authors(conventions)
    projector = projector or power_iteration(
        rank,
        b1,
        b1 if rho is None else rho,
        basis_dtype=basis_dtype,
        cold_start="svd" if authors else "power",
    )
    inner = _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors=False)
    feedback = [feed_back(b1, error_dtype)] if error_feedback else []
    return chain(
        project(projector, transport=rotate_moments(b1, b2), **options),
        inner,
        *feedback,
        backproject(scale, learning_rate),
    )


@takes(_bracket)
def scale_by_ldadam(
    rank: Any = 16, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of LDAdam, without learning rate and weight decay.

    Args:
      rank: see ``lro.ldadam``, like all others.
      **options: as in ``lro.ldadam``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.ldadam``.
      ValueError: as ``lro.ldadam``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_ldadam(rank=4), optax.scale(-1e-3))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].basis["kernel"].shape
      (32, 4)
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 16,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""LDAdam: a new basis every step, moments and errors carried along.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G``, after n steps::

        A  = G + E                                  E = 0 without error feedback
        B  = rho U_old mu / (1 - b1^n) + (1 - rho) A
        U  = orth(B (B^T U_old))                    one block power sweep
        C  = U^T U_old
        E <- A - U U^T A + b1 / (1 - b1) (U_old mu - U C mu)
        mu, nu <- C mu, and nu by lro.rotate_moments
        R  = U^T A,  Adam's moments and direction N from R
        W <- W - lr (U N + weight_decay W)

    State per matrix: ``m r + 2 r n``, **and m n more with error feedback** (Adam: 2 m
    n): gradients are values in JAX, so E is a state of its own. Every step costs about
    two refreshes of GaLore's default projector and, with error feedback, two products
    more.

    Args:
      learning_rate: a number or an Optax schedule (authors: 1e-3; 1e-5 on GLUE).
      rank: basis vectors r, as in ``lro.galore`` (authors: 16).
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      rho: weight of the momentum in B; None is ``b1``, when B is the momentum after
        this step (authors: 0.908 both).
      error_feedback: keep E (authors: on). Off here for its memory.
      error_dtype: storage dtype of E; bfloat16 halves it.
      scale: factor on ``U N`` (authors: none).
      b1: decay of the first moment (authors: 0.908).
      b2: decay of the second moment (authors: 0.99).
      eps: added to the root of the second moment (authors: 1e-8).
      base_optimizer: the inner transformation in place of Adam; it needs moments with
        decays ``b1`` and ``b2``.
      projector: another projector; it brings its own rank.
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      basis_dtype: storage dtype of the basis.
      conventions: "authors" starts from the SVD; nothing else differs.
      **options: the arguments above that the signature lists after ``mask``, and those
        of ``lro.project`` (``side``, ``select``, ``layer_axis``, ...).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank`` is not a Python number, or an argument is unknown.
      ValueError: if one is out of range or a choice is unknown; at init, if a leaf
        selected explicitly cannot be projected, the inner optimizer has no moments,
        or ``side`` is "both".

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.ldadam(learning_rate=1e-3, rank=4, error_feedback=True)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> lro.state_bytes(tx, params).by_role["recovery"] == 4 * 64 * 32
      True

    References:
      Robert et al., LDAdam: Adaptive Optimization from Low-Dimensional Gradient
      Statistics (2024), https://arxiv.org/abs/2410.16103

    Differences from the authors' code:
      * Error feedback is off by default, and E is a state instead of being kept in
        ``.grad``.
      * The first basis comes from block power steps (the SVD with
        ``conventions="authors"``), the others from shifted CholeskyQR.
      * A zero or non-finite gradient leaves the basis as it is, and a B of rank below
        r the directions it does not fill.
    """
    tx = _bracket(learning_rate, rank, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask)
