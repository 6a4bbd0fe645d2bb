"""What people who come from elsewhere write: each is told what to write instead."""

import importlib
import sys

import jax.numpy as jnp
import jaxtyping
import optax
import pytest

import lowrank_optax as lro


@pytest.fixture(autouse=True)
def no_type_checks():
    """Users have no run-time type checks: the package's own messages must come."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PARAMS = {"layer": {"kernel": jnp.ones((64, 48))}}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("proj_type", "std", 'write side=, where "std" is "short"'),
        ("galore_scale", 0.25, "write scale="),
        ("betas", (0.9, 0.999), "write b1= and b2="),
        ("lr", 1e-3, "write learning_rate="),
        ("optim_target_modules", ["attn"], "write select="),
        ("params", PARAMS, r"parameters go to init .*tx\.init\(params\)"),
    ],
)
def test_names_of_other_libraries(name, value, message):
    for method in (lro.galore, lro.fira, lro.apollo):
        with pytest.raises(TypeError, match=rf"no argument `{name}`\. Here, {message}"):
            method(1e-3, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "0.25"}, "`scale` must be a number, got '0.25' .*without quotes"),
        ({"scale": [0.25]}, r"`scale` must be a number, got \[0\.25\] of type list"),
        ({"b1": (0.9, 0.999)}, "`b1` must be a number.*b1 and b2 apart"),
        ({"weight_decay": "0.1"}, "`weight_decay` must be a number.*without quotes"),
        ({"eps": {"a": 1}}, "`eps` must be a number, .*dict"),
        ({"b2": lambda step: 0.9}, "`b2` must be a number.*inject_hyperparams"),
        ({"rank": "8"}, "`rank` must be a positive int.*without quotes: rank=8"),
        ({"rank": [8]}, "`rank` must be a positive int, got .8. of type list"),
        ({"update_proj_gap": "200"}, "`update_proj_gap` must .*without quotes"),
        ({"update_proj_gap": lambda step: 5}, "got a function.*has no schedule"),
    ],
)
def test_other_things_in_the_place_of_numbers(options, message):
    with pytest.raises(TypeError, match=message):
        lro.galore(1e-3, **options)
    if not {"rank", "weight_decay"} & set(options):  # it has the latter not at all
        with pytest.raises(TypeError, match=message):
            lro.scale_by_galore(4, **options)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("1e-3", "`learning_rate` must be a number or a schedule.*without quotes"),
        (PARAMS, r"`learning_rate` must be .*tx\.init\(params\)"),
        ([1e-3], "`learning_rate` must be .*one number"),
        (optax.adam(1e-3), r"`learning_rate` must be .*optax\.chain"),
        (True, "`learning_rate` must be a number"),
    ],
)
def test_learning_rates_that_are_none(rate, message):
    with pytest.raises(TypeError, match=message):
        lro.galore(rate)


def test_arguments_that_changed_places():
    with pytest.raises(TypeError, match=r"learning_rate=128 and rank=0\.001.*places"):
        lro.galore(128, 1e-3)


@pytest.mark.parametrize("make", [lro.galore, lro.fira, lro.apollo])
def test_a_rank_that_changed_between_runs(make):
    state = make(1e-3, rank=8).init(PARAMS)
    with pytest.raises(ValueError, match=r"made with rank 8 .*'layer/kernel'.*rank 4"):
        make(1e-3, rank=4).update(PARAMS, state, PARAMS)


def test_states_of_other_optimizers():
    bracket = lro.scale_by_galore(4)
    with pytest.raises(ValueError, match=r"another optimizer.*got ScaleByAdamState"):
        bracket.update(PARAMS, optax.scale_by_adam().init(PARAMS), PARAMS)
    for maker, user, found in (
        (lro.scale_by_fira, lro.scale_by_galore, "has a recovery_state.*no recovery"),
        (lro.scale_by_galore, lro.scale_by_fira, "has no recovery_state"),
    ):
        with pytest.raises(ValueError, match=f"another method: it {found}"):
            user(4).update(PARAMS, maker(4).init(PARAMS), PARAMS)


@pytest.mark.parametrize("method", [lro.galore(1e-3, 4), lro.scale_by_fira(4)])
def test_a_method_inside_a_bracket(method):
    inside = lro.chain(lro.project(lro.svd(8)), optax.chain(method), lro.backproject())
    for tx in (inside, lro.galore(1e-3, 8, base_optimizer=method)):
        with pytest.raises(
            ValueError, match=r"bracket inside a bracket.*scale_by_adam"
        ):
            tx.init(PARAMS)


class NoCompute(lro.OrthonormalProjector):
    pass


class NoStart(lro.Projector):
    def refresh(self, matrix, gradient, stored, at):
        return stored


class Wide(lro.OrthonormalProjector):
    def compute(self, matrix, gradient, old, at):
        return jnp.eye(matrix.m, matrix.rank + 1)


class Transposed(lro.OrthonormalProjector):
    def compute(self, matrix, gradient, old, at):
        return jnp.eye(matrix.rank, matrix.m)


@pytest.mark.parametrize(
    ("projector", "message"),
    [(NoCompute, "NoCompute defines no `compute`"), (NoStart, "defines no `start`")],
)
def test_a_projector_without_a_method(projector, message):
    with pytest.raises(TypeError, match=message):
        lro.project(projector(rank=4))


@pytest.mark.parametrize("projector", [Wide, Transposed])
def test_a_projector_whose_basis_has_another_shape(projector):
    tx = lro.galore(1e-3, projector=projector(rank=4))
    with pytest.raises(ValueError, match=rf"{projector.__name__}.*float32\[48, 4\]"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("package", ["chex", "hypothesis"])
def test_the_extra_of_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "lowrank_optax.testing", raising=False)
    message = rf"testing needs {package}, .* pip install 'lowrank-optax\[testing\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("lowrank_optax.testing")
