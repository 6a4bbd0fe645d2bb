"""A change of basis in the coordinates that moments live in."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.linalg.products import HIGHEST, by_blocks


class Rotation(NamedTuple):
    """A change of basis in coordinates: ``R_new = left R_old (right^T)``."""

    left: Array
    right: Array | None = None

    def apply(self, low: Array) -> Array:
        """Rotates ``[r, n]`` coordinates."""
        low = jnp.matmul(self.left, low, precision=HIGHEST)
        if self.right is None:
            return low
        return by_blocks(low, self.right.T, HIGHEST)

    def diagonal(self, low: Array) -> Array:
        """Returns the factors with which coordinates like ``low`` stay in place."""
        left = jnp.diagonal(self.left)[:, None]
        if self.right is None:
            return left
        blocks = low.shape[-1] // self.right.shape[-1]
        return left * jnp.tile(jnp.diagonal(self.right), blocks)

    def apply_rest(self, low: Array) -> Array:
        """Returns ``apply(low) - diagonal * low``, without cancellation on one side."""
        if self.right is not None:
            return self.apply(low) - self.diagonal(low) * low
        rest = self.left - jnp.diag(jnp.diagonal(self.left))
        return jnp.matmul(rest, low, precision=HIGHEST)

    def squared(self) -> "Rotation":
        """Returns the rotation with squared entries, for variances."""
        right = None if self.right is None else self.right**2
        return Rotation(self.left**2, right)
