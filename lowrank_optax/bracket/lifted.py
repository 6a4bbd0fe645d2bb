"""``Lifted``: what is written for one matrix, done to all matrices of a leaf."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax._meshes import varied_axes
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.leaves.part import Part


@dataclasses.dataclass(frozen=True, eq=False)
class Lifted(Part):
    """A leaf that is a matrix, or a stack of matrices.

    Attributes:
      matrix: how it is seen.
    """

    matrix: Matrix

    @property
    def in_turn(self) -> bool:
        """Whether the layers are projected and lifted one after another.

        So a basis that lies in parts on a mesh is whole for one layer at a time.
        """
        return self.matrix.in_turn

    def lift(self, function: Callable, *trees: Any, in_turn: bool = False) -> Any:
        """Returns ``function`` of one matrix for all matrices of the leaf.

        All at once, or in turn, layer by layer.
        """
        if not self.matrix.batch:
            return function(*trees)
        # The plan says so only where the layers are the one batch axis, axis 0.
        if in_turn:
            return jax.lax.map(lambda args: function(*args), trees)
        # Axis by axis: batch axes that are sharded are not merged.
        for name in reversed(self._names):
            function = jax.vmap(function, axis_name=name)
        return function(*trees)

    def one_by_one(self, function: Callable, *trees: Any) -> Any:
        """Returns the same by a loop over the matrices, each with its own branches."""
        if not self.matrix.batch:
            return function(*trees)
        batch = self.matrix.batch_shape
        flat = jax.tree.map(lambda x: x.reshape((-1, *x.shape[len(batch) :])), trees)
        # In a loop every `cond` stays a branch. `vmap` would make a select of it, and
        # every matrix would pay for a refresh that one needs.
        out = jax.lax.map(lambda args: function(*args), flat)
        return jax.tree.map(lambda x: x.reshape((*batch, *x.shape[1:])), out)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(f"lowrank/batch{axis}" for axis in self.matrix.batch)

    def anywhere(self, flag: Array) -> Array:
        """Whether the flag holds for any matrix that is worked on at once."""
        if not self.matrix.batch or self.in_turn:
            return flag
        # A maximum over the mapped axes is one scalar for all, so that a branch on it
        # stays a branch where `vmap` would run both. Inside `jax.shard_map` JAX has no
        # collectives over axes of `vmap`.
        if varied_axes(flag):
            return _over_axes(flag)
        return jax.lax.pmax(flag.astype(jnp.int32), self._names) > 0


@jax.custom_batching.custom_vmap
def _over_axes(flag: Array) -> Array:
    """Returns whether a flag holds anywhere along the axes of ``vmap``."""
    return flag


@_over_axes.def_vmap
def _(size: int, batched: Any, flag: Array) -> tuple[Array, bool]:
    del size
    return _over_axes(jnp.any(flag, 0) if batched[0] else flag), False
