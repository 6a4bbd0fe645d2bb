"""`--activation-budget`: what is planned, refused and written down."""

import json

import pytest

from examples.llama import train
from examples.llama.config import TrainConfig, UsageError, resolve
from examples.llama.plan_layers import parse_budget, plan_layers, profile_name
from lowrank_optax import activations
from lowrank_optax.activations import ActivationPlan

pytestmark = pytest.mark.usefixtures("programs")


def plan(budget, **flags):
    config, model = resolve(
        TrainConfig(
            preset="micro", optimizer="adamw", activation_budget=budget, **flags
        )
    )
    return plan_layers(config, model)


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
    with pytest.raises(UsageError, match="--activation-policy full, or the budget"):
        plan("30%", activation_policy="full")


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


@pytest.mark.usefixtures("micro_preset")
def test_a_run_follows_its_plan(shards, tmp_path):
    """Two runs that differ in the budget: the same first loss, other gradients."""

    def run(name, *flags):
        folder = tmp_path / name
        common = ["--preset", "micro", "--data", shards, "--optimizer", "galore"]
        assert train.main([*common, "--run-dir", str(folder), *flags]) == 0
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line).get("loss") for line in lines]
        return folder, [loss for loss in losses if loss is not None]

    _, exact = run("none")
    folder, planned = run("planned", "--activation-budget", "30%")
    written = ActivationPlan.from_json((folder / "activation_plan.json").read_text())
    assert written == plan("30%", data=shards)
    assert (folder / "activation_plan.txt").read_text().strip() == written.table()
    assert (folder / "activation_plan.png").read_bytes().startswith(b"\x89PNG")
    assert any("int" in str(c.action) for c in written.segments[0].choices)
    # The forward pass is exact; from then on the rounded gradients show.
    assert planned[0] == pytest.approx(exact[0], rel=1e-6)
    assert planned[-1] == pytest.approx(exact[-1], rel=0.01)
    assert planned[2:] != exact[2:]
    settings = json.loads((folder / "config.json").read_text())
    assert settings["activation_budget"] == "30%"
