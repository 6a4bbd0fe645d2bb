"""A change of basis in the coordinates that moments live in."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.linalg.layout import HIGHEST


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

    @property
    def diagonal(self) -> Array:
        """The factor with which every coordinate stays where it is."""
        left = jnp.diagonal(self.left)[:, None]
        return left if self.right is None else left * jnp.diagonal(self.right)

    def apply_rest(self, low: Array) -> Array:
        """Returns ``apply(low) - diagonal * low``, without cancellation on one side."""
        if self.right is not None:
            return self.apply(low) - self.diagonal * low
        rest = self.left - jnp.diag(jnp.diagonal(self.left))
        return jnp.matmul(rest, low, precision=HIGHEST)

    def squared(self) -> "Rotation":
        """Returns the rotation with squared entries, for variances."""
        right = None if self.right is None else self.right**2
        return Rotation(self.left**2, right)
