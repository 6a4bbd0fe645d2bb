"""Perplexity: exact, the same for every batch size, and as GaLore's script has it."""

import math

import jax
import numpy as np
import pytest

from examples.llama.model import abstract_model, init_params
from examples.llama.report import (
    eval_batches,
    evaluate,
    perplexity,
    unigram_perplexity,
)
from examples.llama.step import token_losses

SEQ_LEN = 16


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    lengths = [17, 17, 5, 17, 2, 11, 17, 17, 3, 17, 17]
    return [rng.integers(0, 264, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def model(micro_config):
    definition, _ = abstract_model(micro_config)
    params = jax.tree.map(lambda p: p * 5, init_params(micro_config, 0))

    @jax.jit
    def eval_step(params, batch):
        losses = token_losses(definition, params, batch)
        return losses.sum(axis=1), batch["mask"].sum(axis=1)

    return definition, params, eval_step


def test_batch_size_does_not_matter(rows, model):
    _, params, step = model
    results = [
        evaluate(step, params, eval_batches(rows, size, SEQ_LEN)) for size in (1, 3, 16)
    ]
    assert {r.tokens for r in results} == {sum(len(row) - 1 for row in rows)}
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)


def test_equals_a_float64_loop_over_tokens(rows, model):
    definition, params, step = model
    result = evaluate(step, params, eval_batches(rows, 4, SEQ_LEN))
    total, tokens = 0.0, 0
    one = jax.jit(lambda p, b: token_losses(definition, p, b))
    for batch in eval_batches(rows, 1, SEQ_LEN):
        for loss, counts in zip(
            np.asarray(one(params, batch))[0], batch["mask"][0], strict=True
        ):
            total, tokens = total + float(loss) * float(counts), tokens + int(counts)
    assert result.tokens == tokens
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-6)


def test_galore_compat_divides_by_one_batch_too_many(rows, model):
    _, params, step = model
    batches = list(eval_batches(rows, 4, SEQ_LEN))
    result = evaluate(step, params, batches)
    means = []
    for batch in batches:
        losses, counts = step(params, batch)
        means.append(float(np.sum(losses) / np.sum(counts)))
    assert result.compat_loss == pytest.approx(sum(means) / 4, rel=1e-6)
    assert len(means) == 3


def test_stops_when_told(rows, model):
    _, params, step = model
    batches = eval_batches(rows, 4, SEQ_LEN)
    assert evaluate(step, params, batches, lambda: True) is None


def test_unigram():
    train, held_out = [[0, 1, 1, 2]], [[0, 1, 2]]
    # Counts 0, 2, 1 and one more each over four tokens: 1/7, 3/7, 2/7, 1/7.
    expected = math.exp(-(math.log(3 / 7) + math.log(2 / 7)) / 2)
    assert unigram_perplexity(train, held_out, 4) == pytest.approx(expected)


def test_perplexity_of_a_diverged_model():
    assert perplexity(1e9) == math.inf
