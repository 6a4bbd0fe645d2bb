"""`read_labelled` makes tokens of texts or pairs of texts with a label each."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import tokenizers

from examples.finetune.files import Row
from examples.llama.batches import Batch
from examples.llama.config import UsageError
from examples.llama.corpus import Counts

# Columns of GLUE's tables, of its copies as JSON lines, and of others like them.
_TEXTS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
)
_LABELS = ("label", "gold_label", "Quality", "is_duplicate", "labels", "score")
REAL = "score"  # the one that is a number, not a class
UNLABELLED = ("-1", "-")  # what GLUE and SNLI write where there is no label


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a row has its texts and its label."""

    texts: tuple[str, ...]
    label: str
    unlabelled: tuple[str, ...] = UNLABELLED

    @property
    def real(self) -> bool:
        return self.label == REAL

    def text(self, row: Row) -> str:
        return "\n".join(str(row.get(name, "")) for name in self.texts)

    def word(self, row: Row) -> str:
        """A label as text; "" for none."""
        value = row.get(self.label)
        if isinstance(value, bool):
            return str(int(value))
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        word = "" if value is None else str(value).strip()
        return "" if word in self.unlabelled else word


def find_columns(
    row: Row,
    text: str,
    label: str,
    name: str,
    unlabelled: tuple[str, ...] = UNLABELLED,
) -> Columns:
    """The columns that flags name, else those of the field's usual names.

    Raises:
        UsageError: there are none.
    """
    wanted = [tuple(text.split(","))] if text else _TEXTS
    texts = next((names for names in wanted if all(n in row for n in names)), None)
    labels = [label] if label else _LABELS
    found = next((n for n in labels if n in row), None)
    if texts is None:
        raise UsageError(
            f"{name} has no texts among its fields: {_fields(row)}; say --text-key"
        )
    if found is None:
        raise UsageError(
            f"{name} has no labels among its fields: {_fields(row)}; say --label-key"
        )
    return Columns(texts, found, unlabelled)


def _fields(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text's tokens, the number of its text at each, and its label."""

    tokens: np.ndarray
    types: np.ndarray
    label: float


def find_classes(rows: Sequence[Row], columns: Columns, name: str) -> list[str]:
    """The classes in order: as numbers where all are, else as words.

    Raises:
        UsageError: there are fewer than two.
    """
    found = {columns.word(row) for row in rows} - {""}
    if len(found) < 2:
        raise UsageError(
            f"{name} has no labels to tell apart: {columns.label} is "
            f"{', '.join(found) or 'missing'} in all {len(rows)} rows"
        )
    if len(found) > max(1000, len(rows) // 2):
        raise UsageError(
            f"{name}: {columns.label} has {len(found)} classes, which is no label"
        )
    numbers = all(word.lstrip("-").isdecimal() for word in found)
    return sorted(found, key=int) if numbers else sorted(found)


def read_labelled(
    rows: Sequence[Row],
    columns: Columns,
    classes: Sequence[str],
    tokenizer: tokenizers.Tokenizer,
    seq_len: int,
    name: str,
) -> tuple[list[Labelled], Counts]:
    """Texts of up to `seq_len` tokens, and what became of rows.

    A long text is cut before its closing token, of a pair the longer text first.

    Raises:
        UsageError: no row has both a text and a label, or a label is of no class.
    """
    counts: Counts = Counts()
    numbers = {word: at for at, word in enumerate(classes)}
    tokenizer.no_padding()
    found = []
    for number, row in enumerate(rows, 1):
        texts = [str(row.get(key) or "") for key in columns.texts]
        if not all(text.strip() for text in texts):
            counts["without a text"] += 1
            continue
        label = _label(row, columns, numbers, f"{name}: row {number}")
        if label is None:
            counts["without a label"] += 1
            continue
        pair = texts[1] if len(texts) > 1 else None
        tokenizer.no_truncation()
        whole = tokenizer.encode(texts[0], pair)
        if len(whole.ids) > seq_len:
            counts["cut to --seq-len"] += 1
            tokenizer.enable_truncation(seq_len)
            whole = tokenizer.encode(texts[0], pair)
        counts["read"] += 1
        ids, types = (np.asarray(x, np.int32) for x in (whole.ids, whole.type_ids))
        found.append(Labelled(ids, types, label))
    tokenizer.no_truncation()
    if not found:
        reasons = ", ".join(f"{v} {k}" for k, v in counts.items())
        raise UsageError(f"{name} has no row with a text and a label ({reasons})")
    return found, counts


def _label(
    row: Row, columns: Columns, numbers: dict[str, int], where: str
) -> float | None:
    if not columns.real:
        word = columns.word(row)
        if word and word not in numbers:
            raise UsageError(
                f"{where}: label {word!r} is not among those to train on: "
                f"{', '.join(numbers)}"
            )
        return numbers.get(word)
    value = row.get(columns.label)
    try:
        real = math.nan if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {columns.label} {value!r} is no number") from error
    return real if math.isfinite(real) else None


def as_batch(rows: Sequence[Labelled], size: int, seq_len: int) -> Batch:
    """Tokens and which are real, `[size, seq_len]`; labels and mask `[size, 1]`."""
    batch: Batch = {
        "tokens": np.zeros((size, seq_len), np.int32),
        "real": np.zeros((size, seq_len), np.int32),
        "types": np.zeros((size, seq_len), np.int32),
        "labels": np.zeros((size, 1), np.float32),
        "mask": np.zeros((size, 1), np.float32),
    }
    for i, row in enumerate(rows):
        length = len(row.tokens)
        batch["tokens"][i, :length] = row.tokens
        batch["types"][i, :length] = row.types
        batch["real"][i, :length] = 1
        batch["labels"][i], batch["mask"][i] = row.label, 1
    return batch
