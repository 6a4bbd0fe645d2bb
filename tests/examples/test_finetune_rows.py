"""Files to rows: splits, packing, truncation, labels; and what packing leaves equal."""

import numpy as np
import pytest
from flax import nnx

from examples.finetune import instructions, labelled
from examples.finetune.chat import Chat
from examples.finetune.examples import Examples
from examples.finetune.files import read_rows, split
from examples.llama.batches import Position, training_batches
from examples.llama.config import UsageError
from examples.llama.model import abstract_model, init_params
from examples.llama.step import token_losses
from tests.examples.pretrained import DECODER, byte_tokenizer

TOKENS = byte_tokenizer("<|im_start|>", "<|im_end|>")


def pairs(*texts: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": p, "response": r} for p, r in texts]


def read(rows, seq_len=64):
    return instructions.read_instructions(rows, Chat(), TOKENS, seq_len, "data")


def test_packed_rows_have_the_losses_of_rows_of_their_own():
    texts = [("a", "bc"), ("de", "f"), ("ghi", "jklm"), ("n" * 9, "o" * 11), ("p", "q")]
    found, counts = read(pairs(*texts))
    assert str(counts) == "5 documents"
    lines = instructions.packed(found, 64)
    assert sum(map(len, lines)) == 5 and len(lines) < 5
    assert all(sum(map(len, line)) <= 64 for line in lines)
    definition, _ = abstract_model(DECODER)
    params = init_params(DECODER, 1)
    together = instructions.as_batch(lines, 5, 64)
    alone = instructions.as_batch([[one] for one in found], 5, 64)
    without = {k: v for k, v in together.items() if k != "segments"}
    sums = [
        float(np.sum(token_losses(definition, params, batch)))
        for batch in (together, alone, without)
    ]
    # In float32, sums of about fifty losses in two orders.
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    # Without segments a row's later examples see those before, at other positions.
    assert abs(sums[2] - sums[1]) > 1e-3 * sums[1]
    assert (
        together["mask"].sum()
        == alone["mask"].sum()
        == sum(len(r) + 1 for _, r in texts)
    )


def test_a_first_fit_keeps_every_example_once():
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 40, 300)
    examples = [
        instructions.Example(*(np.full(n, i) for _ in range(3)))
        for i, n in enumerate(sizes)
    ]
    lines = instructions.packed(examples, 64)
    assert sorted(int(e.inputs[0]) for line in lines for e in line) == list(range(300))
    assert max(sum(map(len, line)) for line in lines) <= 64
    # Rows of 64 at 95 % at least: what a first fit is for.
    assert sum(sizes) > 0.95 * 64 * len(lines)


def test_truncation_is_counted():
    rows = pairs(("a", "b"), ("a", "c" * 50), ("d" * 50, "e"), ("f", " "), ("g", ""))
    found, counts = read(rows, 48)
    assert dict(counts) == {
        "read": 2,
        "cut to --seq-len": 1,
        "whose response begins behind --seq-len": 1,
        "without a response": 2,
    }
    assert [len(e) for e in found][1] == 48
    # Of the 48 targets 19 are of the question and of headers; the answer has no end.
    assert found[1].targets[found[1].mask > 0].tolist() == TOKENS.encode("c").ids * 29
    with pytest.raises(UsageError, match="row 2 is neither messages"):
        read([*pairs(("a", "b")), {"x": 1}])


def test_an_order_that_can_be_returned_to():
    rows = Examples("data", range(10), lambda r, n: {"x": np.array([*r])}, seed=3)
    batches = training_batches(rows, 4, Position())
    seen = [next(batches) for _ in range(7)]
    assert sorted(x for b, _ in seen[:5] for x in b["x"])[::2] == [*range(10)]
    again = training_batches(rows, 4, Position.from_json(seen[2][1].to_json()))
    for _, (batch, position) in zip(range(4), seen[3:], strict=True):
        found, at = next(again)
        assert found["x"].tolist() == batch["x"].tolist() and at == position


