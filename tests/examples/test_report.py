"""The log of a run: it never stops one, and loses nothing that can be kept."""

import json
import math
import os
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.llama.picture import About, draw, round_numbers, smoothed
from examples.llama.report import Metrics, entropy

LINES = [{"step": step, "loss": 1.0} for step in range(1, 11)]


def text(lines) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text(LINES))
    return tmp_path


def kept(run_dir) -> str:
    return (run_dir / "metrics.jsonl").read_text()


def test_lines_behind_the_start_are_dropped(run_dir):
    Metrics(run_dir, 7).add({"step": 8, "loss": 2.0})
    assert kept(run_dir) == text([*LINES[:7], {"step": 8, "loss": 2.0}])


@pytest.mark.parametrize(
    "odd",
    [b"5", b"{}", b"[1]", b"\xfb\"step\": 11}", b'{"step": "11"}', b"[" * 60_000,
     b'{"step": 1e3}', b"null", b"", b'{"step": true}', b"x" * 1_000_000],
    ids=lambda odd: str(odd[:12]),
)  # fmt: skip
def test_odd_lines_are_left_out(run_dir, odd, capsys):
    path = run_dir / "metrics.jsonl"
    path.write_bytes(odd + b"\n" + text(LINES).encode() + b'{"step": 11, "lo')
    log = Metrics(run_dir, 11)
    assert log.lines == LINES
    assert kept(run_dir) == text(LINES)
    assert "damaged or cut lines left out" in capsys.readouterr().err


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1))
@settings(max_examples=200, deadline=None)
def test_any_bytes(tmp_path_factory, changes):
    run_dir = tmp_path_factory.mktemp("run")
    changed = bytearray(text(LINES).encode())
    for at, byte in changes:
        changed[at % len(changed)] = byte
    (run_dir / "metrics.jsonl").write_bytes(changed)
    log = Metrics(run_dir, 10)
    log.add({"step": 11})
    assert kept(run_dir) == text(log.lines)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("no", p)])
def test_what_is_no_log_is_moved_away(tmp_path, make, capsys):
    make(tmp_path / "metrics.jsonl")
    Metrics(tmp_path, 0).add({"step": 1})
    assert kept(tmp_path) == '{"step": 1}\n'
    assert "moved to metrics.damaged" in capsys.readouterr().err


def test_a_full_disk(run_dir, capsys):
    log = Metrics(run_dir, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        size = (run_dir / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, before[1]))
        for step in range(11, 40):
            log.add({"step": step, "loss": 1.0})
        # Nothing is rewritten before the disk has room: the history stays.
        assert kept(run_dir).startswith(text(LINES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
        again = Metrics(run_dir, 5)
        assert kept(run_dir).startswith(text(LINES))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.splitlines() == [
        "metrics.jsonl: File too large; lines are kept to be written",
        "metrics.jsonl: 1 damaged or cut lines left out",
        "metrics.jsonl: File too large; lines are kept to be written",
    ]
    files = log.close()
    assert {path.name for path in files} == {"metrics.jsonl", "metrics.csv", "loss.png"}
    assert kept(run_dir) == text(log.lines)
    assert len(log.lines) == 39
    again.close()
    assert kept(run_dir) == text(LINES[:5])


def test_values_that_cannot_be_drawn(tmp_path, capsys):
    log = Metrics(tmp_path, 0)
    log.add({"step": 1, "loss": {"a": 1}})
    log.add({"step": 2, "loss": 10**400})
    assert [path.name for path in log.close()] == ["metrics.jsonl", "metrics.csv"]
    assert "loss.png was not written" in capsys.readouterr().err


# --- the picture -------------------------------------------------------------------


def test_picture_says_what_ran_and_in_which_units(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    lines = [
        {
            "step": n,
            "loss": 6.0 / n,
            "tokens": 100 * n,
            "seconds": 0.5 if n > 1 else 9.0,
        }
        for n in range(1, 81)
    ]
    lines += [{"step": 40, "val_loss": 0.2}, {"step": 60, "loss": None}]
    baseline = ("entropy of bytes", 3.0)
    memory = [("state, galore", 2**20), ("state, adamw", 3 * 2**20)]
    about = About("a run", "nats per byte", "byte", baseline, memory)
    draw(lines, tmp_path / "loss.png", about)
    (figure,) = drawn
    loss, speed, bars = figure.axes
    assert figure.get_suptitle() == "a run"
    assert loss.get_ylabel() == "loss, nats per byte"
    assert loss.child_axes[0].get_ylabel() == "perplexity per byte"
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == [
        "training, mean of 5 steps around each", "validation", "entropy of bytes: 3.00"
    ]  # fmt: skip
    # Without the step that compiled.
    assert "bytes per second, median 200" == speed.get_title()
    assert speed.lines[0].get_xdata()[0] == 2
    assert bars.get_title() == "memory, MiB"
    assert [bar.get_width() for bar in bars.patches] == [3, 1]
    assert "without dropout" in figure.get_supxlabel()


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": 1.0}]])
def test_a_run_that_hardly_began_has_a_picture(tmp_path, lines):
    draw(lines, tmp_path / "loss.png", About())
    assert (tmp_path / "loss.png").stat().st_size


def test_smoothing_does_not_lag():
    line = np.arange(10.0)
    np.testing.assert_allclose(smoothed(line, 2), line)
    np.testing.assert_allclose(smoothed(np.array([0.0, 3.0, 0.0]), 1), [0, 1, 0])


def test_round_numbers():
    assert round_numbers(4.0, 31.0) == [5, 7, 10, 15, 20, 30]
    assert round_numbers(3.0, 900.0) == [5, 10, 20, 50, 100, 200, 500]


def test_entropy_of_frequencies():
    assert entropy([1, 1, 2, 2]) == pytest.approx(math.log(2))
    assert entropy([3]) == 0 and entropy([]) == 0
