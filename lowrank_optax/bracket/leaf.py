"""``LowLeaf`` and ``FullLeaf``: a leaf's way to the inner optimizer, and back.

Both ``open`` before the inner optimizer and ``close`` after it. The parts of a bracket
are written for one matrix; ``LowLeaf.lift`` alone knows of stacks. Leaves of equal
shapes share one trace of either door, since the path enters as a number.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lowrank_optax._meshes import varied_axes, vary_like
from lowrank_optax.bracket import match
from lowrank_optax.bracket.state import Clock, Kept, Moments, Opened, Renewable
from lowrank_optax.leaves.boxes import refill, unbox
from lowrank_optax.leaves.matrix import Matrix
from lowrank_optax.leaves.part import Part
from lowrank_optax.linalg.products import Operand, has_square, kept_if
from lowrank_optax.projectors import At, Projector
from lowrank_optax.recovery import LeafView, Recovered, Recovery
from lowrank_optax.transport import Transport

# Named here, and not left to `jax_default_prng_impl`: the state has bare key data, and
# a run that goes on under another default must draw the same numbers.
PRNG = "threefry2x32"


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
        del clock, moments, done
        gradient = opened.gradient.stored
        if isinstance(direction, optax.MaskedNode):  # no elements, and no direction
            return gradient, None, kept
        if jnp.issubdtype(gradient.dtype, jnp.integer):
            return stepped(direction, gain), None, kept
        update = cast(stepped(direction, gain), gradient.dtype)
        return kept_if(has_square(gradient), update), None, kept


@dataclasses.dataclass(frozen=True, eq=False)
class LowLeaf(Part):
    """A projected leaf.

    Attributes:
      matrix: how it is seen.
      projector: of this leaf.
      transport: carries signs and moments over to a new basis.
      recovery: gives the update its share from outside the subspace, or None.
      scale: factor on the lifted direction.
      match: whose updates the leaf's are as long as, "adamw" or None.
      dtype: the inner optimizer's.
      update_dtype: the gradient's, and so the update's.
      in_turn: whether the layers are projected and lifted one after another, so that a
        basis that lies in parts on a mesh is whole for one layer at a time.
      path: the leaf's path as a number, for its random keys.
      shift: by how many steps each matrix refreshes early, ``int32 [*batch]``.
    """

    matrix: Matrix
    projector: Projector
    transport: Transport
    recovery: Recovery | None
    scale: Any
    match: str | None
    dtype: Any
    update_dtype: Any
    in_turn: bool
    path: Any
    shift: Any

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

    def _anywhere(self, flag: Array) -> Array:
        """Whether the flag holds for any matrix that is worked on at once."""
        if not self.matrix.batch or self.in_turn:
            return flag
        # A maximum over the mapped axes is one scalar for all, so that a branch on it
        # stays a branch where `vmap` would run both. Inside `jax.shard_map` JAX has no
        # collectives over axes of `vmap`.
        if varied_axes(flag):
            return _over_axes(flag)
        return jax.lax.pmax(flag.astype(jnp.int32), self._names) > 0

    def start(self) -> Kept:
        """Returns what is kept of the basis before the first step."""
        batch = self.matrix.batch_shape
        one = self.projector.start(self.matrix)
        stored = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), one)
        pending = jnp.ones(batch, jnp.bool_) if self.projector.stores_basis else ()
        sample = match.start(self.matrix) if self.match else ()
        sample = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), sample)
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
            one = functools.partial(match.wanted, self.matrix, count=clock.count)
            wanted, sample = self.lift(one, seen, sample)
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
            low = self.down(at, renewed.stored, basis, seen)
            low = _shown(low, clock.open is not None)
            whole = low_weights = None
            if weights is not None:
                whole = self.matrix.operand(weights)
                low_weights = self.down(at, renewed.stored, basis, whole)
        return Opened(
            low,
            low_weights,
            seen,
            whole,
            basis,
            previous,
            renewed,
            wanted,
            sample,
        )

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
        return _where(good, renewed, owed)

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
        return self.lift(self._basis, stored, at)

    def _basis(self, stored: Any, at: At) -> Any:
        return self.projector.basis(self.matrix, stored, at)

    def down(self, at: At, stored: Any, basis: Any, x: Operand) -> Array:
        """Returns ``P^T X`` in the inner's dtype."""

        def one(basis: Any, x: Operand) -> Array:
            return cast(self.projector.down(self.matrix, basis, x), self.dtype)

        def formed(at: At, stored: Any, x: Operand) -> Array:
            return one(self._basis(stored, at), x)

        # Formed inside the loop, a basis that is cut over devices is gathered for one
        # layer at a time.
        if self.in_turn:
            return self.lift(formed, at, stored, x, in_turn=True)
        return self.lift(one, basis, x)

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
        at, renewed = self.at(clock), opened.renewed
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
            lifted, outside, state = self.lift(update, at, *trees, in_turn=self.in_turn)
        recovery = kept.recovery
        if own:
            recovery = when(done, self._as_leaf(state), kept.recovery)
        stored = renewed.stored
        if self.projector.advances:
            with jax.named_scope("lowrank/advance"):
                stored = when(done, self._advance(clock, at, opened, kept), stored)
        if outside is not None:
            outside = self.matrix.leaf(outside)
        update = self.matrix.leaf(lifted)
        return update, outside, Kept(stored, renewed.pending, recovery, opened.sample)

    def _finish(
        self,
        clock: Clock,
        gain: Any,
        at: At,
        direction: Array,
        opened: Opened,
        state: Any,
        moments: Moments,
    ) -> tuple[Operand, Any, Any]:
        """Returns ``P low + G * phi + addend`` of one matrix, in its stored order."""
        basis = opened.basis
        if self.in_turn:
            basis = self._basis(opened.renewed.stored, at)
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
            anywhere=self._anywhere,
            count=clock.count,
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
                total = _resized(total, opened.wanted, gain)
            total = total.map(lambda x: cast(x, self.update_dtype))
        return total, outside, state

    def resized(self, update: Array, opened: Opened, gain: Any) -> Array:
        """Returns the leaf's update as long as wanted, if anything is."""
        if not self.match:
            return update
        one = functools.partial(_resized, gain=gain)
        return self.matrix.leaf(
            self.lift(one, self.matrix.operand(update), opened.wanted)
        )

    def _advance(self, clock: Clock, at: At, opened: Opened, kept: Kept) -> Any:
        """Moves the bases after use, but for those that were found in this step.

        (Or early in the accumulation that ends with the bracket's first step.)
        """

        def one(at, gradient: Operand, projected, cold, stored):
            good = _healthy(gradient) & ~cold & (clock.count > 0)
            new = self.projector.advance(self.matrix, stored, gradient, projected, at)
            return _where(good & _finite(new), new, stored)

        trees = (opened.gradient, opened.low, kept.pending, opened.renewed.stored)
        return self.one_by_one(one, at, *trees)

    def _as_matrices(self, state: Any) -> Any:
        assert self.recovery is not None
        return self.matrix.operand(state) if self.recovery.like_leaf else state

    def _as_leaf(self, state: Any) -> Any:
        assert self.recovery is not None
        return self.matrix.leaf(state) if self.recovery.like_leaf else state


def _resized(update: Operand, wanted: Array, gain: Any) -> Operand:
    """Returns one matrix' update, which has its learning rate, as long as wanted."""
    if gain is not None:
        wanted = wanted * jnp.abs(gain)
    factor = match.ratio(wanted, match.root_mean_square(update))
    return update.map(lambda x: x * factor.astype(x.dtype))


@jax.custom_batching.custom_vmap
def _over_axes(flag: Array) -> Array:
    """Returns whether a flag holds anywhere along the axes of ``vmap``."""
    return flag


@_over_axes.def_vmap
def _(size: int, batched: Any, flag: Array) -> tuple[Array, bool]:
    del size
    return _over_axes(jnp.any(flag, 0) if batched[0] else flag), False


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
    return after if done is None else _where(done, after, before)


def _where(flag: Array, after: Any, before: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), after, before)


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
