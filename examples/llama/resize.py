"""`as_saved` and `lines`: a run goes on with other flags, its state carried over."""

import collections
import dataclasses
import math
from typing import Any

import jax
import optax

import lowrank_optax as lro
from examples.llama.config import Resolved, TrainConfig, UsageError

# A state is made for these, and `lro.resize_state` carries it over to others.
FLAGS = ("rank", "update_proj_gap", "state_dtype", "optimizer")


def asked_for(config: TrainConfig) -> tuple[str, ...]:
    """Those that the command line says, so that nothing changes by being left out."""
    default = TrainConfig()
    return tuple(f for f in FLAGS if getattr(config, f) != getattr(default, f))


def as_saved(config: Resolved, identity: dict[str, Any]) -> Resolved:
    """The flags with which a checkpoint was made."""
    saved = {flag: identity.get(flag, getattr(config, flag)) for flag in FLAGS}
    return dataclasses.replace(config, **saved)


def check(
    old: optax.GradientTransformation, new: optax.GradientTransformation, params: Any
) -> None:
    """Raises if nothing could be kept; from shapes alone."""
    try:
        state = jax.eval_shape(old.init, params)
        jax.eval_shape(lambda x: lro.resize_state(x, old, new, params), state)
    except ValueError as error:
        reason = str(error).split("\n", 1)[0]
        raise UsageError(
            f"the run's state cannot go on with these flags: {reason}"
        ) from error


def lines(
    was: Resolved,
    now: Resolved,
    old: optax.GradientTransformation,
    new: optax.GradientTransformation,
    params: Any,
) -> list[str]:
    """What is done to the matrices, kind by kind, and to all of the state."""
    found = []
    counts: collections.Counter = collections.Counter()
    for before, after in zip(_rows(old, params), _rows(new, params), strict=True):
        ranks = tuple(row.matrix and row.matrix.rank for row in (before, after))
        matrix = before.matrix or after.matrix
        if matrix:
            counts[ranks] += math.prod(matrix.batch_shape)
    for (first, last), count in counts.items():
        if first == last:
            continue
        kept = f"moments kept in {min(first or 0, last or 0)} of {last} directions"
        if first is None:
            kept = "bases found in their first moments"
        if last is None:
            kept = "moments lifted to the whole matrix"
        sizes = [f"rank {rank}" if rank else "full" for rank in (first, last)]
        if first and last:
            sizes[1] = str(last)
        found.append(f"{' -> '.join(sizes)}: {count} matrices, {kept}")
    for flag in FLAGS[1:]:
        before, after = getattr(was, flag), getattr(now, flag)
        if before != after:
            found.append(f"{flag} {before} -> {after}")
    return found


def _rows(optimizer: optax.GradientTransformation, params: Any) -> Any:
    try:
        return lro.selection_report(optimizer, params).rows
    except ValueError:  # no bracket
        return ()
