"""Plans: budgets, predictions, and use."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

from lowrank_optax import activations
from tests.activations import model

ACTIONS = ("save", "recompute", "int8", "int4", "int4+4")
LAYERS = 4


def shapes(width=1024, ff=2816, rows=16, length=512, dtype="bfloat16"):
    """What a layer of a LLaMA-like model is called with."""
    params, _ = model.inputs(1, 8, 8, 1, 1)
    sizes = {"wq": (width, width), "wg": (width, ff), "wd": (ff, width)}
    sizes |= {"wk": sizes["wq"], "wv": sizes["wq"], "wo": sizes["wq"]}
    sizes |= {"wu": sizes["wg"], "norm1": (width,), "norm2": (width,)}
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    assert set(sizes) == set(params)
    return {k: struct(v) for k, v in sizes.items()}, struct((rows, length, width))


@functools.cache
def data(gain=1.0):
    return model.inputs(LAYERS, 64, 176, 2, 64, gain=gain)


def one_layer(params, x):
    return jax.tree.map(lambda p: p[0], params), x


def plan(args=None, n_layers=LAYERS, fn=model.block, **options):
    options = {"hardware": "v5e", "actions": ACTIONS, **options}
    return activations.plan_activations(fn, args or shapes(), n_layers, **options)


def chosen(found, segment=0):
    return {c.tag: str(c.action) for c in found.segments[segment].choices}


# What plans are.


def test_generous_and_tight_budgets():
    everything = plan(budget_fraction=1)
    assert set(chosen(everything).values()) == {"save"}
    assert everything.predicted == everything.full_save
    nothing = plan(budget_fraction=1e-6)
    assert set(chosen(nothing).values()) == {"recompute"}
    assert nothing.predicted.total_bytes == nothing.full_recompute.total_bytes
    times = nothing.predicted.time_ms, nothing.full_recompute.time_ms
    assert times[0] == pytest.approx(times[1])
    assert nothing.segments[0].policy == activations.Policy()


def test_products_are_compressed_and_elementwise_results_are_computed_again():
    found = chosen(plan(budget_fraction=0.2))
    again = {tag for tag, action in found.items() if action == "recompute"}
    assert again == {"norm1", "norm2", "act"}
    assert {found[tag] for tag in model.PRODUCTS} == {"int4"}


def test_less_memory_costs_more_time_and_budgets_hold():
    plans = [plan(budget_fraction=f, error_budget=0.1) for f in (0.6, 0.4, 0.2, 0.1)]
    times = [p.predicted.time_ms for p in plans]
    assert times == sorted(times) and times[0] < times[-1]
    for p in plans:
        assert p.predicted.total_bytes <= p.budget_bytes
        assert p.predicted.error <= 0.1 * (1 + 1e-6)
        assert p.predicted.time_ms < p.full_recompute.time_ms
    loose = plan(budget_fraction=0.2)
    assert loose.predicted.error > 0.1
    assert loose.predicted.time_ms < plans[2].predicted.time_ms


def test_the_totals_are_the_sums_of_the_choices():
    found = plan(budget_fraction=0.25, error_budget=0.08, groups=4, n_layers=8)
    assert len(found.segments) > 1 and found.n_layers == 8
    pairs = [(s.layers, c) for s in found.segments for c in s.choices]
    kept = sum(n * c.nbytes for n, c in pairs)
    _, x = shapes()
    assert found.predicted.kept_bytes == kept
    assert found.predicted.input_bytes == 8 * 2 * x.size
    assert found.predicted.time_ms == pytest.approx(
        sum(n * c.time_ms for n, c in pairs)
    )
    error = sum(n / 8 * c.error**2 for n, c in pairs) ** 0.5
    assert found.predicted.error == pytest.approx(error)
    assert found.budget_bytes - found.predicted.working_bytes == math.ceil(
        0.25 * (found.full_save.kept_bytes) + found.predicted.input_bytes
    )
    # Groups are alike, so that more of them can only be faster.
    single = plan(budget_fraction=0.25, error_budget=0.05, n_layers=8)
    assert found.predicted.time_ms <= single.predicted.time_ms


def test_a_parent_that_only_its_child_needs_is_not_free():
    def fn(w, x):
        proj = checkpoint_name(jnp.tanh(x @ w) @ w, "proj")
        return checkpoint_name(x + proj, "h") ** 2

    args = (jnp.ones((512, 512)), jnp.ones((512, 512)))
    found = plan(
        args, 1, fn, budget_fraction=0.5, actions=("save", "recompute"), errors=None
    )
    # Half of the bytes: one of the two. Without "h" kept, "proj" would be a product.
    assert chosen(found) == {"proj": "recompute", "h": "save"}
    actions = ("save", "recompute", "int8")
    fewer = plan(args, 1, fn, budget_fraction=0.3, actions=actions)
    assert chosen(fewer) == {"proj": "recompute", "h": "int8"}
    none = plan(args, 1, fn, budget_fraction=1e-9, actions=("save", "recompute"))
    assert none.predicted.time_ms > 10 * found.predicted.time_ms
    assert none.predicted.time_ms == pytest.approx(none.full_recompute.time_ms)


def test_forbidden_actions_and_own_errors():
    assert chosen(plan(budget_fraction=0.2, forbidden={"q": "int4"}))["q"] != "int4"
    actions = [activations.parse_action(a) for a in ("save", "int8")]
    errors = {(tag, a): 0.01 * (tag == "q") for tag in model.TAGS for a in actions}
    errors |= {(tag, actions[0]): 0.0 for tag in model.TAGS}
    found = plan(budget_fraction=0.6, actions=actions, errors=errors, error_budget=1e-3)
    assert found.probed and chosen(found)["q"] == "save"
    assert set(chosen(found).values()) == {"save", "int8"}


@functools.cache
def record_of_a_plan() -> bytes:
    return plan(budget_fraction=0.3, groups=2).to_json().encode()


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1))
@settings(max_examples=200, deadline=None)
def test_any_bytes_of_a_record(changes):
    """It is a plan that can be shown, or the error says what was expected."""
    changed = bytearray(record_of_a_plan())
    for at, byte in changes:
        changed[at % len(changed)] = byte
    try:
        found = activations.ActivationPlan.from_json(changed.decode("latin-1"))
    except ValueError as error:
        assert "expected the JSON that ActivationPlan.to_json writes" in str(error)
    else:
        assert found.table() and activations.ActivationPlan.from_json(found.to_json())


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "7", "[" * 100_000, '{"segments": 1}']
)
def test_what_is_no_record(text):
    with pytest.raises(ValueError, match=r"ActivationPlan\.to_json writes"):
        activations.ActivationPlan.from_json(text)


def test_the_record_of_a_plan():
    found = plan(budget_fraction=0.3, groups=2, actions=(*ACTIONS, "offload"))
    assert activations.ActivationPlan.from_json(found.to_json()) == found
    assert hash(found) == hash(
        plan(budget_fraction=0.3, groups=2, actions=(*ACTIONS, "offload"))
    )
    text = found.table()
    for word in (*model.TAGS, "working set", "v5e", "recompute everything", "by role"):
        assert word in text
    assert f"{found.predicted.total_bytes / 2**20:,.3f}" in text

    class Own(activations.Save):
        def __str__(self):
            return "own"

    choice = dataclasses.replace(found.segments[0].choices[0], action=Own())
    segment = activations.Segment(LAYERS, (choice,))
    with pytest.raises(TypeError, match="not one of this package's own"):
        dataclasses.replace(found, segments=(segment,)).to_json()


# What plans do.


def test_the_gradient_is_off_by_what_was_predicted():
    params, x = data(gain=12.0)
    exact_loss, exact = model.run(model.block, (params, x))
    options = {"budget_fraction": 0.3, "error_budget": 0.1, "hardware": "cpu"}
    actions = [activations.parse_action(a, 64) for a in ACTIONS]
    found = plan(one_layer(params, x), actions=actions, **options)
    assert found.probed and 0.03 < found.predicted.error < 0.1
    (body,) = activations.apply_plan(model.block, found)
    loss, got = model.run(body, (params, x))
    model.assert_same(loss, exact_loss)
    # The goal of the planner, and that the bound says something: a probe sees one layer
    # and random cotangents, and nothing kept but the one tag that it rounds.
    assert 1 / 4 < model.distance(got, exact) / found.predicted.error < 1.5


def test_a_stack_under_a_plan():
    params, x = data()
    found = plan(jax.eval_shape(one_layer, params, x), budget_fraction=0.3)
    mixed = dataclasses.replace(
        found,
        segments=tuple(
            dataclasses.replace(found.segments[0], layers=n) for n in (1, 3)
        ),
    )
    (body,) = activations.apply_plan(model.block, found)

    def loss(p, x, which):
        return jnp.mean(activations.scan_layers(model.block, which, p, x) ** 2)

    def gradients(fn):
        return jax.jit(jax.value_and_grad(fn), compiler_options=model.STRICT)(params, x)

    single = gradients(lambda p, x: model.loss(p, x, body))
    model.assert_same(gradients(lambda p, x: loss(p, x, found)), single)
    model.assert_same(gradients(lambda p, x: loss(p, x, mixed)), single)
    with pytest.raises(ValueError, match=r"plan is for 4 layers.*params\['norm1'\]"):
        activations.scan_layers(model.block, found, one_layer(params, x)[0], x)


@pytest.mark.parametrize(
    ("action", "tags", "ratio"),
    [
        # XLA on CPUs widens the steps of codes, and is not thrifty with temporaries.
        ("save", model.TAGS, (0.9, 1.1)),
        ("save", model.PRODUCTS, (0.9, 1.1)),
        ("int8", model.PRODUCTS, (0.85, 1.1)),
        ("int4", model.PRODUCTS, (0.75, 1.1)),
        # Of full recomputation it holds far more at once than one layer needs.
        ("save", (), (0.55, 1.1)),
    ],
)
def test_predicted_against_compiled_bytes(action, tags, ratio):
    """Of a scan over four layers, compiled for a CPU; the policy is forced."""
    params, x = shapes(256, 704, 8, 256, "float32")
    errors = {
        (tag, activations.parse_action(a)): 0.0
        for tag in model.TAGS
        for a in ("recompute", action)
    }
    bar = {tag: "recompute" if tag in tags else action for tag in model.TAGS}
    found = plan(
        (params, x),
        budget_fraction=1,
        hardware="cpu",
        actions=("recompute", action),
        errors=errors,
        forbidden=bar,
    )
    stacked = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct((LAYERS, *p.shape), p.dtype), params
    )
    (body,) = activations.apply_plan(model.block, found)
    compiled = activations.audit(model.compiled(body, (stacked, x))).temp_bytes
    low, high = ratio
    assert low < found.predicted.total_bytes / compiled < high


# Bad input.


def smallest_in(message, name):
    return float(message.split(f"{name}=")[1].split()[0].rstrip(".,"))


def test_the_smallest_feasible_budget_is_feasible():
    options = {"error_budget": 0.01, "actions": ("save", "int8")}
    with pytest.raises(ValueError, match="The smallest feasible budget is") as caught:
        plan(budget_fraction=0.05, **options)
    least = int(smallest_in(str(caught.value), "budget_bytes"))
    fraction = smallest_in(str(caught.value), "budget_fraction")
    assert plan(budget_bytes=least, **options).predicted.total_bytes <= least
    plan(budget_fraction=fraction, **options)
    with pytest.raises(ValueError, match=f"budget_bytes={least} "):
        plan(budget_bytes=least - 1, **options)


def test_an_error_budget_that_nothing_keeps():
    with pytest.raises(ValueError, match=r"smallest feasible one is 0\.\d+") as caught:
        plan(budget_fraction=0.9, error_budget=1e-4, actions=("int4", "int8"))
    least = float(str(caught.value).split("one is ")[1].split(". ")[0])
    plan(budget_fraction=0.9, error_budget=1.001 * least, actions=("int4", "int8"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of `budget_bytes`.*got neither"),
        ({"budget_bytes": 1, "budget_fraction": 0.5}, "exactly one .*got both"),
        ({"budget_bytes": 0}, "`budget_bytes` must be positive, got 0"),
        ({"budget_fraction": -1.0}, "`budget_fraction` must be above 0"),
        ({"budget_fraction": 30}, "at most 1, got 30"),
        ({"error_budget": -1.0}, "`error_budget` must not be negative"),
        ({"hardware": "v9"}, "`hardware` must be one of"),
        ({"n_layers": 0}, "`n_layers` must be at least 1"),
        ({"groups": 5}, "`groups` must be at most the 4 layers"),
        ({"actions": ()}, "`actions` must name at least one"),
        ({"actions": ("int3",)}, "An action must be one of"),
        ({"forbidden": {"w": "save"}}, "`forbidden` lists 'w'.*It tags 'norm1'"),
        ({"forbidden": {"q": ACTIONS}}, "`forbidden` leaves 'q' none"),
        ({"roles": {"q": "key"}}, "`role` must be one of"),
        ({"errors": {}}, "`errors` has no entry for"),
        ({"args": (1,)}, "`example_args` must be a tuple"),
        ({"fn": lambda w, x: x}, "tags nothing that can be kept.*checkpoint_name"),
        ({"budget_bytes": 1000}, "No plan fits into 1,000 bytes"),
    ],
)
def test_bad_input(options, message):
    given = {"budget_bytes", "budget_fraction"} & set(options)
    if options and not given:
        options = {"budget_fraction": 0.5, **options}
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"pip install 'lowrank_optax\[planner\]'"):
        plan(budget_fraction=0.5)
