"""`Examples` are the rows of a task in memory, in an order that can be returned to."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from examples.llama.batches import Batch, Cursor


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of any kind, which `as_batch(rows, size)` makes arrays of.

    A block is an epoch: its order is a function of seed and epoch.
    """

    name: str
    items: Sequence[Any]
    as_batch: Callable[[Sequence[Any], int], Batch]
    seed: int | None = None  # None: in order

    def __len__(self) -> int:
        return len(self.items)

    def shuffled(self, cursor: Cursor) -> tuple[list[Any], Cursor]:
        order = np.arange(len(self.items))
        if self.seed is not None:
            draw = np.random.default_rng((self.seed, cursor.epoch))
            order = draw.permutation(len(self.items))
        return [self.items[int(i)] for i in order], Cursor(cursor.epoch + 1)

    def batch(self, rows: Sequence[Any], size: int) -> Batch:
        return self.as_batch(rows, size)

    def batches(self, size: int) -> list[Batch]:
        """All rows in order; the last batch is filled up, which the mask leaves out."""
        parts = range(0, len(self.items), size)
        return [self.as_batch(self.items[at : at + size], size) for at in parts]
