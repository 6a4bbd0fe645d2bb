"""Which rows stand under which laws: read off their states, not off a list."""

import functools

import jax
import pytest

from lowrank_optax.testing import LAWS
from tests.rows import ROWS, subject

# Laws that run another program than the plain run's, one more compilation for each row.
# Such a wrapper meets nothing but state and updates, so they hold one row for every
# kind of state. Every other law traces and compares, and holds every row.
COMPILED = {"inject_hyperparams", "multi_steps", "apply_if_finite", "no_jit"}


def kinds(node):
    """What a state is made of: the project's own nodes, and what their fields hold."""
    if isinstance(node, dict):
        return set().union(*map(kinds, node.values()))
    if not isinstance(node, tuple | list):
        return set()
    found = set().union(*map(kinds, node))
    own, name = type(node).__module__.startswith("lowrank_optax"), type(node).__name__
    for field in getattr(node, "_fields", ()) if own else ():
        leaves = jax.tree.leaves(getattr(node, field))
        found |= {(name, field, str(leaf.dtype), leaf.ndim) for leaf in leaves}
    return found | {name} if own else found


@functools.cache
def kinds_of(row):
    try:
        shapes = jax.eval_shape(subject(row).tx.init, subject(row).params)
    except Exception:
        return frozenset({row})  # a kind of its own: its tests fail, not the collection
    return frozenset(kinds(shapes))


@functools.cache
def chosen():
    """A row for every kind of state, each row with most that the ones before lack."""
    rows, lacking = [], frozenset().union(*map(kinds_of, ROWS))
    while lacking:
        rows.append(max(ROWS, key=lambda row: len(kinds_of(row) & lacking)))
        lacking -= kinds_of(rows[-1])
    return tuple(row for row in ROWS if row in rows)


@functools.cache
def usual():
    """Rows of `make test`: every kind of state, and one row of every method."""
    methods = {}
    for row in (*chosen(), *ROWS):
        methods.setdefault(ROWS[row].make.func, row)
    return {*chosen(), *methods.values()}


def each_method(test):
    """Runs a test on one row for every kind of state and method, the argument `row`."""
    rows = [case(row) for row in ROWS if row in usual()]
    return pytest.mark.parametrize("row", rows)(test)


def laws(row):
    """The laws that a row stands under, by name."""
    return [law for law in LAWS if law not in COMPILED or row in chosen()]


def case(row, *values):
    """A row as a case of a test; `make test` leaves variants out."""
    marks = () if row in usual() else pytest.mark.variant
    return pytest.param(row, *values, marks=marks)


def each_row(test):
    """Runs a test on every row, the argument `row`."""
    return pytest.mark.parametrize("row", [case(row) for row in ROWS])(test)


def each_bracket(test):
    """Runs a test on every row whose state has a bracket, the argument `row`."""
    rows = [case(row) for row in ROWS if "SubspaceState" in kinds_of(row)]
    return pytest.mark.parametrize("row", rows)(test)


def each_kind(test):
    """Runs a test on one row for every kind of state, the argument `row`."""
    return pytest.mark.parametrize("row", [case(row) for row in chosen()])(test)
