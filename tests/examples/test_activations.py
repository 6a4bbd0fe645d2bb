"""`--activation-policy`: the same training in less memory."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama import train
from examples.llama.batches import as_batch
from examples.llama.config import TrainConfig, UsageError, resolve
from examples.llama.model import ACTIVATIONS, abstract_model, init_params
from examples.llama.step import make_steps, split_rows
from lowrank_optax import activations

# Little effort in the compiler of machine code: the program before that is the same.
QUICK = {"xla_backend_optimization_level": 0}
ROWS, LENGTH = 8, 64  # enough that activations outweigh 264 logits per token


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 264, LENGTH + 1).tolist() for _ in range(ROWS)]
    return split_rows(as_batch(rows, ROWS, LENGTH), 1)


@pytest.fixture(scope="module")
def runs(micro_config, batch):
    """The losses of a few steps and the compiler's account, by policy."""
    definition, _ = abstract_model(micro_config)
    tx = optax.apply_if_finite(optax.adamw(1e-2), 10)
    found = {}
    for name, wrap_layer in ACTIVATIONS.items():
        params = init_params(micro_config, 0)
        state, losses = tx.init(params), []
        step = make_steps(definition, tx, wrap_layer=wrap_layer).train
        step = step.lower(params, state, batch).compile(QUICK)
        for _ in range(5):
            params, state, metrics = step(params, state, batch)
            losses.append(float(metrics["loss"]))
        found[name] = np.array(losses), activations.audit(step)
    return found


@pytest.mark.parametrize("name", ["full", "names"])
def test_recomputing_trains_as_without_a_policy(runs, name):
    """Equal bit for bit where this was written; a compiler that fuses what is computed
    again with other operations than the first time may round float32 elsewhere."""
    expected, _ = runs["none"]
    assert expected[-1] < expected[0] - 0.05
    np.testing.assert_allclose(runs[name][0], expected, rtol=1e-6)


def test_compressed_activations_change_gradients_only(runs):
    expected, found = runs["none"][0], runs["adacc"][0]
    # The forward pass is exact, so the first loss is the same up to float32 rounding.
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    # Then they differ, for the gradients did: by 5e-5 to 1.5e-4 where this was written,
    # and at the second step by as little as rounding.
    difference = np.abs(found / expected - 1)
    assert np.all(difference[2:] > 1e-6) and np.all(difference < 2e-3)


def test_policies_take_the_memory_and_operations_that_they_should(runs):
    memory = {name: audit.temp_bytes for name, (_, audit) in runs.items()}
    assert memory["full"] < memory["names"] < 0.7 * memory["none"]
    assert memory["adacc"] < 0.9 * memory["names"]
    flops = {name: audit.flops for name, (_, audit) in runs.items()}
    # The compiler counts one layer: its products are most of what it does.
    assert flops["full"] > 1.05 * flops["names"] > 1.05 * flops["none"]
    assert flops["adacc"] < 0.95 * flops["full"]


def test_the_evaluation_is_not_wrapped(micro_config, batch):
    def refuse(layer):
        raise AssertionError("wrapped")

    definition, params = abstract_model(micro_config)
    tx = optax.apply_if_finite(optax.identity(), 10)
    steps = make_steps(definition, tx, wrap_layer=refuse)
    rows = jax.tree.map(lambda x: x[0], batch)
    losses, _ = jax.eval_shape(steps.evaluate, params, rows)
    assert losses.shape == (ROWS,)
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(AssertionError, match="wrapped"):
        jax.eval_shape(steps.train, params, state, batch)


def test_micro_batches_are_wrapped(micro_config, batch):
    definition, params = abstract_model(micro_config)
    tx, seen = optax.apply_if_finite(optax.identity(), 10), []

    def watch(layer):
        seen.append(layer)
        return layer

    steps = make_steps(definition, tx, wrap_layer=watch)
    state = jax.eval_shape(tx.init, params)
    halves = {k: jnp.reshape(v, (2, -1, LENGTH)) for k, v in batch.items()}
    jax.eval_shape(steps.train, params, state, halves)
    assert seen


def test_the_flag_reaches_the_steps_and_may_change_in_a_run(
    micro_preset, shards, tmp_path, capsys, monkeypatch
):
    seen = []

    def watch(layer):
        seen.append(layer)
        return layer

    def run(*flags):
        folder = tmp_path / "run"
        common = ["--preset", "micro", "--data", shards, "--optimizer", "adamw"]
        common += ["--run-dir", str(folder), "--eval-every", "0", "--resume"]
        assert train.main([*common, *flags]) == 0
        settings = json.loads((folder / "config.json").read_text())
        return settings["activation_policy"], len(seen)

    monkeypatch.setitem(ACTIVATIONS, "names", watch)
    names = ["--activation-policy", "names"]
    assert run("--stop-step", "2") == ("none", 0)
    assert run("--stop-step", "4", *names) == ("names", 1)
    told = "changed since the run began: activation_policy: none, now names"
    assert told in capsys.readouterr().out


def test_unknown_policies_are_refused():
    message = "--activation-policy must be one of none, full, names, adacc; got 'int4'"
    with pytest.raises(UsageError, match=message):
        resolve(TrainConfig(activation_policy="int4"))
