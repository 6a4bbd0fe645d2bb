"""What mkdocs calls while it builds the site: what is not written by hand.

Everything that lists methods comes from ``lro.METHODS``, the notebooks' pages from the
notebooks, and pictures are put in for both themes. The README's list is not built, so
``python docs/hooks.py`` writes it.
"""

import json
import pathlib
import re
import sys

import lowrank_optax as lro

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # mkdocs loads a lone file
from docs import notebooks

README = pathlib.Path(__file__).parents[1] / "README.md"
CARDS = pathlib.Path(__file__).parent / "methods"
# The groups of the navigation; a card says in its first lines to which it belongs.
KINDS = {
    "found": "A subspace found anew",
    "moved": "A subspace that moves",
    "fixed": "A subspace that is given",
    "none": "No subspace",
}
# What the picture of a kind shows, for whoever does not see it.
SHOWN = {
    "found": "At each of two refreshes a gradient's columns, drawn as points, are "
    "projected onto a line that is found anew along them",
    "moved": "A gradient's columns, drawn as points, are projected onto a line that "
    "turns a little towards them at a refresh",
    "fixed": "A gradient's columns, drawn as points, are projected onto a line that "
    "was given without looking at them",
    "none": "A gradient's columns, drawn as points, stay as they are; what the "
    "optimizer keeps of them lies on a coarse grid",
}
PICTURE = re.compile(r"!\[([^\]]+)\]\((\S*/pictures/[\w-]+)\.svg\)")
STATES = pathlib.Path(__file__).parent / "results/state_memory.json"
BEGIN, END = "<!-- methods: python docs/hooks.py -->", "<!-- end of the methods -->"


def on_config(config):
    """Lists the cards in the navigation, by their kinds."""
    groups = {title: [] for title in KINDS.values()}
    for method in lro.METHODS.values():
        groups[KINDS[kind(method)]].append({method.title: f"methods/{method.name}.md"})
    for entry in config.nav:
        if "Methods" in entry:
            grouped = [{title: cards} for title, cards in groups.items()]
            entry["Methods"] = [{"All methods": entry["Methods"]}, *grouped]
        if "Guides" in entry:
            entry["Guides"].append({"Notebooks": notebooks.navigation()})
    return config


def on_files(files, config, **kwargs):
    """Adds the pages of the notebooks."""
    from mkdocs.structure.files import File

    del kwargs
    for name, content in notebooks.pages():
        files.append(File.generated(config, name, content=content))
    return files


def kind(method):
    """The kind that the method's card names in its first lines."""
    card = (CARDS / f"{method.name}.md").read_text(encoding="utf-8")
    found = re.match(r"---\nkind: (\w+)\n---\n", card)
    if not found or found[1] not in KINDS:
        raise ValueError(
            f"docs/methods/{method.name}.md begins with '---', 'kind: KIND', '---', "
            f"where KIND is one of {', '.join(KINDS)}"
        )
    return found[1]


def on_page_markdown(markdown, page, **kwargs):
    """Puts tables and pictures in their places."""
    del kwargs
    folder, _, name = page.file.src_uri.removesuffix(".md").rpartition("/")
    if folder == "methods" and name in lro.METHODS:
        markdown = card(markdown, lro.METHODS[name])
    return in_both_themes(filled(markdown))


def in_both_themes(markdown):
    """Every picture that has a dark one beside it, with that one."""
    both = r"![\1](\2.svg#only-light)![\1](\2-dark.svg#only-dark)"
    return PICTURE.sub(both, markdown)


def card(markdown, method):
    """The card with its kind's picture, and the method's bytes beside Adam's."""
    found = kind(method)
    picture = f"![{SHOWN[found]}.](../assets/pictures/kind-{found}.svg)"
    before, heading, rest = markdown.partition("\n## ")
    return f"{before}\n{picture}\n\n{held(method.name)}\n{heading}{rest}"


def held(name):
    """A method's state in words."""
    states = json.loads(STATES.read_text(encoding="utf-8"))["state"]
    key = next(key for key in states["7b"] if key.split(",")[0] == name)
    own, adamw = (
        [f"{states[size][row] / 1e9:.1f}" for size in ("1b", "7b")]
        for row in (key, "adamw")
    )
    label = key.partition(", ")[2]
    how = f" ({label})" if label else ""
    return (
        f"State of a LLaMA in bfloat16{how}: {own[0]} GB at 1B, {own[1]} at 7B; "
        f"`optax.adamw` keeps {adamw[0]} and {adamw[1]} "
        "([all sizes](../memory.md))."
    )


def filled(markdown):
    """The text of a page with its tables."""
    markdown = markdown.replace("<!-- table of methods -->", table())
    return markdown.replace("<!-- functions of methods -->", functions())


def on_page_content(html, **kwargs):
    """Docstrings open a literal block with `::`, which Markdown would show."""
    del kwargs
    return html.replace("::</p>", ":</p>")


def names(method):
    """A method's functions."""
    return [f.__name__ for f in (method.factory, method.direction) if f is not None]


def table():
    """One row for every method, with links to their cards."""
    lines = ["| method | paper | here |", "|---|---|---|"]
    for method in lro.METHODS.values():
        title = f"[{method.title}]({method.name}.md)"
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})"
        here = ", ".join(f"`lro.{name}`" for name in names(method))
        lines.append(f"| {title} | {paper} | {here} |")
    return "\n".join(lines)


def functions():
    """What the reference shows of every method."""
    shown = [f for m in lro.METHODS.values() for f in (m.factory, m.direction) if f]
    # Under `lowrank_optax.methods` a file has the name of its method.
    return "\n\n".join(f"::: {f.__module__}.{f.__name__}" for f in shown)


def groups():
    """The methods by kind, each with its paper: what the README lists."""
    lines = []
    for key, title in KINDS.items():
        found = [method for method in lro.METHODS.values() if kind(method) == key]
        links = (
            f"[`{method.name}`](https://arxiv.org/abs/{method.paper})"
            for method in found
        )
        lines.append(f"- {title}: {', '.join(links)}.")
    return "\n".join(lines)


def readme(text):
    """The README with its list as it should be."""
    block = f"{BEGIN}\n{groups()}\n{END}"
    return re.sub(f"{BEGIN}.*?{END}", lambda _: block, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
