"""`read_instructions` makes tokens of conversations; rows of them learn the answers.

An example is a conversation: its inputs, the next token of each as its target, and a
mask that is 1 where the target is of an answer. A row holds one example, or several end
to end, each a segment that the model must not look out of.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import tokenizers

from examples.finetune.chat import Chat, Message, conversation
from examples.finetune.files import Row
from examples.llama.batches import Batch
from examples.llama.config import UsageError
from examples.llama.corpus import Counts

_OPEN = 64  # rows that packing keeps open


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation; three arrays of one length."""

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)


def encode(
    chat: Chat, tokenizer: tokenizers.Tokenizer, messages: Sequence[Message]
) -> Example:
    """The tokens of a conversation; an answer's are those that lie in its characters.

    The template writes special tokens itself, so the tokenizer adds none.
    """
    rendered = chat.render(messages)
    encoding = tokenizer.encode(rendered.text, add_special_tokens=False)
    ids = np.asarray(encoding.ids, np.int32)
    spans = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    learned = np.zeros(len(ids), np.float32)
    for first, behind in rendered.answers:
        # A token of a blank and a header's last letter begins before the answer.
        inside = (spans[:, 0] >= first) & (spans[:, 0] < behind)
        learned[inside & (spans[:, 1] > spans[:, 0])] = 1
    return Example(ids[:-1], ids[1:], learned[1:])


def read_instructions(
    rows: Sequence[Row],
    chat: Chat,
    tokenizer: tokenizers.Tokenizer,
    seq_len: int,
    name: str,
) -> tuple[list[Example], Counts]:
    """Examples of up to `seq_len` tokens, cut at their ends, and what became of rows.

    Raises:
        UsageError: a row is no conversation, or none of them has an answer to learn.
    """
    counts: Counts = Counts()
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            messages = conversation(row)
        except ValueError as error:
            raise UsageError(f"{name}: row {number} is {error}") from error
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if not any(answer.strip() for answer in answers):
            counts["without a response" if answers else "without an assistant"] += 1
            continue
        example = encode(chat, tokenizer, messages)
        if not example.mask.any():
            counts["whose answers the template hides"] += 1
            continue
        if len(example) > seq_len:
            example = Example(
                example.inputs[:seq_len],
                example.targets[:seq_len],
                example.mask[:seq_len],
            )
            if not example.mask.any():
                counts["whose response begins behind --seq-len"] += 1
                continue
            counts["cut to --seq-len"] += 1
        counts["read"] += 1
        examples.append(example)
    if not examples:
        reasons = ", ".join(f"{v} {k}" for k, v in counts.items())
        raise UsageError(
            f"{name} has no response to learn from ({len(rows)} rows: {reasons}); "
            f"--seq-len is {seq_len}"
        )
    return examples, counts


def packed(examples: Sequence[Example], seq_len: int) -> list[list[Example]]:
    """Rows of examples end to end: each goes to the first open row with room.

    The oldest open row is closed when there are too many.
    """
    done: list[list[Example]] = []
    open_rows: list[tuple[int, list[Example]]] = []
    for example in examples:
        for at, (used, row) in enumerate(open_rows):
            if used + len(example) <= seq_len:
                row.append(example)
                open_rows[at] = (used + len(example), row)
                break
        else:
            open_rows.append((len(example), [example]))
            if len(open_rows) > _OPEN:
                done.append(open_rows.pop(0)[1])
    return done + [row for _, row in open_rows]


def as_batch(rows: Sequence[Sequence[Example]], size: int, seq_len: int) -> Batch:
    """Arrays `[size, seq_len]`; what is left of a row, and missing rows, is padding."""
    batch: Batch = {
        "tokens": np.zeros((size, seq_len), np.int32),
        "targets": np.zeros((size, seq_len), np.int32),
        "mask": np.zeros((size, seq_len), np.float32),
        "segments": np.zeros((size, seq_len), np.int32),
    }
    for i, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row, 1):
            part = slice(at, at + len(example))
            batch["tokens"][i, part] = example.inputs
            batch["targets"][i, part] = example.targets
            batch["mask"][i, part] = example.mask
            batch["segments"][i, part] = number
            at += len(example)
    return batch
