"""`parsed` reads a command line into a dataclass of flags, and prints its `--help`.

The reading is tyro's. The help is printed here: flags in groups, one class each, with
the value of every flag that is left out, in the lines that a screen or two has.
"""

import ast
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from examples.llama.presets import METHODS

T = TypeVar("T")
LIST = "list"  # in place of an optimizer's name
OPTAX = {
    "adamw": "AdamW: Optax's own, with which the methods are compared.",
    "sgd": "SGD: Optax's own, without momentum and so without state.",
}
# Exit codes of what trains.
TRAINING = {
    0: "the run ended, or was asked to stop, and its last state is saved",
    1: "it is not, or training cannot go on; with --verify: one is damaged",
    2: "the command, data or checkpoint needs mending (nothing was overwritten)",
    130: "Ctrl-C before the first step",
}
_TEXT = 27  # the column where texts begin
_WIDEST = 100
# The end of a text that says what no recipe knows: the value of a flag left out.
_LEFT_OUT = re.compile(r"; (?:left out|empty): (.*)$")


def parsed(
    kind: type[T],
    prog: str,
    args: Sequence[str] | None,
    codes: Mapping[int, str],
    resolved: Callable[[T], Mapping[str, Any]] | None = None,
) -> T:
    """The flags; `--help` and `--optimizer list` print, and end the program with 0.

    `codes` are the exit codes. `resolved` gives the values of flags that are left out,
    which depend on the flags that stand beside `--help`.
    """
    args = sys.argv[1:] if args is None else [*args]
    rest = [arg for arg in args if arg not in ("-h", "--help")]
    if len(rest) < len(args):
        values = resolved(tyro.cli(kind, prog=prog, args=rest)) if resolved else {}
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        print("\n".join(help_lines(kind, prog, codes, values, width)))
        raise SystemExit(0)
    config = tyro.cli(kind, prog=prog, args=args)
    if getattr(config, "optimizer", None) == LIST:
        print("\n".join(method_lines()))
        raise SystemExit(0)
    return config


def method_lines() -> Iterator[str]:
    """A line for every optimizer."""
    for name, make in METHODS.items():
        text = OPTAX.get(name) or (inspect.getdoc(make) or "").partition("\n")[0]
        yield f"{name:<16}  {text.replace('``', '')}"


def help_lines(
    kind: type[Any],
    prog: str,
    codes: Mapping[int, str],
    values: Mapping[str, Any],
    width: int,
) -> Iterator[str]:
    """The page that `--help` prints."""
    every = list(flags(kind, values))
    places = [flag.label for flag in every if flag.positional]
    yield " ".join(["usage:", prog, *places, "[--flag VALUE ...]"])
    about, _, more = (inspect.getdoc(kind) or "").partition("\n\n")
    for paragraph in (about, more.format(**values)):
        yield from textwrap.wrap(" ".join(paragraph.split()), width)
    group = ""
    for flag in every:
        if flag.group != group:
            group = flag.group
            yield from ("", group)
        yield from entry(flag.label, f"{flag.text} [{flag.value}]", width)
    yield from ("", "exit codes")
    for code, text in codes.items():
        yield from entry(f"{code}", text, width)


def entry(label: str, text: str, width: int) -> Iterator[str]:
    """Two columns."""
    first, *rest = textwrap.wrap(text, width - _TEXT, break_on_hyphens=False)
    yield f"  {label:<{_TEXT - 3}} {first}"
    yield from (" " * _TEXT + line for line in rest)


@dataclasses.dataclass(frozen=True)
class Flag:
    """What the help says of one."""

    label: str
    text: str
    value: str
    group: str
    positional: bool


def flags(kind: type[Any], values: Mapping[str, Any]) -> Iterator[Flag]:
    """Those that a command has, group by group: a group is the class that made them.

    `values` are those of flags that are left out, where the class does not say them.
    """
    hints = get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    texts = {name: text for base in kind.__mro__[::-1] for name, text in said(base)}
    for base in kind.__mro__:
        for name in inspect.get_annotations(base):
            older = base.__mro__[1:]
            marks = get_args(hints[name])[1:]
            if tyro.conf.Suppress in marks or any(
                name in inspect.get_annotations(other) for other in older
            ):
                continue
            placed = tyro.conf.Positional in marks
            default = fields[name].default
            text, value = with_value(texts[name], values.get(name, default))
            yield Flag(
                name.upper() if placed else labelled(name, default, hints[name]),
                text,
                value,
                base.__name__.removesuffix("Config").lower(),
                placed,
            )


def labelled(name: str, default: Any, hint: Any) -> str:
    """The flag and what stands behind it; a switch stands alone."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        return flag
    kinds = {*get_args(hint), hint}
    return f"{flag} {'N' if int in kinds else 'X' if float in kinds else 'TEXT'}"


def with_value(text: str, value: Any) -> tuple[str, str]:
    """The text without its end about flags left out, and the value to show."""
    text = " ".join(text.split())
    told = _LEFT_OUT.search(text)
    if value is dataclasses.MISSING:
        return text, "required"
    if value in (None, "", ()):
        if not told:
            raise ValueError(f"which value has a flag left out? Its text: {text!r}")
        return text[: told.start()], told[1]
    if isinstance(value, bool):
        shown = "on" if value else "off"
    elif isinstance(value, tuple):
        shown = " ".join(map(repr, value))
    else:
        shown = f"{value:g}" if isinstance(value, float) else f"{value}"
    return text[: told.start()] if told else text, shown


def said(kind: type[Any]) -> Iterator[tuple[str, str]]:
    """The texts that stand under the fields of a class."""
    if not dataclasses.is_dataclass(kind):
        return
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, text
