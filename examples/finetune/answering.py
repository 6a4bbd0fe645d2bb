"""`Instructions` trains a decoder on the answers of conversations."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from examples.finetune import instructions
from examples.finetune.chat import conversation
from examples.finetune.examples import Examples
from examples.finetune.files import Row, read_rows
from examples.finetune.generate import Answers
from examples.finetune.models import Model
from examples.finetune.task import FinetuneTask, Measure
from examples.llama.batches import Batch
from examples.llama.config import UsageError
from examples.llama.report import Evaluation, evaluate
from examples.llama.step import Losses, token_losses


@dataclasses.dataclass(frozen=True)
class Learned(Evaluation):
    """Mean loss per token of held-out answers."""

    @property
    def brief(self) -> str:
        return f"loss {self.loss:.4f} nats over {self.tokens:,} tokens of answers"


class Instructions(FinetuneTask):
    """The answers of conversations."""

    unit, loss_unit = "tokens", "nats per token"

    @property
    def losses(self) -> Losses:
        return token_losses

    def read_data(self) -> None:
        config = self.config
        if self.pretrained.encoder:
            raise UsageError(
                f"--task sft needs a model that writes; {config.model} is an encoder: "
                "--task classify"
            )

        def name(row: Row) -> str:
            try:
                return conversation(row)[0]["content"]
            except ValueError:
                return json.dumps(row)  # refused with its number when it is read

        self.held_out(read_rows(config.data), name)
        self.examples, self.counts = {}, {}
        for part, rows in self.data_rows.items():
            found: list[instructions.Example] = []
            if rows:
                found, self.counts[part] = instructions.read_instructions(
                    rows,
                    self.chat,
                    self.pretrained.tokenizer,
                    config.seq_len,
                    f"{config.data} ({part})",
                )
            lines = [[example] for example in found]
            if config.packing == "packed":
                lines = instructions.packed(found, config.seq_len)

            def as_batch(rows: Sequence[Any], size: int) -> Batch:
                return instructions.as_batch(rows, size, self.config.seq_len)

            self.examples[part] = Examples(config.data, lines, as_batch)

    def prepare(self) -> Model:
        return Model(self.pretrained, self.config, self.dtypes())

    def scores(
        self, part: str, run: Measure, should_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        batches = self.examples[part].batches(self.config.eval_batch_size)
        found = evaluate(lambda _, batch: run(batch), {}, batches, should_stop)
        return found and Learned(found.loss, found.tokens)

    def closing(self, result: Evaluation, trainer: Any) -> list[tuple[str, str]]:
        rows = super().closing(result, trainer)
        answers = Answers(
            self.definition,
            self.pretrained.tokenizer,
            self.chat,
            self.pretrained.folder,
        )
        params = self.whole(trainer)
        for row in self.data_rows["dev"][: self.config.answers]:
            turns = conversation(row)
            last = max(
                (i for i, turn in enumerate(turns) if turn["role"] == "assistant"),
                default=len(turns),
            )
            asked = turns[:last]
            said = answers(
                params, asked, self.config.seq_len, self.config.answer_tokens
            )
            question = asked[-1]["content"] if asked else ""
            rows.append((f"asked: {_line(question)}", _line(said)))
        return rows


def _line(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 4]} ..."
