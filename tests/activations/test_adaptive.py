"""Plans that follow the training."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from lowrank_optax import activations
from lowrank_optax.activations import AdaptivePlanner
from lowrank_optax.activations.planner import probes
from tests.activations.model import QUICK

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

    return jax.jit(step, donate_argnums=0, compiler_options=QUICK)


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

    def errors(block, args, actions, **options):
        del block, options
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(args))
        found = {}
        for tag in ("hidden", "act"):
            for action in actions:
                rough = {"int4": 0.1, "int8": 0.01}.get(str(action), 0.0)
                found[tag, action] = rough * table["scale"]
        return found

    monkeypatch.setattr(probes, "probe_errors", errors)
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
        ({"swap_after": 0}, ValueError, "`swap_after` must be at least 1"),
        ({"gain": 1.0}, ValueError, r"`gain` must be in \[0, 1\)"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        planner(Builder(), [], **options)


def run_with(step, measured, steps):
    """The losses of a run whose measurements change at step 3."""
    params, x = start()
    for number in range(steps):
        measured["scale"] = 3.0 if number >= 3 else 1.0
        params, loss = step(params, x)
        yield step, params, float(loss)


def test_a_run_with_a_fixed_delay_repeats_itself_and_goes_on_where_it_was(measured):
    log = []
    options = {"budget_fraction": 0.3, "swap_after": 4}
    whole = list(run_with(planner(Builder(), log, **options), measured, 9))
    said = [(entry["step"], entry["activation_plan"]) for entry in log]
    # Nothing is reconsidered while a plan is under way.
    assert said == [(0, "planned"), (3, "compiling"), (7, "swapped")]
    # Stopped between the decision and the swap, recorded as text, gone on with.
    first = planner(Builder(), [], **options)
    *_, (_, params, _) = run_with(first, measured, 5)
    record = json.loads(json.dumps(first.record()))
    assert record["next"] is not None and record["due"] == 7
    log, measured["scale"] = [], 3.0
    second = planner(Builder(), log, record=record, **options)
    losses = []
    for _ in range(4):
        params, loss = second(params, start()[1])
        losses.append(float(loss))
    assert [(e["step"], e["activation_plan"]) for e in log] == [
        (5, "resumed"),
        (7, "swapped"),
    ]
    assert losses == [loss for _, _, loss in whole[5:]]
    assert second.plan == whole[-1][0].plan


def test_a_plan_whose_step_takes_too_much_is_made_smaller(measured):
    del measured
    log = []
    params, x = start()
    free = planner(Builder(), log, budget_fraction=1.0, error_budget=None)
    free(params, x)
    most = log[0]["compiled_bytes"]
    params, _ = start()
    build = Builder()
    tight = planner(
        build,
        log,
        budget_fraction=1.0,
        error_budget=None,
        memory_bytes=most - 50_000,
    )
    tight(params, x)
    assert log[-1]["compiled_bytes"] <= most - 50_000 and len(build.plans) > 1
    assert tight.plan.predicted.total_bytes < free.plan.predicted.total_bytes
    with pytest.raises(ValueError, match="Use a smaller batch"):
        params, _ = start()
        planner(Builder(), log, budget_fraction=1.0, memory_bytes=1)(params, x)
