"""APOLLO: the gradient itself, stepped as far as Adam would in a random subspace."""

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
from lowrank_optax.projectors import Projector, gaussian
from lowrank_optax.recovery import recover_scale
from lowrank_optax.transport import Transport


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    update_proj_gap: int = 200,
    scale: float | Array = 1.0,
    granularity: str = "column",
    growth_limit: float | Array | None = 1.01,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array | None = None,
    base_optimizer: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    authors = _recipe.is_authors(conventions)
    projector = projector or gaussian(rank, update_proj_gap)
    tx = chain(
        open_bracket(
            rank, update_proj_gap, projector, transport, None, authors, options
        ),
        _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors),
        recover_scale(
            of="gradient", granularity=granularity, growth_limit=growth_limit
        ),
        backproject(scale**0.5, learning_rate),
    )
    return _recipe.correct_bias(tx, base_optimizer, b1, b2, authors)


@takes(_bracket)
def scale_by_apollo(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of APOLLO, without learning rate and weight decay.

    Args:
      rank: see ``lro.apollo``, like all others.
      **options: as in ``lro.apollo``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.apollo``.
      ValueError: as ``lro.apollo``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_apollo(rank=4), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> jax.tree.leaves(state[0].basis)
      []
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""APOLLO: SGD's direction with Adam's step sizes, estimated in a random subspace.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G``, and
    ``P [m, r] ~ N(0, 1/r)`` drawn anew every ``update_proj_gap`` steps::

        R     = P^T G                                  [r, n]
        N     = Adam's direction from R                [r, n]
        phi_j = |N_j| / (|R_j| + 1e-8)                 n numbers
        U     = G diag(phi)
        U    <- U min(1, growth_limit |U_before| / |U|)
        W    <- W - lr (sqrt(scale) U + weight_decay W)

    Only norms are used of what happens in the subspace, so nothing is lifted back, the
    update has full rank, and the basis needs neither orthonormality nor a memory: it is
    regenerated at each step from the bracket's key, the same on every replica and after
    a resume. The moments stay as they are when it is redrawn.

    State per matrix: ``2 r n`` numbers of moments and one of the limiter; per bracket
    one key.

    Args:
      learning_rate: a number or an Optax schedule (paper: 0.01).
      rank: rows r of the projection: an int, a fraction of min(m, n), or a callable of
        the leaf's path (paper: a quarter of the hidden size).
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      conventions: "optax", or "authors" to reproduce the released code.
      update_proj_gap: steps from one draw of P to the next (paper: 200).
      scale: enters as its square root; full leaves are not scaled (paper: 1).
      granularity: phi per "column" (the paper's channels), or one per matrix: "tensor"
        (``lro.apollo_mini``'s).
      growth_limit: largest ratio of ``|U|`` to the step before (paper: 1.01); None for
        no limit. See ``lro.recover_scale`` for its reset.
      b1: decay of the first moment (paper: 0.9).
      b2: decay of the second moment (paper: 0.999).
      eps: added to the root; None is 1e-8, or the released code's 1e-6 with
        ``conventions="authors"``.
      base_optimizer: the inner transformation in place of Adam.
      projector: another projection in place of the Gaussian (``lro.svd(rank)`` is the
        paper's "APOLLO w. SVD"); it brings its own rank and gap, and is stored.
      transport: what a new basis does to the moments, for such a projector; None aligns
        signs (nothing in authors' mode).
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      **options: the arguments above that the signature lists after ``conventions``,
        and those of ``lro.project`` (``side``, ``select``, ``layer_axis``, ``seed``,
        ...).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number, or an
        argument is unknown.
      ValueError: if one is out of range, a choice is unknown, or ``transport`` moves
        moments between bases that are not stored; at init, if a leaf selected
        explicitly cannot be projected.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.apollo(learning_rate=1e-2, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> roles = lro.state_bytes(tx, params).by_role
      >>> roles["mu"] == 4 * 4 * 64, roles["recovery"], "basis" in roles
      (True, 4, False)

    References:
      Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance (2024),
      https://arxiv.org/abs/2412.05270

    Differences from the authors' code:
      * The code keeps P between two draws, ``m r`` numbers more per matrix.
      * Its draws come from a chain of seeds per parameter, counted in the order of the
        parameters; these from one key, the parameter's path and the epoch.
      * Its ``scale_front`` multiplies by ``sqrt(scale)`` before the limiter instead of
        behind it. The limiter only compares norms, so there is no such option here.
      * The limiter sees Adam's bias-corrected direction, ``eps`` stands on the
        corrected root, and decay uses the weights before the step;
        ``conventions="authors"`` restores the code's order in all three.
      * A step without gradient does not hold the limiter down afterwards.
    """
    tx = _bracket(learning_rate, rank, conventions=conventions, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)
