"""`FamilyLM` is a decoder of examples/llama as lm-evaluation-harness takes a model.

This file needs the package `lm-eval` (the extra `harness`).
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM  # type: ignore
from lm_eval.api.registry import register_model  # type: ignore

from examples.harness.scores import Scores
from examples.llama.config import UsageError

NAME = "lowrank_optax"
_TOKENS = 256  # of an answer, where a task names no number
# Under these names tasks say how long an answer may be; the first one goes before.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model(NAME)
class FamilyLM(TemplateLM):
    """`--model_args pretrained=FOLDER`, with `max_length` and `dtype` beside it."""

    def __init__(
        self,
        pretrained: str = "",
        batch_size: Any = None,
        max_length: int | None = None,
        dtype: str = "",
        max_batch_size: Any = None,
        device: str | None = None,
    ):
        super().__init__()
        # Said unasked ("cuda:0"); the device is JAX's choice, by JAX_PLATFORMS.
        del max_batch_size, device
        if batch_size is not None and not str(batch_size).isdecimal():
            raise UsageError(f"--batch_size must be a number; got {batch_size}")
        self.scores = Scores(pretrained, int(batch_size or 8), max_length, dtype)
        self._name = pathlib.Path(pretrained).resolve().name

    # What the base class asks for to make tokens of contexts and continuations.

    @property
    def eot_token_id(self) -> int:
        return min(self.scores.ends, default=self.scores.prefix)

    @property
    def prefix_token_id(self) -> int:
        return self.scores.prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self.scores.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], **_: Any
    ) -> list[tuple[float, bool]]:
        return self.scores.of_pairs([(ctx, own) for _, ctx, own in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        del disable_tqdm
        return [self.scores.of_text(*request.args) for request in requests]

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        del disable_tqdm
        return [self._answer(*request.args) for request in requests]

    def _answer(self, prompt: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or float(options.get("temperature") or 0):
            raise UsageError(
                "a task asks for sampling (do_sample or temperature), and this model "
                "answers greedily: --gen_kwargs do_sample=False,temperature=0"
            )
        until = options.get("until") or []
        lengths = [options[name] for name in _LENGTHS if options.get(name)]
        words = [until] if isinstance(until, str) else until
        return self.scores.answer(prompt, words, int(next(iter(lengths), _TOKENS)))

    # For --apply_chat_template.

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.scores.chat.template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if add_generation_prompt:
            return self.scores.chat.prompt(chat_history)
        return self.scores.chat.render(chat_history).text
