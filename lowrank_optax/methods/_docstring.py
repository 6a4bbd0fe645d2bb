"""``document``: a method's docstring, completed with what methods share."""

import inspect
import re
import textwrap
from collections.abc import Mapping

_ORDER = (
    "Args",
    "Returns",
    "Raises",
    "Examples",
    "References",
    "Differences from the authors' code",
)
_RETURNS = "  The transformation."
_EXAMPLE = """\
  >>> import jax.numpy as jnp, lowrank_optax as lro
  >>> params = {{"kernel": jnp.ones((64, 32))}}
  >>> tx = lro.{name}(learning_rate=1e-3{size})
  >>> updates, state = tx.update(params, tx.init(params), params)"""
_RAISES = """\
  TypeError: if an argument is unknown or would have no effect beside another, or one
    that fixes shapes is not a Python number.
  ValueError: if a number is out of range or a choice is unknown; at init, if a leaf
    selected explicitly cannot be projected."""


def document(
    name: str,
    doc: str,
    signature: inspect.Signature,
    texts: Mapping[str, str],
    source: str,
) -> str:
    """Completes a docstring: all arguments in order, what follows, the paper."""
    sections = sections_of(doc)
    own = entries_of(sections.get("Args", ""))
    lines = []
    for argument in signature.parameters:
        text = " ".join((own.get(argument) or texts.get(argument, "")).split())
        lines += textwrap.wrap(
            f"{argument}: {text}",
            84,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    sections["Args"] = "\n".join(lines)
    sections.setdefault("Returns", _RETURNS)
    size = ", rank=4" if "rank" in signature.parameters else ""
    sections.setdefault("Examples", _EXAMPLE.format(name=name, size=size))
    sections["Raises"] = "\n".join(filter(None, [_RAISES, sections.get("Raises")]))
    paper = textwrap.fill(
        source,
        84,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    sections["References"] = "\n".join(
        filter(None, [paper, sections.get("References")])
    )
    parts = [sections[""]]
    parts += [f"{title}:\n{sections[title]}" for title in _ORDER if title in sections]
    return "\n\n".join(parts) + "\n"


def sections_of(doc: str) -> dict[str, str]:
    """Returns the text before the first heading under "", and each section's."""
    headings = "|".join(map(re.escape, _ORDER))
    pieces = re.split(rf"^({headings}):\n", inspect.cleandoc(doc), flags=re.MULTILINE)
    pairs = zip(["", *pieces[1::2]], pieces[::2], strict=True)
    return {name: text.rstrip() for name, text in pairs}


def entries_of(section: str) -> dict[str, str]:
    """Returns argument -> description of an ``Args`` section."""
    entries = re.split(r"^(\w+): ", textwrap.dedent(section), flags=re.MULTILINE)
    return dict(zip(entries[1::2], entries[2::2], strict=True))
