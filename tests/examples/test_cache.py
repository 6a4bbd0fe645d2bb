"""The cache of keys and values: of every family, what the whole row gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.convert.configs import read_config
from examples.finetune.generate import begun, continued
from examples.llama import cache as kept
from examples.llama.model import abstract_model, init_params
from tests.examples.families import ENCODERS, FAMILIES, TOKENS
from tests.examples.test_families import MODELS

DECODERS = [name for name in FAMILIES if name not in ENCODERS]


def family(name) -> Any:
    """The definition, and weights large enough that families differ."""
    config: Any = read_config(MODELS[name]["config"])
    leaves, tree = jax.tree.flatten(init_params(config, 0))
    rng = np.random.default_rng(1)
    leaves = [x + np.float32(0.3) * rng.standard_normal(x.shape, "f4") for x in leaves]
    params = jax.tree.unflatten(tree, leaves)
    return abstract_model(config)[0], params


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_the_whole_row(name):
    """A prompt at a padded length, then one token after another, over the padding."""
    definition, params = family(name)
    split, (rows, length) = 6, TOKENS.shape

    @jax.jit
    def both(params):
        model = nnx.merge(definition, params)
        prompt = jnp.where(jnp.arange(length) < split, TOKENS, 0)
        cache = kept.empty_cache(model.config, rows, length + 3)
        first, cache = kept.extend(model, prompt, cache, 0)

        def one(cache, at):
            token = jax.lax.dynamic_slice(jnp.asarray(TOKENS), (0, at), (rows, 1))
            hidden, cache = kept.extend(model, token, cache, at)
            return cache, hidden[:, 0]

        _, rest = jax.lax.scan(one, cache, jnp.arange(split, length))
        hidden = jnp.concatenate([first[:, :split], rest.swapaxes(0, 1)], 1)
        return model.logits(hidden), model(TOKENS)

    found, expected = both(params)
    # Sums in float32 in another order.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * scale)


def test_a_greedy_text_in_two_programs():
    """Of any prompt, limit and stop; as it is without a cache."""
    definition, params = family("mistral")
    whole = jax.jit(lambda row: nnx.merge(definition, params)(row[None])[0])
    programs: list[Any] = [begun, continued]
    for program in programs:
        program.clear_cache()
    for prompt, limit in ((TOKENS[0][:5], 14), (TOKENS[1][:1], 9), (TOKENS[0], 16)):
        row = np.zeros(16, np.int32)
        row[: len(prompt)] = prompt
        expected = row.copy()
        for at in range(len(prompt), limit):
            expected[at] = whole(expected)[at - 1].argmax()
        nothing = jnp.full(1, -1, jnp.int32)
        text = begun(definition, params, row, len(prompt))
        # In two parts, as between looks for words.
        text = continued(definition, params, text, len(prompt) + 1, nothing)
        text = continued(definition, params, text, limit, nothing)
        np.testing.assert_array_equal(text.row, expected)
        assert text.end == limit
        # A stop ends it if it is written, not if the prompt ends with it.
        stop = jnp.asarray(expected[len(prompt) + 1 :][:1])
        text = begun(definition, params, row, len(prompt))
        text = continued(definition, params, text, limit, stop)
        end = len(prompt) + int((expected[len(prompt) :] == stop).argmax()) + 1
        assert text.end == end and text.row[end - 1] == stop
    text = begun(definition, params, row, len(prompt))
    text = continued(definition, params, text, limit, jnp.asarray(prompt[-1:]))
    assert text.end > len(prompt)
    assert [program._cache_size() for program in programs] == [1, 1]
