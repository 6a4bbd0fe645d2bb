"""COAP: the basis follows the correlation of momentum and gradient."""

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
from lowrank_optax.projectors import Projector, correlation
from lowrank_optax.transport import Transport, keep_moments


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    update_proj_gap: int = 32,
    reproject_factor: int = 5,
    basis_learning_rate: float | Array = 0.1,
    normalize: bool | None = None,
    scale: float | Array = 1.0,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array | None = None,
    base_optimizer: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    basis_dtype: Any = jnp.float32,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    authors = _recipe.is_authors(conventions)
    if projector is None:
        projector = correlation(
            rank,
            update_proj_gap,
            basis_dtype,
            reproject_factor=reproject_factor,
            learning_rate=basis_learning_rate,
            normalize=not authors if normalize is None else normalize,
            cold_start="svd" if authors else "power",
        )
    if transport is None and authors:
        transport = keep_moments()
    inner = _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors)
    return chain(
        project(projector, transport=transport, **options),
        _recipe.correct_bias(inner, base_optimizer, b1, b2, authors),
        backproject(scale, learning_rate),
    )


@takes(_bracket)
def scale_by_coap(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of COAP, without learning rate and weight decay.

    Args:
      rank: see ``lro.coap``, like all others.
      **options: as in ``lro.coap``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.coap``.
      ValueError: as ``lro.coap``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_coap(rank=4), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def coap(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""COAP: correlation-aware steps of the basis between cheap decompositions.

    GaLore's step on a basis that is refreshed as ``lro.correlation`` says: every
    ``update_proj_gap`` steps it takes one gradient step on reconstruction error times
    (1 - cosine of momentum and gradient), every ``reproject_factor``-th time one
    warm-started power sweep::

        P <- refresh(P, G, mu) when due;   R = P^T G;   N, state = Adam(R)
        W <- W - lr (scale P N + weight_decay W)

    The state is GaLore's: ``m r + 2 r n`` elements per matrix.

    Convolutions are Tucker-2, with one basis for the input channels and one for the
    output channels at all positions of the kernel: ``side="both"`` and dimension
    numbers with a ``shared_axis``, as in the example. The state of a kernel ``[h, w, i,
    o]`` is then ``(i + o) r + 2 h w r^2`` elements.

    Args:
      learning_rate: a number or an Optax schedule (0.01 for LLaMA-1B, 0.005 at 7B in
        the released recipes).
      rank: basis vectors r, as in ``lro.galore`` (released: 512 at 1B, 1024 at 7B).
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      conventions: "optax", or "authors" to reproduce the released code.
      update_proj_gap: steps from one refresh to the next (32; released 40 for
        LLaMA-1B, 100 at 7B).
      reproject_factor: refreshes from one decomposition to the next (5).
      basis_learning_rate: of the step on the basis (0.1).
      normalize: divide the gradient by its rms in that step; None is True, and False
        with ``conventions="authors"``, where the step does next to nothing.
      scale: factor on ``P N`` (1; released 0.25 for LLaMA).
      b1: decay of the first moment (0.9).
      b2: decay of the second moment (0.999).
      eps: added to the root; None is 1e-8, or the released 1e-6 with
        ``conventions="authors"``.
      base_optimizer: the inner transformation in place of Adam. The projector reads
        its ``mu``, ``trace`` or ``ema`` as a direction of the gradient: a momentum of
        updates that were negated already would point the other way.
      projector: in place of ``lro.correlation``; it then brings its own rank and gap.
      transport: what a new basis does to the moments; None aligns signs. The released
        option ``restore_state`` is ``lro.rotate_moments(form="root")``;
        ``lro.rotate_moments()`` rotates variances as variances.
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      basis_dtype: storage dtype of the basis.
      **options: the arguments above that the signature lists after ``conventions``,
        and those of ``lro.project`` (``side``, ``select``, ``layer_axis``, ...).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank``, ``update_proj_gap`` or ``reproject_factor`` is not a
        Python number, or an argument is unknown.
      ValueError: if one is out of range or a choice is unknown; at init, if a leaf
        selected explicitly cannot be projected.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.coap(learning_rate=1e-2, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> numbers = lro.MatrixDimensionNumbers(2, 3, shared_axis=(0, 1))
      >>> conv = lro.coap(1e-2, 4, side="both", weight_dimension_numbers=numbers)
      >>> conv.init(jnp.ones((3, 3, 16, 32))).inner_state.mu.shape
      (4, 36)

    References:
      Xiao et al., COAP: Memory-Efficient Training with Correlation-Aware Gradient
      Projection (2024), https://arxiv.org/abs/2412.00071

    Differences from the authors' code:
      * See ``lro.correlation`` for the refresh. New singular vectors keep the old
        ones' signs; there they come as the backend has them, and the momentum with
        them.
      * ``eps`` stands on the bias-corrected root, and decay uses the weights before
        the step. ``conventions="authors"`` restores both.
      * A convolution has the same rank on both sides.
      * A square matrix is projected on its input axis (see ``lro.galore``).
    """
    tx = _bracket(learning_rate, rank, conventions=conventions, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)
