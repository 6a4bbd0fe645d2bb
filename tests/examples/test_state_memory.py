"""The optimizer's state lies in the host's memory between steps, if asked for."""

import json

import jax
import numpy as np
import pytest

from examples.llama import train
from examples.llama.config import TrainConfig, UsageError
from examples.llama.placement import check_memory

pytestmark = pytest.mark.whole


@pytest.fixture
def config(micro_preset, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(run_dir, **flags):
        common = {"preset": "micro", "data": shards, "eval_every": 0}
        common |= {"optimizer": "galore"}
        return TrainConfig(**common | {"run_dir": str(tmp_path / run_dir)} | flags)

    return make


def trained(config, devices):
    """The trainer after its run, and the losses of all steps of the folder."""
    trainer = train.Trainer(config, devices)
    trainer.run(lambda: False)
    trainer.close()
    lines = (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    found = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    return trainer, found


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim > 1}


def test_the_state_is_in_the_host_and_the_run_is_the_same(config):
    devices = jax.devices()[:1]
    plain, expected = trained(config("plain", steps=4), devices)
    flags = {"steps": 4, "state_memory": "pinned_host"}
    far, found = trained(config("far", **flags), devices)
    assert found == expected
    assert kinds(far.opt_state) == {"pinned_host"} != kinds(plain.opt_state)
    assert "pinned_host" not in kinds(far.params)
    states = jax.device_get((far.opt_state, plain.opt_state))
    jax.tree.map(np.testing.assert_array_equal, *states)
    # One program for all steps, that of the first, which takes what it has returned.
    assert isinstance(far.steps.train, jax.stages.Compiled)
    # A run goes on from either, at another rank as well.
    flags |= {"steps": 5, "resume": True}
    again, longer = trained(config("far", **flags), devices)
    assert longer[:4] == expected and kinds(again.opt_state) == {"pinned_host"}
    flags |= {"state_memory": "device", "steps": 6, "rank": 4}
    near, _ = trained(config("far", **flags), devices)
    assert kinds(near.opt_state) == kinds(plain.opt_state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [{}, {"layerwise": True}, {"compressed": True}],
    ids=["plain", "layerwise", "compressed"],
)
def test_on_a_mesh_and_in_other_steps(config, flags):
    flags, devices = flags | {"steps": 2}, jax.devices()[:2]
    _, expected = trained(config("plain", **flags), devices)
    far, found = trained(config("far", state_memory="pinned_host", **flags), devices)
    assert found == expected
    assert kinds(far.opt_state) == {"pinned_host"}


def test_a_memory_that_is_not_there_is_refused():
    class Device:
        def addressable_memories(self):
            return [type("Memory", (), {"kind": "device"})]

        def __str__(self):
            return "toy"

    with pytest.raises(
        UsageError, match="pinned_host: device toy reaches device alone"
    ):
        check_memory("pinned_host", Device())
