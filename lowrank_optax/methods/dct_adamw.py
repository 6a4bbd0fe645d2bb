"""DCT-AdamW: Adam on the cosine columns that see most of the gradient."""

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
from lowrank_optax.projectors import Projector, dct
from lowrank_optax.recovery import error_feedback as feed_back
from lowrank_optax.transport import Transport, gather_moments


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    update_proj_gap: int = 1,
    kind: str = "dct3",
    norm: int = 1,
    error_feedback: bool = False,
    error_dtype: Any = jnp.float32,
    scale: float | Array = 1.0,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    base_optimizer: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    _recipe.is_authors(conventions)  # one rule for both: see the docstring
    projector = projector or dct(rank, update_proj_gap, kind, norm)
    if transport is None and projector.selects:
        transport = gather_moments()
    feedback = [feed_back(dtype=error_dtype, momentum=False)] if error_feedback else []
    return chain(
        project(projector, transport=transport, **options),
        _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors=False),
        *feedback,
        backproject(scale, learning_rate),
    )


@takes(_bracket)
def scale_by_dct_adamw(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of DCT-AdamW, without learning rate and weight decay.

    Args:
      rank: see ``lro.dct_adamw``, like all others.
      **options: as in ``lro.dct_adamw``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.dct_adamw``.
      ValueError: as ``lro.dct_adamw``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_dct_adamw(rank=4), optax.scale(-1e-3))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].basis["kernel"]
      Array([0, 1, 2, 3], dtype=int32)
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""DCT-AdamW: Adam on r columns of a fixed cosine basis, chosen anew at each step.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G`` and an orthogonal
    cosine matrix ``D [m, m]`` (``lro.dct``)::

        A  = G + E                                  E = 0 without error feedback
        P  = the r columns of D with the largest |D^T A| (summed over n)  when due
        mu, nu: those of columns that stay go along, new columns start at zero
        R  = P^T A,   E <- A - P R
        mu = b1 mu + (1 - b1) R,   nu = b2 nu + (1 - b2) R^2         [r, n]
        N  = (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)
        W <- W - lr (scale P N + weight_decay W)

    State per matrix: ``2 r n`` numbers and r indices, **and m n more with error
    feedback**. No basis is stored and nothing is factorized; each choice costs a
    product of ``m x m`` with ``m x n``.

    With error feedback what a step left out is what the next one sees, so it tends to
    choose other columns, and their moments start anew.

    Args:
      learning_rate: a number or an Optax schedule.
      rank: basis vectors r: an int, a fraction of min(m, n), or a callable of the
        leaf's path.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      update_proj_gap: steps from one choice of columns to the next (authors: 1).
      kind: "dct3" or "dct2", see ``lro.dct`` (authors: both, two bases).
      norm: columns by their sum of magnitudes, 1 (authors), or of squares, 2.
      error_feedback: keep E (authors: optional).
      error_dtype: storage dtype of E; bfloat16 halves it.
      scale: factor on ``P N`` (authors: none).
      b1: decay of the first moment (authors: 0.9).
      b2: decay of the second moment (authors: 0.999).
      eps: added to the corrected root (authors: 1e-8).
      base_optimizer: the inner transformation in place of Adam.
      projector: another projector; it brings its own rank and gap.
      transport: what a new choice does to the moments; None is ``lro.gather_moments()``
        (with another projector, align signs).
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      conventions: "optax" and "authors" are the same here: the released code corrects
        the bias before eps and decays before the step.
      **options: the arguments above that the signature lists after ``mask``, and those
        of ``lro.project`` (``side``, ``select``, ``layer_axis``, ...).

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
      >>> tx = lro.dct_adamw(learning_rate=1e-3, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> lro.state_bytes(tx, params).by_role["basis"]
      16

    References:
      Modoranu et al., FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
      Optimization of Large Language Models (2025), https://arxiv.org/abs/2505.17967

    Differences from the authors' code:
      * Those of ``lro.dct``.
      * Moments are gathered. The code multiplies them by the matrix of inner products
        of old and new columns, which leaves rounding where nothing should be.
      * Error feedback is off by default and is kept in float32 or bfloat16; the 8-bit
        and 4-bit codecs of the code are not offered.
    """
    tx = _bracket(learning_rate, rank, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask)
