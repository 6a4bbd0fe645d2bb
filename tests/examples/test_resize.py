"""A run goes on at another rank, gap, dtype or codec, and says what becomes of it."""

import json
import shutil

import numpy as np
import pytest

from examples.llama import train

pytestmark = pytest.mark.whole


@pytest.fixture
def command(micro_preset, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(run_dir, *flags):
        common = ["--preset", "micro", "--data", shards, "--eval-every", "0"]
        common += ["--optimizer", "galore", "--lr", "0.003"]
        return train.main([*common, "--run-dir", run_dir, *flags])

    return run


def losses(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return np.asarray([line["loss"] for line in lines if "loss" in line])


def test_a_run_goes_on_at_another_rank(command, tmp_path, capsys):
    assert command("whole") == 0
    assert command("parts", "--stop-step", "5") == 0
    for name in ("larger", "smaller", "codes"):
        shutil.copytree("parts", name)
    straight = losses(tmp_path / "whole")
    assert straight.shape == (8,)

    def goes_on(name, *flags):
        capsys.readouterr()
        assert command(name, "--resume", *flags) == 0
        found = losses(tmp_path / name)
        np.testing.assert_array_equal(found[:6], straight[:6])
        # It falls by 0.08 in the step behind the change.
        np.testing.assert_allclose(found, straight, atol=2e-3)
        return capsys.readouterr().out, found

    # Without another rank given, a run goes on as it was, bit for bit.
    _, same = goes_on("parts")
    np.testing.assert_array_equal(same, straight)
    told, larger = goes_on("larger", "--rank", "12")
    assert "rank 8 -> 12: 14 matrices, moments kept in 8 of 12 directions" in told
    assert np.any(larger != straight)
    flags = ["--rank", "4", "--update-proj-gap", "2", "--state-dtype", "bfloat16"]
    told, _ = goes_on("smaller", *flags)
    assert "rank 8 -> 4: 14 matrices, moments kept in 4 of 4 directions" in told
    assert "update_proj_gap 3 -> 2; state_dtype float32 -> bfloat16" in told
    told, _ = goes_on("codes", "--optimizer", "galore_8bit")
    assert "optimizer galore -> galore_8bit" in told

    # What is not given does not change anything; what cannot be kept is refused.
    assert command("larger", "--resume", "--steps", "9") == 2
    assert "rank: checkpoint 12, now 8" in capsys.readouterr().err
    assert command("parts", "--resume", "--steps", "9", "--optimizer", "fira") == 2
    message = capsys.readouterr().err
    assert (
        "cannot go on with these flags: lro.resize_state: new_tx is another" in message
    )
    assert (tmp_path / "parts/checkpoints/8").is_dir()
