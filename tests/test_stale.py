"""What the texts name is there: functions, modules, files, flags and arguments.

And what they say is missing stands in a list here, so that somebody looks at it when
the sentence changes or what is missing is built.
"""

import ast
import dataclasses
import functools
import importlib.util
import inspect
import pathlib
import re

import jax
import optax
import pytest

import lowrank_optax as lro
from docs import notebooks
from examples.convert.__main__ import ConvertConfig
from examples.finetune.compare import CompareConfig
from examples.finetune.config import FinetuneConfig
from examples.llama.config import TrainConfig
from examples.plan.plan import PlanConfig

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FOLDERS = ("lowrank_optax", "examples", "benchmarks", "docs", "tests")
# Of docstrings and comments, too.
SOURCES = [path for name in FOLDERS[:4] for path in (ROOT / name).rglob("*.py")]
COMMANDS = {
    "examples.llama.train": TrainConfig,
    "examples.finetune": FinetuneConfig,
    "examples.finetune.compare": CompareConfig,
    "examples.convert": ConvertConfig,
    "examples.plan": PlanConfig,
}
# Of other people's programs, which the pages use or compare with.
FOREIGN = {
    "--account", "--command", "--force", "--implicit-dirs", "--node-id", "--project",
    "--queue", "--runtime-version", "--worker", "--zone", "--accelerator-type",
    "--signal", "--requeue", "--extra", "--strict", "--optim", "--optim_args",
    "--model", "--model_args", "--batch_size", "--device", "--tasks",
}  # fmt: skip
# What a text says is not there, and where. A new line is looked at, and then added.
MISSING = re.compile(
    r"\bnot (?:yet|built|implemented|supported)\b|\bTODO\b|\bFIXME\b|\bfor now\b"
)
LOOKED_AT = {
    "docs/choosing.md": 1,
    "docs/methods/dion.md": 2,
    "docs/methods/muon.md": 2,
}


def label(path):
    return str(path.relative_to(ROOT))


@functools.cache
def text_of(path):
    return path.read_text(encoding="utf-8")


