"""Grassmannian tracking: one rotation of the subspace per refresh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.linalg import grassmann as geometry
from lowrank_optax.linalg.bases import cholesky_qr, newton_schulz
from lowrank_optax.linalg.products import Operand
from lowrank_optax.projectors._protocol import (
    At,
    OrthonormalProjector,
    TrackingProjector,
)

MOVES = ("track", "walk", "jump")


@dataclasses.dataclass(frozen=True, eq=False)
class grassmann(TrackingProjector, OrthonormalProjector):
    r"""Turns the old subspace a little at every refresh.

    With basis ``S [m, r]``, gradient ``G [m, n]`` and the subspace's cost
    ``F(S) = min_A |S A - G|^2``, ``A = S^T G``::

        T = (I - S S^T) dF/dS = -2 (I - S S^T) G A^T         [m, r]
        S <- S + [(cos a - 1) S v - sin a u] v^T             T ~ sigma u v^T

    the geodesic of the tangent's leading singular triple, against it. The triple comes
    from the ``r x r`` Gram matrix ``T^T T``, and a Newton-Schulz sweep follows. Work is
    two products with ``G``, ``O(m r^2)``, and for the line search a product of ``G``
    with one vector; nothing has ``m x m`` or ``m x n`` elements. Where there is no
    tangent, S stays as it is.

    One direction per refresh is a small step after a sudden change of the data. With
    ``renew_below`` a basis that has lost the gradient is found anew, like the first::

        (|S^T G|^2 / |G|^2 - r / m) / (1 - r / m) < renew_below

    The left side is 1 for a basis that holds all of G and on average 0 for one that
    has nothing to do with it. One product more tells it from the gradient at hand, and
    nothing is kept.

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one refresh to the next, the first at step 0.
      basis_dtype: storage dtype of the basis.
      step: how far to turn. "line_search" is the exact minimizer of ``F`` along the
        geodesic, ``a = atan2(sigma, |A^T v|^2 - |G^T u|^2) / 2``, which needs no step
        size and does not depend on the gradient's scale. A number is SubTrack++'s
        ``eta``: ``a = eta sigma``, quadratic in the gradient's scale. With "walk" a
        number is the angle itself, in radians.
      max_angle: largest angle in radians, None for no limit.
      damping: factor on the angle before it is limited, in (0, 1].
      move: "track" as above; "walk" turns all directions by the same angle along a
        random geodesic; "jump" draws a new random subspace. Both draw from the
        bracket's key.
      cold_start: how the first basis is found, "power" or "svd"; a jump draws it.
      renew_below: share of the gradient, beyond that of a random basis, below which
        the basis is found anew, None for never. ``lro.subtrack`` takes 0.2: through a
        training run a tracked basis sees 0.23 and more, and 0.19 and less after a
        change of the gradient's subspace. A jump has no use for it.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number.
      ValueError: if one is out of range, or ``step``, ``move`` or ``cold_start`` is
        unknown.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.grassmann(rank=8, update_proj_gap=100).step
      'line_search'

    References:
      Rajabi et al., SubTrack++: Gradient Subspace Tracking for Scalable LLM Training
      (2025), https://arxiv.org/abs/2502.01586.
      Balzano et al., Online Identification and Tracking of Subspaces from Highly
      Incomplete Information (2010), https://arxiv.org/abs/1006.4046.
      Randomized Gradient Subspaces (GrassWalk, GrassJump; 2025),
      https://arxiv.org/abs/2510.01878.

    Differences from the authors' code:
      * Tall and square matrices are tracked too; there the released code projects the
        tangent with a matrix that is zero up to rounding.
      * The tangent is made orthogonal to S in floating point, which keeps float32
        bases orthonormal, and the basis may be stored in bfloat16.
      * The default step has no ``eta``.
      * ``renew_below``; there, a basis that has lost the gradient turns by one
        direction per refresh.
    """

    step: str | float | Array = "line_search"
    max_angle: float | Array | None = None
    damping: float | Array = 1.0
    move: str = "track"
    renew_below: float | Array | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        """Checks the choices."""
        super().__post_init__()
        _checks.choice("move", self.move, MOVES)
        if isinstance(self.step, str):
            _checks.choice("step", self.step, ("line_search",))

    def has_lost(self, matrix: Matrix, gradient: Operand, old: Array) -> Any:
        """Returns whether the old basis sees next to nothing of the gradient."""
        everything = matrix.rank >= matrix.m
        if self.renew_below is None or self.move == "jump" or everything:
            return False
        seen = geometry.see(gradient, old)
        return geometry.captured(seen, matrix.m) < self.renew_below

    def find(self, matrix: Matrix, gradient: Operand, at: At) -> Array:
        """Starts at the gradient's leading subspace, or jumps."""
        if self.move == "jump":
            return _draw(matrix, at, gradient.dtype)
        return super().find(matrix, gradient, at)

    def follow(self, matrix: Matrix, gradient: Operand, old: Array, at: At) -> Array:
        """Turns the old basis."""
        if self.move == "jump":
            return _draw(matrix, at, old.dtype)
        if matrix.rank >= matrix.m:
            return old  # the whole space: nowhere to turn
        basis = old
        if not self.orthonormal:
            # What rounding left of its own span would pass for a tangent.
            # One sweep makes 0.75 d^2 of a defect d; two turn 1e-2 into less than 1e-8.
            basis = newton_schulz(newton_schulz(old))
        seen = geometry.see(gradient, basis)
        if self.move == "track":
            geodesic = geometry.descent(basis, seen)
        else:
            geodesic = geometry.random_direction(at.key, basis)
        angle = self.damping * self._angle(geodesic, seen)
        if self.max_angle is not None:
            angle = jnp.clip(angle, -self.max_angle, self.max_angle)
        turned = geometry.turn_along(geodesic, basis, angle)
        # Without a slope u is zero or rounding, and no direction to turn to.
        return jnp.where(geodesic.slope > 0, turned, old)

    def _angle(self, geodesic: geometry.Geodesic, seen: geometry.Seen) -> Array:
        if isinstance(self.step, str):
            return geometry.best_angle(geodesic, seen)
        if self.move == "walk":
            return jnp.asarray(self.step, geodesic.u.dtype)
        # The slope is that of G / peak, and F is quadratic in G.
        return self.step * geodesic.slope * seen.peak**2


def _draw(matrix: Matrix, at: At, dtype: Any) -> Array:
    # The key has the epoch in it, so every jump lands somewhere else.
    return cholesky_qr(jax.random.normal(at.key, (matrix.m, matrix.rank), dtype))
