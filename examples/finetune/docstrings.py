"""`pairs` are questions and answers from the docstrings of Python's standard library.

`python -m examples.finetune.docstrings FILE` writes them as JSON lines: a set of
conversations that every machine has (PSF licence), for a small model to be tuned on.
"""

import ast
import json
import pathlib
import re
import sys
from collections.abc import Iterator

from examples.llama.config import UsageError
from examples.llama.corpus import stdlib
from examples.llama.run_folder import say, usable, write_whole

Function = ast.FunctionDef | ast.AsyncFunctionDef
_SHORT, _LONG = 15, 160  # characters of an answer


def first_sentence(docstring: str) -> str:
    """The summary of a docstring, on one line; "" for one that is none."""
    paragraph = docstring.strip().split("\n\n")[0]
    text = " ".join(paragraph.split())
    text = re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0]
    return text if _SHORT <= len(text) <= _LONG and text[0].isupper() else ""


def pairs(source: str, module: str) -> Iterator[dict[str, str]]:
    """A question for every public function and class that says what it does."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # files that are there to be wrong
        return
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if answer := first_sentence(ast.get_docstring(node) or ""):
            asked = f"What is {module}.{node.name}"
            if isinstance(node, Function):
                names = ", ".join(argument.arg for argument in node.args.args)
                asked = f"What does {module}.{node.name}({names}) do"
            yield {"prompt": f"{asked}?", "response": answer}


def main(args: list[str]) -> int:
    if len(args) != 1:
        say("error: give the file to write")
        return 2
    try:
        rows = []
        library = stdlib()
        for name, path in zip(library.names, library.paths, strict=True):
            module = name.removesuffix(".py").removesuffix("/__init__")
            source = path.read_text(encoding="utf-8", errors="replace")
            rows += pairs(source, module.replace("/", "."))
        with usable(args[0]):
            write_whole(
                pathlib.Path(args[0]), "".join(json.dumps(row) + "\n" for row in rows)
            )
    except UsageError as error:
        say(f"error: {error}")
        return 2
    print(f"{len(rows):,} pairs in {args[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
