"""The planner's integer program against exhaustive search."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np

from lowrank_optax.activations.planner import milp
from lowrank_optax.activations.planner.milp import Tables


@st.composite
def problems(draw):
    groups, tags, actions = (draw(st.integers(1, n)) for n in (2, 3, 3))
    number = st.integers(0, 9)

    def table(values):
        row = st.lists(values, min_size=actions, max_size=actions)
        return np.array(draw(st.lists(row, min_size=tags, max_size=tags)))

    allowed = np.ones((tags, actions), bool)
    if actions > 1:
        allowed[draw(st.integers(0, tags - 1)), draw(st.integers(0, actions - 1))] = 0
    # Values of random tags; later ones may need earlier ones, and work is shared.
    count, some = draw(st.integers(0, 4)), st.booleans()
    values = tuple(
        (
            draw(st.integers(0, tags - 1)),
            draw(some),
            tuple(j for j in range(k + 1, count) if draw(some)),
        )
        for k in range(count)
    )
    sets = {tuple(k for k in range(count) if draw(some)) for _ in range(3)} - {()}
    shared = tuple((members, draw(number)) for members in sorted(sets))
    tables = dict(
        layers=tuple(draw(st.integers(1, 3)) for _ in range(groups)),
        nbytes=table(number).astype(float),
        time=table(number).astype(float),
        error2=table(number).astype(float),
        allowed=allowed,
        dropped=np.arange(actions) == draw(st.integers(0, actions - 1)),
        values=values,
        shared=shared,
    )
    # Halves: no sum of whole numbers lies on a bound, where rounding would decide.
    return tables, draw(st.integers(0, 60)) + 0.5, draw(st.integers(0, 12)) + 0.01


def every_assignment(tables):
    tags, actions = tables.nbytes.shape
    groups = len(tables.layers)
    for flat in itertools.product(range(actions), repeat=groups * tags):
        assignment = np.array(flat).reshape(groups, tags)
        if tables.allowed[np.arange(tags), assignment].all():
            yield assignment, tables.total(assignment)


@hypothesis.given(problems())
@hypothesis.settings(max_examples=60)
def test_the_solver_finds_what_exhaustive_search_finds(problem):
    fields, budget, error2 = problem
    tables = Tables(**fields)
    fits = [
        (time, nbytes)
        for _, (nbytes, time, error) in every_assignment(tables)
        if nbytes <= budget and error <= error2
    ]
    found = milp.solve(tables, budget, error2)
    if not fits:
        assert found is None
        return
    assert found is not None
    nbytes, time, error = tables.total(found)
    assert nbytes <= budget and error <= error2
    assert (time, nbytes) == min(fits)
    least = milp.smallest(tables, tables.nbytes, math.inf)
    assert least is not None
    assert tables.total(least)[0] == min(n for _, (n, _, _) in every_assignment(tables))


def test_ties_go_to_the_action_that_stands_first():
    same = np.ones((3, 4))
    tables = Tables((2, 2), same, same, same, same > 0, np.zeros(4, bool))
    for _ in range(3):
        np.testing.assert_array_equal(milp.solve(tables, 99.0, 99.0), 0)
