"""Online Subspace Descent: the basis has an optimizer of its own."""

from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.chain import backproject, chain, project
from lowrank_optax.methods import _recipe
from lowrank_optax.methods._options import (
    ProjectOptions,
    takes,
    takes_project_options,
)
from lowrank_optax.projectors import Projector, online_pca
from lowrank_optax.projectors.online_pca import NEVER
from lowrank_optax.transport import Transport, keep_moments

# What the paper recommends for the basis: this many times the weights' learning rate.
_RATIO = 5.0
_PENALTY = 1.0


@takes_project_options
def _bracket(
    learning_rate: optax.ScalarOrSchedule | None,
    rank: Any,
    *,
    basis_optimizer: Any = None,
    basis_learning_rate: optax.ScalarOrSchedule | None = None,
    ortho_penalty: float | Array | None = None,
    basis_preset: str = "released",
    normalize: bool = True,
    reorthonormalize_every: Any = None,
    cold_start: str | None = None,
    scale: float | Array = 0.25,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array | None = None,
    base_optimizer: optax.GradientTransformation | None = None,
    after_lift: Any = None,
    projector: Projector | None = None,
    transport: Transport | None = None,
    mu_dtype: Any = None,
    nu_dtype: Any = None,
    basis_dtype: Any = jnp.float32,
    conventions: str = "optax",
    **options: Unpack[ProjectOptions],
) -> optax.GradientTransformationExtraArgs:
    authors = _recipe.is_authors(conventions)
    _checks.choice("basis_preset", basis_preset, ("released", "paper"))
    if basis_preset == "paper":
        ortho_penalty = _PENALTY if ortho_penalty is None else ortho_penalty
        if basis_learning_rate is None and basis_optimizer is None:
            basis_learning_rate = _multiple(learning_rate)
    if projector is None:
        projector = online_pca(
            rank,
            NEVER if reorthonormalize_every is None else reorthonormalize_every,
            basis_dtype,
            basis_optimizer=basis_optimizer,
            basis_learning_rate=basis_learning_rate,
            ortho_penalty=0.0 if ortho_penalty is None else ortho_penalty,
            normalize=normalize,
            cold_start=cold_start or ("svd" if authors else "power"),
        )
    if transport is None and authors:
        transport = keep_moments()
    inner = _recipe.adam(base_optimizer, b1, b2, eps, mu_dtype, nu_dtype, authors)
    bracket = project(projector, transport=transport, **options)
    # Nothing limits the direction, so its bias is corrected inside, where it is small.
    inner = _recipe.correct_bias(inner, base_optimizer, b1, b2, authors)
    if after_lift is None:
        return chain(bracket, inner, backproject(scale, learning_rate))
    _checks.transformation("after_lift", after_lift, "scale_by_sign()")
    tx = optax.chain(chain(bracket, inner, backproject(scale)), after_lift)
    if learning_rate is None:
        return optax.with_extra_args_support(tx)
    return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))


def _multiple(
    learning_rate: optax.ScalarOrSchedule | None,
) -> float | Array | Callable[[Any], Any]:
    if learning_rate is None:
        raise ValueError(
            'basis_preset="paper" sets the basis\' learning rate to 5 times that of '
            "the weights, which scale_by_online_subspace_descent does not know. Give "
            "basis_learning_rate."
        )
    if callable(learning_rate):
        schedule = learning_rate
        return lambda count: _RATIO * schedule(count)
    return _RATIO * learning_rate


