"""Plans that follow the training."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from lowrank_optax import activations
from lowrank_optax.activations import AdaptivePlanner, probe

LAYERS, WIDTH = 3, 128


def layer(params, x):
    hidden = checkpoint_name(x @ params["in"], "hidden")
    act = checkpoint_name(jnp.tanh(hidden), "act")
    return x + act @ params["out"]


def start():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "in": jax.random.normal(keys[0], (LAYERS, WIDTH, 2 * WIDTH)) / WIDTH**0.5,
        "out": jax.random.normal(keys[1], (LAYERS, 2 * WIDTH, WIDTH)) / WIDTH**0.5,
    }
    return params, jax.random.normal(keys[2], (64, WIDTH))


def step_under(plan):
    def loss(params, x):
        return jnp.mean(activations.scan_layers(layer, plan, params, x) ** 2)

    def step(params, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), value

    return jax.jit(step, donate_argnums=0)


class Builder:
    """Counts what is built; holds compilations back until it is let go."""

    def __init__(self):
        self.plans, self.free = [], threading.Event()
        self.free.set()

    def __call__(self, plan):
        self.free.wait(60)
        self.plans.append(plan)
        return step_under(plan)


def one_layer(params, x):
    return jax.tree.map(lambda p: p[0], params), x


@pytest.fixture
def measured(monkeypatch):
    """Errors that a test sets in place of those that would be measured."""
    table = {"scale": 1.0}

    def errors(block, args, actions):
        del block
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(args))
        found = {}
        for tag in ("hidden", "act"):
            for action in actions:
                rough = {"int4": 0.1, "int8": 0.01}.get(str(action), 0.0)
                found[tag, action] = rough * table["scale"]
        return found

    monkeypatch.setattr(probe, "probe_errors", errors)
    return table


def planner(build, log, **options):
    options = {
        "budget_fraction": 0.6,
        "error_budget": 0.2,
        "actions": ("save", "recompute", "int8", "int4"),
        "every": 3,
        **options,
    }
    return AdaptivePlanner(build, one_layer, layer, LAYERS, log=log.append, **options)


def kept(plan):
    return {c.tag: str(c.action) for c in plan.segments[0].choices}


def test_a_plan_that_breaks_its_error_budget_is_replaced_between_steps(measured):
    build, log = Builder(), []
    # A tenth: only four bits fit, and the other tag is computed again.
    step = planner(build, log, budget_fraction=0.3)
    params, x = start()
    losses = []
    for _ in range(3):
        params, loss = step(params, x)
        losses.append(float(loss))
    before = step.plan
    assert "int4" in kept(before).values()
    measured["scale"] = 3.0  # now four bits are too rough
    build.free.clear()
    params, _ = step(params, x)  # starts the compilation
    params, _ = step(params, x)  # goes on under the old plan
    assert step.plan is before and len(build.plans) == 1
    build.free.set()
    step.wait()
    assert "int4" not in kept(step.plan).values()
    params, loss = step(params, x)
    assert np.isfinite(loss) and losses[-1] < losses[0]
    said = [entry["activation_plan"] for entry in log]
    assert said == ["planned", "compiling", "swapped"]
    assert log[1]["error"] == pytest.approx(0.3) and log[1]["step"] == 3
    assert len(build.plans) == 2


def test_nothing_is_compiled_when_nothing_changed(measured):
    build, log = Builder(), []
    step = planner(build, log)
    params, x = start()
    for _ in range(7):
        params, _ = step(params, x)
    assert [(entry["step"], entry["activation_plan"]) for entry in log] == [
        (0, "planned"),
        (3, "kept"),
        (6, "kept"),
    ]
    assert len(build.plans) == 1
    assert measured["scale"] == 1.0


def test_a_plan_comes_back_from_the_cache_and_old_ones_leave(measured):
    build, log = Builder(), []
    step = planner(build, log, budget_fraction=0.3, every=1, executables=2)
    params, x = start()
    for scale in (1.0, 3.0, 1.0):
        measured["scale"] = scale
        for _ in range(2):
            params, _ = step(params, x)
            step.wait()
    assert len(build.plans) == 2  # the first plan's program was still there
    alone = planner(Builder(), [], budget_fraction=0.3, every=1, executables=1)
    for scale in (1.0, 3.0, 1.0):
        measured["scale"] = scale
        for _ in range(2):
            params, _ = alone(params, x)
            alone.wait()
    assert len(alone._build.plans) == 3


def test_a_plan_that_cannot_be_made_is_logged(measured):
    log = []
    step = planner(Builder(), log, budget_fraction=0.01, actions=("int4", "int8"))
    params, x = start()
    with pytest.raises(ValueError, match="smallest"):
        step(params, x)
    step = planner(Builder(), log, budget_fraction=0.3, actions=("int4", "int8"))
    params, _ = step(params, x)
    measured["scale"] = 1000.0
    for _ in range(3):
        params, _ = step(params, x)
    assert log[-1]["activation_plan"] == "kept" and "problem" in log[-1]


def test_a_step_that_does_not_compile_leaves_the_plan(measured):
    log, calls = [], []

    def build(plan):
        calls.append(plan)
        if len(calls) > 1:
            raise RuntimeError("no memory")
        return step_under(plan)

    step = planner(build, log, budget_fraction=0.3, every=1)
    params, x = start()
    params, _ = step(params, x)
    before, measured["scale"] = step.plan, 3.0
    params, _ = step(params, x)
    step.wait()
    params, loss = step(params, x)
    assert step.plan is before and np.isfinite(loss)
    assert {"activation_plan": "failed", "problem": "no memory"}.items() <= log[
        2
    ].items()


def test_real_measurements():
    log = []
    step = planner(Builder(), log, error_budget=None, budget_fraction=0.3)
    params, x = start()
    for _ in range(4):
        params, _ = step(params, x)
    assert [entry["activation_plan"] for entry in log] == ["planned", "kept"]
    assert 0 < log[1]["error"] < 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "`every` must be at least 1"),
        ({"executables": 1.5}, TypeError, "`executables` must be a positive int"),
        ({"gain": 1.0}, ValueError, r"`gain` must be in \[0, 1\)"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        planner(Builder(), [], **options)
