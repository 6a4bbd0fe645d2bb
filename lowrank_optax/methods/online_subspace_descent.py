"""``online_subspace_descent``: the basis has an optimizer of its own."""

from typing import Any, Unpack

import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.bracket.chain import backproject, behind, chain
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.projectors import online_pca
from lowrank_optax.projectors.online_pca import NEVER

# What the paper recommends for the basis: this many times the weights' learning rate.
RATIO = 5.0
PENALTY = 1.0


class _Options(
    has.Base, has.Adam, has.Given, has.Transported, has.Stored, has.Conventions
): ...


@method(
    "Online Subspace Descent",
    "2408.12857",
    "Liang et al. (2024)",
    ignored=(
        "basis_optimizer, basis_learning_rate, ortho_penalty, basis_preset, normalize, "
        "reorthonormalize_every, cold_start beside projector",
        "basis_preset beside ortho_penalty, basis_learning_rate",
        "basis_preset beside ortho_penalty, basis_optimizer",
        "match beside conventions",
        "match beside after_lift",
        # The basis drifts below the moments, and is replaced at no other time.
        "transport without reorthonormalize_every, projector",
    ),
)
def online_subspace_descent(
    learning_rate: optax.ScalarOrSchedule,
    rank: Any = 128,
    *,
    basis_optimizer: Any = None,
    basis_learning_rate: optax.ScalarOrSchedule | None = None,
    ortho_penalty: float | Array | None = None,
    basis_preset: str = "released",
    normalize: bool = True,
    reorthonormalize_every: Any = None,
    cold_start: str | None = None,
    after_lift: Any = None,
    **options: Unpack[_Options],
) -> Transformation:
    """Online Subspace Descent: weights by one optimizer, the basis by another.

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
      basis_optimizer: any Optax optimizer for the basis, which gets it as ``params``;
        None is AdamW with weight decay 0.01, as released.
      basis_learning_rate: multiplies what ``basis_optimizer`` returns: a number or a
        schedule. None is the preset's, and 1 beside a ``basis_optimizer``.
      ortho_penalty: weight of ``|P^T P - I|^2``; None is the preset's.
      basis_preset: "released": 0.005, the code's 1 / 200 (which it multiplies by the
        weights' schedule divided by its peak), without penalty. "paper": 5 times
        ``learning_rate``, schedule included, with ``ortho_penalty=1``, which is ours.
      normalize: divide the gradient by its norm before the loss.
      reorthonormalize_every: steps between re-orthonormalizations of P; None has none.
      cold_start: the first basis: "power" (None in "optax" mode), "svd" (None in
        "authors" mode) or "random".
      after_lift: what is done to the lifted direction, ``optax.scale_by_sign()`` for
        Lion, whose sign belongs to the whole matrix.
      projector: in place of the whole of the above that concerns the basis.
      transport: what a re-orthonormalization does to the moments; None aligns signs.
      basis_dtype: storage dtype of the basis and of its optimizer's moments, None for
        the parameter's; what is kept in bfloat16 is rounded at random.

    Raises:
      ValueError: at init, with ``side="both"``.

    Examples:
      >>> import jax.numpy as jnp, optax, lowrank_optax as lro
      >>> lion = lro.online_subspace_descent(
      ...     1e-3,
      ...     rank=4,
      ...     base_optimizer=lro.scale_by_lion_interpolation(),
      ...     after_lift=optax.scale_by_sign(),
      ...     basis_optimizer=optax.lion(5e-3),
      ... )

    Differences from the authors' code:
      * The first basis comes from a randomized range finder; ``conventions="authors"``
        takes the SVD, the released Adam (``eps`` on the uncorrected root) and its
        decay of the moved weights.
      * The penalty of the paper is absent from the code; here it is an argument.
      * The basis' learning rate is an argument; there it is 1 / ``update_proj_gap``,
        an option that has no other effect.
      * A zero or non-finite gradient moves neither the basis nor its optimizer.
    """
    its = Recipe(**options)
    _checks.choice("basis_preset", basis_preset, ("released", "paper"))
    if basis_preset == "paper":
        ortho_penalty = PENALTY if ortho_penalty is None else ortho_penalty
        if basis_learning_rate is None and basis_optimizer is None:
            basis_learning_rate = _multiple(learning_rate)
    # The basis moves at the end of a step, after its use. A refresh finds the first
    # one, and makes it orthonormal again where that is asked for.
    projector = its.bases(
        online_pca,
        rank,
        NEVER if reorthonormalize_every is None else reorthonormalize_every,
        basis_optimizer=basis_optimizer,
        basis_learning_rate=basis_learning_rate,
        ortho_penalty=0.0 if ortho_penalty is None else ortho_penalty,
        normalize=normalize,
        cold_start=cold_start or ("svd" if its.authors else "power"),
    )
    # A step behind the bracket comes before the learning rate.
    rate = learning_rate if after_lift is None else None
    tx = chain(its.open(projector), its.corrected_adam(), backproject(its.scale, rate))
    if after_lift is not None:
        _checks.transformation("after_lift", after_lift, "scale_by_sign()")
        tx = behind(tx, after_lift)
        if learning_rate is not None:
            tx = behind(tx, optax.scale_by_learning_rate(learning_rate))
    return its.decayed(optax.with_extra_args_support(tx), learning_rate)


def _multiple(learning_rate: optax.ScalarOrSchedule | None) -> Any:
    if learning_rate is None:
        raise ValueError(
            'basis_preset="paper" sets the basis\' learning rate to 5 times that of '
            "the weights, which scale_by_online_subspace_descent does not know. Give "
            "basis_learning_rate."
        )
    if callable(learning_rate):
        schedule = learning_rate
        return lambda count: RATIO * schedule(count)
    return RATIO * learning_rate


scale_by_online_subspace_descent = direction(online_subspace_descent)
