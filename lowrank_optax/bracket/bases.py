"""``Bases``: the bases of a leaf, and when and how they are renewed.

``Lifted``, which it extends, is the one place that knows of stacks of matrices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax._meshes import varied_axes
from lowrank_optax.bracket.state import Clock, Opened, Renewable
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.leaves.part import Part
from lowrank_optax.linalg.products import Operand, has_square
from lowrank_optax.projectors import At, Projector
from lowrank_optax.transport import Transport

# Named here, and not left to `jax_default_prng_impl`: the state has bare key data, and
# a run that goes on under another default must draw the same numbers.
PRNG = "threefry2x32"


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


@dataclasses.dataclass(frozen=True, eq=False)
class Bases(Lifted):
    """A projected leaf's bases, one for each of its matrices.

    Attributes:
      projector: of this leaf.
      transport: carries signs and moments over to a new basis.
      path: the leaf's path as a number, for its random keys.
      shift: by how many steps each matrix refreshes early, ``int32 [*batch]``.
    """

    projector: Projector
    transport: Transport
    path: Any
    shift: Any

    def at(self, clock: Clock) -> At:
        """Returns place and time of every matrix."""
        batch = self.matrix.batch_shape
        first = jnp.arange(self.shift.size, dtype=jnp.int32).reshape(batch)
        # In a layer-wise step the leaf is one layer of a stack: its matrices keep the
        # numbers, and so the keys, that they have in the whole.
        layer = first + clock.layer * self.shift.size
        key = jax.random.wrap_key_data(clock.key_data, impl=PRNG)
        # A key hangs on seed, path, matrix and epoch alone, so that all replicas and
        # all resumed runs draw the same basis.
        key = jax.random.fold_in(key, self.path)

        def one(layer: Any, shift: Any) -> At:
            epoch = (clock.count + shift) // self.projector.update_proj_gap
            own = jax.random.fold_in(jax.random.fold_in(key, layer), epoch)
            return At(own, epoch, layer, jnp.bool_(False), (), clock.count)

        return self.lift(one, layer, self.shift)

    def due(self, clock: Clock, stored: Any, pending: Any) -> Array:
        """Returns for every matrix whether its basis is renewed in this step."""

        def one(stored: Any, shift: Any) -> Array:
            return self.projector.is_due(stored, clock.count + shift)

        # A sum under way stands in the coordinates of the basis that it began with.
        wanted = self.lift(one, stored, self.shift) | pending
        return wanted if clock.open is None else clock.open & wanted

    def refresh(
        self, clock: Clock, at: At, gradient: Operand, before: Renewable
    ) -> Renewable:
        """Renews the matrices that are due and healthy; the rest stay as they are."""
        if not self.projector.stores_basis:
            return before

        def one(due: Array, at: At, gradient: Operand, before: Renewable) -> Renewable:
            return jax.lax.cond(
                due, lambda: self._attempt(clock, at, gradient, before), lambda: before
            )

        due = self.due(clock, before.stored, before.pending)
        if not self.matrix.batch:
            return one(due, at, gradient, before)
        # One scalar for the leaf, so that a step without a refresh pays nothing, and
        # one for each matrix inside.
        return jax.lax.cond(
            jnp.any(due),
            lambda: self.one_by_one(one, due, at, gradient, before),
            lambda: before,
        )

    def _attempt(
        self, clock: Clock, at: At, gradient: Operand, before: Renewable
    ) -> Renewable:
        """Renews one matrix, unless its gradient cannot tell a subspace."""
        owed = before._replace(pending=jnp.ones_like(before.pending))
        at = at._replace(cold=before.pending, moments=before.moments)
        return jax.lax.cond(
            _healthy(gradient),
            lambda: self._renew(clock, at, gradient, before, owed),
            lambda: owed,
        )

    def _renew(self, clock, at, gradient, before: Renewable, owed: Renewable):
        new = self.projector.refresh(self.matrix, gradient, before.stored, at)
        self._check_type(before.stored, new)
        # Signs come before the rotation, which has to lead to the vectors that stay.
        # Packing comes last, so that both see the new basis before it is rounded.
        if self.transport.aligns:
            new = self.projector.align(before.stored, new)
        moments = before.moments
        if self.transport.moves:
            rotation = self.projector.rotation(before.stored, new)
            moments = self.transport.move(moments, rotation, clock.count)
        stored = self.projector.pack(new)
        renewed = Renewable(stored, jnp.zeros_like(before.pending), moments)
        # Of the new basis before it is packed: a codec turns NaN into a number.
        good = _finite(new)
        if self.transport.moves:
            good &= _finite(moments)
        return where(good, renewed, owed)

    def _check_type(self, stored: Any, new: Any) -> None:
        """Raises if a refresh returns what cannot be stored in the old one's place."""
        packed = jax.eval_shape(self.projector.pack, new)
        found, expected = jax.tree.map(_type, (packed, stored))
        if found != expected:
            matrix, name = self.matrix, type(self.projector).__name__
            raise ValueError(
                f"{name}.refresh returned {found} for a matrix [m={matrix.m}, "
                f"n={matrix.n}] at rank {matrix.rank}, and {name}.start {expected}; "
                "they must be the same. A basis is [m, rank]."
            )

    def basis(self, at: At, stored: Any) -> Any:
        """Returns what the projector uses this step, with leading batch axes."""
        return self.lift(self.basis_of, stored, at)

    def basis_of(self, stored: Any, at: At) -> Any:
        return self.projector.basis(self.matrix, stored, at)

    def advance(self, clock: Clock, opened: Opened, pending: Any) -> Any:
        """Moves the bases after use, but for those that were found in this step.

        (Or early in the accumulation that ends with the bracket's first step.)
        """

        def one(at, gradient: Operand, projected, cold, stored):
            good = _healthy(gradient) & ~cold & (clock.count > 0)
            new = self.projector.advance(self.matrix, stored, gradient, projected, at)
            return where(good & _finite(new), new, stored)

        trees = (opened.gradient, opened.low, pending, opened.renewed.stored)
        return self.one_by_one(one, opened.at, *trees)


def where(flag: Array, after: Any, before: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), after, before)


def _healthy(gradient: Operand) -> Array:
    # One reduction tells all: a maximum with a NaN or an infinity in it is not finite.
    return has_square(gradient.peak) & (gradient.peak > 0)


def _finite(stored: Any) -> Array:
    """Returns whether every number of one matrix' stored tree is finite."""
    return jnp.all(
        jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(stored)])
    )


def _type(x: Any) -> str:
    return f"{x.dtype}{[*x.shape]}"


@jax.custom_batching.custom_vmap
def _over_axes(flag: Array) -> Array:
    """Returns whether a flag holds anywhere along the axes of ``vmap``."""
    return flag


@_over_axes.def_vmap
def _(size: int, batched: Any, flag: Array) -> tuple[Array, bool]:
    del size
    return _over_axes(jnp.any(flag, 0) if batched[0] else flag), False
