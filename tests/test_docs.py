"""Whatever the texts say is run: names, examples, links, commands, the notebook."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import pathlib
import re
import types

import nbclient
import nbformat
import pytest

import lowrank_optax as lro
from benchmarks import pictures
from docs import hooks

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Their examples compile steps on meshes, or many of them.
LONG = {
    "docs/api/activations.md",
    "docs/distributed.md",
    "docs/methods/q_galore.md",
    "docs/pods.md",
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def label(value):
    return str(value.relative_to(ROOT)) if isinstance(value, pathlib.Path) else None


def public(module):
    """The public names of a module, without the submodules importing it binds."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def own(module):
    """The public names that a module, or a folder of modules, defines itself."""

    def home(value):
        return str(getattr(value, "__module__", module.__name__))

    return {
        name
        for name in public(module)
        if home(getattr(module, name)).startswith(module.__name__)
    }


# --- names -------------------------------------------------------------------------


def documented():
    """The dotted names that the API pages document, each with its object."""
    pages = (ROOT / "docs" / "api").glob("*.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    text = hooks.filled(text)
    for dotted in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE):
        module, name = dotted.rsplit(".", 1)
        yield dotted, getattr(importlib.import_module(module), name)


def expected():
    """The names that must be documented, each with its object."""
    names = {f"lro.{name}": getattr(lro, name) for name in public(lro)}
    for part in ("testing", "quantization", "activations", "distributed", "layerwise"):
        module = importlib.import_module(f"lowrank_optax.{part}")
        names |= {f"{part}.{name}": getattr(module, name) for name in own(module)}
    return names


def test_every_public_name_stands_on_one_api_page():
    pages, names = dict(documented()), expected()
    found = [id(value) for value in pages.values()]
    assert len(found) == len(set(found)), "an object is documented twice"
    missing = {name for name, value in names.items() if id(value) not in found}
    assert not missing, f"undocumented; add `::: NAME` under docs/api: {missing}"
    wanted = [id(value) for value in names.values()]
    stale = {dotted for dotted, value in pages.items() if id(value) not in wanted}
    assert not stale, f"documented but not public: {stale}"


def test_public_names_are_ours():
    """`import jax` at the top of `__init__` would make `lro.jax` part of the API."""
    foreign = {
        name
        for name in public(lro)
        if not getattr(getattr(lro, name), "__module__", "lowrank_optax").startswith(
            "lowrank_optax"
        )
    }
    assert not foreign


def test_every_public_object_has_a_docstring():
    bare = [
        name
        for name in sorted(public(lro))
        if callable(getattr(lro, name)) and not inspect.getdoc(getattr(lro, name))
    ]
    assert not bare


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_targets_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.MULTILINE))
    commands = set(re.findall(r"^(?:.*`)?make ([a-z-]+)", text, flags=re.MULTILINE))
    assert commands <= targets, commands - targets

    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", prose)
    dead = {link for link in links if not (page.parent / link).exists()}
    made = {
        f"notebooks/{path.stem}.md" for path in NOTEBOOKS
    }  # while the site is built
    assert not dead - (made if page.parent == ROOT / "docs" else set())


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_formulas_are_whole(page):
    """A blank line would end a formula in the middle, and show its source."""
    formulas = page.read_text(encoding="utf-8").split("$$")
    assert len(formulas) % 2 == 1, "a $$ without its partner"
    assert not [formula for formula in formulas[1::2] if "\n\n" in formula]


def test_every_card_has_a_kind():
    for method in lro.METHODS.values():
        assert hooks.kind(method) in hooks.KINDS


# --- pictures ----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_pictures_have_a_text_and_a_dark_one(page):
    text = page.read_text(encoding="utf-8")
    for words, link in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text):
        assert len(words.split()) > 2, f"say what {link} shows"
        if "/pictures/" in link:
            dark = page.parent / link.replace(".svg", "-dark.svg")
            assert dark.exists()
    both = hooks.in_both_themes(text)
    assert both.count("#only-light") == both.count("#only-dark")
    assert both.count("#only-dark") == text.count("/pictures/")


