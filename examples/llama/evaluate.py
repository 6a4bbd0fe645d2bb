"""Validation: exact perplexity, every token counted once."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from examples.llama.batches import Batch, as_batch
from examples.llama.model import Params


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean negative log likelihood per token, and the tokens it is a mean of."""

    loss: float
    tokens: int
    compat_loss: float  # as GaLore's script reports it

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def compat_perplexity(self) -> float:
        return perplexity(self.compat_loss)


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

    known, seen = count(train_rows) + 1.0, count(eval_rows)
    losses = -np.log(known / known.sum())
    return perplexity(float((seen * losses).sum() / max(seen.sum(), 1)))
