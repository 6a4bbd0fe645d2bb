"""The LLaMA: sizes of the presets, causality, the scan over layers, the tags."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_optax as lro
from examples.llama.model import (
    ACTIVATIONS,
    ModelConfig,
    abstract_model,
    count_params,
    init_params,
)
from examples.llama.positions import RopeScaling, rope_frequencies, rotate
from examples.llama.presets import PRESETS

# The papers' counts, to the parameter.
SIZES = {
    "tiny": 871_552,
    "9m": 8_995_968,
    "20m": 19_548_416,
    "35m": 35_197_824,
    "40m": 42_392_480,
    "60m": 58_073_600,
    "71m": 70_578_688,
    "100m": 100_117_120,
    "130m": 134_105_856,
    "250m": 247_370_496,
    "350m": 367_969_280,
    "1b": 1_339_082_752,
    "3b": 2_685_831_680,
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
}


def logits(config, params, tokens, **kwargs):
    definition, _ = abstract_model(config)

    def forward(params, tokens):
        return nnx.merge(definition, params)(tokens, **kwargs)

    return jax.jit(forward)(params, tokens)


@pytest.fixture(scope="module")
def params(micro_config):
    return init_params(micro_config, 0)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 264, (2, 12), np.int32)


def test_every_preset_has_a_known_size():
    assert SIZES.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    _, params = abstract_model(PRESETS[name].model)
    leaves = jax.tree.leaves(params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert count_params(params) == SIZES[name]


def test_leaf_paths(micro_config):
    _, params = abstract_model(micro_config)
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    shapes = {"/".join(str(k.key) for k in path): leaf.shape for path, leaf in flat}
    kernels = {f"layers/attn/{n}/kernel": (2, 32, 32) for n in "qkvo"}
    assert shapes == kernels | {
        "layers/mlp/gate/kernel": (2, 32, 48),
        "layers/mlp/up/kernel": (2, 32, 48),
        "layers/mlp/down/kernel": (2, 48, 32),
        "layers/norm1/scale": (2, 32),
        "layers/norm2/scale": (2, 32),
        "embed/embedding": (264, 32),
        "norm/scale": (32,),
        "lm_head/kernel": (32, 264),
    }


def test_a_token_is_not_seen_by_those_before_it(micro_config, params, tokens):
    before = np.asarray(logits(micro_config, params, tokens))
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 264
    after = np.asarray(logits(micro_config, params, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.max(np.abs(before[:, 7:] - after[:, 7:]), axis=-1) > 0)


def test_scan_equals_a_loop(micro_config, params, tokens):
    scanned = logits(micro_config, params, tokens)
    unrolled = logits(micro_config, params, tokens, scan=False)
    # The same float32 sums in another order: a few units in the last place.
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-6)


def test_packed_documents_do_not_see_each_other(micro_config, params):
    """Two documents in one row are what each is alone; so with padding before them."""
    texts = np.random.default_rng(1).integers(0, 264, (2, 5), np.int32)
    row = np.concatenate([*texts, [0, 0]])[None].astype(np.int32)
    packed = np.repeat([[1, 2, 0]], [5, 5, 2], axis=1)
    rows = np.concatenate([row, np.roll(row, 2, axis=1)])
    numbers = np.concatenate([packed, np.roll(packed, 2, axis=1)])
    for config in (micro_config, dataclasses.replace(micro_config, window=3)):
        found = np.asarray(logits(config, params, rows, segments=numbers))
        assert np.all(np.isfinite(found))
        alone = np.asarray(logits(config, params, texts))
        for at, start in ((0, 0), (1, 2)):
            parts = found[at, start : start + 10].reshape(2, 5, -1)
            # The same sums with more zeros among them.
            np.testing.assert_allclose(parts, alone, rtol=1e-5, atol=1e-6)
    whole = np.asarray(logits(micro_config, params, rows))
    # Without the numbers the second document sees the first.
    assert np.abs(whole[0, 5:10] - alone[1]).max() > 1e-3


def test_segments_reach_layers_that_are_computed_again(micro_config, params):
    """The mask is no argument of a layer, and a wrapped one sees it all the same."""
    definition, _ = abstract_model(micro_config)
    row = np.arange(8, dtype=np.int32)[None]
    numbers = np.array([[1, 1, 1, 2, 2, 2, 0, 0]])

    def loss(params, wrap):
        model = nnx.merge(definition, params)
        return jnp.mean(model(row, segments=numbers, wrap_layer=wrap) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(params, lambda layer: layer)
    wrapped = gradient(params, ACTIVATIONS["adacc"])
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(wrapped), strict=True):
        # It keeps four bits of some values: the same direction, not the same numbers.
        assert np.sum(a * b) > 0.98 * np.linalg.norm(a) * np.linalg.norm(b)


def test_layers_differ(params):
    kernel = params["layers"]["attn"]["q"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
    assert float(np.std(kernel)) == pytest.approx(0.02, rel=0.1)


def test_position_matters_only_relatively():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=8).astype(np.float32) for _ in range(2))
    turn = jax.jit(lambda x: rotate(x, 10_000.0)[0, :, 0])
    queries, keys = (np.asarray(turn(np.broadcast_to(x, (1, 9, 1, 8)))) for x in (q, k))
    scores = queries @ keys.T
    for offset in range(-3, 4):
        diagonal = scores.diagonal(offset)
        # float32 products of 8 terms.
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert abs(float(scores[0, 0] - scores[0, 3])) > 1e-3


def test_activations_are_tagged(micro_config, tokens):
    _, params = abstract_model(micro_config)
    program = str(jax.make_jaxpr(lambda p: logits(micro_config, p, tokens))(params))
    for tag in "norm1 q k v attn h norm2 gate up act".split():
        assert f"name={tag}\n" in program or f"name={tag}]" in program, tag


def test_wrapped_layers_give_the_same_gradient(micro_config, params, tokens):
    definition, _ = abstract_model(micro_config)

    def loss(params, wrap):
        out = nnx.merge(definition, params)(tokens, wrap_layer=wrap)
        return jnp.mean(out**2)

    policy = jax.checkpoint_policies.save_only_these_names("attn", "act")
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(params, lambda layer: layer)
    saved = gradient(params, lambda layer: jax.checkpoint(layer, policy=policy))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        # Recomputed activations are fused otherwise: float32 rounding.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)


FULL = ModelConfig(
    vocab_size=264,
    width=32,
    ff_width=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=16,
    tied=True,
    qkv_bias=True,
    out_bias=True,
    qk_norm=True,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
    window=5,
)


def test_leaf_paths_of_the_family():
    _, params = abstract_model(FULL)
    flat = jax.tree_util.tree_flatten_with_path(params["layers"]["attn"])[0]
    shapes = {"/".join(str(k.key) for k in path): leaf.shape for path, leaf in flat}
    assert shapes == {
        "q/kernel": (2, 32, 64),
        "q/bias": (2, 64),
        "k/kernel": (2, 32, 32),
        "k/bias": (2, 32),
        "v/kernel": (2, 32, 32),
        "v/bias": (2, 32),
        "o/kernel": (2, 64, 32),
        "o/bias": (2, 32),
        "q_norm/scale": (2, 16),
        "k_norm/scale": (2, 16),
    }
    assert params.keys() == {"embed", "layers", "norm"}


def test_selection_takes_kernels_and_leaves_vectors():
    _, params = abstract_model(FULL)
    report = str(lro.selection_report(lro.galore(0.1, rank=4), params))
    projected = [line.split()[0] for line in report.splitlines() if "left" in line]
    kernels = [f"layers.attn.{n}.kernel" for n in "kqv"]
    assert {p.replace("/", ".") for p in projected} >= {*kernels}
    assert not any("bias" in p or "norm" in p or "embed" in p for p in projected)


def test_a_record_of_a_plain_model_is_what_it_was(micro_config):
    record = micro_config.to_json()
    assert "kv_heads" not in record and record["rope_base"] == 10_000.0
    for config in (micro_config, FULL):
        read = json.loads(json.dumps(config.to_json()))
        assert ModelConfig.from_json(read) == config


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv_heads": 3}, "3 heads of keys and values do not divide 4 heads"),
        ({"head_width": None, "width": 30}, "4 heads do not divide the width 30"),
        ({"head_width": 7}, "rotations need heads of even width; got 7"),
        ({"activation": "relu"}, "activation must be one of silu, gelu_tanh; got"),
    ],
)
def test_sizes_that_do_not_fit(fields, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(FULL, **fields)


def test_frequencies_of_llama_3():
    """Values of transformers for Llama 3.1 8B and 3.2 1B."""
    plain = rope_frequencies(64, 500_000.0)
    slow = rope_frequencies(64, 500_000.0, RopeScaling(8.0, 1.0, 4.0, 8192))
    np.testing.assert_array_equal(slow[:29], plain[:29])
    np.testing.assert_allclose(slow[35:], plain[35:] / 8, rtol=1e-6)
    np.testing.assert_allclose(slow[[32, 63]], [0.000524846, 3.06893e-07], rtol=1e-5)
    slow = rope_frequencies(32, 500_000.0, RopeScaling(32.0, 1.0, 4.0, 8192))
    np.testing.assert_allclose(slow[[16, 31]], [0.000429557, 9.41831e-08], rtol=1e-5)


def test_bfloat16(tokens):
    config = ModelConfig(
        264, 32, 48, 2, 2, param_dtype="bfloat16", compute_dtype="bfloat16"
    )
    params = init_params(config, 0)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    out = logits(config, params, tokens)
    assert out.dtype == jnp.float32
    exact = ModelConfig(264, 32, 48, 2, 2)
    widened = jax.tree.map(lambda p: np.asarray(p).astype("float32"), params)
    same = np.asarray(logits(exact, widened, tokens))
    # bfloat16 keeps 8 bits: some parts in 256 of the largest logit, two layers deep.
    np.testing.assert_allclose(np.asarray(out), same, atol=0.02 * np.abs(same).max())
