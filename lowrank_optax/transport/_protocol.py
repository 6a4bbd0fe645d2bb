"""The interface of a transport."""

import dataclasses

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
