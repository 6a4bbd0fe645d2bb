"""COAP's projector: a basis that learns what the momentum and the gradient share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg.bases import (
    block_power,
    cholesky_qr,
    leading_singular_vectors,
)
from lowrank_optax.linalg.products import (
    HIGHEST,
    Operand,
    back_by_blocks,
    by_blocks,
    inner,
    unit_peak,
    wide,
)
from lowrank_optax.projectors._protocol import At, Projector, TrackingProjector
from lowrank_optax.projectors._two_sided import TwoSided, TwoSidedBasis, other_key


@dataclasses.dataclass(frozen=True, eq=False)
class correlation(TrackingProjector):
    r"""Takes a gradient step on the basis, and now and then decomposes anew.

    At every ``update_proj_gap``-th step, with first moment ``M [r, n]`` and
    ``lift(N) = P N``::

        f(P) = mean((P P^T G - G)^2) (1 - mean_i cos(lift(M)_i, G_i))
        P <- P - learning_rate * df/dP * min(1, clip / |df/dP|)

    where i runs over the output units of the layer (and the positions of a convolution
    kernel) and the vectors ``G_i`` over its inputs. At every
    ``reproject_factor * update_proj_gap``-th step instead, one warm-started power
    sweep: ``P <- orth(G G^T P)``. P is orthonormal after a decomposition only.

    With ``side="both"`` P and Q move together, ``lift(N) = P N Q^T``; with a
    ``shared_axis`` that is COAP's Tucker-2 form for convolutions.

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one refresh to the next (COAP: 32).
      basis_dtype: storage dtype of the basis.
      reproject_factor: refreshes from one decomposition to the next (COAP: 5).
      learning_rate: of the step on the basis (COAP: 0.1).
      clip: largest norm of its gradient, of each of two bases (COAP: 1).
      normalize: divide the gradient by its rms first. f is quadratic in the gradient:
        without, the step does nothing at the scale of a language model's gradients.
        With it, the step is the same at every scale, and still small for a large
        matrix, since both factors of f are means: raise ``learning_rate`` there.
      cold_start: "power" for power sweeps, "svd" for the released decompositions: the
        singular vectors of the gradient on the sketch ``G^T P``, by an SVD with r
        columns (the first basis: of the gradient itself).

    Raises:
      TypeError: if ``rank``, ``update_proj_gap`` or ``reproject_factor`` is not a
        Python number.
      ValueError: if one is out of range or ``cold_start`` is unknown.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.correlation(rank=16).update_proj_gap
      32

    References:
      Xiao et al., COAP: Memory-Efficient Training with Correlation-Aware Gradient
      Projection (2024), https://arxiv.org/abs/2412.00071

    Differences from the authors' code:
      * ``normalize``, which is off there.
      * Decompositions start with fewer columns there: a single sketch, the same one
        for every matrix. Tucker factors come from alternating least squares with up to
        100 sweeps; here from one power sweep for each side.
      * For convolutions the code adds each step's gradient to the one before.
    """

    update_proj_gap: Any = 32
    _: dataclasses.KW_ONLY
    reproject_factor: int = 5
    learning_rate: float | Array = 0.1
    clip: float | Array = 1.0
    normalize: bool = True

    reads_moments = True

    def __post_init__(self):
        """Checks the numbers."""
        super().__post_init__()
        _checks.positive_int("reproject_factor", self.reproject_factor)

    def both(self) -> Projector:
        """Returns the projector whose two bases move together."""
        return TwoSidedCorrelation(
            self.rank, self.update_proj_gap, left=self, right=self
        )

    def renew(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """Decomposes anew, or takes a step."""
        return jax.lax.cond(
            self.due_anew(at),
            lambda: self.decompose(matrix, gradient, old, at),
            lambda: self.step(matrix, gradient.array, (old,), at)[0],
        )

    def due_anew(self, at: At) -> Array:
        """Whether this refresh is a decomposition."""
        return at.cold | (at.epoch % self.reproject_factor == 0)

    def decompose(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """Returns the leading basis: the first one, or by one sweep from the old."""
        return super().renew(matrix, gradient, old, at)

    def follow(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """Returns the leading basis by one sweep from the old one."""
        del at
        if self.cold_start == "power":
            return block_power(gradient, old, 1)
        scaled, _ = unit_peak(gradient.array)
        # Q = orth(G^T P), then the left singular vectors of G Q, [m, r]
        sketch, _ = unit_peak(jnp.matmul(scaled.T, old, precision=HIGHEST))
        seen = jnp.matmul(scaled, cholesky_qr(sketch), precision=HIGHEST)
        return leading_singular_vectors(seen, matrix.rank)

    def step(
        self, matrix: Matrix, gradient: Array, bases: tuple[Array, ...], at: At
    ) -> tuple[Array, ...]:
        """Returns the bases after one clipped gradient step on f."""
        if self.normalize:
            # Into range first: the squares of 1e-30 are zero.
            gradient, _ = unit_peak(gradient)
            gradient = gradient / jnp.sqrt(jnp.mean(jnp.square(gradient)))
        slopes = jax.grad(_objective(matrix, gradient, _momentum(at)))(bases)
        return tuple(
            basis - self.learning_rate * slope * self._within(slope)
            for basis, slope in zip(bases, slopes, strict=True)
        )

    def _within(self, slope: Array) -> Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(slope)))
        # PyTorch's `clip_grad_norm_` adds the same 1e-6.
        return jnp.minimum(1.0, self.clip / (norm + 1e-6))


@dataclasses.dataclass(frozen=True, eq=False)
class TwoSidedCorrelation(TwoSided):
    """COAP on both sides: one step on two bases."""

    reads_moments = True

    def refresh(
        self, matrix: Matrix, gradient: Any, stored: TwoSidedBasis, at: At
    ) -> TwoSidedBasis:
        """Decomposes each side, or moves both by one objective."""
        part = self.left
        left, right = (wide(basis) for basis in stored)
        gradient = Operand.of(gradient).astype(left.dtype)

        def decompose() -> tuple[Array, ...]:
            other, turned = matrix.seen_from("right"), matrix.other_side(gradient)
            return (
                part.decompose(matrix, gradient, left, at),
                part.decompose(other, turned, right, other_key(at)),
            )

        def step() -> tuple[Array, ...]:
            return part.step(matrix, gradient.array, (left, right), at)

        bases = jax.lax.cond(part.due_anew(at), decompose, step)
        return TwoSidedBasis(
            *(new.astype(old.dtype) for new, old in zip(bases, stored, strict=True))
        )


def _momentum(at: At) -> Array | None:
    """Returns the first moment of the inner optimizer, near a peak of 1."""
    fields = ("mu", "trace", "ema")
    found = [group[field] for group in at.moments for field in fields if field in group]
    if not found:
        return None
    momentum, _ = unit_peak(wide(found[0]))
    return jnp.where(jnp.all(jnp.isfinite(momentum)), momentum, 0.0)


def _objective(
    matrix: Matrix, gradient: Array, momentum: Array | None
) -> Callable[[tuple[Array, ...]], Array]:
    """Returns f, a function of the tuple of bases."""
    # Whether the inputs lie along m: a view from the right swaps both axes.
    inputs_first = matrix.reduction_is_rows != matrix.transposed

    def lift(bases: tuple[Array, ...], low: Array) -> Array:
        left, *right = bases
        rows = back_by_blocks(low, right[0], HIGHEST) if right else low
        return jnp.matmul(left, rows, precision=HIGHEST)

    def down(bases: tuple[Array, ...]) -> Array:
        left, *right = bases
        low = inner(left, gradient)
        return by_blocks(low, right[0], HIGHEST) if right else low

    def units(x: Array) -> tuple[Array, int]:
        """Returns blocks ``[m, k, n]``, and the axis of the inputs."""
        blocks = x.reshape((matrix.m, matrix.blocks, -1))
        return blocks, 0 if inputs_first else 2

    def f(bases: tuple[Array, ...]) -> Array:
        error = jnp.mean(jnp.square(lift(bases, down(bases)) - gradient))
        if momentum is None:
            return error
        lifted, axis = units(lift(bases, momentum))
        cosines = _cosine(lifted, units(gradient)[0], axis)
        return error * (1.0 - jnp.mean(cosines))

    return f


def _cosine(x: Array, y: Array, axis: int, eps: float = 1e-8) -> Array:
    """Returns cosines along an axis, 0 where a vector vanishes."""

    def norm(v: Array) -> Array:
        square = jnp.sum(jnp.square(v), axis)
        # Replaced inside the root, whose derivative at 0 is infinite: with a choice
        # outside alone, a zero vector would give NaN for a slope.
        return jnp.maximum(jnp.sqrt(jnp.where(square > 0, square, 1.0)), eps)

    return jnp.sum(x * y, axis) / (norm(x) * norm(y))
