"""`Answers` continues a prompt greedily, for a look at what a model has learned."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from examples.finetune.chat import Chat, Message
from examples.llama.model import Params


@functools.partial(jax.jit, static_argnums=0)
def continued(
    definition: Any,
    params: Params,
    tokens: jax.Array,
    start: jax.Array,
    limit: jax.Array,
    stops: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Fills `tokens[start:limit]` until one of the stops.

    The whole row is computed for every token: nothing is kept between them, as fits a
    few short answers. What is behind a position does not reach it.
    """
    model = nnx.merge(definition, params)

    def unfinished(state: Any) -> jax.Array:
        row, at = state
        stopped = (at > start) & jnp.any(row[at - 1] == stops)
        return (at < limit) & ~stopped

    def add(state: Any) -> Any:
        row, at = state
        logits = model(row[None])[0, at - 1]
        return row.at[at].set(jnp.argmax(logits).astype(row.dtype)), at + 1

    return jax.lax.while_loop(unfinished, add, (tokens, start))


class Answers:
    """Greedy answers of a model, in the text of its chat template."""

    def __init__(
        self,
        definition: Any,
        tokenizer: tokenizers.Tokenizer,
        chat: Chat,
        folder: pathlib.Path,
    ):
        self.definition, self.tokenizer, self.chat = definition, tokenizer, chat
        # What the template writes behind an answer, by which a model says that it ends.
        asked = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        text = chat.render(asked).text
        self.mark = text[text.rfind("b") + 1 :].strip()
        self.stops = sorted(end_ids(folder, tokenizer, chat) | self._mark_ids())

    def _mark_ids(self) -> set[int]:
        ids = self.tokenizer.encode(self.mark, add_special_tokens=False).ids
        return {*ids} if len(ids) == 1 else set()

    def __call__(
        self, params: Params, messages: Sequence[Message], length: int, tokens: int
    ) -> str:
        """The answer to a conversation's last message, of a row of `length` tokens."""
        prompt = self.chat.prompt(messages)
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = ids[-max(length - tokens, 1) :]
        row = np.zeros(length, np.int32)
        row[: len(ids)] = ids
        limit = min(len(ids) + tokens, length)
        stops = jnp.asarray(self.stops or [-1], jnp.int32)
        row, end = continued(self.definition, params, row, len(ids), limit, stops)
        found = [int(i) for i in row[len(ids) : int(end)] if int(i) not in self.stops]
        text = self.tokenizer.decode(found)
        return text.split(self.mark)[0].strip() if self.mark else text.strip()


def end_ids(
    folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, chat: Chat
) -> set[int]:
    """The tokens by which generation ends, as the model's files say."""
    path = folder / "generation_config.json"
    found: Any = None
    if path.exists():
        try:
            found = json.loads(path.read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            found = None  # a look at answers can do without
    found = found if isinstance(found, list) else [found]
    named = tokenizer.token_to_id(chat.special.get("eos_token", ""))
    return {i for i in (*found, named) if isinstance(i, int)}
