"""Moments that go where their basis vector went."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.leaves.moments import Group
from lowrank_optax.linalg.bases import Rotation
from lowrank_optax.transport._protocol import Transport


@dataclasses.dataclass(frozen=True)
class gather_moments(Transport):
    """Moves each basis vector's moments to its new place; new vectors start at zero.

    For bases that share whole vectors or nothing, ``C = P_new^T P_old`` is a selection
    of rows, and ``mu <- C mu``, ``nu <- C nu`` (trace and ema likewise) is a gather:
    bit for bit, in the dtype of storage. With a projector that chooses among fixed
    vectors, such as ``lro.dct``.

    Examples:
      >>> import lowrank_optax as lro
      >>> part = lro.project(lro.dct(rank=4), transport=lro.gather_moments())

    References:
      Modoranu et al., FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
      Optimization of Large Language Models (2025), https://arxiv.org/abs/2505.17967
    """

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
            return _rows(rotation.right, blocks.T).T.reshape(low.shape)

        return tuple({field: gather(low) for field, low in g.items()} for g in moments)


def _rows(selection: Array, low: Array) -> Array:
    """Returns ``selection @ low`` for a matrix of zeros and at most one 1 per row."""
    # Rows are copied and not multiplied: a product may round, and 0 times an infinity
    # is NaN. A row without a 1 has the argmax 0, which `kept` rules out.
    kept = jnp.any(selection != 0, axis=1)
    source = jnp.argmax(selection, axis=1)
    return jnp.where(kept[:, None], low[source], jnp.zeros([], low.dtype))
