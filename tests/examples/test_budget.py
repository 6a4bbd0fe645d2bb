"""`--activation-budget`: what is planned, refused and written down."""

import json

import jax
import numpy as np
import optax
import pytest

from examples.llama import budget, train
from examples.llama.batches import as_batch
from examples.llama.budget import (
    find_layers,
    parse_budget,
    plan_from_shapes,
    profile_name,
)
from examples.llama.config import TrainConfig, UsageError, resolve
from examples.llama.model import PRODUCTS, init_params
from examples.llama.step import mean_gradient, split_rows
from lowrank_optax import activations
from lowrank_optax.activations import ActivationPlan

# Little effort in the compiler of machine code: the program before that is the same.
QUICK = {"xla_backend_optimization_level": 0}


def distance(got, exact):
    """The relative L2 distance of two trees."""
    off = jax.tree.map(lambda a, b: a - b, got, exact)
    return float(optax.tree.norm(off) / optax.tree.norm(exact))


def plan(budget, **flags):
    config, model = resolve(
        TrainConfig(
            preset="micro",
            optimizer="adamw",
            activation_budget=budget,
            activation_error=0.0,
            **flags,
        )
    )
    return plan_from_shapes(config, model, "cpu")


@pytest.mark.usefixtures("micro_preset")
def test_a_smaller_budget_keeps_less():
    whole, third, none = plan("100%"), plan("30%"), plan("1%")
    everything = whole.predicted.kept_bytes
    assert everything == whole.full_save.kept_bytes > 0
    assert 0 < third.predicted.kept_bytes <= 0.3 * everything
    assert none.predicted.kept_bytes <= 0.01 * everything
    tags = {choice.tag for choice in third.segments[0].choices}
    assert tags >= {"q", "k", "v", "attn", "gate", "up", "act", "h", "norm1", "norm2"}
    # In bytes it is the sum that is planned for.
    total = third.predicted.total_bytes
    assert plan(str(total)).predicted.total_bytes <= total
    halves = plan("30%", micro_batches=2)
    assert halves.predicted.input_bytes == third.predicted.input_bytes / 2


@pytest.mark.usefixtures("micro_preset")
def test_budgets_that_cannot_be():
    for bad in ("30", "0%", "1", "-3%", "1GB", "200%"):
        with pytest.raises(UsageError, match="activation-budget"):
            plan(bad)
    for flags in ({"activation_error": -1.0}, {"replan_every": -1}):
        with pytest.raises(UsageError, match="must be from 0"):
            resolve(TrainConfig(**flags))
    with pytest.raises(UsageError, match="--activation-policy full, or the budget"):
        plan("30%", activation_policy="full")


@pytest.mark.usefixtures("micro_preset")
def test_the_trainer_plans_for_the_rows_of_one_device(monkeypatch):
    """The planner is given the layer with the rows that one device has of it."""
    given = []
    monkeypatch.setattr(
        activations, "AdaptivePlanner", lambda *args, **options: given.append(args)
    )
    for mesh in ("", "data=2,fsdp=2,tensor=2"):
        flags = {"activation_budget": "30%", "mesh": mesh}
        config, model = resolve(TrainConfig(preset="micro", **flags))
        budget.planned_train(config, model, id, lambda stored: stored, print)
        _, sample, *_ = given[-1]
        _, x = jax.eval_shape(sample, jax.eval_shape(lambda m=model: init_params(m, 0)))
        assert x.shape == (4 if not mesh else 1, 16, 32)


def test_budget_text():
    assert parse_budget("12.5%") == {"budget_fraction": 0.125}
    assert parse_budget("4096") == {"budget_bytes": 4096}


@pytest.mark.parametrize(
    ("kind", "profile"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v4", "v4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("cpu", "cpu"),
    ],
)
def test_profiles_of_devices(kind, profile):
    assert profile_name(kind) == profile
    assert activations.hardware_profile(profile).name == profile


def train_micro(folder, shards, *flags):
    """Runs the trainer; returns what it wrote."""
    common = ["--preset", "micro", "--data", shards, "--optimizer", "galore"]
    assert train.main([*common, "--run-dir", str(folder), *flags]) == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    losses = [line["loss"] for line in lines if "loss" in line]
    decisions = [
        (line["step"], line["activation_plan"])
        for line in lines
        if "activation_plan" in line
    ]
    return losses, decisions


