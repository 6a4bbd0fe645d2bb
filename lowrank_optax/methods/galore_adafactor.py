"""GaLore with Adafactor inside: factored second moments in the subspace."""

from typing import Any, Unpack

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import ProjectOptions, takes_project_options
from lowrank_optax.methods.galore import open_bracket
from lowrank_optax.projectors import Projector
from lowrank_optax.transforms import (
    clip_by_matrix_rms,
    scale_by_matrix_factored_rms,
    scale_by_parameter_rms,
)
from lowrank_optax.transport import Transport


@takes_project_options
def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule | None = None,
    rank: Any = 128,
    *,
    update_proj_gap: int = 200,
    scale: float | Array = 0.25,
    decay_rate: float | Array = 0.8,
    eps: float | Array = 1e-30,
    clipping_threshold: float | Array = 1.0,
    momentum: float | Array | None = 0.9,
    multiply_by_parameter_scale: bool = False,
    min_parameter_scale: float | Array = 1e-3,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    basis_dtype: Any = None,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore on Adafactor: moments of ``r + n`` numbers per matrix, and the basis.

    With ``R = P^T G`` (see ``lro.galore``), ``S = R^2 + eps`` and
    ``b = 1 - t^(-decay_rate)``::

        row = b row + (1 - b) mean_n(S)     col = b col + (1 - b) mean_r(S)
        U  = R / sqrt(row / mean(row)) / sqrt(col)
        U  = lr * U / max(1, rms(U) / clipping_threshold)
        mu = momentum mu + (1 - momentum) U;   U = mu          (if momentum)
        W <- W - lr weight_decay W - scale * P U

    Every matrix of a stack has its own factors and its own clipping.

    Args:
      learning_rate: a number or a schedule; None is Adafactor's relative step,
        ``min(0.01, 1 / sqrt(t))``.
      rank: see ``lro.galore``.
      update_proj_gap: steps from one basis to the next.
      scale: factor on the lifted direction, outside the clipping.
      decay_rate: exponent of the second moment's decay (Adafactor: 0.8).
      eps: added to the squared gradient (Adafactor: 1e-30).
      clipping_threshold: largest rms of the low-rank update (Adafactor: 1).
      momentum: decay of the first moment of the scaled updates; None has none.
        Adafactor without momentum keeps less than a basis takes, so the default
        selection then leaves every leaf full: say ``select`` to project anyway.
      multiply_by_parameter_scale: multiply by ``max(min_parameter_scale, rms(W))``
        of the full parameter (the update then needs ``params``).
      min_parameter_scale: smallest such factor.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      projector: see ``lro.galore``, like all arguments below.
      transport: what a new basis does to the momentum.
      basis_dtype: storage dtype of the basis.
      conventions: "optax", or "authors" for the SVD and its signs.
      **options: as in ``lro.project``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.galore``.
      ValueError: as ``lro.galore``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.galore_adafactor(1e-2, rank=4)
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state.inner_state[0].col["kernel"].shape
      (64,)

    References:
      Shazeer and Stern, Adafactor (2018), https://arxiv.org/abs/1804.04235
      Zhao et al., GaLore (2024), https://arxiv.org/abs/2403.03507

    Differences from the authors' code:
      * The default basis comes from block power steps and keeps its signs;
        ``conventions="authors"`` restores the SVD.
      * The factors are per matrix of a stack.
    """
    authors = _recipe.is_authors(conventions)
    bracket = open_bracket(
        rank, update_proj_gap, projector, transport, basis_dtype, authors, options
    )
    rate: Any = _relative_step if learning_rate is None else learning_rate
    inner = [
        scale_by_matrix_factored_rms(decay_rate, eps),
        clip_by_matrix_rms(clipping_threshold),
    ]
    if multiply_by_parameter_scale:
        inner.append(scale_by_parameter_rms(min_parameter_scale))
    inner.append(optax.scale_by_learning_rate(rate))
    if momentum is not None:
        inner.append(optax.ema(momentum, debias=False))
    tx = chain(bracket, *inner, backproject(scale))
    return _recipe.decay(tx, rate, weight_decay, mask)


def _relative_step(count: Array) -> Array:
    return jnp.minimum(1e-2, 1.0 / jnp.sqrt(count.astype(jnp.float32) + 1.0))
