"""The laws offered to others: they hold good work, and find what is not."""

import functools

import optax
import pytest

from lowrank_optax.testing import LAWS, Subject

DECAYING = optax.linear_schedule(1e-2, 0.0, 9)
FACTORIES = {
    "adam": functools.partial(optax.adam, learning_rate=1e-2),
    "a rate that does not enter linearly": functools.partial(
        optax.fromage, learning_rate=1e-2
    ),
    "other arguments": lambda learning_rate=1e-2, **kw: optax.sgd(learning_rate, **kw),
    "a schedule": lambda learning_rate=DECAYING: optax.sgd(learning_rate),
    "an int": lambda learning_rate=1: optax.sgd(learning_rate),
    "no default": lambda: optax.sgd(1e-2),
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_hyperparameters_of_any_factory_are_injected(make):
    LAWS["inject_hyperparams"](Subject(make))


def test_a_learning_rate_that_cannot_be_set_is_found():
    def make(learning_rate=1e-2):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=learning_rate)

    with pytest.raises(AssertionError):
        LAWS["inject_hyperparams"](Subject(make))
