"""Bytes, or a byte-level BPE that is trained on the corpus and kept on disk."""

import hashlib
import pathlib
from collections.abc import Iterable
from typing import Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from examples.llama.config import UsageError
from examples.llama.corpus import Corpus
from examples.llama.run_folder import (
    brief,
    check_writable,
    parse_object,
    read_text,
    usable,
    write_whole,
)

_TRAINING_CHARACTERS = 100_000_000
_LARGEST = 2**26  # bytes of a tokenizer.json
_PROBE = "A few words, 1 + 1 = 2;\tü, 漢字 and 🙂\n"  # what every text may hold


class Tokenizer(Protocol):
    """Text to numbers; `end` closes a document."""

    end: int
    size: int
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """A token is a byte of UTF-8; 256 closes a document."""

    end = 256
    size = 257
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class BPETokenizer:
    """A byte-level BPE; 0 opens and 1 closes a document, as in the papers' models."""

    end = 1

    def __init__(self, serialized: str):
        self.serialized = serialized
        self._inner = tokenizers.Tokenizer.from_str(serialized)
        # Rows are cut and filled up by the trainer, and the same in every epoch.
        self._inner.no_padding()
        self._inner.no_truncation()
        if getattr(self._inner.model, "dropout", None):
            self._inner.model.dropout = None
        # Numbers may have gaps: the largest one decides.
        self.size = max(self._inner.get_vocab().values(), default=0) + 1
        self.fingerprint = hashlib.sha256(serialized.encode()).hexdigest()[:16]

    def number(self, token: str) -> int | None:
        return self._inner.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._inner.decode(list(ids))


def of_folder(folder: str) -> BPETokenizer:
    """The tokenizer of a pretrained model, whose own token closes a document.

    Raises:
        UsageError: it is not there, or has no such token.
    """
    path = pathlib.Path(folder).expanduser()
    try:
        found = BPETokenizer(read_text(path / "tokenizer.json", _LARGEST))
        settings = parse_object(read_text(path / "tokenizer_config.json", _LARGEST))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's own is bare, or a panic of Rust
        raise UsageError(
            f"the tokenizer of {folder} cannot be read: {brief(error)}"
        ) from error
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    number = found.number(token) if isinstance(token, str) else None
    if number is None:
        raise UsageError(
            f"the tokenizer of {folder} has no token for the end of a text"
        )
    found.end = number
    return found


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learns merges from the texts, up to the first 100 million characters."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        # All 256 bytes have a token, so that there is none for unknown text.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_first(texts, _TRAINING_CHARACTERS), trainer)
    return BPETokenizer(inner.to_str())


def _first(texts: Iterable[str], characters: int) -> Iterable[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def load_tokenizer(
    kind: str,
    vocab_size: int,
    corpus: Corpus,
    cache_dir: str,
    own: pathlib.Path | None = None,
) -> Tokenizer:
    """The file `own` if it exists, else the cached one, else one trained now."""
    if kind == "bytes":
        return ByteTokenizer()
    fingerprint = corpus.fingerprint(cache_dir)
    cached = pathlib.Path(cache_dir) / f"bpe-{vocab_size}-{fingerprint}.json"
    path = own if own is not None and own.exists() else cached
    if not path.exists():
        check_writable("--cache-dir", pathlib.Path(cache_dir))
        print(f"training a BPE of {vocab_size} tokens on {corpus.name} ...", flush=True)
        with usable(f"--cache-dir {cache_dir}"):
            write_whole(path, train_bpe(corpus.texts(), vocab_size).serialized)
    try:
        tokenizer = BPETokenizer(read_text(path, _LARGEST))
        tokenizer.encode(_PROBE)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's own is bare, or a panic of Rust
        raise UsageError(
            f"tokenizer {path} cannot be read ({brief(error)}); remove it to train anew"
        ) from error
    if tokenizer.size > vocab_size:
        raise UsageError(
            f"tokenizer {path} has tokens up to {tokenizer.size - 1}, the model "
            f"{vocab_size} from 0 on"
        )
    return tokenizer
