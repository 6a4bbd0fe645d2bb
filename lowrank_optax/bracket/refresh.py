"""When a matrix gets a new basis, and what happens to its moments then.

A refresh of a leaf is one ``lax.cond`` on a scalar, so a step without one pays
nothing; the matrices of a stack run through ``lax.map``, where each has a scalar
predicate of its own (a predicate batched by ``vmap`` would run both branches).
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.leaves.slices import current_layer
from lowrank_optax.projectors import At, Projector
from lowrank_optax.transport import Transport

PRNG = "threefry2x32"


class Clock(NamedTuple):
    """The bracket's time.

    Attributes:
      count: steps of the inner optimizer taken so far.
      open: False in the middle of a gradient accumulation, when the sum under way
        fixes the basis.
      key_data: the bracket's key.
    """

    count: Array
    open: Array
    key_data: Array


class LeafBasis(NamedTuple):
    """What a refresh may change of one leaf, each with leading batch axes.

    A projector that stores nothing has nothing pending either, ``()``.
    """

    stored: Any
    pending: Any
    moments: Any = ()


@dataclasses.dataclass(frozen=True)
class Refresher:
    """The refresh of one leaf: static facts in, a pure function out.

    Attributes:
      matrix: the leaf's view.
      projector: forms the basis of one matrix.
      transport: carries signs and moments over.
      phase: steps by which this leaf's matrices refresh early, one per matrix.
    """

    matrix: Matrix
    projector: Projector
    transport: Transport
    phase: tuple[int, ...]

    @property
    def reads_moments(self) -> bool:
        """Whether moments take part in the refresh."""
        return self.transport.moves or self.projector.reads_moments

    def init(self) -> LeafBasis:
        """Returns the stored bases ``[*batch, ...]`` and the pending flags."""
        batch = self.matrix.batch_shape
        one = self.projector.start(self.matrix)
        stored = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), one)
        pending = jnp.ones(batch, jnp.bool_) if self.projector.stores_basis else ()
        return LeafBasis(stored, pending)

    def due(self, clock: Clock, leaf: LeafBasis) -> Array:
        """Returns for every matrix, stacked flat, whether it is due in this step."""
        stored = jax.tree.map(lambda x: _flat(self, x), leaf.stored)
        due = self.projector.is_due(stored, clock.count + self._shift())
        return clock.open & (due | _flat(self, leaf.pending))

    def refresh(self, clock: Clock, gradient: Array, leaf: LeafBasis) -> LeafBasis:
        """Renews the matrices that are due and healthy; the rest stay as they are."""
        if not self.projector.stores_basis:
            return leaf
        # A branch's operands are materialized on every step: hand the gradient over
        # in stored order, and transpose it inside.
        gradient = self.matrix.flip(gradient)
        at = self._at(clock)
        due = self.due(clock, leaf)
        if not self.matrix.batch:
            one = jax.tree.map(lambda x: x[0], (at, due))
            return jax.lax.cond(
                one[1],
                lambda: self._attempt(clock, one[0], gradient, leaf),
                lambda: leaf,
            )

        def each(args):
            at, due, gradient, leaf = args
            return jax.lax.cond(
                due, lambda: self._attempt(clock, at, gradient, leaf), lambda: leaf
            )

        def stack():
            flat = jax.tree.map(lambda x: _flat(self, x), (gradient, leaf))
            out = jax.lax.map(each, (at, due, *flat))
            return jax.tree.map(lambda x, like: x.reshape(like.shape), out, leaf)

        return jax.lax.cond(jnp.any(due), stack, lambda: leaf)

    def basis(self, clock: Clock, stored: Any) -> Any:
        """Returns what the projector uses this step, with leading batch axes."""

        def form(at, stored):
            return self.projector.basis(self.matrix, stored, at)

        at = self._at(clock)
        if not self.matrix.batch:
            return form(jax.tree.map(lambda x: x[0], at), stored)
        flat = jax.tree.map(lambda x: _flat(self, x), stored)
        out = jax.vmap(form)(at, flat)
        batch = self.matrix.batch_shape
        return jax.tree.map(lambda x: x.reshape((*batch, *x.shape[1:])), out)

    def each(self, clock: Clock, stored: Any, function: Callable, *trees: Any) -> Any:
        """Returns ``function(matrix, basis, *trees)`` for the matrices of the leaf.

        All at once, or layer by layer if they are worked on in turn: then a basis that
        is stored in parts on a mesh is whole for one layer at a time.
        """
        matrix = self.matrix
        if not matrix.in_turn:
            return function(matrix, self.basis(clock, stored), *trees)
        one, layers = matrix.of_one_layer(), matrix.shape[0]
        leaves, treedef = jax.tree.flatten((self._at(clock), stored, trees))
        cut = [x.shape[:1] == (layers,) for x in leaves]

        def layer(parts: list[Array]) -> Any:
            part = iter(parts)
            mixed = [next(part) if c else x for c, x in zip(cut, leaves, strict=True)]
            at, stored, trees = treedef.unflatten(mixed)
            return function(one, self.projector.basis(one, stored, at), *trees)

        parts = [x for c, x in zip(cut, leaves, strict=True) if c]
        return jax.lax.map(layer, parts)

    def advance(
        self,
        clock: Clock,
        gradient: Array,
        projected: Array,
        before: LeafBasis,
        leaf: LeafBasis,
    ) -> LeafBasis:
        """Moves the bases after use, but for those that were found in this step.

        (Or early in the accumulation that ends with the bracket's first step.)
        """
        began = clock.count > 0
        # In stored order, as the operands of a loop are materialized.
        gradient = self.matrix.flip(gradient)

        def move(args):
            at, gradient, projected, cold, stored = args
            gradient = self.matrix.flip(gradient)
            peak = jnp.max(jnp.abs(gradient))
            healthy = jnp.isfinite(peak) & (peak > 0) & ~cold & began
            new = self.projector.advance(self.matrix, stored, gradient, projected, at)
            good = healthy & _finite(new)
            return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, stored)

        at, trees = self._at(clock), (gradient, projected, before.pending, leaf.stored)
        if not self.matrix.batch:
            one = jax.tree.map(lambda x: x[0], at)
            return leaf._replace(stored=move((one, *trees)))
        flat = jax.tree.map(lambda x: _flat(self, x), trees)
        out = jax.lax.map(move, (at, *flat))
        like = leaf.stored
        stored = jax.tree.map(lambda x, like: x.reshape(like.shape), out, like)
        return leaf._replace(stored=stored)

    def _attempt(self, clock: Clock, at: At, gradient: Array, leaf: LeafBasis):
        peak = jnp.max(jnp.abs(gradient))
        healthy = jnp.isfinite(peak) & (peak > 0)
        keep = leaf._replace(pending=jnp.ones_like(leaf.pending))
        at = at._replace(cold=leaf.pending, moments=leaf.moments)
        return jax.lax.cond(
            healthy, lambda: self._renew(clock, at, gradient, leaf, keep), lambda: keep
        )

    def _renew(self, clock: Clock, at: At, gradient: Array, leaf: LeafBasis, keep):
        view = self.matrix.flip(gradient)
        new = self.projector.refresh(self.matrix, view, leaf.stored, at)
        if self.transport.aligns:
            new = self.projector.align(leaf.stored, new)
        moments = leaf.moments
        if self.transport.moves:
            rotation = self.projector.rotation(leaf.stored, new)
            moments = self.transport.move(moments, rotation, clock.count)
        stored = self.projector.pack(new)
        renewed = LeafBasis(stored, jnp.zeros_like(leaf.pending), moments)
        good = _finite(new)
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), renewed, keep)

    def _shift(self) -> Array:
        gap = self.projector.update_proj_gap
        return jnp.asarray([-phase % gap for phase in self.phase], jnp.int32)

    def _at(self, clock: Clock) -> At:
        """Returns place and time of every matrix of the leaf, stacked flat."""
        epoch = (clock.count + self._shift()) // self.projector.update_proj_gap
        layer = jnp.arange(len(self.phase), dtype=jnp.int32)
        if (one := current_layer()) is not None:
            layer = layer + one.index * len(self.phase)
        key = jax.random.wrap_key_data(clock.key_data, impl=PRNG)
        key = jax.random.fold_in(key, zlib.crc32(self.matrix.path.encode()))

        def fold(layer, epoch):
            return jax.random.fold_in(jax.random.fold_in(key, layer), epoch)

        cold = jnp.zeros(len(self.phase), jnp.bool_)
        count = jnp.broadcast_to(clock.count, cold.shape)
        return At(jax.vmap(fold)(layer, epoch), epoch, layer, cold, (), count)


def phases(matrices: list[Matrix], gap: int, stagger: bool) -> list[tuple[int, ...]]:
    """Spreads the refreshes of all matrices evenly over the gap, or not at all."""
    if stagger and current_layer() is not None:
        raise ValueError(
            "stagger=True spreads refreshes over all matrices of a tree, and a "
            "layer-wise step sees one layer of it at a time. Use stagger=False."
        )
    counts = [math.prod(matrix.batch_shape) for matrix in matrices]
    total, starts = sum(counts), np.cumsum([0, *counts])
    return [
        tuple(int(start + i) * gap // total if stagger else 0 for i in range(count))
        for start, count in zip(starts, counts, strict=False)
    ]


def _finite(stored: Any) -> Array:
    """Returns whether every number of one matrix' stored tree is finite."""
    return jnp.all(
        jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(stored)])
    )


def _flat(refresher: Refresher, x: Array) -> Array:
    """Merges the batch axes into one (an unstacked leaf gets one of size 1)."""
    batch = len(refresher.matrix.batch)
    return x.reshape((len(refresher.phase), *x.shape[batch:]))
