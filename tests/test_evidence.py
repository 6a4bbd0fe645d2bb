"""The evidence page says what its runs say, and the search brackets its rates."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro
from benchmarks import evidence, tuned
from benchmarks._contenders import CONTENDERS, TABLES

ROOT = pathlib.Path(__file__).parents[1]


def test_the_page_has_the_tables_of_the_runs():
    log = tuned.Log(ROOT / evidence.RUNS)
    page = (ROOT / evidence.PAGE).read_text()
    assert evidence.filled(page, evidence.parts(log)) == page


def test_every_method_and_part_is_a_contender():
    assert lro.METHODS.keys() <= CONTENDERS.keys()
    named = {name for pair in evidence.PARTS.values() for name in pair}
    assert named | evidence.TRIED.keys() <= CONTENDERS.keys() | {
        # Made before the draws were taken off, which nothing does any more.
        "even muon, 4 bits, rounded at random"
    }


def test_all_contenders_step_on_stacks_of_matrices():
    params = {"a": jnp.ones((2, 16, 16)), "b": jnp.ones((2, 16, 44))}
    for name, one in CONTENDERS.items():
        state = jax.eval_shape(one.build(4).init, params)
        assert lro.bytes_per_device(state) >= 0, name
    for name, tx in TABLES.items():
        assert jax.eval_shape(tx.init, params), name


def test_a_search_goes_on_until_both_neighbours_are_worse(tmp_path):
    log = tuned.Log(tmp_path / "runs.jsonl")
    asked = []
    for rate in tuned.next_rates(log, 0.01, stage="search", name="x"):
        asked.append(rate)
        distance = abs(math.log2(rate / 0.04))
        loss = None if rate > 0.1 else distance
        log.add({"stage": "search", "name": "x", "rate": rate, "val_loss": loss})
        assert (tuned.best_rate(log, "x") is None) == (rate != 0.08)
    assert asked == [0.01, 0.005, 0.02, 0.04, 0.08]
    assert tuned.best_rate(log, "x") == 0.04
    again = tuned.Log(tmp_path / "runs.jsonl")
    assert again.runs == log.runs
    assert not [*tuned.next_rates(again, 0.01, stage="search", name="x")]


def test_the_front_is_what_nothing_beats():
    def row(name, size, loss):
        return evidence.Row(name, 1.0, (loss,), size / 8, size, math.nan)

    rows = [row("adam", 8, 2.0), row("half", 4, 1.9), row("none", 0, 2.5)]
    rows += [row("worse", 4, 2.2), row("same", 8, 1.9)]
    assert [r.name for r in evidence.front(rows)] == ["none", "half"]


@pytest.mark.whole
def test_a_run_of_the_search(tmp_path, monkeypatch):
    stage = tuned.Stage(16, 1, 2, 4, (0,))
    monkeypatch.setitem(tuned.STAGES, "search", stage)
    work = tuned.Workload(eval_tokens=2048)
    sweep = tuned.Sweep("search", tuned.Log(tmp_path / "runs.jsonl"), work)
    for name in ("optax.adamw", "even_muon, all leaves"):
        sweep.run(name, CONTENDERS[name], 0.01, 0)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    adamw, even = map(json.loads, lines)
    assert all(4 < run["val_loss"] < 6 for run in (adamw, even))
    matrices = 4 * 16 * 16 + 3 * 16 * 44
    assert 8 * matrices <= adamw["matrix_state"] < 8 * matrices + 16
    assert even["table_state"] < 16 and even["matrix_state"] > 0
    assert optax.__version__ == adamw["optax"]
