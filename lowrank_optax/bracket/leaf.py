"""``LowLeaf`` and ``FullLeaf``: a leaf's way to the inner optimizer, and back.

Both ``open`` before the inner optimizer and ``close`` after it. The parts of a bracket
are written for one matrix; ``Lifted`` alone knows of stacks. Leaves of equal shapes
share one trace of either door, since the path enters as a number.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax._meshes import vary_like
from lowrank_optax.bracket import match
from lowrank_optax.bracket.bases import Bases, where
from lowrank_optax.bracket.state import Clock, Kept, Moments, Opened, Renewable
from lowrank_optax.leaves.boxes import refill, unbox
from lowrank_optax.leaves.part import Part
from lowrank_optax.linalg.products import Operand, has_square, kept_if
from lowrank_optax.projectors import At
from lowrank_optax.recovery import LeafView, Recovered, Recovery


@dataclasses.dataclass(frozen=True, eq=False)
class FullLeaf(Part):
    """A leaf that is not projected: it goes through at full size.

    Attributes:
      dtype: the inner optimizer's.
    """

    dtype: Any

    def open(
        self, clock: Clock, gradient: Any, weights: Any, kept: Kept, moments: Any
    ) -> Opened:
        """Casts the gradient and the parameter to the inner's dtype."""
        del kept, moments
        low, seen = cast(gradient, self.dtype), Operand(gradient)
        low = _shown(low, clock.open is not None)
        if weights is None:
            return Opened(low, None, seen, None)
        return Opened(low, cast(weights, self.dtype), seen, Operand(weights))

    def close(
        self,
        clock: Clock,
        opened: Opened,
        direction: Any,
        kept: Kept,
        moments: Moments,
        gain: Any,
        done: Any,
    ) -> tuple[Any, None, Kept]:
        """Returns the update in the gradient's dtype.

        That of an integer is a real number, as in Optax: cut to an integer, it would be
        nothing.
        """
        del moments, done
        gradient = opened.gradient.stored
        if isinstance(direction, optax.MaskedNode):  # no elements, and no direction
            return gradient, None, kept
        if jnp.issubdtype(gradient.dtype, jnp.integer):
            return stepped(direction, gain), None, kept
        sound = has_square(gradient)
        if clock.open is not None and sound is not True:
            sound = sound & jnp.isfinite(direction)
        update = cast(stepped(direction, gain), gradient.dtype)
        return kept_if(sound, update), None, kept


