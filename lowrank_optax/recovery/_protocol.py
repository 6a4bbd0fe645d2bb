"""The interface of a recovery: what the update gets from outside the subspace."""

import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Array

from lowrank_optax import _checks
from lowrank_optax._matrices import Matrix


class LeafView(NamedTuple):
    """What a recovery may read of one leaf, all with leading batch axes.

    Attributes:
      gradient: ``[*batch, m, n]``.
      projected: ``R = P^T G``, ``[*batch, r, n]``.
      direction: what the inner optimizer made of it, ``[*batch, r, n]``.
      basis: what the projector uses, usually ``P [*batch, m, r]``.
      moments: the leaf's moments after the inner update.
      count: steps taken before this one.
    """

    gradient: Array
    projected: Array
    direction: Array
    basis: Any
    moments: Any
    count: Array


class Recovered(NamedTuple):
    """The update ``P low + G * phi + addend``; a term that is None costs nothing."""

    low: Array | None = None
    phi: Array | None = None
    addend: Array | None = None


@dataclasses.dataclass(frozen=True)
class Recovery(_checks.Part):
    """Turns a direction in the subspace into a full update."""

    def start(self, matrix: Matrix) -> Any:
        """Returns the state of one leaf (per-matrix scalars have the batch shape)."""
        raise NotImplementedError

    def update(
        self, matrix: Matrix, state: Any, view: LeafView, scale: Any
    ) -> tuple[Recovered, Any]:
        """Returns the terms of the update and the new state."""
        raise NotImplementedError
