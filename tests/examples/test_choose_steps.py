"""`--layerwise` and `--compressed`: the losses of plain runs, and what is refused."""

import re
import shutil

import chex
import jax
import numpy as np
import optax
import pytest

from examples.llama import choose_steps, optimizers, train
from examples.llama.choose_steps import laid_out, layers_outermost, traffic
from examples.llama.config import SENDS, TrainConfig, UsageError, resolve
from examples.llama.model import abstract_model
from examples.llama.placement import choose_placement, fresh_state
from examples.llama.step import PLAIN
from examples.llama.train import Trainer

pytestmark = pytest.mark.usefixtures("micro_preset")
# Adam divides by roots of 1e-12 or less without it, and makes much of rounding.
COMMON = {"preset": "micro", "optimizer": "galore", "eps": 1e-4, "warmup": 1}


def losses(lines):
    """One per step, and validation's."""
    return np.array([line.get("loss") or line["val_loss"] for line in lines])


@pytest.fixture
def metrics(shards, tmp_path):
    """Runs the trainer; returns its lines of metrics."""

    def run(name, devices=1, **flags):
        flags = COMMON | {"data": shards, "run_dir": str(tmp_path / name)} | flags
        trainer = Trainer(TrainConfig(**flags), jax.devices()[:devices])
        try:
            trainer.run(lambda: False)
        finally:
            trainer.close()
        lines = trainer.metrics.lines
        assert not any(line.get("skipped") for line in lines)
        return lines

    return run


@pytest.mark.whole
def test_layerwise_goes_on_with_a_plain_run_and_back(metrics, tmp_path, monkeypatch):
    """Layer-wise and on two devices from step 3 to 6; refreshes at 0, 3 and 6 of 8.

    With the layouts that a TPU is given.
    """
    monkeypatch.setattr(choose_steps, "PADDING", {"cpu"})
    flags = {"micro_batches": 2, "clip": 0.5, "eval_every": 0, "keep": 9}
    plain = losses(metrics("plain", checkpoint_every=3, **flags))
    assert len(plain) == 9
    assert plain[-2] < plain[0] - 0.1
    mixed = shutil.copytree(tmp_path / "plain", tmp_path / "mixed")
    for step in ("6", "8"):
        shutil.rmtree(mixed / "checkpoints" / step)
    flags |= {"resume": True}
    metrics("mixed", 2, mesh="fsdp=2", layerwise=True, stop_step=6, **flags)
    found = losses(metrics("mixed", **flags))
    assert len(found) == 10  # the stop added a validation
    # float32 sums in another order, through a refresh.
    np.testing.assert_allclose(np.delete(found, 6), plain, rtol=1e-6)


def test_layerwise_layouts(monkeypatch):
    """Layers outermost; innermost the axis that needs no padding, 128 beside 352."""
    config, model = resolve(TrainConfig(preset="tiny", layerwise=True))
    one = choose_placement(config, jax.devices()[:1])
    _, params = abstract_model(model)
    tx = optimizers.build_optimizer(config)
    plain = one.layout(params, tx, PLAIN)
    assert layers_outermost(plain, tx, PLAIN, params) is plain
    monkeypatch.setattr(choose_steps, "PADDING", {"cpu"})
    layout = layers_outermost(plain, tx, PLAIN, params)
    made = fresh_state(layout, model, 0, tx, PLAIN)
    old = fresh_state(plain, model, 0, tx, PLAIN)
    moved = laid_out(old, (layout.stored, layout.state))
    assert old[0]["layers"]["mlp"]["up"]["kernel"].is_deleted()
    for tree in (made, moved):
        kernel = tree[0]["layers"]["mlp"]["up"]["kernel"]
        assert kernel.shape == (4, 128, 352)
        assert kernel.format.layout.major_to_minor == (0, 2, 1)
    chex.assert_trees_all_equal(made, moved)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "galore", "subtrack"])
