"""Shards, documents and the split; what must be skipped and what must stop a run."""

import gzip
import json
import os
import time
import tracemalloc

import pytest

from examples.llama import shard_hashes
from examples.llama.config import UsageError
from examples.llama.corpus import (
    Corpus,
    Counts,
    load_corpora,
    matching,
    stdlib,
)


def lines(corpus: Corpus) -> list[str]:
    return list(corpus.of(None).texts())


def json_lines(path, documents):
    text = [d if isinstance(d, bytes) else json.dumps(d).encode() for d in documents]
    path.write_bytes(b"\n".join(text) + b"\n")
    return matching(str(path), "text").of(None)


GOOD = [{"text": f"document {i}"} for i in range(400)]


def read(corpus) -> tuple[list[str], Counts]:
    counts = Counts()
    texts = [
        t for s in range(len(corpus.paths)) for _, t in corpus.documents(s, 0, counts)
    ]
    return texts, counts


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b'{"text": "cut', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'"just a string"', "without a text"),
        (b"[1, 2]", "without a text"),
        (b"null", "without a text"),
        ({"txt": "other key"}, "without a text"),
        ({"text": 7}, "without a text"),
        ({"text": None}, "without a text"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        ({"text": "a\0b"}, "NUL byte"),
        ({"text": ""}, "empty"),
        ({"text": " \n"}, "empty"),
        (b"", "empty"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_document_is_skipped_and_counted(tmp_path, document, reason):
    corpus = json_lines(tmp_path / "a.jsonl", [*GOOD[:200], document, *GOOD[200:]])
    texts, counts = read(corpus)
    assert texts == [d["text"] for d in GOOD]
    assert counts[reason] == 1
    assert counts["read"] == 400


def test_byte_order_mark_and_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read(matching(str(path), "text").of(None))[0] == ["one\ntwo\nthree\n"]
    document = b'\xef\xbb\xbf{"text": "one\\r\\ntwo"}\r'
    assert read(json_lines(tmp_path / "a.jsonl", [document]))[0] == ["one\ntwo"]


def test_truncated_gzip(tmp_path):
    whole = gzip.compress(b"\n".join(json.dumps(d).encode() for d in GOOD * 40))
    path = tmp_path / "a.json.gz"
    path.write_bytes(whole[: len(whole) // 2])
    texts, counts = read(matching(str(path), "text").of(None))
    assert counts["damaged gzip"] == 1
    assert len(texts) > 1000
    assert texts[:400] == [d["text"] for d in GOOD]
    (tmp_path / "b.json.gz").write_bytes(b"no gzip at all")
    counts = read(matching(str(tmp_path / "b.json.gz"), "text").of(None))[1]
    assert counts == {"damaged gzip": 1}


def test_a_very_long_line_is_cut(tmp_path):
    corpus = json_lines(tmp_path / "a.jsonl", [{"text": "x" * 3_000_000}])
    (text,), counts = read(corpus)
    assert len(text) == 1_000_000
    assert counts["cut short"] == 1


def test_a_long_plain_text_is_read_in_pieces(tmp_path):
    path = tmp_path / "a.txt"
    text = "".join(f"line {i} of the book, with ü and ß\n" for i in range(9000))
    path.write_text(text)
    pieces = read(matching(str(path), "text").of(None))[0]
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces)
    path.write_bytes(text.encode() + b"\xff" + b"x" * 300_000)
    texts, counts = read(matching(str(path), "text").of(None))
    assert counts["not UTF-8"] == 1
    assert len(texts) > 4


def test_too_many_bad_documents_stop_the_run(tmp_path):
    bad = json_lines(tmp_path / "a.jsonl", GOOD[:197] + [b"{"] * 3)
    with pytest.raises(UsageError, match=r"3 of 200 documents .* \(3 invalid JSON\)"):
        read(bad)
    few = json_lines(tmp_path / "b.jsonl", [*GOOD[:10], b"{"])
    assert read(few)[1]["invalid JSON"] == 1  # too few to tell while reading
    with pytest.raises(UsageError, match="1 of 11 documents cannot be used"):
        lines(few)


def test_the_split_is_disjoint_and_complete(tmp_path):
    json_lines(tmp_path / "a.jsonl", GOOD)
    train, validation = load_corpora(str(tmp_path / "a.jsonl"), "", "text")
    a, b = list(train.texts()), list(validation.texts())
    assert sorted(a + b) == sorted(d["text"] for d in GOOD)
    assert 5 < len(b) < 40  # 20 expected of 400


def test_named_validation_text_holds_nothing_out(tmp_path):
    json_lines(tmp_path / "a.jsonl", GOOD)
    json_lines(tmp_path / "b.jsonl", GOOD[:3])
    train, validation = load_corpora(
        str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "text"
    )
    assert len(list(train.texts())) == 400
    assert len(list(validation.texts())) == 3


def test_hosts_share_the_shards(tmp_path):
    for name in "abcde":
        json_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    corpus = matching(str(tmp_path / "*.jsonl"), "text").of(None)
    parts = [lines(corpus.part(host, 2)) for host in range(2)]
    assert parts == [["a", "c", "e"], ["b", "d"]]


def test_the_fingerprint_follows_the_contents_not_the_folder(tmp_path):
    hashes = []
    for folder, text in [("one", "x"), ("two", "x"), ("three", "y")]:
        (tmp_path / folder).mkdir()
        corpus = json_lines(tmp_path / folder / "a.jsonl", [{"text": text}])
        hashes.append(corpus.fingerprint())
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_fingerprint_covers_every_byte_and_reads_it_once(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.txt", str(tmp_path / "cache")
    path.write_bytes(b"x" * 300_000)
    corpus = matching(str(path), "text")
    reads = []
    plain = shard_hashes._hash
    monkeypatch.setattr(
        shard_hashes, "_hash", lambda path: reads.append(path) or plain(path)
    )

    def fingerprint(byte: bytes, seconds: int) -> str:
        with path.open("r+b") as file:
            file.seek(200_000)
            file.write(byte)
        os.utime(path, (seconds, seconds))
        return corpus.fingerprint(cache)

    first = fingerprint(b"x", 1)
    assert corpus.fingerprint(cache) == corpus.fingerprint() == first
    assert len(reads) == 2  # once, and once without the folder
    assert fingerprint(b"y", 2) != first
    assert fingerprint(b"x", 3) == first
    assert len(reads) == 4
    # Just written: it may change again within what is called the same time.
    path.write_bytes(b"x" * 300_000)
    assert corpus.fingerprint(cache) == corpus.fingerprint(cache) == first
    assert len(reads) == 6
    os.utime(path, (3, 3))
    name = str(path)
    for notes in ("", "[]", "[" * 99_999, f'{{"{name}": [300000, 3000000000, "0"]}}'):
        (tmp_path / "cache" / "hashes.json").write_text(notes)
        assert corpus.fingerprint(cache) == first
    assert len(reads) == 10
    assert corpus.fingerprint(cache) == first
    assert len(reads) == 10


def test_a_folder_that_takes_no_notes(tmp_path, capsys):
    corpus = json_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert corpus.fingerprint(str(tmp_path / "a.jsonl")) == corpus.fingerprint()
    (line,) = capsys.readouterr().err.splitlines()
    assert "hashes.json was not written (" in line


def test_stdlib():
    corpus = stdlib()
    assert len(corpus.names) > 300
    assert "argparse.py" in corpus.names
    folders = {folder for name in corpus.names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages"}
    held_out = [n for n in corpus.names if corpus.of("validation")._holds(n)]
    assert 0.02 < len(held_out) / len(corpus.names) < 0.08


def test_missing_and_strange_corpora(tmp_path):
    with pytest.raises(UsageError, match=r"no file matches .*nothing.*txt"):
        load_corpora(str(tmp_path / "nothing*.txt"), "", "text")
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(UsageError, match=r"a\.parquet is no shard: expected one of"):
        load_corpora(str(tmp_path / "*"), "", "text")


def test_unreadable_shard(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    corpus = matching(str(tmp_path / "*.txt"), "text").of(None)
    with pytest.raises(UsageError, match=r"cannot read shard .*a\.txt: No such file"):
        corpus.fingerprint()
    with pytest.raises(UsageError, match=r"cannot read shard .*a\.txt"):
        lines(corpus)


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match=r"a\.jsonl is no file: a shard is read again"):
        matching(str(tmp_path / "*.jsonl"), "text")
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"a\.jsonl is no file"):
        matching(str(tmp_path / "*.jsonl"), "text")


def test_a_line_without_end_takes_no_memory(tmp_path):
    """300 MB of one line, in 0.3 MB of gzip, are read in pieces and counted once."""
    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(b'{"text": "first"}\n{"text": "')
        for _ in range(300):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "last"}\n')
    tracemalloc.start()
    texts, counts = read(matching(str(path), "text").of(None))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert texts == ["first", "last"]
    assert counts == {"read": 2, "line of more than 4,000,000 bytes": 1}
    assert peak < 32 * 2**20


def test_empty_lines_are_passed_over(tmp_path):
    """10 million of them, in a second or so; places of what stands between are kept."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * 10_000_000 + b'{"text": "one"}\n \n\n{"text": "two"}')
    corpus, counts = matching(str(path), "text").of(None), Counts()
    started = time.perf_counter()
    found = list(corpus.documents(0, 0, counts))
    assert time.perf_counter() - started < 10
    assert found == [(10_000_000, "one"), (10_000_003, "two")]
    assert counts == {"empty": 10_000_002, "read": 2}
    counts = Counts()
    assert list(corpus.documents(0, 10_000_001, counts)) == found[1:]
    assert counts == {"empty": 2, "read": 1}
