"""Adapters and the parts of a model that are trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.encoder.model import abstract_model as abstract_encoder
from examples.finetune.adapter import TARGETS, adapt, merge, with_factors
from examples.finetune.config import FinetuneConfig, settled
from examples.finetune.models import Model, Parts, Pretrained, divided, paths
from examples.llama.config import UsageError
from examples.llama.model import abstract_model, init_params
from examples.llama.step import joined
from tests.examples.pretrained import DECODER, ENCODER, byte_tokenizer

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)
QWEN = dataclasses.replace(DECODER, qkv_bias=True, tied=False)


def random_factors(params):
    """B from zero to something, or an adapter does nothing."""

    def draw(path, leaf):
        if "lora_b" not in jax.tree_util.keystr(path):
            return leaf
        return jax.random.normal(jax.random.key(leaf.size), leaf.shape) * 0.1

    return jax.tree_util.tree_map_with_path(draw, params)


def test_a_merged_adapter_is_the_adapted_forward_pass():
    plain, shapes = abstract_model(QWEN)
    params = init_params(QWEN, 0)
    definition, adapted = adapt(plain, shapes, "all-linear", 4, 8.0)
    fresh = with_factors(params, adapted, 0)
    assert jax.tree.structure(fresh) == jax.tree.structure(adapted)
    a = fresh["layers"]["attn"]["q"]["lora_a"]
    assert a.shape == (2, 32, 4) and not np.array_equal(a[0], a[1])
    # he_uniform over 32 inputs, for each layer: variance 2 / 32.
    assert float(jnp.std(a)) == pytest.approx(np.sqrt(2 / 32), rel=0.1)

    def logits(definition, params):
        return nnx.merge(definition, params)(TOKENS)

    before = logits(plain, params)
    # Nothing is added at first, to the bit.
    assert np.array_equal(logits(definition, fresh), before)
    moved = random_factors(fresh)
    after = logits(definition, moved)
    assert float(jnp.max(jnp.abs(after - before))) > 0.01
    merged = merge(moved, 4, 8.0)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(logits(plain, merged), after, atol=2e-5)
    # By hand, of one kernel: alpha / rank is 2.
    base, q = params["layers"]["attn"]["q"]["kernel"], moved["layers"]["attn"]["q"]
    expected = base + 2 * np.asarray(q["lora_a"]) @ np.asarray(q["lora_b"])
    np.testing.assert_allclose(
        merged["layers"]["attn"]["q"]["kernel"], expected, atol=1e-6
    )


@pytest.mark.parametrize("targets", TARGETS)
def test_targets(targets):
    for make, config, names in (
        (abstract_model, DECODER, "gate up down"),
        (abstract_encoder, ENCODER, "up down"),
    ):
        _, shapes = adapt(*make(config), targets, 2, 4.0)
        found = {p.split("/")[-2] for p in paths(shapes) if p.endswith("lora_a")}
        attention = {"qv": "q v"}.get(targets, "q k v o").split()
        expected = {*(attention if targets != "mlp" else ())}
        expected |= {*(names.split() if targets in ("mlp", "all-linear") else ())}
        assert found == expected


def pretrained(config, make):
    shapes = make(config)[1]
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    return Pretrained(None, config, params, byte_tokenizer())  # type: ignore


def parts(**flags):
    return Model(pretrained(DECODER, abstract_model), FinetuneConfig(**flags), {})


def test_what_is_trained():
    everything = parts()
    assert not everything.frozen and everything.parts.select() is None
    body = parts(embeddings="frozen")
    assert paths(body.frozen) == ["embed/embedding"]
    lora = parts(adapter="lora", lora_rank=2)
    assert {p.split("/")[-1] for p in paths(lora.trained)} == {"lora_a", "lora_b"}
    assert "layers/attn/q/base/kernel" in paths(lora.frozen)
    # Two trees without a leaf in common that make the whole one.
    assert joined(lora.trained, lora.frozen) == lora.shapes
    own, rest = lora.arrays()
    for arrays, shapes in ((own, lora.trained), (rest, lora.frozen)):
        assert jax.tree.map(np.shape, arrays) == jax.tree.map(lambda x: x.shape, shapes)


def test_a_linear_probe_trains_the_head_alone():
    make = abstract_encoder
    head = {"classifier": {"kernel": np.zeros((32, 2), np.float32)}}
    flags = FinetuneConfig(task="classify", embeddings="frozen", layers="frozen")
    model = Model(pretrained(ENCODER, make), flags, {}, head)
    assert paths(model.trained) == ["classifier/kernel"]
    # A language model's own head is in nobody's way.
    model = Model(pretrained(QWEN, abstract_model), FinetuneConfig(), {}, head)
    assert paths(model.frozen) == ["lm_head/kernel"]


def test_what_is_projected():
    flags = FinetuneConfig(embeddings="projected", select="attn")
    chosen = Parts(flags, tied=False).select()
    leaf = jax.ShapeDtypeStruct((2, 8, 8), jnp.float32)
    table = jax.ShapeDtypeStruct((260, 8), jnp.float32)
    assert chosen("layers/attn/q/kernel", leaf) and chosen("embed/embedding", table)
    assert not chosen("layers/mlp/up/kernel", leaf)
    assert not chosen("lm_head/kernel", table)
    flags = FinetuneConfig(head="projected", select="all-linear")
    chosen = Parts(flags, tied=False).select()
    assert chosen("lm_head/kernel", table) and not chosen("embed/embedding", table)
    assert chosen("layers/mlp/up/kernel", leaf)
    assert not chosen("layers/norm1/scale", jax.ShapeDtypeStruct((2, 8), jnp.float32))
    assert Parts(FinetuneConfig(select="all-linear"), False).select() == "all-linear"
    with pytest.raises(UsageError, match="the head of this model is its embedding"):
        Parts(FinetuneConfig(head="frozen"), tied=True)


def test_defaults_go_with_the_model_and_its_rows():
    tuning = settled(FinetuneConfig(task="classify", optimizer="adamw"), ENCODER, 320)
    assert (tuning.steps, tuning.warmup, tuning.seq_len, tuning.rank) == (30, 3, 64, 2)
    assert tuning.lr == pytest.approx(0.3 / (3 * 32))
    tuning = settled(FinetuneConfig(steps=7, lr=0.5, epochs=9), DECODER, 320)
    assert (tuning.steps, tuning.lr, tuning.packing) == (7, 0.5, "packed")
    for flags, message in (
        ({"task": "x"}, "--task must be one of sft, classify; got 'x'"),
        ({"seq_len": 500}, "--seq-len 500 is too long: the model has 128 positions"),
        ({"adapter": "lora", "layers": "frozen"}, "leave out --layers"),
        ({"lora_rank": 0}, "--lora-rank must be above 0"),
        ({"epochs": float("nan")}, "--epochs must be above 0"),
        ({"lr": -1.0}, "--lr must be from"),
    ):
        with pytest.raises(UsageError, match=message):
            settled(FinetuneConfig(**flags), DECODER)


def test_trees_are_divided_by_path():
    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    first, rest = divided(tree, lambda path: path in ("a/b", "d"))
    assert (first, rest) == ({"a": {"b": 1}, "d": 3}, {"a": {"c": 2}})
    assert joined(first, rest) == tree