def test_cards_show_their_kind_and_bytes():
    text = hooks.card("# GWT\n\nOne line.\n\n## The update\n", lro.METHODS["gwt"])
    assert "pictures/kind-fixed.svg" in text and "## The update" in text
    assert (
        "(level 2): 1.7 GB at 1B, 7.5 at 7B; `optax.adamw` keeps 5.4 and 27.0" in text
    )
    for method in lro.METHODS.values():
        assert "GB at 1B" in hooks.held(method.name)


def test_pictures_are_of_the_files_that_are_there():
    """Text in them is text."""
    drawn = {path.name for path in pictures.PICTURES.glob("*.svg")}
    themes = (pictures.LIGHT, pictures.DARK)
    assert drawn == {f"{n}{t.suffix}.svg" for n in pictures.DRAWN for t in themes}
    state = pictures.results("state_memory")["state"]
    for theme in themes:
        text = (pictures.PICTURES / f"memory{theme.suffix}.svg").read_text()
        for key in pictures.MEMORY.values():
            assert f">{state['7b'][key] / 1e9:.3g}<" in text, "draw them anew"
        for name in ("memory", "refreshes"):
            assert pictures.DRAWN[name](theme).axes


# --- examples ----------------------------------------------------------------------


def run_doctest(source, namespace, name, filename, line):
    """Runs the examples of a text; what they bind is added to the namespace."""
    test = doctest.DocTestParser().get_doctest(source, namespace, name, filename, line)
    log = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    result = runner.run(test, out=log.append, clear_globs=False)
    assert result.failed == 0, "".join(log)
    namespace.update(test.globs)
    return result.attempted


def docstrings():
    """Every docstring of the package that holds an example.

    Found in the syntax tree: `doctest` itself passes over decorated functions, and
    with the shape checks of the tests all functions are.
    """
    for path in sorted((ROOT / "lowrank_optax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if ">>>" in text:
                    name = getattr(node, "name", path.stem)
                    line = node.body[0].lineno - 1
                    yield pytest.param(path, name, line, text, id=f"{path.stem}.{name}")


@pytest.mark.parametrize(("path", "name", "line", "text"), list(docstrings()))
def test_docstring_example(path, name, line, text):
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(dotted.removesuffix(".__init__"))
    assert run_doctest(text, dict(vars(module)), name, str(path), line)


def blocks(text):
    """The Python blocks of a Markdown text, with the line each starts in."""
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start()].count("\n") + 1, match.group(1)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.whole) if label(page) in LONG else page
        for page in PAGES
    ],
    ids=label,
)
def test_page_examples(page):
    """All blocks of one page share a namespace, as a reader would type them."""
    namespace = {"__name__": "__main__"}
    for line, source in blocks(page.read_text(encoding="utf-8")):
        if ">>>" in source:
            assert run_doctest(source, namespace, page.name, str(page), line)
        else:
            code = compile("\n" * line + source, str(page), "exec")
            exec(code, namespace)  # the page's own examples


def test_readme_holds_examples():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(list(blocks(text))) >= 3


# --- notebooks ---------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_notebook_runs(path, monkeypatch):
    # As a reader's: in its own folder, where Jupyter starts it, and without the flags
    # of the tests, which would leave its loops unoptimized.
    monkeypatch.delenv("XLA_FLAGS")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_notebook_is_committed_with_its_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {
        key for cell in code for out in cell.outputs for key in out.get("data", ())
    }
    assert "image/png" in kinds


def test_notebooks_are_pages():
    assert NOTEBOOKS == hooks.notebooks.paths()
    pages = dict(hooks.notebooks.pages())
    for path in NOTEBOOKS:
        text = pages[f"notebooks/{path.stem}.md"]
        assert text.startswith("# ") and "```python" in text
        for words, picture in re.findall(r"!\[(.+)\]\((.+)\)", text):
            assert words and pages[f"notebooks/{picture}"][:4] == b"\x89PNG"
        assert "](../examples" not in text
