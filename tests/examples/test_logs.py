"""`--log-to`: what is told, and that nobody has to have the packages."""

import sys
import types

import jax
import optax
import pytest

from examples.llama import optimizers
from examples.llama.config import TrainConfig, UsageError, resolve
from examples.llama.logs import open_logs
from examples.llama.report import Metrics
from examples.llama.train import Trainer


class Writer(list):
    """Stands for tensorboardX's and for a run of wandb's."""

    def __init__(self, *folder):
        self.closed = False

    def add_scalar(self, name, value, step):
        self.append((step, name, value))

    def log(self, values, step):
        for name, value in values.items():
            self.add_scalar(name, value, step)

    def close(self):
        self.closed = True

    finish = close


def test_every_number_and_the_speed(tmp_path, monkeypatch):
    made = []

    def make(*args, **options):
        made.append((Writer(), args, options))
        return made[-1][0]

    fake = types.SimpleNamespace(SummaryWriter=make, init=make)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logs = open_logs(("tensorboard", "wandb"), tmp_path, {"lr": 1})
    metrics = Metrics(tmp_path, 0, True, logs)
    metrics.add({"step": 1, "loss": 2.0, "tokens": 10, "seconds": 9.0})
    metrics.add({"step": 2, "loss": None, "tokens": 30, "seconds": 0.5, "plan": "x"})
    metrics.close()
    (board, args, _), (run, _, options) = made
    assert args == (str(tmp_path / "tensorboard"),)
    assert options["mode"] == "offline" and options["config"] == {"lr": 1}
    for writer in (board, run):
        assert writer.closed
        found = [entry for entry in writer if entry[1] != "peak_bytes_in_use"]
        assert found == [
            (1, "loss", 2.0),
            (1, "tokens", 10),
            (1, "seconds", 9.0),
            (2, "tokens", 30),
            (2, "seconds", 0.5),
            (2, "tokens_per_second", 40.0),
        ]


@pytest.mark.whole
def test_the_share_of_the_gradient_that_bases_hold(
    micro_preset, shards, tmp_path, monkeypatch
):
    """At every step of a method that projects."""
    writer = Writer()
    fake = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    config = TrainConfig(
        preset="micro",
        optimizer="galore",
        data=shards,
        steps=3,
        rank=4,
        eval_every=0,
        checkpoint_every=0,
        log_to=("tensorboard",),
        run_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
    )
    trainer = Trainer(config, jax.devices()[:1])
    trainer.run(lambda: False)
    trainer.close()
    *shares, at_the_end = [x.get("captured_energy") for x in trainer.metrics.lines]
    assert at_the_end is None and all(0.1 < share < 1 for share in shares)
    drawn = [value for _, name, value in writer if name == "captured_energy"]
    assert drawn == shares
    assert not optimizers.projects(optax.adamw(1e-3), trainer.params)


def test_a_log_that_fails_is_a_line_and_the_run_goes_on(tmp_path, capsys):
    class Full:
        def add(self, line):
            raise OSError(28, "No space left on device")

        close = add

    metrics = Metrics(tmp_path, 0, True, [Full()])
    metrics.add({"step": 1, "loss": 1.0})
    assert "Full was told nothing (No space left on device); the run goes on" in (
        capsys.readouterr().err
    )
    assert metrics.lines == [{"step": 1, "loss": 1.0}]


def test_what_cannot_be_logged_to(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        UsageError, match=r"--log-to tensorboard needs tensorboardX: pip"
    ):
        open_logs(("tensorboard",), tmp_path, {})
    with pytest.raises(
        UsageError, match="--log-to knows tensorboard and wandb; got 'x'"
    ):
        resolve(TrainConfig(log_to=("x",)))
