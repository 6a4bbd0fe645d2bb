"""Moments that go where their basis vector went."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.leaves.moments import Group
from lowrank_optax.linalg.bases import Rotation
from lowrank_optax.linalg.products import wide
from lowrank_optax.transport._protocol import Transport, typical


@dataclasses.dataclass(frozen=True)
class gather_moments(Transport):
    """Moves each basis vector's moments to its new place; new vectors start afresh.

    For bases that share whole vectors or nothing, ``C = P_new^T P_old`` is a selection
    of rows, and ``mu <- C mu``, ``nu <- C nu`` (trace and ema likewise) is a gather:
    bit for bit, in the dtype of storage. With a projector that chooses among fixed
    vectors, such as ``lro.dct``.

    A new vector's first moment is zero, for nothing is known of its sign. A second
    moment of zero would be a claim: the bias correction is that of all steps so far,
    and Adam's first step along the vector 3.2 times too large on pure noise. It starts
    with what the vectors that stayed have, column by column the squared mean of the
    roots ``(mean_j sqrt(nu_jk))^2`` (of all old ones, if none stayed).

    Args:
      fill: False starts the second moment at zero, too (the released code).

    Examples:
      >>> import lowrank_optax as lro
      >>> part = lro.project(lro.dct(rank=4), transport=lro.gather_moments())

    References:
      Modoranu et al., FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
      Optimization of Large Language Models (2025), https://arxiv.org/abs/2505.17967
    """

    fill: bool = True

    moves = True
    gathers = True

    def move(
        self, moments: tuple[Group, ...], rotation: Rotation, count: Array
    ) -> tuple[Group, ...]:
        """Gathers every moment of one matrix."""
        del count

        def gather(low: Array) -> Array:
            low = _rows(rotation.left, low)
            if rotation.right is None:
                return low
            blocks = low.reshape(-1, rotation.right.shape[-1])
            return _rows(rotation.right, blocks.T).T.reshape((low.shape[0], -1))

        def filled(field: str, low: Array) -> Array:
            moved = gather(low)
            if field != "nu" or not self.fill:
                return moved
            stayed = gather(jnp.ones_like(low)) != 0
            like = typical(wide(moved), rotation, stayed)
            any_stayed = jnp.any(stayed)
            like = jnp.where(any_stayed, like, typical(wide(low), rotation))
            return jnp.where(stayed, moved, like.astype(low.dtype))

        return tuple(
            {field: filled(field, low) for field, low in g.items()} for g in moments
        )


def _rows(selection: Array, low: Array) -> Array:
    """Returns ``selection @ low`` for a matrix of zeros and at most one 1 per row."""
    # Rows are copied and not multiplied: a product may round, and 0 times an infinity
    # is NaN. A row without a 1 has the argmax 0, which `kept` rules out.
    kept = jnp.any(selection != 0, axis=1)
    source = jnp.argmax(selection, axis=1)
    return jnp.where(kept[:, None], low[source], jnp.zeros([], low.dtype))
