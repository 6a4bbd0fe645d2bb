"""Tokenizers that were trained here, foreign ones, and damaged files."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.llama.config import UsageError
from examples.llama.corpus import Corpus
from examples.llama.tokenizer import BPETokenizer, load_tokenizer, train_bpe

NOTHING = Corpus("nothing", (), ())
TEXT = "the words that it knows, and some more of them: 1 + 1 = 2"


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return train_bpe([TEXT] * 10, 300)


def load(tmp_path, text: str, size: int = 300):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    return load_tokenizer("bpe", size, NOTHING, str(tmp_path), path)


def test_padding_and_truncation_are_cleared(trained, tmp_path):
    inner = tokenizers.Tokenizer.from_str(trained.serialized)
    inner.enable_padding(length=64)
    inner.enable_truncation(4)
    assert load(tmp_path, inner.to_str()).encode(TEXT) == trained.encode(TEXT)


def test_a_text_is_the_same_tokens_every_time(trained, tmp_path):
    data = json.loads(trained.serialized)
    data["model"]["dropout"] = 0.5
    loaded = load(tmp_path, json.dumps(data))
    assert all(loaded.encode(TEXT) == trained.encode(TEXT) for _ in range(20))


def test_numbers_beyond_the_model_are_refused(trained, tmp_path):
    data = json.loads(trained.serialized)
    name = next(n for n, i in data["model"]["vocab"].items() if i == trained.size - 1)
    data["model"]["vocab"][name] = 5000
    with pytest.raises(UsageError, match="has tokens up to 5000, the model 300 from 0"):
        load(tmp_path, json.dumps(data))
    with pytest.raises(UsageError, match=f"up to {trained.size - 1}, the model 200"):
        load(tmp_path, trained.serialized, 200)


@pytest.mark.parametrize("text", ["", "{}", "[]", "[" * 100_000, "\0", "null"])
def test_what_is_no_tokenizer(tmp_path, text):
    with pytest.raises(UsageError, match=r"cannot be read .*; remove it to train anew"):
        load(tmp_path, text)


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1))
@settings(max_examples=200, deadline=None)
def test_any_bytes(trained, tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("run") / "tokenizer.json"
    changed = bytearray(trained.serialized.encode())
    for at, byte in changes:
        changed[at % len(changed)] = byte
    path.write_bytes(changed)
    try:
        tokenizer = load_tokenizer("bpe", 300, NOTHING, "unused", path)
        assert all(0 <= token < 300 for token in tokenizer.encode(TEXT))
    except UsageError as error:
        assert str(path) in str(error)
