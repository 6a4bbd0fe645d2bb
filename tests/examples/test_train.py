"""The command: what it leaves behind, going on bit for bit, and its exit codes."""

import csv
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import orbax.checkpoint as ocp
import pytest

from examples.llama import train
from examples.llama.checkpoint import Store
from examples.llama.config import TrainConfig
from examples.llama.run_folder import choose_run_dir

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("programs")


@pytest.fixture
def command(micro_preset, shards, tmp_path, monkeypatch):
    """Runs the program in this process; returns its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str, run_dir: str = "run") -> int:
        common = ["--preset", "micro", "--data", shards, "--run-dir", run_dir]
        return train.main([*common, *flags])

    return run


def metrics(run_dir: pathlib.Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def arrays(run_dir: pathlib.Path, step: int):
    with ocp.CheckpointManager((run_dir / "checkpoints").absolute()) as manager:
        state = manager.restore(step, args=ocp.args.StandardRestore())
    return {
        jax.tree_util.keystr(path): (leaf.dtype.name, leaf.tobytes())
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            jax.tree.map(jax.numpy.asarray, state)
        )[0]
    }


def test_resume_is_bit_for_bit_and_survives_damage(command, tmp_path, capsys):
    assert command("--micro-batches", "2", run_dir="whole") == 0
    table = capsys.readouterr().out
    assert re.search(r"corpus .*\.json\.gz: 3 shards, hash [0-9a-f]{16}", table)
    assert "optimizer state, galore" in table
    assert "byte-unigram perplexity" in table
    whole = tmp_path / "whole"
    for name in ("metrics.jsonl", "metrics.csv", "loss.png", "config.json"):
        assert (whole / name).stat().st_size > 0
    assert "layers/attn/q/kernel" in (whole / "selection.txt").read_text()
    rows = csv.DictReader((whole / "metrics.csv").read_text().splitlines())
    assert [int(r["step"]) for r in rows] == [x["step"] for x in metrics(whole)]

    parts = tmp_path / "parts"
    flags = ["--micro-batches", "2", "--resume"]
    assert command(*flags, "--stop-step", "5", run_dir="parts") == 0
    assert Store(parts).newest_good() == (5, {})
    assert command(*flags, run_dir="parts") == 0
    # The stop added a validation at step 5; all else is the same.
    resumed = [x for x in metrics(parts) if "loss" in x or x["step"] != 5]
    assert resumed == metrics(whole)
    assert arrays(parts, 8) == arrays(whole, 8)

    data = max(
        (p for p in (parts / "checkpoints/8").rglob("*") if p.is_file()),
        key=lambda path: path.stat().st_size,
    )
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 4
    data.write_bytes(flipped)
    capsys.readouterr()
    assert command(*flags, "--keep", "4", run_dir="parts") == 0
    told, message = capsys.readouterr()
    assert "changed since the run began: keep: 3, now 4" in told
    assert re.search(r"checkpoint 8 is damaged \(.*sha256\).* back to step 6", message)
    assert metrics(parts)[-3:] == metrics(whole)[-3:]
    assert arrays(parts, 8) == arrays(whole, 8)

    # Another configuration: refused, with what differs, and nothing is touched.
    before = contents(parts)
    assert command("--resume", "--rank", "4", "--b2", "0.9", run_dir="parts") == 2
    message = capsys.readouterr().err
    assert "another configuration (b2: checkpoint 0.999, now 0.9; rank: che" in message
    assert command(run_dir="parts") == 2
    assert "already holds a run: go on with --resume" in capsys.readouterr().err
    assert contents(parts) == before


def test_a_run_that_diverges_stops(command, tmp_path, capsys):
    flags = ["--optimizer", "adamw", "--lr", "1e38", "--warmup", "0"]
    assert command(*flags, "--max-skips", "2", "--eval-every", "0") == 1
    message = capsys.readouterr().err
    assert re.search(r"stopped: step \d: the gradient was not finite 2 times", message)
    assert metrics(tmp_path / "run")[-1]["skipped"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nothing/*.txt"], r"error: no file matches .*nothing/\*\.txt"),
        (["--optimizer", "sgdx"], "error: unknown optimizer 'sgdx'; known: adamw"),
        (["--preset", "8b"], "error: unknown preset '8b'; known: tiny"),
        (["--val-data", "empty.txt"], "holds no validation text: give more files"),
        (["--data", "empty.txt"], "holds no validation text"),
        (["--data", "gone.txt"], r"cannot read shard gone\.txt: No such file"),
        (
            ["--data", "bad.jsonl"],
            r"(\d) of \1 documents cannot be used \(\1 invalid JSON\)",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_the_caller_can_mend_exits_with_2(
    command, tmp_path, capsys, flags, message
):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "bad.jsonl").write_text("{\n" * 60)
    assert command(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "run").exists()


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fresh, again = TrainConfig(), TrainConfig(resume=True)
    assert str(choose_run_dir(fresh)) == "runs/tiny-galore"
    assert str(choose_run_dir(again)) == "runs/tiny-galore"
    for expected in ("runs/tiny-galore", "runs/tiny-galore-2", "runs/tiny-galore-3"):
        path = choose_run_dir(fresh)
        assert str(path) == expected
        path.mkdir(parents=True)
        assert choose_run_dir(again) == path


def test_help_explains_every_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
        assert f"    {name}: " in (ROOT / "examples/llama/config.py").read_text()
    for unit in ("optimizer steps", "length of a row, tokens", "rows per optimizer"):
        assert unit in text


def test_sigterm_saves_and_exits_with_0(shards, tmp_path):
    program = [sys.executable, "-m", "examples.llama.train", "--data", shards]
    flags = "--steps 100000 --seq-len 16 --batch-size 2 --eval-tokens 100".split()
    with subprocess.Popen(
        [*program, *flags, "--optimizer", "adamw", "--run-dir", str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        log = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.stat().st_size:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    step = int(re.search(r"stopped at step (\d+); saved in", output).group(1))
    assert step >= 1
    assert Store(tmp_path / "run").newest_good() == (step, {})
    assert metrics(tmp_path / "run")[-1]["step"] == step
