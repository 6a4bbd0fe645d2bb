"""The end of a step for one leaf, or for one layer of it: recover, step, lift."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.bracket.state import Bracket, cast
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.projectors import Projector
from lowrank_optax.recovery import LeafView, Recovered


@dataclasses.dataclass(frozen=True)
class Finish:
    """Turns a direction into an update; what ``Refresher.each`` calls.

    Attributes:
      bracket: its recovery, scale and learning rate.
      projector: of this leaf.
      dtype: of the update.
      count: steps taken before this one.
    """

    bracket: Bracket
    projector: Projector
    dtype: Any
    count: Array

    def __call__(
        self, matrix: Matrix, basis: Any, stored: Any, direction: Any, *rest: Any
    ) -> tuple[Array, Any]:
        """Returns ``P low + G * phi + addend`` and the recovery's state.

        Gradient and update are in stored order, and summed in it: a sum of transposes
        is one more pass for XLA.
        """
        recovery, scale, state = self.bracket.recovery, self.bracket.scale, ()
        gradient, recovered = matrix.flip(stored), Recovered(scale * direction)
        if recovery is not None:
            projected, previous, after, carried, before, state = rest
            leaf = LeafView(
                gradient=gradient,
                projected=projected,
                direction=direction,
                basis=basis,
                previous_basis=previous,
                moments=after,
                carried_moments=carried,
                previous_moments=before,
                orthonormal=self.projector.orthonormal,
                up=functools.partial(self.projector.up, matrix),
                count=self.count,
            )
            recovered, state = recovery.update(matrix, state, leaf, scale)
        low, phi, addend = (
            None if x is None else stepped(self.bracket, self.count, x)
            for x in recovered
        )
        terms = []
        if low is not None:
            terms.append(self.projector.up(matrix, basis, low))
        if phi is not None:
            terms.append(gradient.astype(phi.dtype) * phi)
        if addend is not None:
            terms.append(addend)
        update = functools.reduce(jnp.add, map(matrix.flip, terms))
        return cast(update, self.dtype), state


def stepped(bracket: Bracket, count: Array, x: Any) -> Any:
    """Multiplies by the negative learning rate, if it is the bracket's."""
    rate = bracket.learning_rate
    if rate is None:
        return x
    gain = -jnp.asarray(rate(count) if callable(rate) else rate)
    return x * gain.astype(x.dtype)
