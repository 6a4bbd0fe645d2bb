"""The interface of a recovery: what the update gets from outside the subspace."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.leaves.part import Part


class LeafView(NamedTuple):
    """What a recovery may read of one leaf, all with leading batch axes.

    Attributes:
      gradient: ``[*batch, m, n]``, with what ``Recovery.enter`` added to it.
      projected: ``R = P^T G``, ``[*batch, r, n]``.
      direction: what the inner optimizer made of it, ``[*batch, r, n]``.
      basis: what the projector uses, usually ``P [*batch, m, r]``.
      previous_basis: what the projector stored before this step's refresh.
      moments: the leaf's moments after the inner update, a tuple of dictionaries.
      carried_moments: before it, in the coordinates of ``basis``.
      previous_moments: before transport, in the coordinates of ``previous_basis``.
      orthonormal: whether ``basis`` is orthonormal up to float32's rounding (static).
      up: the projector's ``(basis, low) -> P low``.
      count: steps taken before this one.
    """

    gradient: Array
    projected: Array
    direction: Array
    basis: Any
    previous_basis: Any
    moments: Any
    carried_moments: Any
    previous_moments: Any
    orthonormal: bool
    up: Callable[[Any, Array], Array]
    count: Array


class Recovered(NamedTuple):
    """The update ``P low + G * phi + addend``; a term that is None costs nothing."""

    low: Array | None = None
    phi: Array | None = None
    addend: Array | None = None


@dataclasses.dataclass(frozen=True)
class Recovery(Part):
    """Turns a direction in the subspace into a full update.

    Its state per leaf is an array (or a tree of them) with the leaf's batch axes in
    front, or of the leaf's own shape. It advances when the inner optimizer steps: in
    the middle of an accumulation inside the bracket it is held, and the update at the
    end recovers from the last micro-batch's gradient.

    Attributes:
      accumulates: whether such an accumulation is allowed.
    """

    accumulates = True

    def start(self, matrix: Matrix) -> Any:
        """Returns the state of one leaf (per-matrix scalars have the batch shape)."""
        raise NotImplementedError

    def enter(self, matrix: Matrix, state: Any, gradient: Array) -> Array:
        """Returns what takes the gradient's place in this step."""
        del matrix, state
        return gradient

    def update(
        self, matrix: Matrix, state: Any, view: LeafView, scale: Any
    ) -> tuple[Recovered, Any]:
        """Returns the terms of the update and the new state."""
        raise NotImplementedError