@pytest.mark.whole
@pytest.mark.usefixtures("micro_preset")
def test_a_run_follows_its_plan(shards, tmp_path):
    """Two runs that differ in the budget: the same first loss, other gradients."""
    exact, _ = train_micro(tmp_path / "none", shards)
    folder = tmp_path / "planned"
    budget = ["--activation-budget", "30%"]
    planned, decisions = train_micro(folder, shards, *budget)
    written = ActivationPlan.from_json((folder / "activation_plan.json").read_text())
    kept = written.predicted.kept_bytes
    assert written.probed and 0 < kept <= 0.3 * written.full_save.kept_bytes
    assert 0 < written.predicted.error <= 0.05
    assert (folder / "activation_plan.txt").read_text().strip() == written.table()
    assert (folder / "activation_plan.png").read_bytes().startswith(b"\x89PNG")
    assert any("int" in str(c.action) for c in written.segments[0].choices)
    assert decisions == [(0, "planned")]
    # The forward pass is exact; from then on the rounded gradients show.
    assert planned[0] == pytest.approx(exact[0], rel=1e-6)
    assert planned[-1] == pytest.approx(exact[-1], rel=0.01)
    assert planned[2:] != exact[2:]
    settings = json.loads((folder / "config.json").read_text())
    assert settings["activation_budget"] == "30%"


@pytest.mark.whole
@pytest.mark.usefixtures("micro_preset")
def test_a_resumed_run_has_the_plan_of_the_one_that_stopped(
    shards, tmp_path, monkeypatch
):
    monkeypatch.setattr("examples.llama.budget.DELAY", 3)
    budget = ["--activation-budget", "30%", "--replan-every", "2"]
    # A bound that is broken at once: every plan is made anew.
    budget += ["--activation-error", "0.002", "--checkpoint-every", "0"]
    whole, decisions = train_micro(tmp_path / "whole", shards, *budget)
    folder = tmp_path / "halves"
    train_micro(folder, shards, *budget, "--stop-step", "5")
    resumed, again = train_micro(folder, shards, *budget, "--resume")
    assert resumed == whole
    assert [d for d in again if d[1] != "resumed"] == decisions
    assert (5, "resumed") in again


def layer_gradients(definition, params, batch, wrap=None):
    def gradient(params, batch):
        return mean_gradient(definition, params, batch, wrap)[1]["layers"]

    return jax.jit(gradient, compiler_options=QUICK)(params, batch)


@pytest.mark.whole
def test_gradients_are_within_the_predicted_error():
    """Of the trainer's model, whatever the policy: at most 1.5 of what was predicted.

    The prediction adds squares of single tags, from two layers: it is a bound for rows
    of tags that stand one behind the other, and no more exact than that.
    """
    config, model = resolve(TrainConfig(batch_size=4, seq_len=64))
    layers, params = find_layers(config, model), init_params(model, 0)
    rng = np.random.default_rng(0)
    # Text-like: a few tokens are most of it.
    rows = [(rng.zipf(1.5, 65) % 256).tolist() for _ in range(4)]
    batch = split_rows(as_batch(rows, 4, 64), 1)
    errors = layers.errors(params, {k: v[0] for k, v in batch.items()})
    exact = layer_gradients(layers.definition, params, batch)
    shapes = jax.eval_shape(layers.args, params)
    norms = dict.fromkeys(("norm1", "norm2"), "int4+8")
    policies = {
        "int8": dict.fromkeys(PRODUCTS, "int8"),
        "int4": dict.fromkeys(PRODUCTS, "int4"),
        "norms": norms | {"act": "int4"},
        "all": dict.fromkeys([*PRODUCTS, "h", "act", "norm1", "norm2"], "int4"),
        "roles": activations.transformer_policy(),
    }
    for name, policy in policies.items():
        predicted = activations.predict(
            layers.block, shapes, model.layers, policy, errors=errors
        )

        def wrap(layer, policy=policy):
            return activations.compressed_checkpoint(layer, policy)

        got = layer_gradients(layers.definition, params, batch, wrap)
        error = distance(got, exact)
        assert error < 1.5 * predicted.error, name
        # And the bound says something: the largest is off by ten times at most.
        assert error > 0.1 * predicted.error, name
