"""Natural GaLore: the projected gradient, preconditioned by its own history."""

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
from lowrank_optax.transforms import scale_by_natural_gradient
from lowrank_optax.transport import Transport


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    history: int = 20,
    damping: float | Array = 1e-3,
    side: str = "both",
    update_proj_gap: int = 200,
    scale: float | Array = 0.25,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array | None = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    history_dtype: Any = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    basis_dtype: Any = None,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],  # pyright: ignore[reportGeneralTypeIssues]
) -> optax.GradientTransformationExtraArgs:
    authors = _recipe.is_authors(conventions)
    adam = _recipe.adam(None, b1, b2, eps, mu_dtype, nu_dtype, authors)
    adam = _recipe.correct_bias(adam, None, b1, b2, authors)
    options["side"] = side
    if options.get("full") is None:
        options["full"] = adam
    return chain(
        open_bracket(
            rank, update_proj_gap, projector, transport, basis_dtype, authors, options
        ),
        scale_by_natural_gradient(history, damping, history_dtype),
        adam,
        backproject(scale, learning_rate),
    )


@takes(_bracket)
def scale_by_natural_galore(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of Natural GaLore, without learning rate and weight decay.

    Args:
      rank: see ``lro.natural_galore``, like all others.
      **options: as in ``lro.natural_galore``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.natural_galore``.
      ValueError: as ``lro.natural_galore``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_natural_galore(rank=4), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].inner_state[0].history["kernel"].shape
      (20, 4, 4)
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def natural_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural GaLore: GaLore on an empirical natural gradient.

    GaLore (``lro.galore``) with one stage more. With g = vec(R) of the projection R
    and H the last s = ``history`` of them, the current one included::

        R  = P^T G Q                                     [r, r]
        g <- (damping I + H H^T)^{-1} g                  by an s x s Cholesky
        N  = Adam's direction from g
        W <- W - lr (scale P N Q^T + weight_decay W)

    **The history dominates the state**: s numbers per element of R, ten times Adam's
    two moments at s = 20. Per matrix, in numbers::

        side="both"     (m + n) r + 22 r^2 + 20
        side="short"    min(m, n) r + 22 r max(m, n) + 20         Adam: 2 m n

    On one side that is more than Adam's own from ``r = min(m, n) / 11`` on, and such
    leaves then stay full (``lro.selection_report`` names them): at rank 128 all
    matrices with a side of up to 1408. On both sides a square matrix is smaller up to
    ``r = 0.26 n``. So "both", the released code's form, is the default here; "short"
    (the paper's) is for small ranks, or for leaves selected by name, which are
    projected whatever it costs.

    The history is not cleared, and not rotated, when the basis is new: for s steps its
    columns mix coordinates of the old and the new basis. Leaves that are not projected
    get plain Adam. Accumulate gradients outside (``optax.MultiSteps`` around the whole
    optimizer): the history takes every gradient it sees.

    Args:
      learning_rate: a number or an Optax schedule.
      rank: basis vectors r, as in ``lro.galore``.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      conventions: "optax", or "authors" for the released code's Adam, order of decay,
        SVD and signs.
      history: number s of projections kept (released code: 20).
      damping: lambda > 0 (released code: 1e-3).
      side: "both" (released code), or another of ``lro.project``'s: "short" for the
        paper's.
      update_proj_gap: steps from one basis to the next (200, as GaLore).
      scale: factor on the lifted direction (0.25, as GaLore).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root; None is 1e-8, or the released code's 1e-6 with
        ``conventions="authors"``.
      projector: as in ``lro.galore``.
      transport: what a new basis does to Adam's moments; None aligns signs.
      history_dtype: storage dtype of the history; None is float32.
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      basis_dtype: storage dtype of the basis; None is float32.
      **options: the arguments above that the signature lists after ``conventions``,
        and those of ``lro.project`` (``select``, ``full``, ``layer_axis``, ...).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank``, ``history`` or ``update_proj_gap`` is not a Python
        number, or an argument is unknown.
      ValueError: if one is out of range or a choice is unknown; at init, if a leaf
        selected explicitly cannot be projected.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.natural_galore(1e-2, rank=4)
      >>> lro.state_bytes(tx, params).total < 2 * 4 * 64 * 32  # Adam's moments
      True
      >>> one_sided = lro.natural_galore(1e-2, rank=4, side="short", select="kernel")
      >>> updates, state = one_sided.update(params, one_sided.init(params), params)
      >>> state.inner_state[0].history["kernel"].shape
      (20, 4, 64)

    References:
      Das, Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and
      Fine-tuning (2024), https://arxiv.org/abs/2410.16029

    Differences from the authors' code:
      * It projects by a Tucker decomposition of the matrix; here both bases are
        leading singular bases, and from block power steps unless
        ``conventions="authors"``.
      * The solve is ``H (damping I + H^T H)^{-1} e`` for the current column, equal to
        Woodbury's form and without its cancellation.
      * Everything listed under ``lro.galore``.
    """
    tx = _bracket(learning_rate, rank, conventions=conventions, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)
