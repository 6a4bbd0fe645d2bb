"""`Metrics`, `evaluate` and `describe`: all that a run says of itself.

It leaves in its folder metrics.jsonl, metrics.csv, loss.png, config.json,
selection.txt and, with `--compressed`, traffic.txt. None of them ever stops it.
"""

import contextlib
import csv
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import lowrank_optax as lro
from examples.llama.batches import Batch, Cursor, Rows, as_batch
from examples.llama.config import Resolved
from examples.llama.model import Params, count_params
from examples.llama.picture import About, draw
from examples.llama.placement import whole_axes
from examples.llama.processes import is_first
from examples.llama.run_folder import (
    brief,
    not_vital,
    parse_object,
    say,
    write_whole,
)

_UNIGRAM_ROWS = 20_000
_LONGEST_LINE = 65_536  # bytes of a line of metrics
_PATIENCE = 100  # lines after which a log that could not be written is tried again


def environment() -> dict[str, str]:
    """What this run runs on."""
    devices = jax.devices()
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "jax": jax.__version__,
        "lowrank_optax": _version("lowrank-optax"),
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return "not installed"


def describe(
    config: Resolved,
    run_dir: pathlib.Path,
    optimizer: optax.GradientTransformation,
    params: Any,
    data: str,
    mesh: Mesh | None,
) -> None:
    """Says what is about to run, and leaves the particulars in its folder."""
    print(
        f"{config.preset} ({count_params(params):,} parameters) with "
        f"{config.optimizer}; {data}; writing to {run_dir}",
        flush=True,
    )
    if mesh is not None:
        print(f"mesh {config.mesh}", *whole_axes(mesh, params), sep="\n", flush=True)
    if not is_first():
        return
    if config.compressed:
        report = lro.distributed.traffic_report(optimizer, params)
        print(f"gradients: {str(report).splitlines()[-1]}", flush=True)
        _leave(run_dir / "traffic.txt", f"{report}\n")
    settings = dataclasses.asdict(config) | {"environment": environment()}
    _leave(run_dir / "config.json", json.dumps(settings, indent=1) + "\n")
    with contextlib.suppress(ValueError):  # an optimizer without a bracket
        selection = lro.selection_report(optimizer, params)
        _leave(run_dir / "selection.txt", f"{selection}\n")


def _leave(path: pathlib.Path, text: str) -> None:
    with not_vital(f"{path.name} was not written"):
        write_whole(path, text)


def say_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Names the settings in which a resumed run differs from what was saved."""
    free = {
        "resume",
        "run_dir",
        "stop_step",
        "cache_dir",
        "compilation_cache",
        "log_to",
        "export",
    }
    changed = [
        f"{name}: {before.get(name)}, now {value}"
        for name, value in now.items()
        if name not in free and before.get(name) != value
    ]
    if changed:
        print("changed since the run began: " + "; ".join(changed), flush=True)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean negative log likelihood per token, and the tokens it is a mean of."""

    loss: float
    tokens: int
    compat_loss: float = math.nan  # as GaLore's script reports it
    per: str = "token"  # which may be a byte

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def compat_perplexity(self) -> float:
        return perplexity(self.compat_loss)

    @property
    def brief(self) -> str:
        """For the line of a validation between steps."""
        return f"validation perplexity {self.perplexity:.3f} per {self.per}"

    def line(self) -> dict[str, Any]:
        """For the metrics."""
        return {
            "val_loss": self.loss,
            "val_perplexity": self.perplexity,
            "val_tokens": self.tokens,
        }


def perplexity(loss: float) -> float:
    """exp(loss); infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def eval_batches(
    rows: Iterable[Sequence[int]], size: int, seq_len: int
) -> Iterator[Batch]:
    """All rows in batches of one shape; the last one is filled up and masked."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield as_batch(batch, size, seq_len)


