"""The interface of a transport."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.leaves.moments import Group
from lowrank_optax.leaves.part import Part
from lowrank_optax.linalg.bases import Rotation


@dataclasses.dataclass(frozen=True)
class Transport(Part):
    """What happens to signs and moments when a matrix gets a new basis.

    Attributes:
      aligns: whether the new basis' signs follow the old basis.
      moves: whether ``move`` changes the moments (else they are left alone and
        never enter the refresh).
      gathers: whether it needs bases that share vectors (``Projector.selects``).
    """

    aligns = True
    moves = False
    gathers = False

    def move(
        self, moments: tuple[Group, ...], rotation: Rotation, count: Array
    ) -> tuple[Group, ...]:
        """Returns one matrix' moments in the new basis.

        Args:
          moments: per state object a dict of ``mu``, ``nu``, ``trace`` ``[r, n]``.
          rotation: old coordinates to new ones.
          count: updates the moments have seen.
        """
        del rotation, count
        return moments


def typical(nu: Array, rotation: Rotation, known: Any = True) -> Array:
    """Returns a second moment for coordinates of which none is known.

    Per column (of the matrix, if columns move too) the squared mean of the roots: on
    gradients that are alike in all directions what every coordinate has, elsewhere
    nearer to the weak ones, where new vectors come from.

    Args:
      nu: ``[r, n]`` in float32.
      rotation: of the moments.
      known: which entries to take the mean of.
    """
    axes = -2 if rotation.right is None else (-2, -1)
    return jnp.square(jnp.mean(jnp.sqrt(jnp.abs(nu)), axes, keepdims=True, where=known))
