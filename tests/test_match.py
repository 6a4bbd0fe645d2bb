"""Updates as long as AdamW's, and the factor on the leaves that are not projected."""

import functools
import inspect
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from benchmarks import step_sizes

ROOT = pathlib.Path(__file__).parents[1]
STEPS = (1, 10, 101)
# Stacks of two: layer 0 is shown noise, layer 1 a signal of rank 4 in noise.
SHAPES = {"wide": (2, 32, 64), "tall": (2, 64, 32), "square": (2, 48, 48)}


def gradients(shapes, step):
    """As they come in training: 1e-3 of signal, noise, or both."""
    found = {}
    for i, (name, (_, m, n)) in enumerate(shapes.items()):
        a, b, c = jax.random.split(jax.random.key(i), 3)
        left, right = jax.random.normal(a, (m, 4)), jax.random.normal(b, (4, n))
        signal = left @ right / 4 * (1 + 0.3 * jnp.sin(step / 7.0))
        noise = jax.random.normal(jax.random.fold_in(c, step), (2, m, n))
        found[name] = 1e-3 * jnp.stack([noise[0], signal + 0.5 * noise[1]])
    return found


def sizes(tx, shapes):
    """Root mean squares of every layer's updates after 1, 10 and 101 steps."""
    params = {name: jnp.full(shape, 0.02) for name, shape in shapes.items()}

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(gradients(shapes, t), state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: 1e-3 * u, updates))
        rms = [jnp.sqrt(jnp.mean(jnp.square(u), (1, 2))) for u in updates.values()]
        return (params, state), jnp.stack(rms)

    start = params, tx.init(params)
    _, found = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(max(STEPS))))(start)
    return np.asarray(found)[[s - 1 for s in STEPS]]


@functools.cache
def of_adamw(*names):
    shapes = {name: SHAPES[name] for name in names}
    return sizes(optax.adamw(1.0, weight_decay=0.0), shapes)


def matched(name, rank, **options) -> Any:
    factory = lro.METHODS[name].factory
    chosen = {"rank": rank, "select": ".", "layer_axis": 0}
    taken = inspect.signature(factory).parameters
    chosen = {key: x for key, x in chosen.items() if key in taken}
    return factory(1.0, match="adamw", **chosen, **options)


def assert_as_long(found, wished):
    # Five root mean squares in a hundred, at 256 entries, and the sample's own luck.
    assert np.abs(found / wished - 1.0).max() < 0.15


@pytest.mark.parametrize("name", lro.METHODS)
def test_every_method_steps_as_far_as_adamw(name):
    found = sizes(matched(name, 0.25), {"wide": SHAPES["wide"]})
    assert_as_long(found, of_adamw("wide"))


# Told from the direction, from two thin terms, and from the update itself.
@pytest.mark.parametrize("name", ["galore", "fira", "frugal"])
@pytest.mark.parametrize("rank", [0.125, 0.5])
def test_at_every_rank_and_shape(name, rank):
    assert_as_long(sizes(matched(name, rank), SHAPES), of_adamw(*SHAPES))


def test_the_recorded_table_is_the_pages():
    recorded = json.loads((ROOT / "docs/results/step_sizes.json").read_text())
    runs = recorded["runs"]
    assert {run["name"] for run in runs} == set(lro.METHODS)
    assert step_sizes.table(runs) in (ROOT / "docs/choosing.md").read_text()
    found = [run[f"matched_{kind}"] for run in runs for kind in step_sizes.KINDS]
    assert np.abs(np.array(found) - 1.0).max() < 0.3


def one_step(tx, gradient=None, params=None, **extra) -> Any:
    params = jnp.ones((32, 64)) if params is None else params
    gradient = (
        jax.random.normal(jax.random.key(0), (32, 64))
        if gradient is None
        else (gradient)
    )
    return tx.update(gradient, tx.init(params), params, **extra)[0]


def test_the_scale_is_of_no_account_and_cannot_be_given():
    tx = [
        lro.chain(
            lro.project(lro.power(4), match="adamw"),
            optax.scale_by_adam(),
            lro.backproject(scale),
        )
        for scale in (0.25, 3.0)
    ]
    # A length is rounded by the scale that it is taken at.
    np.testing.assert_allclose(*map(one_step, tx), rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="`scale` has no effect beside `match`"):
        lro.galore(1e-3, 4, scale=1.0, match="adamw")
    lro.fira(1e-3, 4, scale=1.0, match="adamw")  # weighs its two parts


