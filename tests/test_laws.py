"""The laws offered to others: they hold good work, and find what is not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.testing import LAWS, Subject, assert_projector_laws

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


class Bad(lro.OrthonormalProjector):
    def compute(self, matrix, gradient, old, at):
        return self.broken(matrix, jnp.linalg.qr(gradient)[0][:, : matrix.rank], at)

    def broken(self, matrix, basis, at):
        return basis


class NotFinite(Bad):
    def broken(self, matrix, basis, at):
        return basis * jnp.nan


class WarmNotFinite(Bad):
    def broken(self, matrix, basis, at):
        return jnp.where(at.cold, basis, jnp.nan)


class Drawn(Bad):
    def broken(self, matrix, basis, at):
        drawn = np.random.default_rng().standard_normal((matrix.m, matrix.rank))
        return jnp.linalg.qr(jnp.asarray(drawn, jnp.float32))[0]


class OneMoreVector(Bad):
    def broken(self, matrix, basis, at):
        return jnp.eye(matrix.m, matrix.rank + 1)


class OtherType(Bad):
    def refresh(self, matrix, gradient, stored, at):
        return jnp.eye(matrix.m, matrix.rank, dtype=jnp.bfloat16)


class OtherStructure(Bad):
    def pack(self, new):
        return {"basis": new}


@pytest.mark.parametrize(
    ("projector", "message"),
    [
        (NotFinite, "gaussian 8 x 8: NotFinite.refresh is not finite"),
        (WarmNotFinite, "refresh is not finite"),
        (Drawn, "a second program gives other bits"),
        (OneMoreVector, r"changes its type: float32\[8, 2\] .* float32\[8, 3\]"),
        (OtherType, r"changes its type: float32.* bfloat16"),
        (OtherStructure, "OtherStructure .*8 x 8"),
    ],
)
def test_a_projector_that_does_not_work_is_found(projector, message):
    with pytest.raises(AssertionError, match=message):
        assert_projector_laws(projector(rank=2), shapes=[(8, 8)])


class Randomized(lro.OrthonormalProjector):
    """Halko, Martinsson and Tropp: a sketch, two sweeps, and a small SVD."""

    def compute(self, matrix, gradient, old, at):
        size = min(matrix.m, matrix.n, matrix.rank + 5)
        sketch = gradient @ jax.random.normal(at.key, (matrix.n, size))
        for _ in range(2):
            rows = jnp.linalg.qr(gradient.T @ jnp.linalg.qr(sketch)[0])[0]
            sketch = gradient @ rows
        found = jnp.linalg.qr(sketch)[0]
        small = jnp.linalg.svd(found.T @ gradient, full_matrices=False)[0]
        return (found @ small)[:, : matrix.rank]


def test_a_good_randomized_svd_keeps_the_laws():
    assert_projector_laws(Randomized(rank=2), shapes=[(12, 8), (3, 40)], energy=0.99)
