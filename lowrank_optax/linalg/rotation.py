"""A change of basis in the coordinates that moments live in."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.linalg.orthogonalize import HIGHEST


class Rotation(NamedTuple):
    """A change of basis in coordinates: ``R_new = left R_old (right^T)``."""

    left: Array
    right: Array | None = None

    def apply(self, low: Array) -> Array:
        """Rotates ``[r, n]`` coordinates."""
        low = jnp.matmul(self.left, low, precision=HIGHEST)
        if self.right is None:
            return low
        return jnp.matmul(low, self.right.T, precision=HIGHEST)

    def squared(self) -> "Rotation":
        """Returns the rotation with squared entries, for variances."""
        right = None if self.right is None else self.right**2
        return Rotation(self.left**2, right)
