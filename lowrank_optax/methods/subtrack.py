"""SubTrack++: a tracked subspace, moments that follow it, recovery scaling."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import takes
from lowrank_optax.methods._tracked import tracked
from lowrank_optax.projectors import grassmann


@takes(tracked)
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    update_proj_gap: int = 200,
    step: str | float | Array = "line_search",
    max_angle: float | Array | None = None,
    damping: float | Array = 1.0,
    basis_dtype: Any = jnp.float32,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    authors = _recipe.is_authors(conventions)
    track = grassmann(
        rank,
        update_proj_gap,
        basis_dtype,
        step=step,
        max_angle=max_angle,
        damping=damping,
        cold_start="svd" if authors else "power",
    )
    return tracked(track, learning_rate, conventions=conventions, **options)


@takes(_bracket)
def scale_by_subtrack(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of SubTrack++, without learning rate and weight decay.

    Args:
      rank: see ``lro.subtrack``, like all others.
      **options: as in ``lro.subtrack``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.subtrack``.
      ValueError: as ``lro.subtrack``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_subtrack(rank=4), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].basis["kernel"].shape
      (32, 4)
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def subtrack(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SubTrack++: the basis turns, the moments turn with it, nothing is dropped.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G`` and orthonormal
    ``S [m, r]``, every ``update_proj_gap`` steps S takes one step along the Grassmann
    geodesic that captures more of G (``lro.grassmann``), and the moments follow by
    ``C = S_new^T S_old`` (``lro.rotate_moments``). Each step t = 1, 2, ... is::

        R  = S^T G                                              [r, n]
        mu = b1 mu + (1 - b1) R        nu = b2 nu + (1 - b2) R^2
        N  = (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)
        Lambda = (G - S R) diag(|N_j| / (|R_j| + 1e-8))         limited in growth
        W <- W - lr (scale S N + Lambda + weight_decay W)

    with Lambda as in ``lro.recover_scale``. State per matrix: ``m r + 2 r n`` and one
    number.

    Args:
      learning_rate: a number or an Optax schedule (paper: 1e-3 up to 350M, 1e-4 from
        1B to 7B).
      rank: basis vectors r, as in ``lro.galore`` (paper: 128 at 60M, 256 at 130M and
        350M, 512 at 1B and 3B, 1024 at 7B).
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      conventions: "optax"; "authors" puts Adam's eps on the uncorrected root (1e-6),
        the bias correction behind the limiter and the decay after the step, starts
        from the SVD, and transports by the paper's formula as printed. Where the
        released code contradicts the paper, the paper is followed.
      update_proj_gap: steps from one turn to the next (paper: 200; 500 at 7B).
      scale: factor on ``S N``, not on Lambda (paper: 0.25).
      step: "line_search" turns by the exact minimizer; a number is the paper's eta
        (10000 there, 10 in its scripts), whose effect goes with the square of the
        gradient's scale.
      max_angle: largest angle of a turn in radians; None for no limit.
      damping: factor on the angle, in (0, 1]; below 1 for noisy gradients.
      growth_limit: largest ratio of ``|Lambda|`` to the step before (paper: 1.01);
        None for no limit.
      b1: decay of the first moment (paper: 0.9).
      b2: decay of the second moment (paper: 0.999).
      eps: added to the root; None is 1e-8, or the paper's 1e-6 with
        ``conventions="authors"``.
      base_optimizer: the inner transformation in place of Adam; it needs moments with
        decays ``b1`` and ``b2``, or another ``transport``.
      transport: in place of ``lro.rotate_moments(b1, b2)``.
      recovery: in place of ``lro.recover_scale(growth_limit=growth_limit)``.
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      basis_dtype: storage dtype of the basis.
      **options: the arguments above that the signature lists after ``conventions``,
        and those of ``lro.project`` (``side``, ``select``, ``layer_axis``, ...).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number, or an
        argument is unknown.
      ValueError: if one is out of range or a choice is unknown; at init, if a leaf
        selected explicitly cannot be projected, or the inner optimizer has no moments.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.subtrack(learning_rate=1e-3, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> sizes = lro.state_bytes(tx, params).by_role
      >>> sizes["basis"] == 4 * 32 * 4, sizes["mu"] == 4 * 4 * 64, sizes["recovery"]
      (True, True, 4)

    References:
      Rajabi et al., SubTrack++: Gradient Subspace Tracking for Scalable LLM Training
      (2025), https://arxiv.org/abs/2502.01586

    Differences from the authors' code:
      * Tall and square matrices are tracked as well; the code leaves all but the wide
        ones at their first basis.
      * Moments turn from the previous basis to the new one, in the step that turns it;
        the code turns them from the first basis, a step early.
      * The second moment keeps its size: the code multiplies it by ``1 - b2`` at every
        turn, and the formula as printed corrects its bias twice.
      * The residual is ``G - S R``, the code's ``G - scale S R``.
      * The turn is the exact line search, and the first basis comes from block power
        steps.
    """
    tx = _bracket(learning_rate, rank, conventions=conventions, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)
