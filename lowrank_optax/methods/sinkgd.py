"""``sinkgd``: gradients whose rows and columns all have one size, without state."""

from typing import Unpack

import optax

from lowrank_optax.bracket.chain import backproject, chain
from lowrank_optax.leaves.part import made
from lowrank_optax.methods import _shared as has
from lowrank_optax.methods._method import direction, method
from lowrank_optax.methods._shared import Recipe, Transformation
from lowrank_optax.transforms import normalize_rows_and_columns


class _Options(has.Scale, has.Decay, has.Matrices, has.Moments): ...


@method(
    "SinkGD",
    "2502.06742",
    "Gradient Multi-Normalization for Stateless and Scalable LLM Training (2025)",
    defaults={"scale": 0.05, "eps": 1e-8},
    ignored=("b1, b2, eps beside full",),
)
def sinkgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    iterations: int = 5,
    **options: Unpack[_Options],
) -> Transformation:
    """SinkGD: SGD on gradients whose rows and columns have one size, without state.

    For every matrix ``W [m, n]`` with gradient ``G``, ``iterations`` times::

        X <- X / rms(X along the inputs)       one number per output, X = G at first
        X <- X / rms(X along the outputs)      one number per input
        W <- W - lr (scale X + weight_decay W)

    A matrix has no state at all. Leaves that are not chosen, which are vectors,
    embeddings and heads, get Adam, unscaled; ``select="."`` takes every matrix.
    Nothing depends on the size of a gradient, so clipping does nothing, and gradients
    are accumulated before the step.

    Args:
      iterations: of the normalization, see ``lro.normalize_rows_and_columns``.
      scale: factor on the matrices' direction, whose root mean square is 1.
      b1: of Adam on the leaves that are not chosen.
      b2: of the same.
      eps: of the same.

    Examples:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}
      >>> sizes = lro.state_bytes(lro.sinkgd(2e-2), params).by_role
      >>> sizes["mu"], sizes["nu"]  # the bias'
      (128, 128)

    Differences from the authors' code:
      * There is none to compare with; the rule is the paper's. Rows and columns of
        zeros stay zeros, where the rule divides by zero.
      * Learning rate 0.02 and scale 0.05 are known at second hand.
    """
    its = Recipe(**options)
    tx = chain(
        its.matrices(),
        made(normalize_rows_and_columns, iterations),
        backproject(its.scale, learning_rate),
    )
    return its.decayed(tx, learning_rate)


scale_by_sinkgd = direction(sinkgd)