def flags_of(kind) -> set[str]:
    names = {field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    return {"--help"} | {f"--{name}" for name in names} | {f"--no-{n}" for n in names}


@functools.cache
def flags_of_benchmark(module: str) -> set[str]:
    """Those that the source of a benchmark, or what it shares, adds to a parser."""
    files = [ROOT / f"{module.replace('.', '/')}.py", ROOT / "benchmarks/_runs.py"]
    found = (re.findall(r'"(--[a-z][a-z0-9-]*)"', text_of(path)) for path in files)
    return {"--help"}.union(*found)


FLAG = re.compile(r"(?<!\S)--[a-zA-Z][\w-]*")


def commands(text):
    """Every `python -m MODULE` of a text, with the flags behind it."""
    text = text.replace("\\\n", " ")
    for found in re.finditer(
        r"python -m ((?:examples|benchmarks|tests)[\w.]*)(.*)", text
    ):
        line = re.split(r"[`|#;]|&&", found[2])[0]
        yield found[1].rstrip("."), set(FLAG.findall(line))
    for target, line in re.findall(r'\b(TRAIN|FINETUNE)_ARGS="([^"]*)"', text):
        compared = "examples.finetune.compare"
        yield (
            compared if target == "FINETUNE" else "examples.llama.train",
            set(FLAG.findall(line)),
        )


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_and_their_flags_exist(page):
    for module, flags in commands(text_of(page)):
        if module.endswith("NAME"):
            continue
        assert importlib.util.find_spec(module), f"python -m {module}"
        if module == "examples.harness":  # its flags are lm_eval's
            continue
        known = (
            flags_of(COMMANDS[module])
            if module in COMMANDS
            else flags_of_benchmark(module)
        )
        assert flags <= known, (module, flags - known)


@functools.cache
def every_flag() -> set[str]:
    modules = [f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")]
    own = {flag for name in modules for flag in flags_of_benchmark(name)}
    tests = {
        flag
        for name in ("storm", "faults")
        for flag in re.findall(r'"(--[a-z-]+)"', text_of(ROOT / f"tests/{name}.py"))
    }
    return own.union(tests, *(flags_of(kind) for kind in COMMANDS.values()))


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_flags_in_sentences_exist(page):
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    found = {
        flag
        for code in re.findall(r"`([^`\n]+)`", prose)
        for flag in FLAG.findall(code)
    }
    assert found <= every_flag() | FOREIGN, found - every_flag() - FOREIGN


FILE = re.compile(
    rf"(?<![\w/.])((?:{'|'.join(FOLDERS)}|notebooks)/[\w/.-]+"
    r"\.(?:py|md|json|jsonl|ipynb|png|svg))\b"
)
PLACEHOLDER = re.compile("[A-Z]{3}")  # NAME, STEP


def files_named(path) -> set[str]:
    return {
        name for name in FILE.findall(text_of(path)) if not PLACEHOLDER.search(name)
    }


def public_names(path) -> set[str]:
    return {*re.findall(r"\blro\.([a-zA-Z_]\w*)", text_of(path))}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_what_a_page_names_exists(page):
    pages = {f"notebooks/{path.stem}.md" for path in notebooks.paths()}
    gone = {name for name in files_named(page) - pages if not (ROOT / name).exists()}
    assert not gone
    assert public_names(page) <= {*dir(lro)}
    for package, module in (("optax", optax), ("jax", jax)):
        dotted = set(re.findall(rf"`{package}\.([a-z]\w*)", text_of(page)))
        assert not {name for name in dotted if not hasattr(module, name)}


def test_what_sources_name_exists():
    gone = {
        f"{label(path)}: {name}"
        for path in SOURCES
        for name in files_named(path)
        if not (ROOT / name).exists()
    }
    assert not gone
    unknown = {
        f"{label(path)}: lro.{name}"
        for path in [*SOURCES, *notebooks.paths()]
        for name in public_names(path) - {*dir(lro)}
    }
    assert not unknown


@functools.cache
def arguments() -> set[str]:
    """Names of the arguments and fields of everything in the package."""
    found = set()
    for path in SOURCES:
        if not path.is_relative_to(ROOT / "lowrank_optax"):
            continue
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    for make in (optax.adamw, optax.adafactor, jax.jit, jax.shard_map):
        found |= {*inspect.signature(make).parameters}
    return found


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_arguments_in_sentences_exist(page):
    """`name=` and `name=value`, outside of blocks of code."""
    if page.name == "coming-from.md":  # which names those of others
        return
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    found = set(re.findall(r"`([a-z]\w+)=[^`]*`", prose))
    found = {name for name in found if not name.startswith("xla_")}
    assert found <= arguments() | OTHERS, found - arguments() - OTHERS


# Arguments of others, axes of a mesh, and flags of XLA.
OTHERS = {"data", "fsdp", "tensor", "wrt", "static_args"}


def test_a_stale_sentence_is_found():
    """Of these tests: what they read off a text."""
    text = (
        "`python -m examples.plan --topolgy x` and\npython -m benchmarks.gone \\\n --y"
    )
    text += '\nmake train TRAIN_ARGS="--optimizer x --gone 1"'
    assert list(commands(text)) == [
        ("examples.plan", {"--topolgy"}),
        ("benchmarks.gone", {"--y"}),
        ("examples.llama.train", {"--optimizer", "--gone"}),
    ]
    assert "--topolgy" not in every_flag() and "--topology" in every_flag()
    assert FILE.findall("see `docs/gone.md`, a/docs/x.md") == ["docs/gone.md"]
    assert MISSING.search("this is not built yet") and "renew_below" in arguments()


def test_what_is_missing_was_looked_at():
    found = {
        label(page): len(lines)
        for page in PAGES
        if (lines := MISSING.findall(text_of(page)))
    }
    assert found == LOOKED_AT, "look at the sentences, and at LOOKED_AT in this file"
