"""`Scores` asks a decoder how likely texts are, and lets it go on from a prompt."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.encoder.model import EncoderConfig
from examples.finetune.chat import load_chat
from examples.finetune.generate import begun, continued, end_ids
from examples.finetune.models import load_pretrained
from examples.llama.config import UsageError
from examples.llama.model import Params, abstract_model

_SHORTEST = 16  # positions of the smallest program
_PIECE = 16  # tokens between two looks for the words that end an answer

# What stands before a continuation, and the continuation: numbers of tokens.
Pair = tuple[Sequence[int], Sequence[int]]


@functools.partial(jax.jit, static_argnums=0)
def _row_scores(
    definition: Any,
    params: Params,
    tokens_BxS: jax.Array,
    targets_BxS: jax.Array,
    mask_BxS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Of every row the log-probability of its targets, and whether all are likeliest.

    One row after another goes through the head: the logits of a batch would be the
    largest array by far.
    """
    model = nnx.merge(definition, params)

    def one(row: Any) -> tuple[jax.Array, jax.Array]:
        hidden_SxD, targets_S, mask_S = row
        logits_SxV = model.logits(hidden_SxD)
        found = jnp.take_along_axis(
            jax.nn.log_softmax(logits_SxV), targets_S[:, None], axis=-1
        )[:, 0]
        likeliest = jnp.argmax(logits_SxV, axis=-1) == targets_S
        return jnp.sum(jnp.where(mask_S, found, 0)), jnp.all(likeliest | ~mask_S)

    return jax.lax.map(one, (model.hidden(tokens_BxS), targets_BxS, mask_BxS))


def windows(
    tokens: Sequence[int], prefix: int, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """A long text as pairs: every token is predicted once, from as many as there is
    room for.

    The first window is behind `prefix`. The last one is as long as the others and
    predicts what is left.
    """
    first = [prefix, *tokens]
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        # What is predicted is one behind what is read, so `first` is one ahead.
        yield first[max(end - length, 0) : start + 1], list(tokens[start:end])


class Scores:
    """A pretrained decoder that is asked for likelihoods and continuations.

    Attributes:
      tokenizer, chat: of its folder.
      length: positions that are used; a longer context loses its front.
      prefix: the token that a text without a context stands behind.
      ends: the tokens by which a text ends.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 8,
        length: int | None = None,
        dtype: str = "",
    ):
        """`length`, and the `dtype` of activations, are the model's own if left out.

        Raises:
            UsageError: the folder holds no decoder with a tokenizer that ends texts.
        """
        found = load_pretrained(folder, "pretrained")
        config = found.config
        if isinstance(config, EncoderConfig):
            raise UsageError(f"{folder} is an encoder; only a decoder writes texts")
        if length is not None and not 2 <= length <= config.max_length:
            raise UsageError(
                f"max_length must be from 2 to the model's {config.max_length}; got "
                f"{length}"
            )
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1; got {batch_size}")
        if dtype not in ("", "float32", "bfloat16"):
            raise UsageError(f"dtype must be float32 or bfloat16; got {dtype!r}")
        self.length, self.batch_size = length or config.max_length, batch_size
        self.tokenizer, self.chat = found.tokenizer, load_chat(found.folder)
        self.ends = end_ids(found.folder, self.tokenizer, self.chat)
        begin = self.tokenizer.token_to_id(self.chat.special.get("bos_token", ""))
        if begin is None and not self.ends:
            raise UsageError(
                f"{folder} names no token that begins or ends a text: give "
                "tokenizer_config.json a bos_token or an eos_token"
            )
        self.prefix = min(self.ends) if begin is None else begin
        if dtype:
            config = dataclasses.replace(config, compute_dtype=dtype)
        self._definition, _ = abstract_model(config)
        self._params = jax.tree.map(jnp.asarray, found.params)

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Tokens, with those that the tokenizer puts before a text if `special`.

        None: unless the text begins with one, which a chat template has written.
        """
        if special is None:
            begin = self.chat.special.get("bos_token")
            special = not (begin and text.startswith(begin))
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def of_pairs(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        r"""`sum_t log p(c_t | context, c_<t)`, and whether a greedy text would be `c`.

        Rows of about one length share a program: lengths are powers of two.
        """
        for context, continuation in pairs:
            if not context or not 0 < len(continuation) <= self.length:
                raise UsageError(
                    f"a continuation has {len(continuation)} tokens and its context "
                    f"{len(context)}; expected at least one of either, and of a "
                    f"continuation no more than the model's {self.length} positions"
                )
        rows = [([*a, *b][-self.length - 1 :], len(b)) for a, b in pairs]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for at in range(0, len(order), self.batch_size):
            part = order[at : at + self.batch_size]
            sums, likeliest = self._batch([rows[i] for i in part])
            for i, total, whole in zip(part, sums, likeliest, strict=False):
                found[i] = float(total), bool(whole)
        return found

    def _batch(self, rows: Sequence[tuple[list[int], int]]) -> Any:
        """Scores of rows, the longest first; a short batch is filled up."""
        size = self._room(len(rows[0][0]) - 1)
        tokens = np.zeros((self.batch_size, size), np.int32)
        targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        for i, (row, continuation) in enumerate(rows):
            end = len(row) - 1
            tokens[i, :end], targets[i, :end] = row[:-1], row[1:]
            mask[i, end - continuation : end] = True
        args = (self._definition, self._params, tokens, targets, mask)
        return jax.device_get(_row_scores(*args))

    def of_text(self, text: str) -> float:
        """The log-probability of a text of any length behind the prefix."""
        tokens = self.encode(text, special=False)
        pairs = list(windows(tokens, self.prefix, self.length))
        return sum(total for total, _ in self.of_pairs(pairs))

    def answer(self, prompt: str, until: Sequence[str], tokens: int) -> str:
        """What a greedy model writes behind a prompt, up to the first of `until`.

        It ends with an end of a text, too, or after so many tokens.
        """
        if not 0 < tokens < self.length:
            raise UsageError(
                f"an answer may have {tokens} tokens, and the model has {self.length} "
                "positions for a prompt and its answer: --gen_kwargs max_gen_toks=N"
            )
        ids = self.encode(prompt)[-(self.length - tokens) :] or [self.prefix]
        limit, at = len(ids) + tokens, len(ids)
        row = np.zeros(self._room(limit), np.int32)
        row[: len(ids)] = ids
        stops = jnp.asarray(sorted(self.ends) or [-1], jnp.int32)
        state = begun(self._definition, self._params, row, at)
        text, ended = "", False
        # Words are looked for now and then: the device knows tokens alone.
        while at < limit and not ended:
            piece = min(at + _PIECE, limit)
            state = continued(self._definition, self._params, state, piece, stops)
            at = int(state.end)
            written = np.asarray(state.row)[len(ids) : at].tolist()
            ended = bool(written) and written[-1] in self.ends
            text = self.tokenizer.decode(written[:-1] if ended else written)
            found = [text.find(word) for word in until if word and word in text]
            if found:
                return text[: min(found)]
        return text

    def _room(self, length: int) -> int:
        """The power of two that a row of this length is filled up to."""
        return min(max(_SHORTEST, 1 << (length - 1).bit_length()), self.length)
