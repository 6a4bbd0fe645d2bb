"""GaLore+: one basis for all heads of an attention kernel."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import (
    ProjectOptions,
    takes,
    takes_project_options,
)
from lowrank_optax.methods.galore import open_bracket
from lowrank_optax.projectors import power
from lowrank_optax.transport import Transport


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    heads: Any = 1,
    head: str = "first",
    update_proj_gap: int = 200,
    scale: float | Array = 0.25,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    base_optimizer: optax.GradientTransformation | None = None,
    transport: Transport | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    basis_dtype: Any = None,
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    _checks.choice("head", head, ("first", "mean"))
    if not callable(heads):
        _checks.positive_int("heads", heads)
    blocks: Any = heads
    projector = power(rank, update_proj_gap, blocks=blocks, block=head)
    return chain(
        open_bracket(
            rank, update_proj_gap, projector, transport, basis_dtype, False, options
        ),
        _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, False),
        backproject(scale, learning_rate),
    )


@takes(_bracket)
def scale_by_galore_plus(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of GaLore+, without learning rate and weight decay.

    Args:
      rank: see ``lro.galore_plus``, like all others.
      **options: as in ``lro.galore_plus``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.galore_plus``.
      ValueError: as ``lro.galore_plus``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_galore_plus(4, heads=4), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 64))})
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def galore_plus(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore+: GaLore, with the basis found on one head and shared by all.

    The gradient of an attention kernel is ``G = [G_1, ..., G_h]``, one ``[m, n / h]``
    for every head. A refresh looks at one of them and all heads use what it finds::

        P <- orth(G_1 G_1^T P)                                       [m, r]
        R = P^T G;   N, state = Adam(R)                              [r, n]
        W <- W - lr (scale P N + weight_decay W)

    The refresh costs a share ``1 / h`` of GaLore's; step and state are GaLore's. A
    basis smaller than that, on the axis inside a head, comes with dimension numbers:
    ``MatrixDimensionNumbers(0, 2, shared_axis=1)`` for a kernel ``[embed, heads,
    head_dim]``.

    Args:
      learning_rate: a number or an Optax schedule.
      rank: basis vectors r, as in ``lro.galore``.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      heads: into how many equal parts the kept axis falls, or a callable of the
        leaf's path, 1 for leaves without heads: ``lambda path: 16 if "attn/q" in path
        else 1``. The heads must lie on the kept axis: give ``side="left"`` for kernels
        ``[embed, heads * head_dim]`` that are narrower than ``embed``.
      head: the basis is formed from the "first" part, or from the "mean" of all.
      update_proj_gap: steps from one basis to the next.
      scale: factor on ``P N``.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.
      base_optimizer: the inner transformation in place of Adam.
      transport: what a new basis does to the moments; None aligns signs.
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      basis_dtype: storage dtype of the basis; None is float32.
      **options: the arguments above that the signature lists after ``mask``, and
        those of ``lro.project`` (``side``, ``select``, ``layer_axis``, ...).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank``, ``update_proj_gap`` or ``heads`` is not a Python number,
        or an argument is unknown.
      ValueError: if one is out of range or ``head`` is unknown; at init, if a leaf
        selected explicitly cannot be projected.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> tx = lro.galore_plus(learning_rate=1e-2, rank=4, heads=8)
      >>> updates, state = tx.update(params, tx.init(params), params)

    References:
      GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection (2024),
      https://arxiv.org/abs/2412.19820

    Differences from the authors' code:
      * No code was found: written from the paper's description. Its sparse storage of
        what the projection leaves out of the moments is not here.
    """
    tx = _bracket(learning_rate, rank, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask)
