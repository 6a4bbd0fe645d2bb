"""Compiles for a TPU that need not be there: ``pytest -m tpu_aot`` (extra ``tpu``)."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu_aot


def test_an_update_compiles_for_a_tpu(tmp_path):
    pytest.importorskip("libtpu")
    path = tmp_path / "figures.json"
    # A process of its own: the TPU's compiler needs its settings before JAX starts.
    command = [sys.executable, "-m", "benchmarks.tpu_aot"]
    options = ["--preset", "60m", "--rank", "128", "--json", str(path)]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    adamw = figures["rows"]["optax.adamw"]
    # Two float32 moments over 16 devices; the counter is on all of them.
    assert adamw["state_bytes_per_device"] == figures["parameters"] * 8 // 16 + 4
    for name, row in figures["rows"].items():
        assert row["program_bytes"] > 0, name
    auto = figures["rows"]["galore side=auto"]
    assert "all-reduce" not in auto["collectives_every_step"]


def test_four_bits_take_a_quarter_of_the_activations(tmp_path):
    pytest.importorskip("libtpu")
    path = tmp_path / "activations.json"
    command = [sys.executable, "-m", "benchmarks.activations", "--tpu"]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, "--out", str(path)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["tpu"]["rows"]
    none, four, full = rows["no remat"], rows["int4"], rows["full remat"]
    assert four["temp_bytes"] <= 0.25 * none["temp_bytes"]
    assert four["flops"] <= 1.03 * none["flops"] < 1.2 * none["flops"] < full["flops"]