@takes(_bracket)
def scale_by_online_subspace_descent(
    rank: Any = 128, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The direction of Online Subspace Descent, without learning rate and decay.

    Args:
      rank: see ``lro.online_subspace_descent``, like all others.
      **options: as in ``lro.online_subspace_descent``.

    Returns:
      The transformation.

    Raises:
      TypeError: as ``lro.online_subspace_descent``.
      ValueError: likewise, and for ``basis_preset="paper"`` without a
        ``basis_learning_rate``, which it would take from the learning rate.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> tx = lro.scale_by_online_subspace_descent(4, basis_optimizer=optax.sgd(0.1))
      >>> tx = optax.chain(tx, optax.scale(-1e-2))
      >>> state = tx.init({"kernel": jnp.ones((64, 32))})
      >>> state[0].basis["kernel"].vectors.shape
      (32, 4)
    """
    return _bracket(None, rank, **options)


@takes(_bracket)
def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    weight_decay: float | Array | None = None,
    mask: Any = None,
    conventions: str = "optax",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Online Subspace Descent: weights by one optimizer, the basis by another.

    For every projected matrix ``G [m, n]`` with basis ``P [m, r]``; each step is::

        R = P^T G;   N, state = Adam(R)                              [r, n]
        W <- W - lr (scale P N + weight_decay W)
        L(P) = |P P^T Gh - Gh|^2 + ortho_penalty |P^T P - I|^2,   Gh = G / |G|
        P <- P + basis_learning_rate * basis_optimizer(dL/dP)        after use

    No SVD and no other factorization after the first basis: see ``lro.online_pca`` for
    the derivative, one product with G. Moments stay where they are while the basis
    drifts below them.

    The state is ``2 r n`` elements of moments and ``m r`` of basis, and what
    ``basis_optimizer`` keeps for ``m r`` parameters: 2 m r more for AdamW, m r for
    Lion, none for SGD. ``lro.state_bytes`` lists both under "basis".

    Args:
      learning_rate: a number or an Optax schedule (0.01 in the released recipes from
        60M to 1B, 0.005 at 7B).
      rank: basis vectors r, as in ``lro.galore`` (released recipes: 128 at 60M, 256 at
        130M and 350M, 1024 at 1B and 7B).
      weight_decay: decoupled decay per unit of learning rate; None has no such stage.
      mask: leaves to decay, as in ``optax.masked``.
      conventions: "optax", or "authors" for the released code's first basis (an SVD),
        its Adam and its decay.
      basis_optimizer: any Optax optimizer for the basis, which gets it as ``params``;
        None is AdamW with weight decay 0.01, as released.
      basis_learning_rate: multiplies what ``basis_optimizer`` returns: a number or a
        schedule of the same steps. None is the preset's for the default optimizer and
        1 for one given.
      ortho_penalty: weight of ``|P^T P - I|^2``; None is the preset's.
      basis_preset: "released": 0.005, the code's 1 / 200 (which it multiplies by the
        weights' schedule divided by its peak: give that as ``basis_learning_rate``),
        without penalty. "paper": 5 times ``learning_rate``, schedule included, with
        ``ortho_penalty=1``; the ratio is the paper's, the weight of the penalty ours.
      normalize: divide the gradient by its norm before the loss.
      reorthonormalize_every: steps between re-orthonormalizations of P; None has none.
      cold_start: the first basis: "power" (None in "optax" mode), "svd" (None in
        "authors" mode) or "random".
      scale: factor on ``P N`` (released: 0.25).
      b1: decay of the first moment (0.9).
      b2: decay of the second moment (0.999).
      eps: added to the root; None is 1e-8, or the released 1e-6 with
        ``conventions="authors"``.
      base_optimizer: the weights' optimizer in place of Adam, without learning rate:
        ``optax.chain(lro.scale_by_matrix_factored_rms(), lro.clip_by_matrix_rms())``
        for Adafactor, ``lro.scale_by_lion_interpolation()`` for Lion, ...
      after_lift: what is done to the lifted direction, ``optax.scale_by_sign()`` for
        Lion, whose sign belongs to the whole matrix.
      projector: in place of the whole of the above that concerns the basis.
      transport: what a re-orthonormalization does to the moments; None aligns signs.
      mu_dtype: storage dtype of the first moment; None is float32.
      nu_dtype: storage dtype of the second moment; None is float32.
      basis_dtype: storage dtype of the basis; its optimizer's state is float32. A
        bf16 basis loses steps below 1/256 of its entries: keep float32 at small rates.
      **options: the arguments above that the signature lists after ``conventions``,
        and those of ``lro.project`` (``side``, ``select``, ``layer_axis``, ...).

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank`` or ``reorthonormalize_every`` is not a Python number,
        ``basis_optimizer`` no transformation, or an argument is unknown.
      ValueError: if one is out of range or a choice is unknown; at init, with
        ``side="both"``, or if a leaf selected explicitly cannot be projected.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32))}
      >>> tx = lro.online_subspace_descent(1e-2, rank=4)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> lion = lro.online_subspace_descent(
      ...     1e-3,
      ...     rank=4,
      ...     base_optimizer=lro.scale_by_lion_interpolation(),
      ...     after_lift=optax.scale_by_sign(),
      ...     basis_optimizer=optax.lion(5e-3),
      ... )

    References:
      Liang et al., Memory-Efficient LLM Training with Online Subspace Descent (2024),
      https://arxiv.org/abs/2408.12857

    Differences from the authors' code:
      * The first basis comes from a randomized range finder; ``conventions="authors"``
        takes the SVD, the released Adam (``eps`` on the uncorrected root) and its
        decay of the moved weights.
      * The penalty of the paper is absent from the code; here it is an argument.
      * The basis' learning rate is an argument; there it is 1 / ``update_proj_gap``,
        an option that has no other effect.
      * A zero or non-finite gradient moves neither the basis nor its optimizer.
      * A square matrix is projected on its input axis (see ``lro.galore``).
    """
    tx = _bracket(learning_rate, rank, conventions=conventions, **options)
    return _recipe.decay(tx, learning_rate, weight_decay, mask, conventions)
