"""What mkdocs calls while it builds the site: pages and navigation of the methods.

Everything that lists methods is written here, from ``lro.METHODS``. The README's list
is not built, so ``python docs/hooks.py`` writes it.
"""

import pathlib
import re

import lowrank_optax as lro

README = pathlib.Path(__file__).parents[1] / "README.md"
CARDS = pathlib.Path(__file__).parent / "methods"
# The groups of the navigation; a card says in its first lines to which it belongs.
KINDS = {
    "found": "A subspace found anew",
    "moved": "A subspace that moves",
    "fixed": "A subspace that is given",
    "none": "No subspace",
}
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
    return config


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


def on_page_markdown(markdown, **kwargs):
    """Puts the tables in their places."""
    del kwargs
    return filled(markdown)


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
