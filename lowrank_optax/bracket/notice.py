"""``check_projected``: at ``init`` nothing stays full in silence."""

import collections
import contextlib
import contextvars
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from lowrank_optax.bracket.selection import (
    ALL_LINEAR,
    ConcludedAxesWarning,
    NotProjectedWarning,
    Selection,
)

# Frames of these are not the user's.
_LIBRARIES = {"lowrank_optax", "optax", "jax", "jaxlib", "flax", "equinox"}
_LIBRARIES |= {"beartype", "jaxtyping", "contextlib", "functools"}
_SHOWN = 4
_MATRICES = ("matrix", "unknown", "long")


# Whether nothing is said. No number that a step computes depends on it.
_QUIET: contextvars.ContextVar[bool] = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets an ``init`` be asked for its shapes: it says nothing, and raises nothing."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


def quiet_init(tx: Any) -> Callable[[Any], Any]:
    """Returns ``tx.init`` for a part of a tree, or for shapes that nobody trains."""

    def init(params: Any) -> Any:
        with quiet():
            return tx.init(params)

    return init


def check_projected(selection: Selection, leaves: Any) -> None:
    """Warns if a fresh bracket projects less than half, raises if none was meant.

    Args:
      selection: the bracket's options.
      leaves: the plans of all leaves.

    Raises:
      ValueError: if an explicit choice chooses no leaf.
    """
    if _QUIET.get():
        return
    leaves = [leaf for leaf in leaves if not leaf.empty]
    projected = [leaf for leaf in leaves if leaf.matrix]
    given = _explicit(selection)
    if given and leaves and not projected:
        raise ValueError(
            f"{given} chooses no leaf: nothing would be projected, and the state would "
            f"be the inner optimizer's at full size. Full are {_listed(leaves)}. "
            f"{_all_reasons()}"
        )
    if given and selection.select != ALL_LINEAR:
        return
    looked_at = [leaf for leaf in leaves if leaf.kind in _MATRICES]
    looked_at = [leaf for leaf in looked_at if _size(leaf) >= selection.min_size]
    total = sum(map(_size, looked_at))
    low = sum(_size(leaf) for leaf in projected)
    full = [leaf for leaf in looked_at if not leaf.matrix]
    if projected and (2 * low >= total or not full):
        _say_axes(selection, projected)
        return
    if not projected:
        full = full or [x for x in leaves if _is_named(x)]
        if not full:
            return  # vectors alone
        found = "projects nothing"
    else:
        found = f"projects {low:,} of the {total:,} elements of leaves like matrices"
    message = (
        f"lowrank_optax {found}; the rest keeps the inner optimizer's state at full "
        f"size. Full are {_listed(full)}. To mend it: {_mend(full)} {_all_reasons()}"
    )
    _warn(message, NotProjectedWarning)


def _say_axes(selection: Selection, projected: Any) -> None:
    """Warns if layers were concluded to lie on an axis that is not one of the first."""
    if _explicit(selection) or selection.agrees or selection.layer_axis is not None:
        return
    odd = [x for x in projected if x.matrix.batch != (*range(len(x.matrix.batch)),)]
    if odd:
        message = (
            f"lowrank_optax concluded from their siblings which axes of {len(odd)} "
            f"leaves are no matrix axes, and not the first ones: {_listed(odd)}. To "
            "agree: weight_dimension_numbers=lro.dimension_numbers. To see all axes: "
            "print(lro.dimension_numbers(params))."
        )
        _warn(message, ConcludedAxesWarning)


def _explicit(selection: Selection) -> str:
    if selection.select is not None:
        return f"select={selection.select!r}"
    if selection.weight_dimension_numbers is not None and not selection.agrees:
        return "weight_dimension_numbers"
    return ""


def _is_named(leaf: Any) -> bool:
    """Whether a leaf with two axes stays full for what it is taken for."""
    return leaf.kind == "table" or (bool(leaf.kind) and "named like" in leaf.reason)


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape)


def _listed(leaves: Any) -> str:
    """The largest leaves with their reasons."""
    shown = sorted(leaves, key=_size, reverse=True)[:_SHOWN]
    parts = [
        f"{leaf.path or 'the leaf'} {'x'.join(map(str, leaf.shape))}: {leaf.reason}"
        for leaf in shown
    ]
    more = len(leaves) - len(shown)
    if more:
        parts.append(f"and {more} more")
    return "; ".join(parts)


def _mend(leaves: Any) -> str:
    """The line that changes the reason that most elements have."""
    sizes: collections.Counter = collections.Counter()
    for leaf in leaves:
        sizes[_line(leaf)] += _size(leaf)
    return sizes.most_common(1)[0][0]


def _line(leaf: Any) -> str:
    if "exceeds" in leaf.reason or "would not save" in leaf.reason:
        return (
            "lower the rank (rank=0.25 is a quarter of every matrix' shorter side), or "
            'choose leaves in spite of that: select="all-linear".'
        )
    if leaf.kind in ("table", "long") or leaf.reason.startswith("named like"):
        return 'choose leaves yourself: select="<a regular expression on the path>".'
    if "min_size" in leaf.reason:
        return "lower min_size."
    if leaf.kind == "unknown":
        return (
            "say which axes form the matrices: numbers = lro.dimension_numbers(params) "
            "is what was concluded; fill in the missing ones and pass "
            "weight_dimension_numbers=numbers (or layer_axis=0 for stacked layers)."
        )
    return "choose leaves yourself: select=... or weight_dimension_numbers=..."


def _all_reasons() -> str:
    return "print(lro.selection_report(tx, params)) gives the reason for every leaf."


def _warn(message: str, category: type[Warning]) -> None:
    """Warns at the nearest line outside of libraries, so once for each such line."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_library(frame):
        frame = frame.f_back
    scope = frame.f_globals
    registry = scope.setdefault("__warningregistry__", {})
    place = frame.f_code.co_filename, frame.f_lineno, scope.get("__name__")
    warnings.warn_explicit(message, category, *place, registry)


def _is_library(frame: Any) -> bool:
    name = frame.f_globals.get("__name__", "").partition(".")[0]
    generated = frame.f_code.co_filename.startswith("<@")
    return generated or name in _LIBRARIES
