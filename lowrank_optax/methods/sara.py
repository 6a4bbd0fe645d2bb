"""SARA: GaLore on singular vectors drawn by importance."""

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
from lowrank_optax.projectors import Projector, sampled_svd
from lowrank_optax.recovery import Recovery
from lowrank_optax.transport import Transport


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    update_proj_gap: int = 200,
    scale: float | Array = 0.25,
    recovery: Recovery | None = None,
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
    projector = projector or sampled_svd(rank, update_proj_gap)
    tx = chain(
        open_bracket(
            rank, update_proj_gap, projector, transport, basis_dtype, authors, options
        ),
        _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors),
        *([] if recovery is None else [recovery]),
        backproject(scale, learning_rate),
    )
    return _recipe.correct_bias(tx, base_optimizer, b1, b2, authors)


@takes(_bracket)
def scale_by_sara(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of SARA, without learning rate and weight decay.

    Args:
      rank: see ``lro.sara``, like all others.
      **options: as in ``lro.sara``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.sara``.
      ValueError: as ``lro.sara``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_sara(rank=4), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].basis["kernel"].shape
      (32, 4)
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def sara(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""SARA: GaLore whose basis is drawn from all singular vectors.

    GaLore's step (``lro.galore``) with another basis: every ``update_proj_gap`` steps
    r of the s = min(m, n) left singular vectors of G are drawn without replacement with
    probability proportional to their singular values (``lro.sampled_svd``)::

        P  = r columns of U, drawn            G = U diag(sigma) V^T
        R  = P^T G,  Adam's moments and direction N from R            [r, n]
        W <- W - lr (scale P N + weight_decay W)

    State as GaLore's. With ``recovery=lro.recover_scale()`` it is Fira on the same
    bases.

    Args:
      learning_rate: a number or an Optax schedule.
      rank: basis vectors r, as in ``lro.galore``.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      conventions: "optax", or "authors" for the GaLore code's Adam, order of decay and
        signs.
      update_proj_gap: steps from one draw to the next (200, as GaLore).
      scale: factor on ``P N`` (0.25, as GaLore).
      recovery: what the update gets from outside the subspace, such as
        ``lro.recover_scale()``; None discards it.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root; None is 1e-8, or 1e-6 with ``conventions="authors"``.
      base_optimizer: the inner transformation in place of Adam.
      projector: another projector; it brings its own rank and gap.
      transport: what a new basis does to the moments; None aligns signs. Row i of the
        moments changes its meaning at every draw; ``lro.rotate_moments()`` takes what
        the old and the new basis share along.
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      basis_dtype: storage dtype of the basis; None is float32.
      **options: the arguments above that the signature lists after ``conventions``,
        and those of ``lro.project`` (``side``, ``select``, ``seed``, ...).

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
      >>> tx = lro.sara(learning_rate=1e-2, rank=4, recovery=lro.recover_scale())
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["kernel"].shape
      (64, 32)

    References:
      Breaking the Frozen Subspace: Importance Sampling for Low-Rank Optimization in
      LLM Pretraining (2025), https://arxiv.org/abs/2502.05790

    Differences from the authors' code:
      * No official code was found: the rule is the paper's, and the order of the drawn
        columns (falling singular value), which it leaves open, is ours.
      * New basis vectors take the signs of the old ones they replace;
        ``conventions="authors"`` leaves them as they come, and runs the released
        GaLore code's Adam (``lro.galore``), as no other is known.
    """
    tx = _bracket(learning_rate, rank, conventions=conventions, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)