@dataclasses.dataclass(frozen=True, eq=False)
class LowLeaf(Bases):
    """A projected leaf.

    Attributes:
      recovery: gives the update its share from outside the subspace, or None.
      scale: factor on the lifted direction.
      match: whose updates the leaf's are as long as, "adamw" or None.
      dtype: the inner optimizer's.
      update_dtype: the gradient's, and so the update's.
    """

    recovery: Recovery | None
    scale: Any
    match: str | None
    dtype: Any
    update_dtype: Any

    @property
    def in_turn(self) -> bool:
        """Whether its layers are projected and lifted one after another."""
        # Copied layer by layer, entries would only be written once more.
        return self.matrix.in_turn and not self.projector.entrywise

    def start(self) -> Kept:
        """Returns what is kept of the basis before the first step."""
        batch = self.matrix.batch_shape
        one = self.projector.start(self.matrix)
        stored = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), one)
        pending = jnp.ones(batch, jnp.bool_) if self.projector.stores_basis else ()
        sample = match.start(self.matrix) if self.match else ()
        return Kept(stored, pending, sample=sample)

    def start_recovery(self, leaf: Any) -> Any:
        """Returns the recovery's first state for a leaf, in boxes like the leaf's."""
        if self.recovery is None:
            return ()
        if self.recovery.whole:
            # Residuals come in float32 at least, and so the state starts in float32
            # even where the leaf is in bfloat16.
            zeros = jnp.zeros(unbox(leaf).shape, jnp.float32)
            return self.recovery.start_whole(refill(leaf, zeros))
        if self.recovery.like_leaf:
            return refill(leaf, self.recovery.start(self.matrix))
        batch, one = self.matrix.batch_shape, self.recovery.start(self.matrix.single)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), one)

    # Before the inner optimizer.

    # The leaf itself is an argument: leaves that differ in their arrays alone are
    # traced once, inside a jitted step, too.
    @jax.jit
    def open(
        self, clock: Clock, gradient: Array, weights: Any, kept: Kept, moments: Any
    ) -> Opened:
        """Views the leaf as matrices, renews their bases and projects."""
        clock, gradient, weights, kept, moments = alike(
            clock, gradient, weights, kept, moments
        )
        at = self.at(clock)
        seen = self.matrix.operand(gradient)
        wanted, sample = (), kept.sample
        if self.match:
            wanted, sample = match.wanted(self, seen, sample, clock.count)
        if self.recovery is not None and not self.recovery.whole:
            entering = self._as_matrices(kept.recovery)
            seen = self.lift(self.recovery.enter, entering, seen)
        with jax.named_scope("lowrank/refresh"):
            before = Renewable(kept.stored, kept.pending, moments)
            renewed = self.refresh(clock, at, seen, before)
        with jax.named_scope("lowrank/project"):
            basis = self.basis(at, renewed.stored)
            previous = ()
            if self.projector.stores_basis:
                previous = self.basis(at, kept.stored)
            whole = None if weights is None else self.matrix.operand(weights)
            low, low_weights = self.down(at, renewed.stored, basis, (seen, whole))
            low = _shown(low, clock.open is not None)
        return Opened(
            low,
            low_weights,
            seen,
            whole,
            at,
            basis,
            previous,
            renewed,
            wanted,
            sample,
        )

    def down(self, at: At, stored: Any, basis: Any, trees: Any) -> Any:
        """Returns ``P^T X`` in the inner's dtype, for every operand X of a tree."""

        def one(basis: Any, trees: Any) -> Any:
            return jax.tree.map(
                lambda x: cast(self.projector.down(self.matrix, basis, x), self.dtype),
                trees,
                is_leaf=lambda x: isinstance(x, Operand),
            )

        def formed(at: At, stored: Any, trees: Any) -> Any:
            return one(self.basis_of(stored, at), trees)

        # Formed inside the loop, a basis that is cut over devices is gathered for one
        # layer at a time.
        if self.in_turn:
            return self.lift(formed, at, stored, trees, in_turn=True)
        return self.lift(one, basis, trees)

    # After it.

    @jax.jit
    def close(
        self,
        clock: Clock,
        opened: Opened,
        direction: Array,
        kept: Kept,
        moments: Moments,
        gain: Any,
        done: Any,
    ) -> tuple[Array, Any, Kept]:
        """Recovers, lifts, and moves the bases that move after use.

        Args:
          clock: the bracket's time.
          opened: the leaf as it was opened.
          direction: ``[*batch, r, n]``, from the inner optimizer.
          kept: what was kept before this step.
          moments: the moments that the recovery may read.
          gain: the negative learning rate, None if it is applied elsewhere.
          done: whether an accumulation is complete, None where there is none.

        Returns:
          The update in the leaf's own shape, what goes to the recovery's transformation
          of whole leaves (or None), and what is kept from here on.
        """
        clock, opened, direction, kept, moments = alike(
            clock, opened, direction, kept, moments
        )
        renewed = opened.renewed
        own = self.recovery is not None and not self.recovery.whole
        state = self._as_matrices(kept.recovery) if own else ()
        update = functools.partial(self._finish, clock, gain)
        trees = (direction, opened, state, moments)
        if self.in_turn:
            # Without the whole basis: each layer's is formed in its turn.
            trees = (
                direction,
                opened._replace(weights=None, basis=None),
                state,
                moments,
            )
        with jax.named_scope("lowrank/backproject"):
            lifted, outside, state = self.lift(update, *trees, in_turn=self.in_turn)
        recovery = kept.recovery
        if own:
            recovery = when(done, self._as_leaf(state), kept.recovery)
        stored = renewed.stored
        if self.projector.advances:
            with jax.named_scope("lowrank/advance"):
                moved = self.advance(clock, opened, kept.pending)
                stored = when(done, moved, stored)
        if outside is not None:
            outside = self.matrix.leaf(outside)
        update = self.matrix.leaf(lifted)
        return update, outside, Kept(stored, renewed.pending, recovery, opened.sample)

    def _finish(
        self,
        clock: Clock,
        gain: Any,
        direction: Array,
        opened: Opened,
        state: Any,
        moments: Moments,
    ) -> tuple[Operand, Any, Any]:
        """Returns ``P low + G * phi + addend`` of one matrix, in its stored order."""
        basis = opened.basis
        if self.in_turn:
            basis = self.basis_of(opened.renewed.stored, opened.at)
        gradient, low = opened.gradient, opened.low
        if clock.open is not None:
            low, direction = _shown(low), kept_if(jnp.isfinite(direction), direction)
        view = LeafView(
            gradient=gradient,
            projected=low,
            direction=direction,
            basis=basis,
            previous_basis=opened.previous,
            moments=moments.after,
            carried_moments=moments.carried,
            previous_moments=moments.before,
            orthonormal=self.projector.orthonormal and _is_exact(basis),
            up=functools.partial(self.projector.up, self.matrix),
            anywhere=self.anywhere,
            count=clock.count,
            key=opened.at.key,
        )
        recovered = Recovered(self.scale * direction)
        if self.recovery is not None:
            recovered, state = self.recovery.update(
                self.matrix, state, view, self.scale
            )
        length = match.length(view, recovered) if self.match else None
        if length is not None:
            m, n = gradient.shape
            factor = match.ratio(opened.wanted, length / (m * n) ** 0.5)
            gain = factor if gain is None else gain * factor
        terms = []
        # The learning rate multiplies the thin factors where it can: behind the product
        # it would take a pass over [m, n].
        if recovered.low is not None:
            low = stepped(recovered.low, gain)
            terms.append(self.projector.up(self.matrix, basis, low))
        if recovered.phi is not None:
            phi, bound = stepped(recovered.phi, gain), recovered.bound
            # A gradient in bfloat16 is widened, or phi would be rounded to 8 bits.
            term = gradient.map(_shown).astype(phi.dtype).times(phi)
            if bound is not None:
                bound = gradient.along(jnp.abs(stepped(bound, gain)))
                term = term.map(lambda x: jnp.clip(x, -bound, bound))
            terms.append(term)
        if recovered.addend is not None:
            addend = Operand.of(recovered.addend, self.matrix.transposed)
            terms.append(addend.map(lambda x: stepped(_shown(x), gain)))
        outside = recovered.outside
        if outside is not None:
            outside = outside.map(_shown)
        total = functools.reduce(lambda a, b: a.map(jnp.add, b), terms)
        if outside is None:  # else one more term is to come
            if self.match and length is None:
                total = match.resize(total, opened.wanted, gain)
            total = total.map(lambda x: cast(x, self.update_dtype))
        return total, outside, state

    def resized(self, update: Any, opened: Opened, gain: Any) -> Array:
        """Returns the leaf's update as long as wanted, if anything is."""
        if not self.match:
            return update
        update = self.matrix.operand(update)
        return self.matrix.leaf(match.resized(self, update, opened.wanted, gain))

    def _as_matrices(self, state: Any) -> Any:
        assert self.recovery is not None
        return self.matrix.operand(state) if self.recovery.like_leaf else state

    def _as_leaf(self, state: Any) -> Any:
        assert self.recovery is not None
        return self.matrix.leaf(state) if self.recovery.like_leaf else state