def test_files_and_their_splits(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    lines = '{"text": "a\u2028b", "label": 1, "split": "validation"}\n\n{"text": "c"}\n'
    rows = read_rows(write("a.jsonl", lines))
    assert rows[0]["text"] == "a\u2028b"
    assert split(rows[:1], str)["dev"] == rows[:1]
    assert read_rows(write("a.json", '[{"text": "a"}]')) == [{"text": "a"}]
    many = [{"text": f"row {i}"} for i in range(1000)]
    parts = split(many, lambda row: row["text"])
    assert 70 < len(parts["dev"]) < 130 and not parts["test"]
    # By the text alone, whatever is written around it.
    shouted = split(
        [{"text": r["text"].upper() + " "} for r in many], lambda r: r["text"]
    )
    assert [r["text"].strip().lower() for r in shouted["dev"]] == [
        r["text"] for r in parts["dev"]
    ]
    for name, text, message in (
        ("b.jsonl", '{"a": 1}\n[1]\n', r"b\.jsonl:2: no JSON object"),
        ("b.jsonl", "{", r"b\.jsonl:1"),
        ("b.json", "[1]", "something else than objects"),
        ("b.tsv", "sentence\tlabel\na\n", r"b\.tsv:2: 1 cells in a table of 2 columns"),
        ("b.jsonl", "\n", "has no rows"),
    ):
        with pytest.raises(UsageError, match=message):
            read_rows(write(name, text))
    with pytest.raises(UsageError, match="split 'x' is unknown"):
        split([{"split": "x"}], str)


# Header and a line of GLUE's tables; the words of the texts, and the label.
GLUE = {
    "cola": ("gj04\t1\t\tOur friends.", ("Our friends.",), "1"),
    "sst2": ('sentence\tlabel\n"a" good\t1', ('"a" good',), "1"),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tone\ttwo",
        ("one", "two"),
        "1",
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\tone\ttwo\tnot_entailment",
        ("one", "two"),
        "not_entailment",
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta?\tb?\t0",
        ("a?", "b?"),
        "0",
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\ta?\tb.\tentailment",
        ("a?", "b."),
        "entailment",
    ),
    "mnli": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tneutral",
        ("a", "b"),
        "neutral",
    ),
    "stsb": ("index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.8", ("a", "b"), "3.8"),
}


@pytest.mark.parametrize("name", GLUE)
def test_the_tables_of_glue(tmp_path, name):
    text, texts, label = GLUE[name]
    (tmp_path / "train.tsv").write_text(f"{text}\n")
    rows = read_rows(str(tmp_path / "train.tsv"))
    columns = labelled.find_columns(rows[0], "", "", "data")
    assert tuple(rows[0][c] for c in columns.texts) == texts
    assert rows[0][columns.label] == label
    assert columns.real == (name == "stsb")


def test_labels_and_what_is_left_out():
    rows = [
        {"text": "aa", "label": 2},
        {"text": "b", "label": "10"},
        {"text": "", "label": 2},
        {"text": "c", "label": -1},
        {"text": "d" * 90, "label": 2.0},
    ]
    columns = labelled.find_columns(rows[0], "", "", "data")
    classes = labelled.find_classes(rows, columns, "data")
    assert classes == ["2", "10"]  # as numbers, not as words
    found, counts = labelled.read_labelled(rows, columns, classes, TOKENS, 16, "data")
    assert [row.label for row in found] == [0, 1, 0]
    assert dict(counts) == {
        "read": 3,
        "without a text": 1,
        "without a label": 1,
        "cut to --seq-len": 1,
    }
    # Where -1 is a class, as in sentiments from -1 to 1, a flag says so.
    columns = labelled.find_columns(rows[0], "", "", "data", ("",))
    assert labelled.find_classes(rows, columns, "data") == ["-1", "2", "10"]
    _, more = labelled.read_labelled(
        rows, columns, ["-1", "2", "10"], TOKENS, 16, "data"
    )
    assert more["read"] == 4 and "without a label" not in more
    batch = labelled.as_batch(found, 4, 16)
    assert batch["real"].sum(axis=1).tolist() == [2, 1, 16, 0]
    assert batch["mask"][:, 0].tolist() == [1, 1, 1, 0]
    for rows, options, message in (
        ([{"x": 1}], ("", ""), "no texts among its fields: x; say --text-key"),
        (
            [{"text": "a"}],
            ("", ""),
            "no labels among its fields: text; say --label-key",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            labelled.find_columns(rows[0], *options, "data")
    with pytest.raises(UsageError, match="no labels to tell apart: label is 1 in all"):
        labelled.find_classes([{"text": "a", "label": 1}] * 3, columns, "data")
    with pytest.raises(UsageError, match="row 1: label '7' is not among those"):
        labelled.read_labelled(
            [{"text": "a", "label": 7}], columns, classes, TOKENS, 16, "data"
        )


def test_padding_reaches_no_decoder():
    """A text's last position is that of its row, whatever fills the row up."""
    definition, _ = abstract_model(DECODER)
    model = nnx.merge(definition, init_params(DECODER, 0))
    tokens = np.arange(8, dtype=np.int32)[None]
    real = (tokens < 5).astype(np.int32)
    hidden = model.hidden(tokens, segments=real)[0, 4]
    other = np.where(real, tokens, 200)
    assert np.array_equal(hidden, model.hidden(other, segments=real)[0, 4])
