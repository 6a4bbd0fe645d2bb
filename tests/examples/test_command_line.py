"""The pages of `--help`: short, grouped, with the value of every flag left out."""

import dataclasses
import re

import pytest

import lowrank_optax as lro
from examples.convert.__main__ import ConvertConfig
from examples.convert.__main__ import main as convert
from examples.finetune.__main__ import main as finetune
from examples.finetune.compare import CompareConfig
from examples.finetune.compare import main as compare
from examples.finetune.config import FinetuneConfig
from examples.llama.command_line import flags, method_lines, with_value
from examples.llama.config import TrainConfig, resolve
from examples.llama.presets import METHODS, PRESETS, Recipe
from examples.llama.train import main as train
from examples.plan.plan import PlanConfig
from examples.plan.plan import main as plan

GROUPS = ["run", "data", "model", "optimizer", "memory", "devices", "checkpoints"]
COMMANDS = {
    "train": (train, TrainConfig, GROUPS),
    "finetune": (finetune, FinetuneConfig, ["finetune", *GROUPS]),
    "plan": (plan, PlanConfig, ["plan", *GROUPS]),
    "convert": (convert, ConvertConfig, ["convert"]),
    "compare": (compare, CompareConfig, ["compare"]),
}


def page(capsys, main, *args) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        main([*args, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out.splitlines()


def entries(lines) -> dict[str, str]:
    """What the page says of every flag."""
    body = "\n".join(lines).partition("exit codes")[0]
    texts = re.split(r"^  (?=\S)", body, flags=re.MULTILINE)[1:]
    return {text.split()[0]: " ".join(text.split()) for text in texts}


def shown_flags(kind) -> set[str]:
    anything = dict.fromkeys((field.name for field in dataclasses.fields(kind)), 1)
    return {flag.label.split()[0] for flag in flags(kind, anything)}


def shown(value) -> str:
    if isinstance(value, bool):
        return "[on]" if value else "[off]"
    return f"[{value:g}]" if isinstance(value, float) else f"[{value}]"


@pytest.fixture(autouse=True)
def hundred_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_grouped_and_says_every_default(capsys, name):
    main, kind, groups = COMMANDS[name]
    lines = page(capsys, main)
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line in groups] == groups
    found = entries(lines)
    assert set(found) == shown_flags(kind)
    for text in found.values():
        assert re.search(r"\[[^\[\]]+\]( |$)", text), f"no value: {text}"
    codes = [line.split()[0] for line in lines[lines.index("exit codes") + 1 :]]
    assert codes[0] == "0" and "2" in codes


@pytest.mark.parametrize("preset", PRESETS)
def test_the_trainers_page_has_a_hundred_lines_and_the_presets_values(capsys, preset):
    flags = {"preset": preset, "optimizer": "coap", "steps": 770}
    args = [word for name, value in flags.items() for word in (f"--{name}", f"{value}")]
    lines = page(capsys, train, *args)
    assert len(lines) <= 100
    found = entries(lines)
    resolved, _ = resolve(TrainConfig(**flags))
    for field in dataclasses.fields(TrainConfig):
        value = getattr(resolved, field.name)
        if value not in (None, "", ()):  # whose text says what that means
            text = found[f"--{field.name.replace('_', '-')}"]
            assert shown(value) in text, text
    # The preset's, the method's own, and what follows from a flag.
    assert "[77]" in found["--warmup"] and "[32]" in found["--update-proj-gap"]


def test_flags_of_pretraining_are_no_flags_of_fine_tuning():
    names = shown_flags(FinetuneConfig)
    assert {"--model", "--data", "--weights", "--resume", "--mesh"} <= names
    assert {"--layerwise", "--activation-budget"} <= names
    assert not names & {"--preset", "--corpus", "--compressed", "--eval-tokens"}


def test_what_a_recipe_decides_is_said_in_words():
    """No default of fine-tuning can be shown before the model is known."""
    said = {flag.label.split()[0]: flag.value for flag in flags(FinetuneConfig, {})}
    for field in dataclasses.fields(Recipe):
        if field.name not in ("dtype", "tokenizer", "eval_tokens"):
            assert said[f"--{field.name.replace('_', '-')}"]
    with pytest.raises(ValueError, match="which value has a flag left out"):
        with_value("a text", None)


def test_a_wrong_flag_beside_help_is_an_error(capsys):
    assert train(["--help", "--preset", "10m"]) == 2
    assert "unknown preset '10m'" in capsys.readouterr().err


@pytest.mark.parametrize("main", [train, finetune, plan])
def test_a_line_for_every_method(capsys, main):
    with pytest.raises(SystemExit) as stop:
        main(["--optimizer", "list"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == list(method_lines())
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert {*lro.METHODS} <= {*METHODS}
    assert max(map(len, lines)) <= 100
