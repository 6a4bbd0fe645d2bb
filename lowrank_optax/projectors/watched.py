"""A refresh where a basis has lost the gradient, and none where it has not."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Axes, Matrix
from lowrank_optax.linalg.bases import Rotation
from lowrank_optax.linalg.products import Operand, wide
from lowrank_optax.projectors._protocol import At, Projector
from lowrank_optax.projectors._wrapped import Wrapped, check_basis


class WatchedBasis(NamedTuple):
    """What is stored for one matrix.

    Attributes:
      vectors: what the projector inside stores.
      first: mean share of the first period after the refresh, -1 before its end.
      total: sum of the shares of the period under way.
      steps: int32, how many they are; -1 in the step of a refresh.
      lost: whether the basis is to be renewed.
    """

    vectors: Any
    first: Any
    total: Any
    steps: Any
    lost: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Watched(Wrapped):
    """A projector that is refreshed when its share has fallen; see ``watched``."""

    below: float | Array = 0.8

    advances = True

    def start(self, matrix: Matrix) -> WatchedBasis:
        """Starts without having seen anything."""
        return self._fresh(self.projector.start(matrix))

    def axes(self, matrix: Matrix) -> WatchedBasis:
        """Says what the projector inside does; the rest is the matrix' own."""
        return WatchedBasis(self.projector.axes(matrix), *(Axes() for _ in range(4)))

    def adopt(self, matrix: Matrix, basis: Any, at: At, of: Projector) -> WatchedBasis:
        """As inside, without having seen anything."""
        return self._fresh(self.projector.adopt(matrix, basis, at, of))

    @staticmethod
    def _fresh(vectors: Any) -> WatchedBasis:
        number = jnp.zeros([], jnp.float32)
        return WatchedBasis(
            vectors, number - 1.0, number, jnp.int32(-1), jnp.zeros([], jnp.bool_)
        )

    def is_due(self, stored: WatchedBasis, steps: Array) -> Array:
        """Whether the share has fallen."""
        del steps
        return stored.lost

    def refresh(
        self, matrix: Matrix, gradient: Any, stored: WatchedBasis, at: At
    ) -> WatchedBasis:
        """Refreshes the basis, and begins a new watch."""
        # Epochs are of equal lengths, and refreshes are not: two may be of one.
        at = at._replace(key=jax.random.fold_in(at.key, at.count))
        new = self.projector.refresh(matrix, gradient, stored.vectors, at)
        return self._fresh(new)

    def advance(
        self,
        matrix: Matrix,
        stored: WatchedBasis,
        gradient: Any,
        projected: Array,
        at: At,
    ) -> WatchedBasis:
        """Counts the share of this gradient, and judges at the end of a period."""
        del at
        gradient = Operand.of(gradient, matrix.transposed)
        # In units of the largest entry, whose square is in range.
        size = jnp.where(gradient.peak > 0, wide(gradient.peak), 1.0)
        whole = jnp.sum(jnp.square(wide(gradient.stored) / size))
        inside = jnp.sum(jnp.square(wide(projected) / size))
        share = (inside / jnp.maximum(whole, 1.0)).astype(jnp.float32)
        # A basis is made for the gradient of its refresh, which is no sample.
        total = stored.total + jnp.where(stored.steps >= 0, share, 0.0)
        steps = stored.steps + 1
        mean, ends = total / self.update_proj_gap, steps == self.update_proj_gap
        is_first = stored.first < 0
        lost = ends & ~is_first & (mean < self.below * stored.first)
        return WatchedBasis(
            stored.vectors,
            jnp.where(ends & is_first, mean, stored.first),
            jnp.where(ends, 0.0, total),
            jnp.where(ends, 0, steps),
            lost | stored.lost,
        )

    def pack(self, new: WatchedBasis) -> WatchedBasis:
        """As inside."""
        return new._replace(vectors=self.projector.pack(new.vectors))

    def basis(self, matrix: Matrix, stored: WatchedBasis, at: At) -> Any:
        """As inside."""
        return self.projector.basis(matrix, stored.vectors, at)

    def align(self, old: WatchedBasis, new: WatchedBasis) -> WatchedBasis:
        """As inside."""
        return new._replace(vectors=self.projector.align(old.vectors, new.vectors))

    def rotation(self, old: WatchedBasis, new: WatchedBasis) -> Rotation:
        """As inside."""
        return self.projector.rotation(old.vectors, new.vectors)


def watched(
    projector: Any, *, below: float | Array = 0.8, period: Any = None
) -> Projector:
    r"""Refreshes a matrix when its basis has lost the gradient, and not before.

    Every step the basis sees a share of the gradient's energy, ``|P^T G|^2 / |G|^2``.
    Means over periods of ``period`` steps are compared with the mean of the first
    period after the last refresh; where one is less than ``below`` times that, the next
    step renews the basis. The gradient of a refresh itself does not count.

    Four numbers are kept per matrix. The matrices of a stack are watched one by one: a
    stack that is sharded over its layers is gathered for that, so shard another axis.

    Args:
      projector: one that keeps its basis between refreshes: ``lro.power``, ``lro.svd``,
        ``lro.quantize_basis(...)``, ...
      below: share of the first period's share; 1 renews at about every other period, 0
        never. May be traced.
      period: steps from one look to the next; None is the projector's
        ``update_proj_gap``, which has no other meaning here.

    Returns:
      A projector.

    Raises:
      TypeError: if ``projector`` is no projector, or ``period`` no Python int.
      ValueError: if ``period`` is below 1, or the projector stores no basis or moves it
        between refreshes.

    Examples:
      >>> import lowrank_optax as lro
      >>> tx = lro.galore(1e-2, projector=lro.watched(lro.power(8), period=20))

    References:
      Lotus: Efficient LLM Training by Randomized Low-Rank Gradient Projection with
      Adaptive Subspace Switching (2026), https://arxiv.org/abs/2602.01233

    Differences from the authors' code:
      * None was to be found, and two descriptions of its rule disagree: how far the
        unit projection has moved since the switch, which keeps another ``r x n``
        numbers, or the share of a sum of unit gradients, which keeps ``m x n``. The
        share of the energy is ours, for its four numbers.
    """
    check_basis("watched", projector)
    if period is None:
        period = projector.update_proj_gap
    _checks.positive_int("period", period)
    return Watched(projector.rank, period, projector, below)
