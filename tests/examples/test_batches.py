"""Rows and batches: nothing lost, nothing twice, and the way back to a position."""

import hashlib
import itertools
import json

import numpy as np
import pytest

from examples.llama.batches import (
    Cursor,
    Position,
    Rows,
    as_batch,
    prefetched,
    training_batches,
    validation_rows,
)
from examples.llama.config import UsageError
from examples.llama.corpus import Counts, matching
from examples.llama.tokenizer import ByteTokenizer, load_tokenizer, train_bpe


@pytest.fixture
def rows(shards):
    corpus = matching(shards, "text")
    return Rows(corpus, ByteTokenizer(), 16, packed=True, seed=3, block_rows=40)


def digest(batches) -> str:
    content = b"".join(a.tobytes() for b, _ in batches for a in b.values())
    return hashlib.sha256(content).hexdigest()


def take(rows, number, position=None, size=4):
    start = Position() if position is None else position
    return list(itertools.islice(training_batches(rows, size, start), number))


def test_the_same_seed_gives_the_same_batches(rows):
    assert digest(take(rows, 200)) == digest(take(rows, 200))
    other = Rows(rows.corpus, rows.tokenizer, 16, True, seed=4, block_rows=40)
    assert digest(take(other, 200)) != digest(take(rows, 200))


def test_batches_do_not_depend_on_prefetching(rows):
    ahead = prefetched(training_batches(rows, 4, Position()))
    assert digest(itertools.islice(ahead, 50)) == digest(take(rows, 50))
    ahead.close()


def test_prefetching_passes_on_errors():
    def failing():
        yield 1
        raise UsageError("no more")

    ahead = prefetched(failing())
    assert next(ahead) == 1
    with pytest.raises(UsageError, match="no more"):
        next(ahead)


@pytest.mark.parametrize("packed", [True, False])
def test_resuming_at_every_position(rows, packed):
    rows = Rows(rows.corpus, rows.tokenizer, 16, packed, seed=3, block_rows=40)
    batches = take(rows, 170)
    assert batches[-1][1].cursor.epoch > 0
    for done in range(0, 160, 7):
        position = batches[done][1]
        position = Position.from_json(json.loads(json.dumps(position.to_json())))
        assert digest(take(rows, 5, position)) == digest(batches[done + 1 : done + 6])


def test_an_epoch_holds_every_token_once(rows):
    cursor, found = Cursor(), []
    while cursor.epoch == 0:
        block, cursor = rows.block(cursor)
        found += [token for row in block for token in row[1:]]
    expected = []
    for shard in rows._shard_order(0):
        for _, text in rows.corpus.documents(shard, 0, Counts()):
            expected += [*text.encode(), 256]
    assert found == expected[1:]  # the very first token is never a target


def test_epochs_are_shuffled_differently_and_counted(rows):
    cursor = Cursor()
    while cursor.epoch < 2:
        _, cursor = rows.block(cursor)
    assert rows._shard_order(0) != rows._shard_order(1) or rows._shard_order(
        1
    ) != rows._shard_order(2)
    documents = len(list(rows.corpus.texts()))
    assert dict(cursor.counts)["read"] == 2 * documents


def test_padded_rows_hold_one_document(shards):
    corpus = matching(shards, "text")
    rows = Rows(corpus, ByteTokenizer(), 16, packed=False, seed=None)
    block, _ = rows.block(Cursor())
    texts = list(corpus.texts())
    assert len(block) == len(texts)
    for row, text in zip(block, texts, strict=True):
        assert row == [*text.encode(), 256][:16]
    batch = as_batch([[5, 6, 256]], 2, 16)
    np.testing.assert_array_equal(batch["tokens"][0, :3], [5, 6, 256])
    np.testing.assert_array_equal(batch["targets"][0, :2], [6, 256])
    assert batch["mask"].sum() == 2  # a document of n tokens has n - 1 targets


def test_validation_stops_at_the_token(rows):
    plain = Rows(rows.corpus.of("validation"), rows.tokenizer, 16, True, None)
    found = list(validation_rows(plain, 100))
    assert sum(len(row) - 1 for row in found) == 100
    everything = list(validation_rows(plain, 10**9))
    assert everything[: len(found) - 1] == found[:-1]


def test_a_corpus_without_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    corpus = matching(str(tmp_path / "a.jsonl"), "text").of(None)
    rows = Rows(corpus, ByteTokenizer(), 16, packed=True, seed=0)
    with pytest.raises(UsageError, match="holds no text to train on"):
        take(rows, 1)


def test_bpe_round_trip_and_cache(tmp_path, shards):
    corpus = matching(shards, "text")
    tokenizer = load_tokenizer("bpe", 300, corpus, str(tmp_path / "cache"))
    text = "the gradient of low rank\n  naïve ⟨x⟩"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(text.encode())
    assert tokenizer.size <= 300
    again = load_tokenizer("bpe", 300, corpus, str(tmp_path / "cache"))
    assert again.fingerprint == tokenizer.fingerprint
    assert train_bpe(corpus.texts(), 300).fingerprint == tokenizer.fingerprint
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_text("{")
    with pytest.raises(UsageError, match=r"cannot be read .* remove it to train anew"):
        load_tokenizer("bpe", 300, corpus, str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "cursor",
    [
        {"shard": "x"},
        {"line": -1},
        {"epoch": None},
        {"line": True},
        {"carry": [1.5]},
        {"carry": 7},
        {"counts": [["read", "many"]]},
        {"counts": [1]},
        {"other": 1},
    ],
)
def test_positions_of_something_else(cursor):
    good = Position().to_json()
    assert Position.from_json(good) == Position()
    spoiled = [good | {"cursor": good["cursor"] | cursor}, {"rows": 0}, [], 7]
    for data in (*spoiled, good | {"rows": 2.5}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Position.from_json(data)
