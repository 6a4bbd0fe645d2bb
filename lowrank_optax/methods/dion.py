"""``dion``: momentum orthonormalized by a power step of rank r, error fed back."""

from typing import Unpack

import optax
from jaxtyping import Array

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.leaves.part import made
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.transforms import power_momentum


class _Options(has.Decay, has.Matrices, has.Moments): ...


@method(
    "Dion",
    "2504.05295",
    "Ahn et al., Dion: Distributed Orthonormalized Updates (2025)",
    defaults={"eps": 1e-8},
    ignored=("b1, b2, eps beside full",),
)
def dion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | float = 0.25,
    *,
    decay: float | Array = 0.95,
    seed: int = 0,
    **options: Unpack[_Options],
) -> Transformation:
    """Dion: momentum orthonormalized at rank r, for meshes; Adam for the rest.

    For every matrix ``W`` with gradient ``G``, seen as ``[k', k]`` with its longer side
    as rows (the outputs of a square one)::

        M <- M + G
        P  = orth(M Q)                                   one power step, [k', r]
        R  = M^T P                                       [k, r]
        M <- M - (1 - decay) P R^T                       the rest waits in M
        Q <- R / |column|
        W <- W - lr (sqrt(outputs / inputs) P Q^T + weight_decay W)

    **It saves communication and not state**: ``m n + k r`` numbers per matrix, more
    than ``lro.muon``'s. A mesh sends thin matrices, of r columns, and ``r x r`` ones,
    where Muon's polar factor gathers ``m n`` numbers. Leaves that
    are not chosen, which are vectors, embeddings and heads, get Adam.

    Args:
      rank: r, an int or a fraction of the shorter side, and no more than it.
      decay: of the directions that leave M, the paper's mu.
      seed: of the normal numbers that Q starts with.
      b1: of Adam on the leaves that are not chosen.
      b2: of the same.
      eps: of the same.
      full_scale: factor on the update of the leaves that are not chosen, their
        learning rate per unit of the matrices'.

    Examples:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((256, 128)), "bias": jnp.ones(128)}
      >>> sizes = lro.state_bytes(lro.dion(1e-2), params).by_role
      >>> sizes["mu"] == 4 * (256 + 1) * 128, sizes["other"] - 4 * 128 * 32 < 32
      (True, True)

    Differences from the authors' code:
      * Its fraction is 1 by default; a quarter, which its description has for 3B
        parameters, saves something.
      * Directions that M does not have are zeros in the update and keep their column of
        Q; there a QR factorization invents them, and noise of unit size comes out.
      * Column norms have no eps, so a gradient's size does not matter.
      * Its randomized Cholesky QR is one of shifted sweeps here, without random
        numbers.
      * There the replicas of data parallelism may add up ``M Q`` and ``M^T P`` in the
        place of their gradients, with an M each; here gradients are whole.
    """
    its = Recipe(**options)
    tx = chain(
        its.matrices(),
        made(power_momentum, rank, decay, seed=seed),
        backproject(learning_rate=learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_dion = direction(dion)
