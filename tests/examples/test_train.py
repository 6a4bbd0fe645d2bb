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
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore((run_dir / "checkpoints" / str(step)).absolute())
    return {
        jax.tree_util.keystr(path): (leaf.dtype.name, leaf.tobytes())
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            jax.tree.map(jax.numpy.asarray, state)
        )[0]
    }


def test_resume_is_bit_for_bit_and_survives_damage(command, tmp_path, capsys):
    assert command("--micro-batches", "2", run_dir="whole") == 0
    table = capsys.readouterr().out
    assert re.match(rf"device \d+ x .* \| jax {jax.__version__} \| lowrank_opt", table)
    assert re.search(r"corpus .*\.json\.gz: 3 shards, hash [0-9a-f]{16} of", table)
    assert "step 1: compiling" in table
    assert "optimizer state, even_muon" in table
    assert "byte-unigram perplexity" in table
    whole = tmp_path / "whole"
    for name in ("metrics.jsonl", "metrics.csv", "loss.png", "config.json"):
        assert (whole / name).stat().st_size > 0
    assert "layers/attn/q/kernel" in (whole / "selection.txt").read_text()
    settings = json.loads((whole / "config.json").read_text())
    assert settings["environment"]["jax"] == jax.__version__
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
    assert re.search(
        r"checkpoint 8 is damaged \(.*its hash\).* back to step 6", message
    )
    assert metrics(parts)[-3:] == metrics(whole)[-3:]
    assert arrays(parts, 8) == arrays(whole, 8)

    assert command("--verify", run_dir="parts") == 0
    assert "checkpoint 8: good" in capsys.readouterr().out

    # Another configuration: refused, with what differs, and nothing is touched.
    before = contents(parts)
    assert command("--resume", "--rank", "4", "--b2", "0.9", run_dir="parts") == 2
    message = capsys.readouterr().err
    assert "another configuration (b2: checkpoint 0.999, now 0.9; rank: che" in message
    assert command(run_dir="parts") == 2
    assert "already holds a run: go on with --resume" in capsys.readouterr().err
    assert contents(parts) == before


def test_what_no_resume_can_use_is_one_line(command, tmp_path, capsys):
    """A record that is whole, as its seal says, and of another program."""
    assert command("--steps", "2") == 0
    store = Store(tmp_path / "run")
    meta = store.meta(2)
    hostile = [{"identity": {}}, meta | {"position": None}, meta | {"settings": 7}]
    for number, changed in enumerate(hostile):
        store.write_record(2, changed)
        capsys.readouterr()
        assert command("--steps", "2", "--resume") == 2, number
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: "), number


@pytest.mark.parametrize("name", ["checkpoints", "records", "lock", "damaged"])
def test_a_run_folder_of_something_else(command, tmp_path, capsys, name):
    """Files where folders should be, or the other way round; `damaged` can wait."""
    (tmp_path / "run").mkdir()
    if name == "lock":
        (tmp_path / "run/lock").mkdir()
    else:
        (tmp_path / "run" / name).write_text("")
    code = command("--steps", "2", "--resume", "--eval-every", "0")
    if name == "damaged":
        assert code == 0
    else:
        assert code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and " cannot be used: " in line


@pytest.mark.parametrize("flag", ["--run-dir", "--cache-dir", "--compilation-cache"])
@pytest.mark.parametrize("place", ["file", "file/below", "dangling", "/proc/none"])
def test_folders_that_cannot_be_used(command, tmp_path, capsys, flag, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    assert command("--tokenizer", "bpe", flag, place) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {flag} {place} cannot be used: ")


def test_a_run_whose_state_is_not_saved(command, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "begin", full)
        assert command("--steps", "3", "--eval-every", "0") == 1
    told, message = capsys.readouterr()
    assert message.splitlines() == [
        "checkpoint 2 could not be saved (No space left on device): none was before it",
        "checkpoint 3 could not be saved (No space left on device): none was before it",
        "stopped: the state of step 3 could not be saved; there is no checkpoint",
    ]
    assert "checkpoints" not in told.splitlines()[-2]
    # Nothing was ever saved, so the run may start.
    assert command("--steps", "3", "--eval-every", "0", "--resume") == 0


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
    assert str(choose_run_dir(fresh)) == "runs/tiny-even_muon"
    assert str(choose_run_dir(again)) == "runs/tiny-even_muon"
    for expected in (
        "runs/tiny-even_muon",
        "runs/tiny-even_muon-2",
        "runs/tiny-even_muon-3",
    ):
        path = choose_run_dir(fresh)
        assert str(path) == expected
        path.mkdir(parents=True)
        assert choose_run_dir(again) == path


def test_sigterm_saves_and_exits_with_0(shards, tmp_path):
    program = [sys.executable, "-m", "examples.llama.train", "--data", shards]
    flags = "--steps 100000 --seq-len 16 --batch-size 2 --eval-tokens 100".split()
    # One device, where the tests have eight: the later flag counts.
    one = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    with subprocess.Popen(
        [*program, *flags, "--optimizer", "adamw", "--run-dir", str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": one},
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
