"""Random Gaussian projections, regenerated from a key instead of stored."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.projectors._protocol import At, Projector


@dataclasses.dataclass(frozen=True, eq=False)
class gaussian(Projector):
    """Projects with ``P ~ N(0, 1/r)``, redrawn every ``update_proj_gap`` steps.

    ``E[P P^T] = I``. The basis is a function of the bracket's key, the leaf's path,
    the layer and the epoch, and is drawn anew each step: nothing is stored, and all
    replicas and all resumed runs see the same one. Moments are not carried over a
    redraw (there is no useful rotation between two random bases).

    Args:
      rank: an int, a fraction of min(m, n), or a callable of the leaf's path.
      update_proj_gap: steps from one draw to the next.

    Raises:
      TypeError: if ``rank`` or ``update_proj_gap`` is not a Python number.
      ValueError: if either is out of range.

    Examples:
      >>> import lowrank_optax as lro
      >>> lro.gaussian(rank=4).stores_basis
      False

    References:
      Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance (2024),
      https://arxiv.org/abs/2412.05270
    """

    stores_basis = False

    def start(self, matrix: Matrix) -> tuple[()]:
        """Stores nothing."""
        del matrix
        return ()

    def basis(self, matrix: Matrix, stored: tuple[()], at: At) -> Array:
        """Draws ``P [m, r]`` for this epoch."""
        del stored
        # Always in float32: another dtype would draw other numbers from the same key.
        draw = jax.random.normal(at.key, (matrix.m, matrix.rank), jnp.float32)
        return draw / matrix.rank**0.5