def evaluate(
    eval_step: Callable[[Params, Any], Any],
    params: Params,
    batches: Iterable[Batch],
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Token-weighted mean over all batches; None when it was told to stop.

    The device sums over a row, the host over rows in float64: how rows are put into
    batches does not change the result. GaLore's script takes the mean of batch means
    and starts its count of batches at 1, so it divides n of them by n + 1.
    """
    total, tokens, batch_means = 0.0, 0.0, []
    for batch in batches:
        if should_stop():
            return None
        losses, counts = (np.asarray(x, np.float64) for x in eval_step(params, batch))
        total, tokens = total + losses.sum(), tokens + counts.sum()
        batch_means.append(losses.sum() / max(counts.sum(), 1))
    compat = sum(batch_means) / (len(batch_means) + 1)
    return Evaluation(float(total / max(tokens, 1)), int(tokens), float(compat))


def unigram_perplexity(
    train_rows: Iterable[Sequence[int]],
    eval_rows: Iterable[Sequence[int]],
    vocab_size: int,
) -> float:
    """Perplexity of tokens drawn independently with the training text's frequencies."""

    def count(rows: Iterable[Sequence[int]]) -> np.ndarray:
        targets = np.concatenate([np.asarray(row[1:], np.int64) for row in rows])
        return np.bincount(targets, minlength=vocab_size)

    # Plus one, or a token that the training text lacks would cost infinitely much.
    known, seen = count(train_rows) + 1.0, count(eval_rows)
    losses = -np.log(known / known.sum())
    return perplexity(float((seen * losses).sum() / max(seen.sum(), 1)))


def entropy(symbols: Iterable[int]) -> float:
    """Of their frequencies, in nats: the least loss of knowing nothing else."""
    _, counts = np.unique(np.fromiter(symbols, np.int64), return_counts=True)
    share = counts / max(counts.sum(), 1)
    return float(-(share * np.log(share)).sum())


def unigram(rows: Rows, validation: Sequence[Any], vocab_size: int) -> float:
    """The perplexity of knowing only how frequent each token of the text is."""
    block, _ = rows.block(Cursor())
    known = itertools.islice(block, _UNIGRAM_ROWS)
    return unigram_perplexity(known, validation, vocab_size)


class Metrics:
    """One JSON object a line. A resumed run drops the lines behind its start.

    The lines are kept in memory as well: what a full disk refuses is written later,
    with all that came before it. With `write` false nothing is written: another
    process does it. `others` have `add` and `close`, too (`logs.py`).
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        start: int,
        write: bool = True,
        others: Sequence[Any] = (),
    ):
        self.path, self.others = run_dir / "metrics.jsonl", others
        self.write = write
        self.lines, damaged = _read(self.path) if write else ([], 0)
        before = len(self.lines)
        self.lines = [line for line in self.lines if line["step"] <= start]
        # How many of them the file holds; None: it must be written anew, as it is when
        # it has lines of steps that will be run again.
        same = not damaged and before == len(self.lines)
        self._held: int | None = before if same else None
        self._again = 0  # the number of lines at which a failed write is tried again
        self._write()

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        for log in self.others:
            with not_vital(f"{type(log).__name__} was told nothing"):
                log.add(line)
        if len(self.lines) >= self._again:
            self._write()

    def _write(self) -> None:
        """Adds what the file lacks, or writes it anew through another one."""
        if not self.write:
            return
        try:
            if self._held is None:
                write_whole(self.path, _as_text(self.lines))
            else:
                with self.path.open("a") as file:
                    file.write(_as_text(self.lines[self._held :]))
            self._held, self._again = len(self.lines), 0
        except OSError as error:
            if not self._again:
                say(f"{self.path.name}: {brief(error)}; lines are kept to be written")
            # The last line may be there in part.
            self._held, self._again = None, len(self.lines) + _PATIENCE

    def close(self, about: Callable[[], About] = About) -> list[pathlib.Path]:
        """Writes the CSV and the picture; returns the files.

        `about` says what the picture has beside the lines.
        """
        for log in self.others:
            with not_vital(f"{type(log).__name__} was not closed"):
                log.close()
        if not self.write:
            return []
        if self._held != len(self.lines):
            self._write()
        table = self.path.with_suffix(".csv")
        with not_vital(f"{table.name} was not written"):
            names = list(dict.fromkeys(name for line in self.lines for name in line))
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(self.lines)
        picture = self.path.with_name("loss.png")
        with not_vital(f"{picture.name} was not written"):
            draw(self.lines, picture, about())
        return [path for path in (self.path, table, picture) if path.is_file()]


def _as_text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _read(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a log, and how many are damaged; what is no log is moved away."""
    lines, damaged = [], 0
    if not os.path.lexists(path):
        return lines, damaged
    try:
        if not path.is_file():  # a pipe, say, would never end
            raise OSError("no file")
        with path.open("rb") as file:
            while text := file.readline(_LONGEST_LINE):
                try:
                    lines.append(_parse(text))
                except ValueError:
                    damaged += 1
    except OSError as error:
        aside = path.with_suffix(".damaged")
        say(f"{path.name} cannot be read ({brief(error)}): moved to {aside.name}")
        with not_vital(f"{path.name} was not moved"):
            path.replace(aside)
        return [], 1
    if damaged:
        say(f"{path.name}: {damaged} damaged or cut lines left out")
    return lines, damaged


def _parse(text: bytes) -> dict[str, Any]:
    line = parse_object(text.decode())
    if type(line.get("step")) is not int or not text.endswith(b"\n"):
        raise ValueError("a line without a step, or cut by a kill")
    return line


def finite(number: float) -> float | None:
    """The number, if JSON has a word for it."""
    return number if math.isfinite(number) else None


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
