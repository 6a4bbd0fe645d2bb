"""`Answers` continues a prompt greedily, for a look at what a model has learned."""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from examples.finetune.chat import Chat, Message
from examples.llama.cache import Cache, empty_cache, extend
from examples.llama.model import Params


class Text(NamedTuple):
    """A row of tokens that is being written."""

    row: jax.Array  # [S]
    end: jax.Array  # tokens that it has
    cache: Cache  # of all of them but the last, which is read with the next


@functools.partial(jax.jit, static_argnums=0)
def begun(
    definition: Any, params: Params, row: jax.Array, end: jax.Array | int
) -> Text:
    """A text of `row[:end]`, of at least one token. What is behind `end` is padding."""
    model = nnx.merge(definition, params)
    cache = empty_cache(model.config, 1, len(row))
    end = jnp.asarray(end, jnp.int32)
    return Text(row, end, extend(model, row[None], cache, 0)[1])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def continued(
    definition: Any, params: Params, text: Text, limit: jax.Array, stops: jax.Array
) -> Text:
    """Adds likeliest tokens until the text has `limit`, or one of the stops is added.

    Every token runs through the model alone: the cache has what it sees of the others.
    """
    model, start = nnx.merge(definition, params), text.end

    def unfinished(text: Text) -> jax.Array:
        stopped = (text.end > start) & jnp.any(text.row[text.end - 1] == stops)
        return (text.end < limit) & ~stopped

    def add(text: Text) -> Text:
        last = jax.lax.dynamic_slice(text.row, (text.end - 1,), (1,))
        hidden, cache = extend(model, last[None], text.cache, text.end - 1)
        token = jnp.argmax(model.logits(hidden)[0, 0]).astype(text.row.dtype)
        return Text(text.row.at[text.end].set(token), text.end + 1, cache)

    return jax.lax.while_loop(unfinished, add, text)


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
        written = begun(self.definition, params, row, len(ids))
        written = continued(self.definition, params, written, limit, stops)
        answer = np.asarray(written.row)[len(ids) : int(written.end)].tolist()
        found = [i for i in answer if i not in self.stops]
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
