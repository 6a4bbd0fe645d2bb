"""``SubspaceState``: what a bracket keeps; beside it its slots, and what it shows."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowrank_optax.bracket.leaf import LowLeaf
from lowrank_optax.leaves.matrix import Axes, rebox, refill, unbox
from lowrank_optax.leaves.part import Part
from lowrank_optax.projectors import Projector
from lowrank_optax.quantization import is_quantized
from lowrank_optax.recovery import Recovery
from lowrank_optax.transport import Transport


@dataclasses.dataclass(frozen=True, eq=False)
class Bracket(Part):
    """The slots of one bracket: the parts of a step, and nothing about any tree."""

    projector: Projector
    inner: Any
    transport: Transport
    recovery: Recovery | None
    full: Any
    scale: Any
    learning_rate: Any
    dtype: Any


class SubspaceState(NamedTuple):
    """State of a bracket; trees have the parameters' structure.

    Attributes:
      count: updates of the inner optimizer so far.
      key: key data of the bracket's random numbers, ``uint32[2]``.
      basis: what the projector stores per matrix, ``MaskedNode`` on full leaves.
      pending: per matrix, whether a refresh is owed (at the start, and after a
        zero or non-finite gradient), ``MaskedNode`` on full leaves.
      inner_state: the inner optimizer's, on projections and (without ``full``) on
        full leaves.
      full_state: the state of ``full``, or ``()``.
      recovery_state: the recovery's per matrix, or ``()``.
    """

    count: Array
    key: Array
    basis: Any
    pending: Any
    inner_state: Any
    full_state: Any
    recovery_state: Any


class SubspaceView(NamedTuple):
    """What an inner transformation may read, passed as extra argument ``subspace``.

    Read-only and never stored; trees are structured like the updates that the
    inner transformation sees.

    Attributes:
      gradient: the gradient, matrices as ``[*batch, m, n]``.
      params: the parameters likewise, or None.
      projected: what the inner transformation was given.
      basis: the basis of this step, None on full leaves.
      previous_basis: the basis of the step before, None on full leaves and ``()``
        where the projector stores none.
      state_before: inner state before transport.
      state_transported: inner state after transport, before the update.
      matrices: the static ``Matrix`` of each projected leaf, None on full leaves.
    """

    gradient: Any
    params: Any
    projected: Any
    basis: Any
    previous_basis: Any
    state_before: Any
    state_transported: Any
    matrices: Any


def start_recovery(door: LowLeaf, leaf: Any) -> Any:
    """Returns the recovery's first state for a leaf, in boxes like the leaf's own."""
    if door.recovery is None:
        return ()
    if door.recovery.whole:
        zeros = jnp.zeros(unbox(leaf).shape, jnp.float32)
        return door.recovery.start_whole(refill(leaf, zeros))
    state = door.start_recovery()
    return refill(leaf, state) if door.recovery.like_leaf else state


def box_basis(leaf: Any, stored: Any, door: LowLeaf) -> Any:
    """Puts boxes like the leaf's around what has axes in common with it."""
    batch = door.matrix.batch_axes

    def box(x: Any, axes: Axes) -> Any:
        return x if is_quantized(x) or not any(axes) else rebox(leaf, x, batch + axes)

    axes = door.projector.axes(door.matrix)
    return jax.tree.map(box, stored, axes, is_leaf=is_quantized)
