"""``normalize_rows_and_columns``: Sinkhorn's iteration on the norms of a gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.linalg.products import unit_peak, wide
from lowrank_optax.transforms._matrices import map_matrices, require_matrices


def normalize_rows_and_columns(
    iterations: int = 5, axis: int = -2
) -> optax.GradientTransformationExtraArgs:
    r"""Scales rows and columns of every matrix until all have a root mean square of 1.

    Of a matrix ``X = G``, ``iterations`` times, for every vector of one output and then
    for every vector of one input::

        X <- X / rms(X along the inputs)         one number per output
        X <- X / rms(X along the outputs)        one number per input

    Rows and columns of zeros stay zeros. The result is ``diag(r) G diag(s)``, and only
    r and s are iterated, so that an iteration reads the squares of G twice and writes
    nothing of their size. Nothing is kept, and the size of G does not matter: entries
    below 1e-19 of the matrix' largest count as zeros in the norms.

    The last two axes of a leaf are a matrix, leading axes are batch.

    Args:
      iterations: how often (SinkGD: 5).
      axis: the input axis outside a bracket: -2 for Flax kernels ``(in, out)``, -1 for
        torch's weights. Inside one, dimension numbers say it.

    Returns:
      A transformation without state.

    Raises:
      TypeError: if ``iterations`` is not a Python int.
      ValueError: if ``axis`` is neither, or at init or update if a leaf has fewer than
        two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.normalize_rows_and_columns()
      >>> g = {"w": jnp.array([[4.0, 0.0], [0.0, -1e-9]])}
      >>> jnp.square(tx.update(g, tx.init(g))[0]["w"]).round().tolist()
      [[2.0, 0.0], [0.0, 2.0]]

    References:
      Gradient Multi-Normalization for Stateless and Scalable LLM Training (2025),
      https://arxiv.org/abs/2502.06742
    """
    _checks.positive_int("iterations", iterations)
    _checks.choice("axis", axis, (-2, -1))
    require = functools.partial(require_matrices, "lro.normalize_rows_and_columns")

    def init(params: Any) -> optax.EmptyState:
        require(params)
        return optax.EmptyState()

    def update(updates, state, params=None, *, subspace=None, **extra_args):
        del params, extra_args
        require(updates)

        def one(update: Array, axis: int) -> tuple[Array]:
            return (_normalized(update, iterations, axis),)

        (out,) = map_matrices(one, updates, subspace=subspace, axis=axis)
        return out, state

    return optax.GradientTransformationExtraArgs(init, update)


def _normalized(update: Array, iterations: int, axis: int) -> Array:
    if not update.size:
        return update
    x, _ = unit_peak(wide(update))
    squares, other = x * x, -3 - axis

    # Squares of factors, along one axis from those along the other.
    def factors(axis: int, others: Array) -> Array:
        total = jnp.sum(squares * others, axis, keepdims=True)
        return jnp.where(total > 0, x.shape[axis] / jnp.where(total > 0, total, 1), 0)

    def step(_: Any, of_inputs: Array) -> Array:
        return factors(other, factors(axis, of_inputs))

    # The last step is apart, as both of its factors are wanted.
    start = jnp.ones_like(jnp.sum(squares, other, keepdims=True))
    of_inputs = jax.lax.fori_loop(0, iterations - 1, step, start)
    of_outputs = factors(axis, of_inputs)
    of_inputs = factors(other, of_outputs)
    return (x * jnp.sqrt(of_outputs) * jnp.sqrt(of_inputs)).astype(update.dtype)
