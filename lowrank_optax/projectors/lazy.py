"""Fewer refreshes for the matrices whose bases have stopped moving."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax.leaves.matrix import Axes, Matrix
from lowrank_optax.linalg.bases import Rotation, block_power
from lowrank_optax.linalg.products import HIGHEST, Operand, wide
from lowrank_optax.projectors._protocol import At, Projector
from lowrank_optax.projectors._wrapped import Wrapped, check_basis

_ENDLESS = 2**30  # gaps are int32
_NONE_YET = -1.0  # no cosine's magnitude
_SWEEPS = 12


class LazyBasis(NamedTuple):
    """What is stored for one matrix.

    Attributes:
      vectors: what the projector inside stores.
      similarities: ``[history]``, the newest last; -1 where there is none yet.
      gap: int32, steps between refreshes.
    """

    vectors: Any
    similarities: Any
    gap: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy(Wrapped):
    """A projector with a gap of its own for every matrix; see ``lazy``."""

    threshold: float | Array = 0.4
    history: int = 5
    factor: int = 2
    largest_gap: int = _ENDLESS

    def start(self, matrix: Matrix) -> LazyBasis:
        """Starts with the common gap."""
        return LazyBasis(
            self.projector.start(matrix),
            jnp.full(self.history, _NONE_YET, jnp.float32),
            jnp.asarray(self.update_proj_gap, jnp.int32),
        )

    def axes(self, matrix: Matrix) -> LazyBasis:
        """Says what the projector inside does; the rest is the matrix' own."""
        return LazyBasis(self.projector.axes(matrix), Axes(((),)), Axes())

    def adopt(self, matrix: Matrix, basis: Any, at: At, of: Projector) -> LazyBasis:
        """As inside; the gap is the common one again."""
        vectors = self.projector.adopt(matrix, basis, at, of)
        return self.start(matrix)._replace(vectors=vectors)

    def is_due(self, stored: LazyBasis, steps: Array) -> Array:
        """Whether a multiple of the matrix' own gap is reached."""
        return steps % stored.gap == 0

    def refresh(
        self, matrix: Matrix, gradient: Any, stored: LazyBasis, at: At
    ) -> LazyBasis:
        """Refreshes the basis, and widens the gap if the old one was good for long."""
        gradient = Operand.of(gradient, matrix.transposed)
        new = self.projector.refresh(matrix, gradient, stored.vectors, at)
        old, start = (
            _first(self.projector.basis(matrix, vectors, at))
            for vectors in (stored.vectors, new)
        )
        leading = block_power(gradient.astype(start.dtype), start, _SWEEPS)
        newest = jnp.append(stored.similarities[1:], _cosine(old, leading))
        # A cold start has no old vector that is worth a comparison.
        similarities = jnp.where(at.cold, stored.similarities, newest)
        return LazyBasis(new, similarities, self._gap(similarities, stored.gap))

    def _gap(self, similarities: Array, gap: Array) -> Array:
        """Multiplies the gap if the history is full and similar enough."""
        full = jnp.all(similarities >= 0)
        stable = full & (jnp.mean(similarities) >= self.threshold)
        # Divided and not multiplied: the product could leave the range of int32.
        grows = stable & (gap <= self.largest_gap // self.factor)
        return jnp.where(grows, gap * self.factor, gap)

    def pack(self, new: LazyBasis) -> LazyBasis:
        """As inside."""
        return new._replace(vectors=self.projector.pack(new.vectors))

    def basis(self, matrix: Matrix, stored: LazyBasis, at: At) -> Any:
        """As inside."""
        return self.projector.basis(matrix, stored.vectors, at)

    def align(self, old: LazyBasis, new: LazyBasis) -> LazyBasis:
        """As inside."""
        return new._replace(vectors=self.projector.align(old.vectors, new.vectors))

    def rotation(self, old: LazyBasis, new: LazyBasis) -> Rotation:
        """As inside."""
        return self.projector.rotation(old.vectors, new.vectors)


def lazy(
    projector: Any,
    *,
    threshold: float | Array = 0.4,
    history: Any = 5,
    factor: Any = 2,
    largest_gap: Any = None,
) -> Projector:
    r"""Refreshes matrices whose leading direction has settled less often.

    Every matrix has a gap T of its own, at first ``update_proj_gap``, and is refreshed
    at the steps that T divides. Each refresh after the first compares the first vector
    p of the old basis with the gradient's leading direction::

        u = (G G^T)^12 p_new, of unit norm
        c = |<p, u>| / |p|
        T <- factor T    if the last `history` c have a mean >= threshold
                         and factor T <= largest_gap

    ``p_new``, the first vector of the new basis, is u itself if that comes from an SVD.
    A basis that is found from the old one (``lro.power``) stays near it whatever the
    gradient is; u does not.

    With the defaults a steady matrix is refreshed at 0, T, ..., 5 T, then at 6 T, 8 T,
    16 T and from there on every 16 T.

    Args:
      projector: one that keeps its basis between refreshes: ``lro.power``,
        ``lro.svd``, ``lro.quantize_basis(...)``, ...
      threshold: least mean cosine (0.4, as released); may be traced.
      history: cosines in the mean (5, as released).
      factor: by which the gap grows (2, as released).
      largest_gap: bound of the gap; None is 16 times ``update_proj_gap`` (ours; the
        released code has none, so that a steady matrix is all but frozen in the end).

    Returns:
      A projector.

    Raises:
      TypeError: if ``projector`` is no projector, or a count no Python int.
      ValueError: if a number is out of range, or the projector stores no basis or
        moves it between refreshes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lowrank_optax as lro
      >>> tx = lro.galore(1e-2, projector=lro.lazy(lro.svd(4, update_proj_gap=100)))
      >>> int(tx.init({"kernel": jnp.ones((64, 32))}).basis["kernel"].gap)
      100

    References:
      Zhang et al., Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
      Low-Rank Gradients (2024), https://arxiv.org/abs/2407.08296

    Differences from the authors' code:
      * The cosine's magnitude counts: a vector that only turned around has not moved.
      * The power steps: there every basis comes from an SVD.
      * The gap is bounded.
      * The old vector is the stored basis' own, so nothing more is kept than
        ``history`` cosines and the gap.
    """
    check_basis("lazy", projector)
    gap = projector.update_proj_gap
    if largest_gap is None:
        largest_gap = 16 * gap
    _checks.positive_int("history", history)
    _checks.positive_int("factor", factor, least=2)
    _checks.positive_int("largest_gap", largest_gap, least=gap)
    return Lazy(
        projector.rank,
        gap,
        projector,
        threshold,
        history,
        factor,
        min(largest_gap, _ENDLESS),
    )


def _first(basis: Any) -> Array:
    """Returns the first basis vector ``[m, 1]``, on the left of two sides."""
    return wide(jax.tree.leaves(basis)[0])[:, :1]


def _cosine(old: Array, leading: Array) -> Array:
    cosine = jnp.abs(jnp.vdot(old, leading, precision=HIGHEST)) / jnp.linalg.norm(old)
    # No direction where the new vector sees nothing of the gradient.
    return jnp.nan_to_num(cosine).astype(jnp.float32)
