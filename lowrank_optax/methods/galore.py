"""GaLore: gradient low-rank projection."""

import dataclasses
from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain, project
from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import ProjectOptions, takes_project_options
from lowrank_optax.projectors import Projector, power, svd
from lowrank_optax.transport import Transport, keep_moments


@takes_project_options
def scale_by_galore(
    rank: Any = 128,
    *,
    update_proj_gap: int = 200,
    scale: float | Array = 0.25,
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
    """The direction of GaLore, without learning rate and weight decay.

    Args:
      rank: see ``lro.galore``, like every other argument.
      update_proj_gap: steps from one basis to the next.
      scale: factor on the lifted direction.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      base_optimizer: the inner transformation in place of Adam.
      projector: how bases are formed.
      transport: what a new basis does to the moments.
      mu_dtype: storage dtype of the first moment.
      nu_dtype: storage dtype of the second moment.
      basis_dtype: storage dtype of the basis.
      conventions: "optax" or "authors".
      **options: as in ``lro.project``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.galore``.
      ValueError: as ``lro.galore``.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = optax.chain(lro.scale_by_galore(rank=4), optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].inner_state.nu["kernel"].shape
      (4, 64)
    """
    authors = _recipe.is_authors(conventions)
    bracket = open_bracket(
        rank, update_proj_gap, projector, transport, basis_dtype, authors, options
    )
    inner = _inner(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors)
    return chain(bracket, inner, backproject(scale))


@takes_project_options
def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    update_proj_gap: int = 200,
    scale: float | Array = 0.25,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array | None = None,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    base_optimizer: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    basis_dtype: Any = None,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore: Adam on the gradient's leading singular subspace.

    For a matrix ``W [m, n]`` (m its shorter side) with gradient ``G``, every
    ``update_proj_gap`` steps ``P [m, r]`` becomes the leading left singular basis of
    ``G``; each step t = 1, 2, ... is::

        R  = P^T G                                     [r, n]
        mu = b1 mu + (1 - b1) R
        nu = b2 nu + (1 - b2) R^2
        N  = (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)
        W <- W - lr (scale * P N + weight_decay * W)

    Moments take ``2 r n`` elements in place of ``2 m n``, the basis ``m r``. Leaves
    that are not projected get Adam itself. The learning rate is applied to ``N``,
    where it costs r/m of what it would on the lifted update.

    Args:
      learning_rate: a number or an Optax schedule (0.01 in the paper's pretraining
        from 60M to 1B, 0.005 at 7B; full leaves get the same).
      rank: basis vectors r: an int, a fraction of min(m, n), or a callable of the
        leaf's path. The paper uses a quarter of the hidden size.
      update_proj_gap: steps from one basis to the next, from step 0 (paper: 200;
        500 at 7B).
      scale: factor on the lifted direction, not on full leaves (paper: 0.25).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root; None is 1e-8, or the released code's 1e-6 with
        ``conventions="authors"``.
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      base_optimizer: the inner transformation in place of Adam: any Optax direction
        that treats leading axes as batch (``optax.scale_by_lion()``, ...).
      projector: how bases are formed, in place of ``lro.power(rank,
        update_proj_gap)`` (``lro.svd`` in authors' mode); it then brings its own
        rank and gap.
      transport: what a new basis does to the moments; None aligns the basis' signs
        with the old basis (nothing in authors' mode).
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      basis_dtype: storage dtype of the basis; None is float32.
      conventions: "optax", or "authors" to reproduce the released code.
      **options: which leaves are projected and from which side: ``side``, ``select``,
        ``min_size``, ``weight_dimension_numbers``, ``layer_axis``, ``clip_rank``,
        ``param_shardings``, ``full``, ``dtype``, ``stagger`` and ``seed``, as in
        ``lro.project``.

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number.
      ValueError: if one is out of range, ``side`` or ``conventions`` is unknown, or
        (at init) a leaf selected explicitly cannot be projected.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
      >>> tx = lro.galore(learning_rate=1e-2, rank=4)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> optax.tree_utils.tree_get(state, "mu")["kernel"].shape
      (4, 64)

    References:
      Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
      Projection (2024), https://arxiv.org/abs/2403.03507

    Differences from the authors' code:
      * The default basis comes from block power steps, not from an SVD.
      * New basis vectors keep the old ones' signs; there, a sign that flips at a
        refresh turns that vector's momentum around.
      * ``eps`` stands on the bias-corrected root, and decay uses the weights before
        the step. ``conventions="authors"`` restores both, the SVD and its signs.
      * Moments and basis are float32 whatever the gradient's dtype.
      * A zero or non-finite gradient never reaches a basis; the refresh is made up
        for at the next step.
      * A square matrix is projected on its input axis (a torch weight's right side,
        a Flax kernel's left).
    """
    authors = _recipe.is_authors(conventions)
    bracket = open_bracket(
        rank, update_proj_gap, projector, transport, basis_dtype, authors, options
    )
    inner = _inner(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors)
    tx = chain(bracket, inner, backproject(scale, learning_rate))
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)


def open_bracket(
    rank, update_proj_gap, projector, transport, basis_dtype, authors: bool, options
) -> project:
    """Opens a bracket on the gradient's leading singular subspace."""
    if projector is None:
        projector = (svd if authors else power)(rank, update_proj_gap)
    if basis_dtype is not None:
        projector = dataclasses.replace(projector, basis_dtype=basis_dtype)
    if transport is None and authors:
        transport = keep_moments()
    return project(projector, transport=transport, **options)


def _inner(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors: bool):
    # Nothing limits the direction, so its bias is corrected inside, where it is small.
    inner = _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors)
    return _recipe.correct_bias(inner, base_optimizer, b1, b2, authors)