def test_layerwise_on_a_mesh(metrics, optimizer):
    flags = {"optimizer": optimizer, "eval_every": 0, "checkpoint_every": 0}
    flags |= {"batch_size": 8, "micro_batches": 2}
    plain = losses(metrics("plain", **flags))
    flags |= {"activation_policy": "names", "layerwise": True}
    found = losses(metrics("mesh", 8, mesh="data=2,fsdp=2,tensor=2", **flags))
    np.testing.assert_allclose(found, plain, rtol=1e-5)


def check_compressed(metrics, mesh, **flags):
    """Six steps, refreshes at 0 and 3; not clipped, as the norm is another one."""
    flags |= {"clip": 0.0, "steps": 6, "eval_every": 0, "checkpoint_every": 0}
    plain = metrics("plain", 4, mesh=mesh or "data=4", **flags)
    sent = metrics("sent", 4, mesh=mesh, compressed=True, **flags)
    expected = losses(plain)
    assert expected[-2] < expected[0] - 0.1
    np.testing.assert_allclose(losses(sent), expected, rtol=1e-5)
    # Whole gradients at refreshes, their parts in the subspace between.
    norms = zip(sent[:6], plain[:6], strict=True)
    ratios = [a["grad_norm"] / b["grad_norm"] for a, b in norms]
    assert [ratio > 0.9999 for ratio in ratios] == [True, False, False] * 2


@pytest.mark.whole
def test_compressed_equals_plain_data_parallelism(metrics, tmp_path, capsys):
    check_compressed(metrics, "")
    told = capsys.readouterr().out
    assert "mesh data=4,fsdp=1,tensor=1" in told
    assert "gradients: 21,408 numbers between refreshes, 34,464 plainly" in told
    table = (tmp_path / "sent" / "traffic.txt").read_text()
    assert table.count("a projection between refreshes") == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"mesh": "data=2,fsdp=2", "micro_batches": 2},
        {"mesh": "data=2,tensor=2", "optimizer": "natural_galore"},
        {"mesh": "data=2,fsdp=2", "weights": "int8", "activation_policy": "adacc"},
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_compressed_beside_other_axes(metrics, flags):
    check_compressed(metrics, batch_size=8, **flags)


def test_which_methods_send_projections():
    for name in optimizers.OPTIMIZERS:
        config, model = resolve(
            TrainConfig(preset="micro", optimizer=name, update_proj_gap=3, level=1)
        )
        tx, params = optimizers.build_optimizer(config), abstract_model(model)[1]
        if name in (*SENDS, "dct_adamw"):  # with a gap above 1
            assert traffic(config, tx, params).compressed, name
            continue
        with pytest.raises(UsageError, match=f"--compressed: {name} .* galore, "):
            traffic(config, tx, params)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"layerwise": True, "weights": "int8"},
            "take --weights split, or plain",
        ),
        ({"layerwise": True, "activation_budget": "30%"}, "leave the budget out"),
        ({"layerwise": True, "compressed": True}, "give one of the two"),
        ({"compressed": True, "mesh": "fsdp=4"}, "is 1; for example --mesh data=2,fsd"),
        (
            {"compressed": True, "micro_batches": 2},
            r"2 rows .* data x fsdp = 4 devices",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together(flags, message):
    with pytest.raises(UsageError, match=message):
        choose_placement(
            resolve(TrainConfig(preset="micro", **flags))[0], jax.devices()[:4]
        )


def test_refusals_end_with_2_and_write_nothing(shards, tmp_path, monkeypatch, capsys):
    def coupled(config, lr, **_):
        return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(lr))

    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw", coupled)
    common = ["--preset", "micro", "--data", shards, "--run-dir", str(tmp_path / "r")]
    common += ["--batch-size", "8"]
    for flags, message in [
        (
            ["--layerwise", "--optimizer", "adamw"],
            "update of .* depends on the gradien",
        ),
        (
            ["--compressed", "--optimizer", "adamw"],
            "adamw projects nothing; methods th",
        ),
        (["--compressed", "--optimizer", "fira"], r"whole \(layers/attn/k/kernel: lro"),
    ]:
        assert train.main([*common, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line)
        assert not (tmp_path / "r").exists()
