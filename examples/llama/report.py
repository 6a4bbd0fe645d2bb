"""What a run leaves behind: metrics.jsonl, metrics.csv, loss.png, a closing table."""

import csv
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any


class Metrics:
    """One JSON object a line. A resumed run drops the lines behind its start.

    With `write` false nothing is written: another process does it.
    """

    def __init__(self, run_dir: pathlib.Path, start: int, write: bool = True):
        self.path = run_dir / "metrics.jsonl"
        self.lines = [line for line in _read(self.path) if line["step"] <= start]
        self.write = write
        self._file = (self.path if write else pathlib.Path(os.devnull)).open("w")
        for line in self.lines:
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> list[pathlib.Path]:
        """Writes the CSV and the picture; returns the files."""
        self._file.close()
        if not self.write:
            return []
        table = self.path.with_suffix(".csv")
        names = list(dict.fromkeys(name for line in self.lines for name in line))
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.lines)
        picture = self.path.with_name("loss.png")
        _plot(self.lines, picture)
        return [self.path, table, picture]


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # a line cut by a kill; its step will be run again
            continue
    return lines


def _plot(lines: list[dict[str, Any]], path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, label, style in [
        ("loss", "training", "-"),
        ("val_loss", "validation", "o-"),
    ]:
        points = [
            (line["step"], line[key]) for line in lines if line.get(key) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def readable_bytes(number: float) -> str:
    """12.3 MiB, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} B" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1024
    raise AssertionError


def closing_table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    body = [f"  {name:<{width}}  {value}" for name, value in rows]
    rule = "-" * max(len(line) for line in body)
    return "\n".join([rule, *body, rule])
