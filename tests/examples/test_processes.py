"""Two processes of one run, each with two CPU devices, joined over the loopback."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from examples.llama import processes
from examples.llama.config import UsageError

ROOT = pathlib.Path(__file__).parents[2]

# The program with a model that compiles fast. Process 1 sends itself SIGNAL at STEP.
PROGRAM = """
import os, sys
from examples.llama import presets, train
from examples.llama.model import ModelConfig

recipe = presets.Recipe(
    steps=8, rank=8, update_proj_gap=3, seq_len=16, batch_size=8, micro_batches=1,
    clip=1.0, tokenizer="bytes", packing="packed", dtype="float32", eval_every=0,
    eval_tokens=300, eval_batch_size=6, checkpoint_every=2,
)
model = ModelConfig(vocab_size=264, width=32, ff_width=48, layers=2, heads=2)
presets.PRESETS["micro"] = presets.Preset(model, recipe)
number, at = int(os.environ["SIGNAL"]), int(os.environ["STEP"])
plain = train.Trainer._step

def step(self, item, bar):
    if number and self.step == at and os.environ["JAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), number)
    plain(self, item, bar)

train.Trainer._step = step
sys.exit(train.main(["--preset", "micro", "--optimizer", "galore", *sys.argv[1:]]))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def launch(shards, tmp_path):
    """Runs both processes to their ends; returns exit codes and outputs."""
    started: list[subprocess.Popen] = []

    def run(name: str, *flags: str, number: int = 0, step: int = 0):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
            "SIGNAL": str(int(number)),
            "STEP": str(step),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", PROGRAM, "--data", shards, *flags]
        both = [
            subprocess.Popen(
                [*command, "--run-dir", name],
                cwd=tmp_path,
                env=env | {"JAX_PROCESS_ID": str(index)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for index in range(2)
        ]
        started.extend(both)
        outputs = [process.communicate(timeout=400) for process in both]
        return [process.returncode for process in both], outputs

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def losses(run_dir: pathlib.Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines for key in ("loss", "val_loss") if key in line]


@pytest.mark.slow
def test_two_processes_one_killed_and_resumed(launch, tmp_path):
    codes, outputs = launch("whole")
    assert codes == [0, 0], outputs
    (first, _), (second, _) = outputs
    assert "mesh data=1,fsdp=4,tensor=1" in first
    assert "validation perplexity" in first
    # What the transport itself says is not the program's.
    assert all(line.startswith("[Gloo]") for line in second.splitlines())
    expected = losses(tmp_path / "whole")
    assert len(expected) == 9

    codes, outputs = launch("killed", number=signal.SIGKILL, step=5)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0  # its steps need the other's rows
    assert len(losses(tmp_path / "killed")) == 5

    # One process is asked to stop: both do, before the same step, and save.
    resume = "killed", "--resume"
    codes, outputs = launch(*resume, number=signal.SIGTERM, step=6)
    assert codes == [0, 0], outputs
    assert re.search(r"going on from step [24]\b", outputs[0][0])
    assert "stopped at step 7" in outputs[0][0]

    codes, outputs = launch(*resume)
    assert codes == [0, 0], outputs
    assert "going on from step 7" in outputs[0][0]
    # The same programs on the same rows; sums over processes keep their order.
    np.testing.assert_allclose(losses(tmp_path / "killed"), expected, rtol=1e-6)


@pytest.mark.slow
def test_processes_share_an_error(launch):
    codes, outputs = launch("run", "--mesh", "fsdp=3")
    assert codes == [2, 2], outputs
    for _, errors in outputs:
        assert "names 3 devices, and there are 4" in errors


def test_a_part_of_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(UsageError, match="JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is"):
        processes.start_processes(False)


def join(monkeypatch, address):
    """As process 1 of 2 that waits for no time."""
    monkeypatch.setattr(processes, "WAIT", 0)
    for name, value in zip(processes.NAMES, (address, "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    processes.start_processes(False)


def test_nobody_at_the_coordinators_address(monkeypatch, capsys):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        UsageError, match=f"nobody listens at {address} .*refused.*runs"
    ):
        join(monkeypatch, address)
    assert f"process 1 of 2 joins the others at {address}" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"a port of process 0.* got '10\.0\.0\.1'"):
        join(monkeypatch, "10.0.0.1")


def test_one_process_asks_nobody():
    def flag() -> bool:
        return True

    assert processes.any_of(flag) is flag
    assert processes.found_by_first(lambda: 3) == 3
    assert processes.is_first()


def test_ctrl_c_while_the_libraries_load():
    command = [sys.executable, "-X", "importtime", "-m", "examples.llama.train"]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as loading:
        for line in loading.stderr:
            if "jax._src.config" in line:
                loading.send_signal(signal.SIGINT)
                break
        _, rest = loading.communicate()
    lines = [x for x in rest.splitlines() if x and not x.startswith("import time:")]
    assert (loading.returncode, lines) == (130, ["interrupted"])


@pytest.mark.parametrize(
    ("numbers", "unsaved", "line"),
    [
        ([signal.SIGINT], False, "interrupted before a step; nothing is lost"),
        (
            [signal.SIGTERM, signal.SIGINT],
            True,
            "ended at once by a second signal; nothing more is saved",
        ),
    ],
)
def test_signals_while_the_main_thread_is_busy(numbers, unsaved, line):
    program = (
        "import hashlib\n"
        "from examples.llama.processes import stop_on_signals\n"
        f"with stop_on_signals(lambda: {unsaved}):\n"
        "    print('busy', flush=True)\n"
        # As a compilation does: no line of Python for minutes.
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as busy:
        assert busy.stdout.readline() == "busy\n"
        for number in numbers:
            busy.send_signal(number)
            time.sleep(0.2)  # or the system may keep one of them
        _, errors = busy.communicate(timeout=60)
    assert errors.split("\n") == ["", line, ""]
    assert busy.returncode == 128 + numbers[-1]


def test_a_second_signal_ends_at_once():
    program = (
        "import os, signal\n"
        "from examples.llama.processes import stop_on_signals\n"
        "with stop_on_signals() as asked:\n"
        "    for number in (signal.SIGINT, signal.SIGTERM):\n"
        "        os.kill(os.getpid(), number)\n"
        "        print(asked(), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "True\n"
    assert done.stderr.split("\n") == [
        "",
        "ended at once by a second signal; nothing more is saved",
        "",
    ]