@pytest.mark.parametrize("name", ["galore", "fira", "frugal", "gwt"])
def test_the_learning_rate_multiplies_what_is_matched(name):
    def at(rate):
        options = {"rank": 4} if name != "gwt" else {}
        return one_step(lro.METHODS[name].factory(rate, match="adamw", **options))

    np.testing.assert_allclose(at(1e-3), 1e-3 * at(1.0), rtol=1e-5, atol=1e-8)
    assert not at(0.0).any()
    np.testing.assert_array_equal(at(lambda count: 1e-3), at(1e-3))


def test_without_a_gradient_there_is_no_step():
    for method in (lro.galore, lro.frugal):
        tx = method(1.0, 4, match="adamw")
        assert not one_step(tx, jnp.zeros((32, 64))).any()
        spoiled = jnp.ones((32, 64)).at[3, 5].set(jnp.nan)
        assert np.isfinite(one_step(tx, spoiled)).all()


def test_what_it_keeps():
    params = {"w": jnp.zeros((4, 64, 512)), "b": jnp.zeros(64)}
    plain, with_match = (
        lro.galore(1e-3, 8, layer_axis=0, match=match) for match in (None, "adamw")
    )
    more = lro.state_bytes(with_match, params).total
    more -= lro.state_bytes(plain, params).total
    assert more == 4 * 2 * 512 * 4  # layers, moments, columns, float32
    specs = lro.state_shardings(with_match, params, {"w": jax.P("data"), "b": jax.P()})
    assert specs.sample["w"].first == jax.P("data")
    report = lro.distributed.traffic_report(with_match, {"w": jnp.zeros((64, 512))})
    assert report.whole == ("w",)


def test_refusals():
    params = jnp.zeros((32, 64))
    plain, with_match = (lro.galore(1e-3, 4, match=m) for m in (None, "adamw"))
    with pytest.raises(ValueError, match="match=None, and this optimizer has"):
        with_match.update(params, plain.init(params), params)
    with pytest.raises(ValueError, match="match='adamw', and this optimizer has"):
        plain.update(params, with_match.init(params), params)
    with pytest.raises(ValueError, match="match"):
        lro.galore(1e-3, 4, match="adam")
    with pytest.raises(TypeError, match="`match` has no effect beside `conventions`"):
        lro.galore(1e-3, 4, match="adamw", conventions="authors")
    inner: Any = optax.MultiSteps(optax.scale_by_adam(), 2)
    tx = lro.galore(1e-3, 4, base_optimizer=inner, match="adamw")
    with pytest.raises(ValueError, match="accumulation inside the bracket"):
        tx.init(params)


# The other leaves.

TREE = {"w": jnp.ones((32, 64)), "b": jnp.ones(64)}


def updates(tx, steps=1) -> Any:
    state, out = tx.init(TREE), TREE
    for _ in range(steps):
        out, state = tx.update(TREE, state, TREE)
    return out


@pytest.mark.parametrize("form", [float, jnp.float32, lambda x: lambda count: x])
@pytest.mark.parametrize("method", [lro.galore, lro.sumo], ids=["inner", "full"])
def test_full_scale_is_a_factor_on_the_other_leaves(method, form):
    plain, scaled = (updates(method(1e-2, 4, full_scale=s)) for s in (None, form(0.5)))
    np.testing.assert_array_equal(plain["w"], scaled["w"])
    np.testing.assert_allclose(0.5 * plain["b"], scaled["b"], rtol=1e-6)


def test_full_scale_follows_its_schedule_and_is_injected():
    def schedule(count):
        return jnp.where(count < 1, 1.0, 0.0)

    for tx in (
        lro.scale_by_galore(4, full_scale=schedule),
        lro.galore(1e-2, 4, full_scale=schedule),
        optax.inject_hyperparams(lro.galore, lro.static_args(lro.galore))(
            1e-2, 4, full_scale=schedule
        ),
    ):
        assert updates(tx)["b"].any()
        later = updates(tx, 2)
        assert later["w"].any() and not later["b"].any()
    quoted: Any = "0.5"
    with pytest.raises(TypeError, match="`full_scale` must be a number or a schedule"):
        lro.galore(1e-2, 4, full_scale=quoted)
