"""The LLaMA: sizes of the presets, causality, the scan over layers, the tags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.llama.model import (
    ModelConfig,
    abstract_model,
    count_params,
    init_params,
    rotate,
)
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
