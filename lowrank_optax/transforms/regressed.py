"""``scale_by_regressed_adam``: moments kept as products of thin factors (LoRA-Pre)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax.leaves.boxes import is_box, rebox, unbox
from lowrank_optax.leaves.moments import weight_seen
from lowrank_optax.leaves.stand_in import hidden
from lowrank_optax.linalg.products import HIGHEST, wide, wider
from lowrank_optax.transforms._matrices import (
    check_made,
    drawn_for,
    map_matrices,
    rank_rule,
    require_matrices,
)

# Of a Gram matrix' mean eigenvalue: float32 knows products to 1e-7 of it.
_RIDGE = 1e-5

# Each of two Newton's steps at once assumes that the other factor stays. After small
# gradients a large one asks of A as many times what it is as the gradient has grown; by
# more than this A does not change. The start at zero needs 1.
_LARGEST = 2.0

_TINY = 2.0**-120  # whose inverse is a float32


class ScaleByRegressedAdamState(NamedTuple):
    """State of ``scale_by_regressed_adam``; float32 factors of every matrix.

    Attributes:
      count: steps taken.
      mu_left: of the first moment, ``[..., m, r]``.
      mu_right: ``[..., r, n]``.
      root_left: of the second moment's root, ``[..., m, r]``.
      root_right: ``[..., r, n]``.
    """

    count: Array
    mu_left: Any
    mu_right: Any
    root_left: Any
    root_right: Any


def scale_by_regressed_adam(
    rank: int | float = 16,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    *,
    entry_limit: float | Array | None = 10.0,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Adam whose moments are products of two thin factors, learned by regression.

    An exponential mean is a step of gradient descent on ``|M - G|^2``; here the step is
    one of Newton's on the factors of ``M = B A``, both from the old ones. With
    ``c = sqrt(b1)``, ``B [m, r]`` and ``A [r, n]``::

        B' = c B + (1 - c) G A^T (A A^T)^-1
        A' = c A + (1 - c) (B^T B)^-1 B^T G
        mu = b1 (1 - b1^(t-1)) B' A' / (1 - b1^t) + (1 - b1) G

    and likewise factors ``D, C`` of the root of the second moment, of ``|G|`` with
    ``c = b2^(1/4)``, entry by entry::

        nu = b2 (1 - b2^(t-1)) (D' C' / (1 - b2^(t/2)))^2 + (1 - b2) G^2
        N  = mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps)

    A product of factors that start at zero is short by ``1 - c^(2 t)``, hence the
    divisors; a steady gradient that the factors can hold has ``N = 1`` at every step.

    No basis is found and nothing is refreshed; state ``2 r (m + n)`` numbers. Moments
    are formed, m x n, for the step that they serve.

    Factors of small gradients would overshoot a large one by as much as it has grown:
    in a step A grows by no more than twice its largest entry. Its size is kept at 1,
    and goes with B.

    **Where the product D C crosses zero nothing is left of nu** but this step's share,
    and N is as large as the first moment makes it: entries are clipped at
    ``entry_limit``.

    The last two axes of a leaf are a matrix, leading axes are batch.

    Args:
      rank: r, an int or a fraction of min(m, n).
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the corrected root.
      entry_limit: largest entry of N; None for the paper's form. May be traced.
      seed: of the random A and C that it starts with, C without negative numbers, as it
        is to hold magnitudes; B and D are zero.

    Returns:
      The transformation.

    Raises:
      TypeError: if ``rank`` is not a Python number.
      ValueError: if it is out of range, or at init if a leaf has fewer than two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> state = lro.scale_by_regressed_adam(4).init({"w": jnp.zeros((3, 16, 8))})
      >>> state.mu_left["w"].shape, state.mu_right["w"].shape
      ((3, 16, 4), (3, 4, 8))

    References:
      Taming Momentum: Rethinking Optimizer States Through Low-Rank Approximation
      (2026), https://arxiv.org/abs/2602.24283
    """
    rank_of = rank_rule("lro.scale_by_regressed_adam", rank)

    def init(params: Any) -> ScaleByRegressedAdamState:
        require_matrices("lro.scale_by_regressed_adam", params)

        def batch_of(p: Any) -> tuple[tuple[int, ...], ...]:
            return tuple((i,) for i in range(p.ndim - 2))

        def left(leaf: Any) -> Any:
            p = unbox(leaf)
            # As a sum has it: sharded like the parameter, and each device's own if
            # that is.
            rows = jnp.zeros_like(jnp.sum(p, -1), wider(jnp.float32, p.dtype))
            zeros = jnp.broadcast_to(rows[..., None], (*p.shape[:-1], rank_of(p)))
            return rebox(leaf, zeros, (*batch_of(p), (p.ndim - 2,), ()))

        def right(salt: str, path: Any, leaf: Any) -> Any:
            p = unbox(leaf)
            columns = jnp.zeros_like(jnp.sum(p, -2), wider(jnp.float32, p.dtype))
            shape = (*p.shape[:-2], rank_of(p), p.shape[-1])
            drawn = drawn_for(salt, seed, path, shape, columns.dtype)
            if salt == "second":
                drawn = jnp.abs(drawn)
            # Rows of about unit norm.
            drawn = drawn / p.shape[-1] ** 0.5 + columns[..., None, :]
            return rebox(leaf, drawn, (*batch_of(p), (), (p.ndim - 1,)))

        def over(make: Any) -> Any:
            tree = jax.tree_util.tree_map_with_path(make, params, is_leaf=is_box)
            return hidden(params, tree)

        zeros = [over(lambda path, leaf: left(leaf)) for _ in range(2)]
        drawn = [
            over(lambda path, leaf, salt=salt: right(salt, path, leaf))
            for salt in ("first", "second")
        ]
        count = jnp.zeros([], jnp.int32)
        return ScaleByRegressedAdamState(count, zeros[0], drawn[0], zeros[1], drawn[1])

    def update(updates, state, params=None):
        del params
        check_made("rank", rank_of, lambda _, b: b.shape[-1], updates, state.mu_left)
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = count.astype(jnp.float32)
        seen1, seen2 = weight_seen(b1, steps), weight_seen(b2, steps)
        # What the factors have of a moment, and what it has of steps before this one.
        held1, held2 = seen1, weight_seen(b2, steps / 2)
        past1, past2 = (b * weight_seen(b, steps - 1) for b in (b1, b2))

        def one(update: Array, b, a, d, c, axis: int) -> tuple[Array, ...]:
            del axis
            g = wide(update)
            b, a = _regressed(g, b, a, b1**0.5)
            d, c = _regressed(jnp.abs(g), d, c, b2**0.25)
            mu = past1 * _product(b, a) / held1 + (1 - b1) * g
            nu = past2 * jnp.square(_product(d, c) / held2) + (1 - b2) * g * g
            out = mu / seen1 / (jnp.sqrt(nu / seen2) + eps)
            if entry_limit is not None:
                out = jnp.clip(out, -entry_limit, entry_limit)
            return out.astype(update.dtype), b, a, d, c

        out, *kept = map_matrices(one, updates, *state[1:], subspace=None, axis=-2)
        return out, ScaleByRegressedAdamState(count, *kept)

    return optax.GradientTransformation(init, update)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=HIGHEST)


