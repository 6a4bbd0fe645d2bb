"""Rows of tokens from documents, in an order that can be returned to.

Rows are made a block at a time: documents are read until a block is full, and its
rows are shuffled. A position is the cursor where the block began and the number of
rows taken from it, so a resumed run makes the block again and goes on.
"""

import array
import dataclasses
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from examples.llama.config import UsageError
from examples.llama.corpus import Corpus, Counts
from examples.llama.tokenizer import Tokenizer

BLOCK_ROWS = 8192
Batch = dict[str, np.ndarray]  # tokens, targets, mask; each [rows, seq_len]


@dataclasses.dataclass(frozen=True)
class Cursor:
    """Where the next document starts."""

    epoch: int = 0
    shard: int = 0  # place in the epoch's order of shards
    line: int = 0
    carry: tuple[int, ...] = ()  # tokens read but not yet in a row
    counts: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Position:
    """Where the next batch starts."""

    cursor: Cursor = Cursor()
    rows: int = 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Position":
        """What `to_json` wrote.

        Raises:
            KeyError, TypeError or ValueError: it is something else.
        """
        fields = dict(data["cursor"])
        fields["carry"] = tuple(fields["carry"])
        fields["counts"] = tuple((k, v) for k, v in fields["counts"])
        cursor, rows = Cursor(**fields), data["rows"]
        numbers = [cursor.epoch, cursor.shard, cursor.line, rows, *cursor.carry]
        numbers += [number for _, number in cursor.counts]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a position is made of numbers from 0 on")
        return cls(cursor, rows)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Cuts a corpus into rows. Packed rows overlap by the one token that is the last
    target of a row and the first input of the next; padded rows hold one document."""

    corpus: Corpus
    tokenizer: Tokenizer
    seq_len: int
    packed: bool
    seed: int | None  # None: in the corpus's order
    block_rows: int = BLOCK_ROWS

    @property
    def name(self) -> str:
        return f"corpus {self.corpus.name}"

    def block(self, start: Cursor) -> tuple[list[list[int]], Cursor]:
        """About `block_rows` rows, in order, and the cursor behind them.

        A block ends behind a document, and at the end of the epoch at the latest.
        """
        counts = Counts(dict(start.counts))
        order = self._shard_order(start.epoch)
        rows: list[list[int]] = []
        carry, line = list(start.carry), start.line
        for place in range(start.shard, len(order)):
            for at, text in self.corpus.documents(order[place], line, counts):
                carry = self._cut(text, carry, rows)
                if len(rows) >= self.block_rows:
                    kept = tuple(sorted(counts.items()))
                    end = Cursor(start.epoch, place, at + 1, tuple(carry), kept)
                    return rows, end
            # Only the shard that the block begins in is entered in its middle.
            line = 0
        counts.check(self.corpus.name, finished=True)
        # A last, short row; a single token would have nothing to predict.
        if len(carry) > 1:
            rows.append(carry)
        kept = tuple(sorted(counts.items()))
        return rows, Cursor(start.epoch + 1, counts=kept)

    def _shard_order(self, epoch: int) -> list[int]:
        shards = len(self.corpus.paths)
        if self.seed is None:
            return list(range(shards))
        # A function of seed and epoch, so that a position needs no generator's state.
        return np.random.default_rng((self.seed, epoch)).permutation(shards).tolist()

    def _cut(self, text: str, carry: list[int], rows: list[list[int]]) -> list[int]:
        if not self.packed:
            text = text[: 32 * self.seq_len]  # a token is seldom longer: enough text
            rows.append([*self.tokenizer.encode(text), self.tokenizer.end])
            del rows[-1][self.seq_len :]
            return []
        carry += [*self.tokenizer.encode(text), self.tokenizer.end]
        last = 0
        for last in range(self.seq_len, len(carry), self.seq_len):
            rows.append(carry[last - self.seq_len : last + 1])
        return carry[last:]

    def shuffled(self, cursor: Cursor) -> tuple[list[list[int]], Cursor]:
        rows, end = self.block(cursor)
        if self.seed is not None:
            seed = (self.seed, cursor.epoch, cursor.shard, cursor.line)
            order = np.random.default_rng(seed).permutation(len(rows))
            rows = [rows[i] for i in order]
        return rows, end

    def batch(self, rows: Sequence[Sequence[int]], size: int) -> Batch:
        return as_batch(rows, size, self.seq_len)


class Source(Protocol):
    """Rows of any kind, in blocks whose order a cursor decides."""

    @property
    def name(self) -> str: ...

    def shuffled(self, cursor: Cursor) -> tuple[Sequence[Any], Cursor]:
        """The block that begins at the cursor, and the cursor behind it."""
        ...

    def batch(self, rows: Sequence[Any], size: int) -> Batch:
        """Rows as arrays; those that are missing are left out by the mask."""
        ...


def as_batch(rows: Sequence[Sequence[int]], size: int, seq_len: int) -> Batch:
    """Fills up short rows and missing ones with zeros that the mask leaves out."""
    both = np.zeros((size, seq_len + 1), np.int32)
    mask = np.zeros((size, seq_len), np.float32)
    for i, row in enumerate(rows):
        both[i, : len(row)] = row
        mask[i, : len(row) - 1] = 1
    return {"tokens": both[:, :-1], "targets": both[:, 1:], "mask": mask}


def training_batches(
    rows: Source, size: int, position: Position
) -> Iterator[tuple[Batch, Position]]:
    """Endless batches, each with the position behind it."""
    cursor, taken = position.cursor, position.rows
    block, end = rows.shuffled(cursor)
    batch: list[Any] = []
    fruitless = 0
    while True:
        wanted = block[taken : taken + size - len(batch)]
        batch += wanted
        taken += len(wanted)
        if len(batch) == size:
            yield rows.batch(batch, size), Position(cursor, taken)
            batch = []
            continue
        fruitless = 0 if block else fruitless + 1
        if fruitless > 1:  # an epoch that was read from its start gave no row
            raise UsageError(f"{rows.name} holds no text to train on")
        cursor, taken = end, 0
        block, end = rows.shuffled(cursor)


def validation_rows(rows: Rows, tokens: int) -> Iterator[array.array]:
    """Rows in order, until they hold so many targets; the last one is cut to fit."""
    cursor = Cursor()
    while tokens > 0 and cursor.epoch == 0:
        block, cursor = rows.block(cursor)
        for row in block:
            if tokens <= 0:
                return
            row = row[: tokens + 1]
            tokens -= len(row) - 1
            if len(row) > 1:
                yield array.array("i", row)


def prefetched(batches: Iterator[Any], depth: int = 2) -> Generator[Any, None, None]:
    """The same items, prepared by a thread while the device works."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            try:
                # A full queue must not hold a thread that was told to stop.
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in batches:
                put((True, item))
                if stopped.is_set():
                    return
        except BaseException as error:
            # Raised again by `prefetched`, in the thread that trains.
            put((False, error))

    thread = threading.Thread(target=work, daemon=True, name="batches")
    thread.start()
    try:
        while True:
            good, item = ready.get()
            if not good:
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
