"""`read_rows` reads a file of rows, JSON lines or a table with tabs, and `split` it."""

import csv
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from examples.llama.config import UsageError
from examples.llama.run_folder import parse_object, usable

Row = dict[str, Any]
_HELD_OUT = 10  # one row in so many
_SPLITS = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}


def read_rows(path: str, flag: str = "--data") -> list[Row]:
    """The rows of a `.jsonl`, `.json` (a list) or `.tsv` file, in order.

    Raises:
        UsageError: there is none, or a line is no row.
    """
    file = pathlib.Path(path).expanduser()
    if not path:
        raise UsageError(f"{flag} names no file of rows: JSON lines, or a .tsv table")
    if not file.is_file():
        raise UsageError(f"{flag} {path}: there is no such file")
    with usable(f"{flag} {path}"):
        data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path} is not UTF-8: {error}") from error
    if file.suffix == ".tsv":
        rows = _table(text, path)
    elif file.suffix == ".json" and text.lstrip().startswith("["):
        rows = _list(text, path)
    else:
        rows = _lines(text, path)
    if not rows:
        raise UsageError(f"{flag} {path} has no rows")
    return rows


def _lines(text: str, path: str) -> list[Row]:
    rows = []
    # Not `splitlines`, which also cuts at separators that JSON allows in a text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(parse_object(line))
            except ValueError as error:
                raise UsageError(f"{path}:{number}: {error}") from error
    return rows


def _list(text: str, path: str) -> list[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path} is a list of something else than objects")
    return rows


def _table(text: str, path: str) -> list[Row]:
    """A table of GLUE; CoLA's is the one without names of columns."""
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    cells = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if cells and len(cells[0]) == 4 and cells[0][1] in ("0", "1"):
        names = ["source", "label", "star", "sentence"]
    else:
        names, cells = (cells[0], cells[1:]) if cells else ([], [])
    for number, line in enumerate(cells, 2):
        if len(line) != len(names):
            raise UsageError(
                f"{path}:{number}: {len(line)} cells in a table of {len(names)} columns"
            )
    return [dict(zip(names, line, strict=True)) for line in cells]


def split(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows to train on, to validate on (`dev`) and, where the file says so, `test`.

    A field `split` decides; without one, a tenth is held out by a hash of `name(row)`,
    so that equal texts are on one side, in every run.

    Raises:
        UsageError: a split has an unknown name.
    """
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for row in rows:
        if "split" in row:
            part = _SPLITS.get(str(row["split"]).lower())
            if part is None:
                raise UsageError(
                    f"split {row['split']!r} is unknown; known: {', '.join(_SPLITS)}"
                )
        else:
            digest = hashlib.sha256(name(row).strip().lower().encode()).digest()
            held_out = int.from_bytes(digest, "big") % _HELD_OUT == 0
            part = "dev" if held_out else "train"
        parts[part].append(row)
    return parts


def fingerprint(rows: Sequence[Row]) -> str:
    """A hash of all rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]