def alike(*trees: Any) -> tuple[Any, ...]:
    """Returns the trees with all arrays each device's own, if any of them is."""
    return vary_like(trees, trees)


def _is_exact(basis: Any) -> bool:
    """Whether the basis is stored in at least float32's precision."""
    least = jnp.finfo(jnp.float32).eps
    return all(jnp.finfo(x.dtype).eps <= least for x in jax.tree.leaves(basis))


def cast(leaf: Any, dtype: Any) -> Any:
    """Casts real floating-point leaves; counters, complex and keys stay."""
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def stepped(x: Any, gain: Any) -> Any:
    """Multiplies by the negative learning rate, if it is the bracket's."""
    # The rate takes the dtype of x: as a float32 array it would widen a bfloat16 x.
    return x if gain is None else x * gain.astype(x.dtype)


def when(done: Any, after: Any, before: Any) -> Any:
    """Returns ``before`` in the middle of an accumulation."""
    return after if done is None else where(done, after, before)


def _shown(x: Any, accumulates: bool = False) -> Any:
    """Returns ``x`` with zeros for numbers without a square.

    Entry by entry, in the one place that uses the result: a mask for two uses would be
    written out, and one for a column costs a pass. An accumulation is shown what is not
    finite: it may have been told to skip that.
    """
    sound = has_square(x)
    if accumulates and sound is not True:
        sound = sound | ~jnp.isfinite(x)
    return kept_if(sound, x)