def _regressed(g: Array, left: Array, right: Array, keep: Any) -> tuple[Array, Array]:
    """Returns both factors after a step towards ``g``, the right one of size 1."""
    if not g.size:
        return left, right
    # In units of each factor, so that squares of small gradients do not vanish.
    size = _peak(left)
    unit = left / jnp.where(size > 0, size, 1)
    turned, other = jnp.swapaxes(unit, -1, -2), jnp.swapaxes(right, -1, -2)
    of_left = _solved(_product(right, other), _product(right, jnp.swapaxes(g, -1, -2)))
    step = (1 - keep) * _solved(_product(turned, unit), _product(turned, g))
    most = _LARGEST * _peak(right) / jnp.maximum(_peak(step), _TINY)
    step = step * jnp.minimum(1 / jnp.maximum(size, _TINY), most)
    left = keep * left + (1 - keep) * jnp.swapaxes(of_left, -1, -2)
    right = keep * right + jnp.where(size > 0, step, 0)
    # The product does not know how its size is divided.
    scale = jnp.maximum(_peak(right), _TINY)
    return left * scale, right / scale


def _peak(x: Array) -> Array:
    return jnp.max(jnp.abs(x), (-2, -1), keepdims=True)


def _solved(gram: Array, x: Array) -> Array:
    """Returns ``(S + ridge)^-1 X``, 0 where S and X are."""
    r = gram.shape[-1]
    mean = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / r
    ridge = jnp.where(mean > 0, _RIDGE * mean, 1.0)
    factor = jnp.linalg.cholesky(gram + ridge * jnp.eye(r, dtype=gram.dtype))
    half = jax.lax.linalg.triangular_solve(factor, x, left_side=True, lower=True)
    return jax.lax.linalg.triangular_solve(
        factor, half, left_side=True, lower=True, transpose_a=True
    )
