"""``SubspaceState``: what a bracket keeps; beside it its slots, and what it shows."""

import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Array

from lowrank_optax.bracket.storage import Storage
from lowrank_optax.leaves.part import Part
from lowrank_optax.linalg.products import Operand
from lowrank_optax.projectors import Projector
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
    full_scale: Any
    match: str | None
    learning_rate: Any
    dtype: Any
    storage: Storage


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
      sample: AdamW's moments of some entries of every matrix, for ``match``, or ``()``.
    """

    count: Array
    key: Array
    basis: Any
    pending: Any
    inner_state: Any
    full_state: Any
    recovery_state: Any
    sample: Any = ()


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
      clock: the bracket's time, and its key.
    """

    gradient: Any
    params: Any
    projected: Any
    basis: Any
    previous_basis: Any
    state_before: Any
    state_transported: Any
    matrices: Any
    clock: "Clock"


class Clock(NamedTuple):
    """The bracket's time.

    Attributes:
      count: steps of the inner optimizer taken so far.
      open: False in the middle of a gradient accumulation, when the sum under way
        fixes the basis; None where nothing accumulates.
      key_data: the bracket's key.
      layer: which layer the first one of every stack is; 0 where stacks are whole.
    """

    count: Array
    open: Array | None
    key_data: Array
    layer: Array | int


class Kept(NamedTuple):
    """What the bracket keeps of one leaf; ``()`` where there is nothing.

    Attributes:
      stored: what the projector stores, with leading batch axes.
      pending: per matrix, whether a refresh is owed.
      recovery: the recovery's state.
      sample: AdamW's moments of some entries.
    """

    stored: Any = ()
    pending: Any = ()
    recovery: Any = ()
    sample: Any = ()


class Renewable(NamedTuple):
    """What a refresh may change of a matrix: of ``Kept``, and its moments."""

    stored: Any
    pending: Any
    moments: Any


class Opened(NamedTuple):
    """A leaf on its way.

    Attributes:
      low: what the inner optimizer is given: ``R = P^T G``, or a full gradient.
      low_weights: the parameter likewise, or None.
      gradient: the gradient ``[*batch, m, n]``, with what the recovery added to it.
      weights: the parameter likewise, or None.
      at: place and time of every matrix, None on full leaves.
      basis: the basis of this step, None on full leaves.
      previous: that of the step before, ``()`` where none is stored.
      renewed: what is kept from here on, and the moments in the new coordinates.
      wanted: the root mean square that every matrix' update shall have, ``()`` if none.
      sample: what tells it, from here on.
    """

    low: Array
    low_weights: Any
    gradient: Operand
    weights: Operand | None
    at: Any = None
    basis: Any = None
    previous: Any = None
    renewed: Any = None
    wanted: Any = ()
    sample: Any = ()


class Moments(NamedTuple):
    """One leaf's moments for a recovery, each a tuple of dictionaries by field.

    Attributes:
      after: after the inner update.
      carried: before it, in the coordinates of this step's basis.
      before: before transport, in those of the previous one.
    """

    after: Any = ()
    carried: Any = ()
    before: Any = ()
