"""`examples.harness`: its arithmetic, and lm-evaluation-harness where it is there."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.convert import read_model
from examples.harness import __main__ as command
from examples.harness.scores import Scores, windows
from examples.llama.config import UsageError
from examples.llama.model import abstract_model
from tests.examples.pretrained import write_decoder, write_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture(scope="module")
def scores(folder):
    return Scores(folder, batch_size=3)


@pytest.fixture(scope="module")
def logits(folder):
    """Of a text, in float64 behind the model."""
    config, params = read_model(folder)
    model = nnx.merge(abstract_model(config)[0], jax.tree.map(jnp.asarray, params))
    # One program for all texts: what is behind a position does not reach it.
    run = jax.jit(lambda tokens: model(tokens[None])[0])

    def of(ids):
        row = np.zeros(128, np.int32)
        row[: len(ids)] = ids
        return np.asarray(run(row), np.float64)[: len(ids)]

    return of


def expected(logits, context, continuation):
    """`sum_t log softmax(logits_t)[c_t]`, and whether every `c_t` is the likeliest."""
    ids = [*context, *continuation]
    found = logits(ids[:-1])[len(context) - 1 :]
    logp = found - np.log(np.exp(found).sum(-1, keepdims=True))
    picked = logp[np.arange(len(continuation)), continuation].sum()
    return picked, bool((found.argmax(-1) == continuation).all())


def test_a_continuation_has_the_sum_of_its_log_probabilities(scores, logits):
    """In any batch; of lengths that share a program, and of others."""
    encode = scores.encode
    pairs = [
        (encode("red"), encode(" blue")),
        (encode("a" * 40), encode("b")),
        (encode("x"), encode("yz" * 20)),
        (encode("green"), encode(" or gold")),
    ]
    # A continuation that the model itself would write.
    context = encode("who")
    greedy = [int(logits(context)[-1].argmax())]
    greedy.append(int(logits(context + greedy)[-1].argmax()))
    pairs.append((context, greedy))
    found = scores.of_pairs(pairs)
    assert found[-1][1] and not any(whole for _, whole in found[:-1])
    for pair, (total, whole) in zip(pairs, found, strict=True):
        wanted, likeliest = expected(logits, *pair)
        # The model computes in float32.
        assert total == pytest.approx(wanted, rel=1e-5)
        assert whole == likeliest
    assert scores.of_pairs([]) == []


def test_a_long_context_loses_its_front(scores, logits):
    ids = [int(i) for i in np.random.default_rng(0).integers(2, 258, 200)]
    ((total, _),) = scores.of_pairs([(ids[:190], ids[190:])])
    # 128 positions: what is read is one behind what is predicted.
    wanted, _ = expected(logits, ids[-129:-10], ids[-10:])
    assert total == pytest.approx(wanted, rel=1e-5)


def test_windows_predict_every_token_once():
    assert list(windows([*range(10)], -1, 4)) == [
        ([-1], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert list(windows([], -1, 4)) == []


def test_a_rolling_likelihood_is_the_sum_of_its_windows(folder, scores, logits):
    short = "a text of a few words"
    ids = scores.encode(short)
    wanted, _ = expected(logits, [scores.prefix], ids)
    assert scores.of_text(short) == pytest.approx(wanted, rel=1e-5)
    narrow = Scores(folder, batch_size=2, length=8)
    parts = [expected(logits, a, b)[0] for a, b in windows(ids, scores.prefix, 8)]
    assert len(parts) == 3
    assert narrow.of_text(short) == pytest.approx(sum(parts), rel=1e-5)
    assert scores.of_text("") == 0


def test_an_answer_is_greedy_and_stops(scores, logits):
    prompt, count = "What is red?", 40
    ids, written = scores.encode(prompt), []
    for _ in range(count):
        written.append(int(logits(ids + written)[-1].argmax()))
    assert not scores.ends & {*written}
    text = scores.tokenizer.decode(written)
    assert scores.answer(prompt, [], count) == text
    # The earliest of several words, behind the first look for them, too.
    for word in (text[3:5], text[-4:]):
        assert (
            scores.answer(prompt, [word, text[-4:], ""], count) == text.split(word)[0]
        )
    # A token that ends texts is one for answers, and is not written.
    end = written[6]
    scores.ends.add(end)
    try:
        at = written.index(end)
        assert scores.answer(prompt, [], count) == scores.tokenizer.decode(written[:at])
    finally:
        scores.ends.remove(end)


def test_what_cannot_be_scored_is_said(folder, scores, tmp_path, capsys, monkeypatch):
    encoder = write_encoder(tmp_path / "encoder")
    nameless = write_decoder(tmp_path / "nameless", eos_token=None)
    for options, message in (
        ({"folder": "nowhere"}, "pretrained nowhere is no folder"),
        ({"folder": encoder}, "is an encoder; only a decoder writes"),
        ({"folder": nameless}, "names no token that begins or ends a text"),
        ({"length": 4096}, "max_length must be from 2 to the model's 128; got 4096"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"dtype": "int8"}, "dtype must be float32 or bfloat16; got 'int8'"),
    ):
        with pytest.raises(UsageError, match=message):
            Scores(**{"folder": folder} | options)
    with pytest.raises(UsageError, match="has 129 tokens and its context 1"):
        scores.of_pairs([([5], [5] * 129)])
    with pytest.raises(UsageError, match=r"256 tokens.*128 positions.*max_gen_toks=N"):
        scores.answer("a", [], 256)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "examples.harness.model", raising=False)
    assert command.main(["--tasks", "colors"]) == 2
    assert "pip install 'lowrank-optax[harness]'" in capsys.readouterr().err


# A task of each kind, of files alone.
CHOICE = """task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: %(folder)s/colors.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: [" red", " green"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
ROLLING = """task: lines
dataset_path: json
dataset_kwargs: {data_files: {test: %(folder)s/colors.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""
WRITE = """task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: %(folder)s/colors.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.whole
@pytest.mark.filterwarnings("default")  # those of the package and of what it imports
def test_the_harness_on_a_task_of_local_files(
    folder, scores, logits, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    import lm_eval
    from lm_eval.tasks import TaskManager

    from examples.harness.model import FamilyLM

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    questions = ["A rose is", "Grass is", "A leaf is", "Blood is"]
    rows = [{"question": q, "answer": i % 2} for i, q in enumerate(questions)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "colors.jsonl").write_text(lines)
    tasks = {"colors": CHOICE, "lines": ROLLING, "answers": WRITE}
    for name, text in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(text % {"folder": tmp_path})
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        FamilyLM(folder, batch_size="3"),
        tasks=list(tasks),
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    # The scores are those of the logits.
    right, total, size = 0, 0.0, 0
    for row in rows:
        ids = scores.encode(row["question"])
        both = [
            expected(logits, ids, scores.encode(word))[0] for word in (" red", " green")
        ]
        right += int(np.argmax(both)) == row["answer"]
        total += expected(logits, [scores.prefix], ids)[0]
        size += len(row["question"].encode())
    results = found["results"]
    assert results["colors"]["acc,none"] == right / 4
    assert results["lines"]["byte_perplexity,none"] == pytest.approx(
        np.exp(-total / size), rel=1e-5
    )
    written = [sample["resps"][0][0] for sample in found["samples"]["answers"]]
    assert sorted(written) == sorted(scores.answer(q, ["\n"], 8) for q in questions)
