"""Polar factors in the place of matrices."""

import functools
from collections.abc import Sequence
from typing import Any

import optax
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.linalg.polar import polar_newton_schulz, polar_quintic, polar_svd
from lowrank_optax.linalg.products import wide
from lowrank_optax.transforms._matrices import map_matrices, require_matrices

METHODS = ("svd", "newton_schulz", "quintic")
SHAPE_FACTORS = ("none", "sqrt_long", "width")

Triple = tuple[float, float, float]

# Muon's (Jordan et al., 2024).
QUINTIC: Triple = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    method: str = "svd",
    steps: int | None = None,
    shape_factor: str = "none",
    *,
    coefficients: Triple | Sequence[Triple] = QUINTIC,
    rms: float | Array = 0.2,
    axis: int = -2,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces every matrix ``X = U S V^T`` by its polar factor ``U V^T``.

    The last two axes of a leaf are a matrix, leading axes are batch. "svd" leaves
    directions out whose singular value is below ``eps sqrt(max(rows, columns))`` of the
    largest, which is rounding noise: X = 0 gives 0, and a matrix of rank k gives one
    with k singular values 1.

    "newton_schulz" is for accelerators on which an SVD is slow: matrix products alone,
    ``Y <- (3 I - Y Y^T) Y / 2`` from ``Y = X / |X|``, in float32 at the highest
    precision. A step multiplies small singular values by 1.5, so those above
    ``5 * 1.5^-steps`` of the Frobenius norm end within 1e-3 of 1 (3e-5 of it at 30
    steps) and those below do not arrive. With many more steps rounding noise arrives
    too, where "svd" drops it. Where both have arrived they agree up to about
    1e-6 times the condition number, what float32 knows of the singular vectors.

    "quintic" is Muon's: a few steps ``Y <- a Y + b Y Y^T Y + c (Y Y^T)^2 Y`` whose
    coefficients raise small singular values fast and do not converge, which Muon does
    not need. With the default ones five steps bring values from 0.01 of the Frobenius
    norm up to between 0.68 and 1.14.

    In a bracket whose layers lie on several devices (``param_shardings`` and
    ``layer_axis`` of ``lro.project``) a stack is worked on layer by layer, so that one
    layer at a time is gathered.

    Args:
      method: "svd", "newton_schulz" or "quintic".
      steps: of the other two, None for 30 of "newton_schulz", and of "quintic" 5, or
        as many as there are coefficients.
      shape_factor: "none"; "sqrt_long" for a factor of ``rms sqrt(max(rows,
        columns))``, which gives a matrix of full rank elements with this root mean
        square; "width" for ``sqrt(max(1, outputs / inputs))``.
      coefficients: ``(a, b, c)`` of "quintic", or one such triple for every step.
      rms: of "sqrt_long" (0.2 is the usual way to match Adam's steps). May be traced.
      axis: the input axis outside a bracket, for "width": -2 for Flax kernels ``(in,
        out)``, -1 for torch's weights. Inside one, dimension numbers say it.

    Returns:
      A transformation without state.

    Raises:
      TypeError: if ``steps`` is not a Python int.
      ValueError: if a choice is unknown, if ``steps`` and coefficients are not equally
        many, or at init or update if a leaf has fewer than two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.orthogonalize()
      >>> g = {"w": jnp.array([[3.0, 0.0], [0.0, -1e-3]])}
      >>> updates, _ = tx.update(g, tx.init(g))
      >>> bool(jnp.allclose(updates["w"], jnp.diag(jnp.array([1.0, -1.0]))))
      True

    References:
      Higham, Functions of Matrices (2008), chapter 8.
    """
    _checks.choice("method", method, METHODS)
    _checks.choice("shape_factor", shape_factor, SHAPE_FACTORS)
    _checks.choice("axis", axis, (-2, -1))
    if steps is not None:
        _checks.positive_int("steps", steps)
    polar = _polar(method, steps, coefficients)
    require = functools.partial(require_matrices, "lro.orthogonalize")

    def one(x: Array, axis: int) -> tuple[Array]:
        if x.size == 0:
            return (x,)
        inputs, outputs = x.shape[axis], x.shape[-3 - axis]
        factor: Any = 1.0
        if shape_factor == "sqrt_long":
            factor = rms * max(inputs, outputs) ** 0.5
        elif shape_factor == "width":
            factor = max(1.0, outputs / inputs) ** 0.5
        return ((factor * polar(wide(x))).astype(x.dtype),)

    def init(params: Any) -> optax.EmptyState:
        require(params)
        return optax.EmptyState()

    def update(updates, state, params=None, *, subspace=None, **extra_args):
        del params, extra_args
        require(updates)
        (out,) = map_matrices(one, updates, subspace=subspace, axis=axis, in_turn=True)
        return out, state

    return optax.GradientTransformationExtraArgs(init, update)


def _polar(method: str, steps: int | None, coefficients: Any) -> Any:
    """Returns the function that makes polar factors."""
    if method == "svd":
        return polar_svd
    if method == "newton_schulz":
        return functools.partial(polar_newton_schulz, steps=steps or 30)
    table = tuple(coefficients)
    if not isinstance(table[0], Sequence):
        table = (table,) * (steps or 5)
    if any(len(row) != 3 for row in table) or len(table) != (steps or len(table)):
        raise ValueError(
            "`coefficients` must be three numbers, or as many triples as there are "
            f"steps; got {len(table)} for {steps} steps: {coefficients}."
        )
    return functools.partial(polar_quintic, coefficients=table)
