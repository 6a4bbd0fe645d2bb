"""Which rows stand under which laws, and which of them on the newest jax."""

import pytest

from lowrank_optax.testing import LAWS
from tests.rows import PLAIN, ROWS

# What a law costs is mostly its compilations, so not every row stands under every law.
# Laws that compile nothing of their own hold every row. Laws of a full step under the
# wrappers that look into a transformation hold one row of every method at least.
METHODS = (
    "galore_svd",
    "galore_8bit",
    "q_galore",
    "galore_adafactor",
    "fira",
    "subtrack",
    "grass_walk",
    "grass_jump",
    "ldadam",
    "osd",
    "apollo",
    "apollo_mini",
    "coap",
    "sara",
    "dct_adamw",
    "natural_galore",
    "galore_plus",
    "frugal",
    "gwt",
    "sumo",
    *PLAIN,
)
# Laws of wrappers that see a step from outside, and of other trees and life cycles,
# meet nothing but state and updates: they hold one row for every kind of state.
COVER = (
    "galore_power",  # moments in a basis that starts from a key
    "galore_staggered",  # stacks, each layer with its own time to refresh
    "galore_8bit_stacked",  # encoded moments and basis, stacked, rotated
    "q_galore",  # a coarser basis, and gaps that grow
    "galore_adafactor",  # factored moments
    "fira_both",  # a limiter for the whole tree, two bases
    "subtrack_eta",  # tracking, raw moments
    "ldadam_stacked",  # error feedback in bfloat16
    "osd_stacked",  # an optimizer of the basis
    "apollo_stacked",  # scaling in place of lifting
    "coap_stacked",  # correlation steps, the root of rotated moments
    "dct_adamw_feedback",  # column numbers for a basis, error feedback
    "natural_galore",  # a history of gradients
    "frugal",  # a step of its own for the complement
    "gwt_stacked",  # wavelets, details clipped
    "sumo",  # orthogonalized moments
)
CHOSEN = tuple(name for name in ROWS if name in {*METHODS, *COVER})
OF_METHODS = {"chain", "masked", "inject_hyperparams", "no_jit", "odd_leaves"}
OF_STATES = {
    "partition",  # two masks; every method stands under one
    "multi_steps",
    "apply_if_finite",  # test_no_poison.py: every row, bit for bit
    "scan",
    "pmap",
    "donation",  # test_no_buffer_stands_in_two_places: every row
}


def laws(name):
    """The laws that a row stands under, by name."""
    spared = set() if name in COVER else OF_STATES
    spared = spared if name in CHOSEN else spared | OF_METHODS
    return [law for law in LAWS if law not in spared]


# The newest jax gets the rows with every kind of state, and one of each other method.
_COVERED = {ROWS[name].make.func for name in COVER}
NEWEST = {*COVER, *(m for m in METHODS if ROWS[m].make.func not in _COVERED)}


def case(name, *values):
    """A row as a case of a test; `make test-latest` leaves variants out."""
    marks = () if name in NEWEST else pytest.mark.variant
    return pytest.param(name, *values, marks=marks)


def each_row(test):
    """Runs a test on every row, the argument `row`."""
    return pytest.mark.parametrize("row", [case(name) for name in ROWS])(test)
