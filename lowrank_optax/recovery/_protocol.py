"""``Recovery``: how an update gets a share from outside the subspace."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from lowrank_optax.leaves.matrix import Axes, Matrix
from lowrank_optax.leaves.part import Part
from lowrank_optax.linalg.products import Operand


class LeafView(NamedTuple):
    """What a recovery may read of one matrix.

    Attributes:
      gradient: ``[m, n]``, with what ``Recovery.enter`` added to it. Numbers whose
        squares cannot be summed are in it, and taken out of the update's terms.
      projected: ``R = P^T G``, ``[r, n]``, with zeros for such numbers.
      direction: what the inner optimizer made of it, ``[r, n]``.
      basis: what the projector uses, usually ``P [m, r]``.
      previous_basis: the basis of the step before.
      moments: the matrix' moments after the inner update, a tuple of dictionaries.
      carried_moments: before it, in the coordinates of ``basis``.
      previous_moments: before transport, in the coordinates of ``previous_basis``.
      orthonormal: whether ``basis`` is orthonormal up to float32's rounding (static).
      up: the projector's ``(basis, low) -> P low``.
      anywhere: whether a condition holds for this matrix, or for one that is worked on
        together with it: for a choice between two ways to compute the same.
      count: steps taken before this one.
      key: a PRNG key of this bracket, leaf, matrix and epoch (``At.key``); with
        ``count`` folded in it is one of the step.
    """

    gradient: Operand
    projected: Array
    direction: Array
    basis: Any
    previous_basis: Any
    moments: Any
    carried_moments: Any
    previous_moments: Any
    orthonormal: bool
    up: Callable[[Any, Array], Operand]
    anywhere: Callable[[Array], Array]
    count: Array
    key: Array


class Recovered(NamedTuple):
    """The update ``P low + G * phi + addend``; a term that is None costs nothing.

    No entry of ``G * phi`` goes beyond ``bound``, ``[1, n]`` or ``[1, 1]``. ``outside``
    goes to ``Recovery.update_whole``, whose result is one more term.
    """

    low: Array | None = None
    phi: Array | None = None
    addend: Any = None
    outside: Operand | None = None
    bound: Array | None = None


@dataclasses.dataclass(frozen=True)
class Recovery(Part):
    """Turns a direction in the subspace into a full update.

    Written for one matrix. Its state advances when the inner optimizer steps: in the
    middle of an accumulation inside the bracket it is held, and the update at the end
    recovers from the last micro-batch's gradient.

    Attributes:
      accumulates: whether such an accumulation is allowed.
      like_leaf: whether its state is one array of the leaf's own shape, which comes
        and goes as an ``Operand``; else it is a tree of small arrays per matrix.
      whole: whether it runs a transformation on whole leaves, whatever their layout,
        whose state then stands in the place of the matrices' own.
    """

    accumulates = True
    like_leaf = False
    whole = False

    def stored_as(self, dtype: Any) -> "Recovery":
        """Returns the recovery that stores in ``dtype`` unless it was told another."""
        del dtype
        return self

    def start_whole(self, leaf: Any) -> Any:
        """Returns the transformation's state for a leaf, given zeros like it."""
        raise NotImplementedError

    def update_whole(self, outside: Any, state: Any) -> tuple[Any, Any]:
        """Returns a term of the update, from what lies outside, and the new state."""
        raise NotImplementedError

    def start(self, matrix: Matrix) -> Any:
        """Returns the state of one matrix."""
        raise NotImplementedError

    def axes(self, matrix: Matrix) -> Any:
        """Returns a tree like ``start``'s, of ``Axes``: what the arrays' axes mean.

        An axis that is not that of the parameter's rows or columns has no name, and no
        sharding.
        """
        return jax.tree.map(
            lambda x: Axes(((),) * x.ndim), jax.eval_shape(lambda: self.start(matrix))
        )

    def enter(self, state: Any, gradient: Operand) -> Operand:
        """Returns what takes the gradient's place in this step."""
        del state
        return gradient

    def update(
        self, matrix: Matrix, state: Any, view: LeafView, scale: Any
    ) -> tuple[Recovered, Any]:
        """Returns the terms of the update and the new state."""
        raise NotImplementedError
