"""What every leaf of other people's trees is, concluded from shapes and names."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro

L, D, F, V, N, H, E = 24, 64, 256, 1024, 4, 16, 8
IN_OUT, OUT_IN = ((0,), (1,)), ((1,), (0,))


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def nested(flat, separator="/"):
    """A tree of shapes from paths."""
    tree = {}
    for path, shape in flat.items():
        *parents, last = path.split(separator)
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = struct(*shape)
    return tree


def axes(numbers):
    """Reduction, output and shared axes as tuples, without the last if it is empty."""
    out = [(x,) if isinstance(x, int) else tuple(x) for x in numbers]
    return tuple(out if out[2] else out[:2])


def concluded(params, **options):
    """The dimension numbers of the leaves that have any, by path."""
    numbers = lro.dimension_numbers(params, **options)
    flat = jax.tree_util.tree_leaves_with_path(
        numbers, is_leaf=lambda x: isinstance(x, lro.MatrixDimensionNumbers)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): axes(leaf)
        for path, leaf in flat
    }


def block(i, shapes):
    return {path.replace("*", str(i)): shape for path, shape in shapes.items()}


def unrolled(count, shapes, rest):
    """Equal layers, their number in the place of the star, and what is outside."""
    out = dict(rest)
    for i in range(count):
        out |= block(i, shapes)
    return out


def matrices(count, numbers):
    out = {}
    for i in range(count):
        out |= block(i, numbers)
    return out


# Name: paths with shapes, and the numbers of those that are matrices.
MODELS = {}

MODELS["MaxText, layers on axis 1"] = (
    {
        "params/decoder/layers/mlp/wi_0/kernel": (D, L, F),
        "params/decoder/layers/mlp/wi_1/kernel": (D, L, F),
        "params/decoder/layers/mlp/wo/kernel": (F, L, D),
        "params/decoder/layers/self_attention/query/kernel": (D, L, N, H),
        "params/decoder/layers/self_attention/key/kernel": (D, L, 2, H),
        "params/decoder/layers/self_attention/out/kernel": (N, L, H, D),
        "params/decoder/layers/pre_self_attention_layer_norm/scale": (D, L),
        "params/decoder/decoder_norm/scale": (D,),
        "params/decoder/logits_dense/kernel": (D, V),
        "params/token_embedder/embedding": (V, D),
    },
    {
        "params/decoder/layers/mlp/wi_0/kernel": ((0,), (2,)),
        "params/decoder/layers/mlp/wi_1/kernel": ((0,), (2,)),
        "params/decoder/layers/mlp/wo/kernel": ((0,), (2,)),
        "params/decoder/layers/self_attention/query/kernel": ((0,), (2, 3)),
        "params/decoder/layers/self_attention/key/kernel": ((0,), (2, 3)),
        "params/decoder/layers/self_attention/out/kernel": ((0, 2), (3,)),
    },
)
MODELS["MaxText, experts within layers"] = (
    {
        "decoder/layers/moe/gate/kernel": (D, L, E),
        "decoder/layers/moe/wi_0": (E, L, D, F),
        "decoder/layers/moe/wi_1": (E, L, D, F),
        "decoder/layers/moe/wo": (E, L, F, D),
        "decoder/layers/self_attention/query/kernel": (D, L, N, H),
        "decoder/layers/self_attention/out/kernel": (N, L, H, D),
        "decoder/layers/norm/scale": (D, L),
        "token_embedder/embedding": (V, D),
    },
    {
        "decoder/layers/moe/gate/kernel": ((0,), (2,)),
        "decoder/layers/moe/wi_0": ((2,), (3,)),
        "decoder/layers/moe/wi_1": ((2,), (3,)),
        "decoder/layers/moe/wo": ((2,), (3,)),
        "decoder/layers/self_attention/query/kernel": ((0,), (2, 3)),
        "decoder/layers/self_attention/out/kernel": ((0, 2), (3,)),
    },
)
MODELS["Flax Linen, unrolled, heads"] = (
    unrolled(
        3,
        {
            "block_*/MultiHeadDotProductAttention_0/query/kernel": (D, N, H),
            "block_*/MultiHeadDotProductAttention_0/query/bias": (N, H),
            "block_*/MultiHeadDotProductAttention_0/value/kernel": (D, N, H),
            "block_*/MultiHeadDotProductAttention_0/out/kernel": (N, H, D),
            "block_*/MultiHeadDotProductAttention_0/out/bias": (D,),
            "block_*/LayerNorm_0/scale": (D,),
            "block_*/Dense_0/kernel": (D, F),
            "block_*/Dense_1/kernel": (F, D),
        },
        {"Embed_0/embedding": (V, D), "Dense_0/kernel": (D, V)},
    ),
    matrices(
        3,
        {
            "block_*/MultiHeadDotProductAttention_0/query/kernel": ((0,), (1, 2)),
            "block_*/MultiHeadDotProductAttention_0/value/kernel": ((0,), (1, 2)),
            "block_*/MultiHeadDotProductAttention_0/out/kernel": ((0, 1), (2,)),
            "block_*/Dense_0/kernel": IN_OUT,
            "block_*/Dense_1/kernel": IN_OUT,
        },
    ),
)
MODELS["scanned GPT-2, as many heads as layers"] = (
    {
        "h/attn/query/kernel": (12, 48, 12, 4),
        "h/attn/out/kernel": (12, 12, 4, 48),
        "h/mlp/c_fc/kernel": (12, 48, 192),
        "h/mlp/c_proj/kernel": (12, 192, 48),
        "h/ln_1/scale": (12, 48),
        "h/mlp/c_fc/bias": (12, 192),
        "wte/embedding": (V, 48),
        "wpe/embedding": (128, 48),
        "ln_f/scale": (48,),
    },
    {
        "h/attn/query/kernel": ((1,), (2, 3)),
        "h/attn/out/kernel": ((1, 2), (3,)),
        "h/mlp/c_fc/kernel": ((1,), (2,)),
        "h/mlp/c_proj/kernel": ((1,), (2,)),
    },
)
MODELS["GPT-2 of Hugging Face, Conv1D stores in, out"] = (
    unrolled(
        2,
        {
            "transformer.h.*.attn.c_attn.weight": (D, 3 * D),
            "transformer.h.*.attn.c_attn.bias": (3 * D,),
            "transformer.h.*.attn.c_proj.weight": (D, D),
            "transformer.h.*.attn.c_proj.bias": (D,),
            "transformer.h.*.mlp.c_fc.weight": (D, F),
            "transformer.h.*.mlp.c_fc.bias": (F,),
            "transformer.h.*.ln_1.weight": (D,),
        },
        {
            "transformer.wte.weight": (V, D),
            "transformer.wpe.weight": (128, D),
            "lm_head.weight": (V, D),
        },
    ),
    matrices(
        2,
        {
            "transformer.h.*.attn.c_attn.weight": IN_OUT,
            "transformer.h.*.attn.c_proj.weight": IN_OUT,
            "transformer.h.*.mlp.c_fc.weight": IN_OUT,
        },
    ),
)
MODELS["Mixtral of Hugging Face"] = (
    unrolled(
        2,
        {
            "model.layers.*.self_attn.q_proj.weight": (D, D),
            "model.layers.*.self_attn.k_proj.weight": (32, D),
            "model.layers.*.self_attn.o_proj.weight": (D, D),
            "model.layers.*.block_sparse_moe.gate.weight": (E, D),
            "model.layers.*.block_sparse_moe.experts.0.w1.weight": (F, D),
            "model.layers.*.block_sparse_moe.experts.0.w2.weight": (D, F),
            "model.layers.*.block_sparse_moe.experts.1.w1.weight": (F, D),
            "model.layers.*.block_sparse_moe.experts.1.w2.weight": (D, F),
            "model.layers.*.input_layernorm.weight": (D,),
        },
        {
            "model.embed_tokens.weight": (V, D),
            "model.norm.weight": (D,),
            "lm_head.weight": (V, D),
        },
    ),
    matrices(
        2,
        {
            "model.layers.*.self_attn.q_proj.weight": OUT_IN,
            "model.layers.*.self_attn.k_proj.weight": OUT_IN,
            "model.layers.*.self_attn.o_proj.weight": OUT_IN,
            "model.layers.*.block_sparse_moe.gate.weight": OUT_IN,
            "model.layers.*.block_sparse_moe.experts.0.w1.weight": OUT_IN,
            "model.layers.*.block_sparse_moe.experts.0.w2.weight": OUT_IN,
            "model.layers.*.block_sparse_moe.experts.1.w1.weight": OUT_IN,
            "model.layers.*.block_sparse_moe.experts.1.w2.weight": OUT_IN,
        },
    ),
)
MODELS["experts in one array, unrolled layers"] = (
    unrolled(
        2,
        {
            "layers/*/attn/q_proj/kernel": (D, D),
            "layers/*/moe/router/kernel": (D, E),
            "layers/*/moe/gate_proj": (E, D, F),
            "layers/*/moe/up_proj": (E, D, F),
            "layers/*/moe/down_proj": (E, F, D),
            "layers/*/moe/up_bias": (E, F),
            "layers/*/norm/scale": (D,),
        },
        {"embed/embedding": (V, D)},
    ),
    matrices(
        2,
        {
            "layers/*/attn/q_proj/kernel": IN_OUT,
            "layers/*/moe/router/kernel": IN_OUT,
            "layers/*/moe/gate_proj": ((1,), (2,)),
            "layers/*/moe/up_proj": ((1,), (2,)),
            "layers/*/moe/down_proj": ((1,), (2,)),
        },
    ),
)
MODELS["Gemma of Tunix, einsums"] = (
    unrolled(
        2,
        {
            "layers/*/attn/q_einsum/w": (N, D, 32),
            "layers/*/attn/kv_einsum/w": (2, 1, D, 32),
            "layers/*/attn/attn_vec_einsum/w": (N, 32, D),
            "layers/*/mlp/gate_proj/kernel": (D, F),
            "layers/*/mlp/up_proj/kernel": (D, F),
            "layers/*/mlp/down_proj/kernel": (F, D),
            "layers/*/pre_attention_norm/scale": (D,),
            "layers/*/post_attention_norm/scale": (D,),
        },
        {"embedder/input_embedding": (V, D), "final_norm/scale": (D,)},
    ),
    matrices(
        2,
        {
            "layers/*/attn/q_einsum/w": ((1,), (0, 2)),
            "layers/*/attn/kv_einsum/w": ((2,), (1, 3)),
            "layers/*/attn/attn_vec_einsum/w": ((0, 1), (2,)),
            "layers/*/mlp/gate_proj/kernel": IN_OUT,
            "layers/*/mlp/up_proj/kernel": IN_OUT,
            "layers/*/mlp/down_proj/kernel": IN_OUT,
        },
    ),
)
MODELS["ViT of Flax"] = (
    unrolled(
        2,
        {
            "Transformer/encoderblock_*/MlpBlock_0/Dense_0/kernel": (D, F),
            "Transformer/encoderblock_*/MlpBlock_0/Dense_1/kernel": (F, D),
            "Transformer/encoderblock_*/MHA_0/query/kernel": (D, N, H),
            "Transformer/encoderblock_*/MHA_0/key/kernel": (D, N, H),
            "Transformer/encoderblock_*/MHA_0/out/kernel": (N, H, D),
            "Transformer/encoderblock_*/LayerNorm_0/scale": (D,),
        },
        {
            "Transformer/posembed_input/pos_embedding": (1, 197, D),
            "cls": (1, 1, D),
            "embedding/kernel": (16, 16, 3, D),
            "head/kernel": (D, 1000),
        },
    ),
    matrices(
        2,
        {
            "Transformer/encoderblock_*/MlpBlock_0/Dense_0/kernel": IN_OUT,
            "Transformer/encoderblock_*/MlpBlock_0/Dense_1/kernel": IN_OUT,
            "Transformer/encoderblock_*/MHA_0/query/kernel": ((0,), (1, 2)),
            "Transformer/encoderblock_*/MHA_0/key/kernel": ((0,), (1, 2)),
            "Transformer/encoderblock_*/MHA_0/out/kernel": ((0, 1), (2,)),
        },
    ),
)
MODELS["T5 whose feed-forward is as long as a vocabulary"] = (
    unrolled(
        2,
        {
            "encoder/block/*/layer/0/SelfAttention/q/kernel": (D, 16 * D),
            "encoder/block/*/layer/0/SelfAttention/o/kernel": (16 * D, D),
            "encoder/block/*/layer/1/DenseReluDense/wi/kernel": (D, 32 * D),
            "encoder/block/*/layer/1/DenseReluDense/wo/kernel": (32 * D, D),
            "encoder/block/*/layer/0/layer_norm/weight": (D,),
        },
        {
            "shared/embedding": (V, D),
            "encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding": (
                32,
                N,
            ),
            "lm_head/kernel": (D, V),
        },
    ),
    matrices(
        2,
        {
            "encoder/block/*/layer/0/SelfAttention/q/kernel": IN_OUT,
            "encoder/block/*/layer/0/SelfAttention/o/kernel": IN_OUT,
            "encoder/block/*/layer/1/DenseReluDense/wi/kernel": IN_OUT,
            "encoder/block/*/layer/1/DenseReluDense/wo/kernel": IN_OUT,
        },
    ),
)
MODELS["encoder and decoder of other depths"] = (
    {
        "encoder/layers/q/kernel": (12, D, D),
        "encoder/layers/up/kernel": (12, D, F),
        "encoder/layers/ln/scale": (12, D),
        "decoder/layers/q/kernel": (6, D, D),
        "decoder/layers/up/kernel": (6, D, F),
        "decoder/layers/ln/scale": (6, D),
        "shared/weight": (V, D),
    },
    {
        f"{part}/layers/{name}/kernel": ((1,), (2,))
        for part in ("encoder", "decoder")
        for name in ("q", "up")
    },
)
MODELS["Equinox, stacked blocks, out before in"] = (
    {
        "tok_embed/weight": (V, D),
        "blocks/attn/query_proj/weight": (L, D, D),
        "blocks/attn/output_proj/weight": (L, D, D),
        "blocks/mlp/fc1/weight": (L, F, D),
        "blocks/mlp/fc1/bias": (L, F),
        "blocks/mlp/fc2/weight": (L, D, F),
        "blocks/ln/weight": (L, D),
        "norm/weight": (D,),
        "unembed/weight": (V, D),
    },
    {
        "blocks/attn/query_proj/weight": ((2,), (1,)),
        "blocks/attn/output_proj/weight": ((2,), (1,)),
        "blocks/mlp/fc1/weight": ((2,), (1,)),
        "blocks/mlp/fc2/weight": ((2,), (1,)),
    },
)
MODELS["Haliax, stacked, in before out"] = (
    {
        "embeddings/token_embeddings/weight": (V, D),
        "transformer/layers/self_attn/q_proj/weight": (L, D, D),
        "transformer/layers/mlp/up_proj/weight": (L, D, F),
        "transformer/layers/mlp/up_proj/bias": (L, F),
        "transformer/layers/mlp/down_proj/weight": (L, F, D),
        "transformer/layers/ln_1/weight": (L, D),
        "transformer/ln_f/weight": (D,),
        "lm_head/weight": (V, D),
    },
    {
        "transformer/layers/self_attn/q_proj/weight": ((1,), (2,)),
        "transformer/layers/mlp/up_proj/weight": ((1,), (2,)),
        "transformer/layers/mlp/down_proj/weight": ((1,), (2,)),
    },
)
MODELS["Whisper of Hugging Face"] = (
    unrolled(
        2,
        {
            "model.encoder.layers.*.self_attn.q_proj.weight": (D, D),
            "model.encoder.layers.*.self_attn.q_proj.bias": (D,),
            "model.encoder.layers.*.fc1.weight": (F, D),
            "model.encoder.layers.*.fc2.weight": (D, F),
            "model.decoder.layers.*.encoder_attn.k_proj.weight": (D, D),
        },
        {
            "model.encoder.conv1.weight": (D, 80, 3),
            "model.encoder.conv2.weight": (D, D, 3),
            "model.encoder.embed_positions.weight": (1500, D),
            "model.decoder.embed_tokens.weight": (V, D),
            "model.decoder.embed_positions.weight": (448, D),
            "proj_out.weight": (V, D),
        },
    ),
    {
        **matrices(
            2,
            {
                "model.encoder.layers.*.self_attn.q_proj.weight": OUT_IN,
                "model.encoder.layers.*.fc1.weight": OUT_IN,
                "model.encoder.layers.*.fc2.weight": OUT_IN,
                "model.decoder.layers.*.encoder_attn.k_proj.weight": OUT_IN,
            },
        ),
        "model.encoder.conv1.weight": ((1,), (0,), (2,)),
        "model.encoder.conv2.weight": ((1,), (0,), (2,)),
    },
)
MODELS["Mamba, stacked"] = (
    {
        "backbone/embedding/weight": (V, D),
        "backbone/layers/mixer/in_proj/weight": (L, 4 * D, D),
        "backbone/layers/mixer/conv1d/weight": (L, 2 * D, 1, 4),
        "backbone/layers/mixer/x_proj/weight": (L, 36, 2 * D),
        "backbone/layers/mixer/dt_proj/weight": (L, 2 * D, 4),
        "backbone/layers/mixer/dt_proj/bias": (L, 2 * D),
        "backbone/layers/mixer/A_log": (L, 2 * D, 16),
        "backbone/layers/mixer/D": (L, 2 * D),
        "backbone/layers/mixer/out_proj/weight": (L, D, 2 * D),
        "backbone/layers/norm/weight": (L, D),
        "backbone/norm_f/weight": (D,),
    },
    {
        "backbone/layers/mixer/in_proj/weight": ((2,), (1,)),
        "backbone/layers/mixer/x_proj/weight": ((2,), (1,)),
        "backbone/layers/mixer/dt_proj/weight": ((2,), (1,)),
        "backbone/layers/mixer/A_log": ((1,), (2,)),
        "backbone/layers/mixer/out_proj/weight": ((2,), (1,)),
    },
)
MODELS["a convolutional network of Flax"] = (
    {
        "conv_init/kernel": (7, 7, 3, 64),
        "stage_0/Conv_0/kernel": (3, 3, 64, 64),
        "stage_0/BatchNorm_0/scale": (64,),
        "stage_1/Conv_0/kernel": (1, 1, 64, 128),
        "stage_1/depthwise_conv/kernel": (3, 3, 1, 128),
        "classifier/kernel": (128, 10),
    },
    {
        "conv_init/kernel": ((2,), (3,), (0, 1)),
        "stage_0/Conv_0/kernel": ((2,), (3,), (0, 1)),
        "stage_1/Conv_0/kernel": ((2,), (3,), (0, 1)),
    },
)
MODELS["Haiku"] = (
    {
        "transformer/~/embed:embeddings": (V, D),
        "transformer/~/h0_attn/query:w": (D, D),
        "transformer/~/h0_attn/query:b": (D,),
        "transformer/~/h0_mlp/linear:w": (D, F),
        "transformer/~/h0_mlp/linear_1:w": (F, D),
        "transformer/~/ln:scale": (D,),
        "transformer/linear:w": (D, V),
    },
    {
        "transformer/~/h0_attn/query/w": IN_OUT,
        "transformer/~/h0_mlp/linear/w": IN_OUT,
        "transformer/~/h0_mlp/linear_1/w": IN_OUT,
    },
)
MODELS["names that hold other names"] = (
    {
        "PreNorm_0/fn/to_qkv/kernel": (D, 3 * D),
        "PreNorm_0/fn/to_out/kernel": (D, D),
        "sentence_embedder/layer/attn/kernel": (D, D),
        "abnormal_gate/kernel": (D, F),
        "headless/kernel": (D, F),
        "PreNorm_0/norm/scale": (D,),
    },
    {
        "PreNorm_0/fn/to_qkv/kernel": IN_OUT,
        "PreNorm_0/fn/to_out/kernel": IN_OUT,
        "sentence_embedder/layer/attn/kernel": IN_OUT,
        "abnormal_gate/kernel": IN_OUT,
        "headless/kernel": IN_OUT,
    },
)


def tree_of(name, flat):
    if name == "Haiku":  # a module's path is one key
        return {
            module: {
                path.split(":")[1]: struct(*shape)
                for path, shape in flat.items()
                if path.split(":")[0] == module
            }
            for module in {path.split(":")[0] for path in flat}
        }
    return nested(flat)  # dots are no separators: keys of Hugging Face are flat


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    flat, expected = MODELS[name]
    assert concluded(tree_of(name, flat)) == expected


@pytest.mark.parametrize("name", MODELS)
def test_the_default_selection_is_what_was_concluded(name):
    """Save what a rank or its bytes keep full, which the report says."""
    flat, expected = MODELS[name]
    report = lro.selection_report(lro.galore(1e-2, rank=2), tree_of(name, flat))
    saved = {row.path for row in report.rows if "save" in row.reason}
    assert {*report.projected} == expected.keys() - saved
    for row in report.rows:
        assert row.reason
        if row.matrix:
            want, *_ = expected[row.path]
            got = (
                row.matrix.rows if row.matrix.reduction_is_rows else row.matrix.columns
            )
            assert got == want


def test_lists_without_names():
    keras = [struct(V, D), struct(D), struct(D, F), struct(F, D), struct(D, V)]
    assert concluded(keras) == {"2": IN_OUT, "3": IN_OUT}
    torch = {"layers": [{"weight": x} for x in map(struct, (V, F, D, V), (D, D, F, D))]}
    assert concluded(torch) == {"layers/1/weight": OUT_IN, "layers/2/weight": OUT_IN}


def test_a_head_is_known_by_the_size_that_it_shares():
    flat = {"wte/weight": (300, D), "mlp/up/kernel": (D, F), "dense/kernel": (D, 300)}
    assert concluded(nested(flat)) == {"mlp/up/kernel": IN_OUT}
    (row,) = [
        row
        for row in lro.selection_report(lro.galore(1.0, rank=2), nested(flat)).rows
        if row.path == "dense/kernel"
    ]
    assert row.reason == "shares the vocabulary's size 300 with 'wte/weight'"


def test_layout_says_what_nothing_else_does():
    square = {"w": struct(D, D)}
    assert concluded(square) == {"w": IN_OUT}
    assert concluded(square, layout="out_in") == {"w": OUT_IN}
    assert concluded({"a": {"weight": struct(D, D)}}) == {"a/weight": OUT_IN}
    with pytest.raises(ValueError, match="`layout` must be one of 'auto', 'in_out'"):
        lro.dimension_numbers(square, layout="torch")


def test_a_square_weight_of_torch_takes_its_input_axis():
    (row,) = lro.selection_report(
        lro.galore(1.0, rank=2), {"a": {"weight": struct(D, D)}}
    ).rows
    assert row.matrix is not None and row.matrix.side == "right"


def test_sizes_that_fit_two_readings_stay_unknown_until_siblings_tell():
    assert concluded(nested({"q": (D, D, D), "up": (D, D, F)})) == {}
    stack = {f"blocks/{name}": (4, D, D) for name in "qkv"}
    assert concluded(nested(stack)) == dict.fromkeys(stack, ((1,), (2,)))


def test_heads_and_queries_in_one_array():
    flat = {
        "blocks/attn/c_attn/weight": (12, 3, N, H, D),
        "blocks/attn/c_proj/weight": (12, D, N, H),
        "blocks/mlp/c_fc/weight": (12, F, D),
        "blocks/ln/weight": (12, D),
    }
    assert concluded(nested(flat)) == {
        "blocks/attn/c_attn/weight": ((4,), (2, 3)),
        "blocks/attn/c_proj/weight": ((2, 3), (1,)),
        "blocks/mlp/c_fc/weight": ((2,), (1,)),
    }


def test_what_has_a_bias_of_the_width_is_no_embedding():
    layers = {"0": (784, 64), "1": (64, 64), "2": (64, 10)}
    flat = {f"Dense_{i}/kernel": shape for i, shape in layers.items()}
    flat |= {f"Dense_{i}/bias": shape[1:] for i, shape in layers.items()}
    assert concluded(nested(flat)) == {f"Dense_{i}/kernel": IN_OUT for i in layers}


def test_a_vocabulary_by_its_length_alone_is_said():
    params = nested({"a/w": (V, D), "up/w": (D, F), "down/w": (F, D), "n": (D,)})
    assert concluded(params) == {"up/w": IN_OUT, "down/w": IN_OUT}
    with pytest.warns(lro.NotProjectedWarning, match="much longer .*select="):
        jax.eval_shape(lro.galore(1e-2, rank=2).init, params)


def test_nnx_and_boxes():
    nnx, linen = pytest.importorskip("flax.nnx"), pytest.importorskip("flax.linen")
    rngs = nnx.Rngs(0)
    state = nnx.state(nnx.MultiHeadAttention(N, D, rngs=rngs, decode=False), nnx.Param)
    numbers = lro.dimension_numbers(state)
    assert jax.tree.structure(
        numbers, is_leaf=lambda x: isinstance(x, lro.MatrixDimensionNumbers)
    ).num_leaves == len(["query", "key", "value", "out"])
    tx = lro.galore(1e-2, rank=2, weight_dimension_numbers=numbers)
    assert len(lro.selection_report(tx, state).projected) == 4
    boxed = {"a": linen.Partitioned(struct(D, F), names=("x", None)), "b": struct(D)}
    assert lro.dimension_numbers(boxed) == {
        "a": lro.MatrixDimensionNumbers(),
        "b": None,
    }


def test_a_lone_stack_stays_unknown():
    assert concluded({"w": struct(3, 48, 32)}) == {}


def test_what_was_concluded_can_be_given_back():
    flat, expected = MODELS["MaxText, layers on axis 1"]
    tx = lro.galore(1e-2, rank=2, weight_dimension_numbers=lro.dimension_numbers)
    params = nested(flat)
    assert {*lro.selection_report(tx, params).projected} == expected.keys()
    jax.eval_shape(tx.init, params)  # without a warning
    numbers = lro.dimension_numbers(params)
    tx = lro.galore(1e-2, rank=2, weight_dimension_numbers=numbers)
    assert {*lro.selection_report(tx, params).projected} == expected.keys()
    jax.eval_shape(tx.init, params)


def test_to_agree_is_no_choice_by_name():
    """A rank that is too large for one leaf is no error, as by the default rule."""
    params = nested({"up": (D, F), "router": (D, E)})
    tx = lro.galore(1e-2, rank=16, weight_dimension_numbers=lro.dimension_numbers)
    assert lro.selection_report(tx, params).projected == ("up",)


# A layer axis that the user names.


@pytest.mark.parametrize("axis", [0, 2])
def test_a_wrong_layer_axis_is_an_error(axis):
    flat, _ = MODELS["MaxText, layers on axis 1"]
    tx = lro.galore(1e-2, rank=2, layer_axis=axis)
    with pytest.raises(ValueError, match=rf"layer_axis={axis} contradicts .* axis 1"):
        jax.eval_shape(tx.init, nested(flat))


def test_a_width_is_no_number_of_layers():
    flat = {"q": (L, D, D), "up": (L, D, F), "gamma": (L, D), "norm/scale": (D,)}
    tx = lro.galore(1e-2, rank=2, layer_axis=1)
    with pytest.raises(ValueError, match="layer_axis=1 contradicts"):
        jax.eval_shape(tx.init, nested(flat))
    with pytest.raises(ValueError, match="layer_axis=5 names no axis of leaf 'q'"):
        jax.eval_shape(lro.galore(1e-2, rank=2, layer_axis=5).init, nested(flat))


def test_heads_without_layers_are_no_stack():
    flat = {"b/attn/query/kernel": (D, N, H), "b/attn/out/kernel": (N, H, D)}
    tx = lro.galore(1e-2, rank=2, layer_axis=0)
    with pytest.raises(ValueError, match=r"layer_axis=0 contradicts .* one attention"):
        jax.eval_shape(tx.init, nested(flat))


def test_the_right_layer_axis_gives_what_is_concluded():
    flat, expected = MODELS["MaxText, layers on axis 1"]
    tx = lro.galore(1e-2, rank=2, layer_axis=1)
    assert {*lro.selection_report(tx, nested(flat)).projected} == expected.keys()


def test_stacked_vectors_are_not_projected_whatever_select_says():
    flat = {"q": (L, D, D), "up": (L, D, F), "gamma": (L, D)}
    tx = lro.galore(1e-2, rank=2, layer_axis=0, select=".")
    rows = {row.path: row for row in lro.selection_report(tx, nested(flat)).rows}
    assert rows["gamma"].matrix is None
    assert rows["gamma"].reason.startswith("stacked vectors, no matrix: axis 0")


# What is said at init.

SMALL = {"layers": {"q": struct(D, D), "up": struct(D, F)}, "norm": struct(D)}


def test_nothing_projected_is_said():
    with pytest.warns(lro.NotProjectedWarning, match=r"projects nothing.*rank=0\.25"):
        jax.eval_shape(lro.galore(1e-2, rank=128).init, SMALL)
    with pytest.warns(lro.NotProjectedWarning, match="weight_dimension_numbers"):
        jax.eval_shape(lro.galore(1e-2, rank=2).init, {"w": struct(2, 3, 48, 32)})
    with pytest.warns(lro.NotProjectedWarning, match="named like .*select="):
        jax.eval_shape(lro.galore(1e-2, rank=2).init, {"embed": struct(V, D)})


def test_less_than_half_is_said():
    params = {"a": struct(200, 100), "b": struct(64, 500)}
    match = "projects 20,000 of the 52,000 elements.*b 64x500: rank 80 exceeds"
    with pytest.warns(lro.NotProjectedWarning, match=match):
        jax.eval_shape(lro.galore(1e-2, rank=80, side="long").init, params)


def test_the_warning_points_at_the_users_line():
    with pytest.warns(lro.NotProjectedWarning) as seen:
        jax.eval_shape(lro.galore(1e-2, rank=128).init, SMALL)
    assert [record.filename for record in seen] == [__file__]


def test_layers_on_another_axis_are_said():
    flat, _ = MODELS["MaxText, layers on axis 1"]
    match = "weight_dimension_numbers=lro.dimension_numbers"
    with pytest.warns(lro.ConcludedAxesWarning, match=match):
        jax.eval_shape(lro.galore(1e-2, rank=2).init, nested(flat))


@pytest.mark.parametrize(
    "params",
    [
        SMALL,
        {},
        {"norm": struct(D)},
        {"embed": struct(V, D), "w": struct(D, D)},
        {"empty": struct(0, D)},
    ],
)
def test_nothing_is_said_where_nothing_is_amiss(params):
    jax.eval_shape(lro.galore(1e-2, rank=2).init, params)


def test_reports_and_masks_say_nothing_of_their_own():
    lro.selection_report(lro.galore(1e-2, rank=128), SMALL)
    lro.state_bytes(lro.galore(1e-2, rank=128), SMALL)
    lro.selection_report(lro.galore(1e-2, rank=2, select="nothing"), SMALL)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"select": "atn"}, "select='atn' chooses no leaf"),
        ({"select": ["atn", "mpl"]}, "select=.* chooses no leaf"),
        ({"select": "norm"}, "chooses no leaf.*norm 64: fewer than two axes"),
        ({"select": lambda path, leaf: False}, "chooses no leaf"),
        (
            {"weight_dimension_numbers": {"layers": None, "norm": None}},
            "weight_dimension_numbers chooses no leaf",
        ),
    ],
)
def test_an_explicit_choice_of_nothing_is_an_error(options, says):
    tx = lro.galore(1e-2, rank=2, **options)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(tx.init, SMALL)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(optax.chain(optax.clip(1.0), tx).init, SMALL)


def test_select_by_words():
    flat = {
        "model.layers.0.self_attn.q_proj.weight": (D, D),
        "model.layers.0.self_attn.v_proj.weight": (D, D),
        "model.layers.0.mlp.up_proj.weight": (F, D),
        "model.layers.0.mattress.up.weight": (F, D),
    }
    q, v, up, _ = flat

    def chosen(*words):
        tx = lro.galore(1e-2, rank=2, select=[*words])
        return {*lro.selection_report(tx, nested(flat)).projected}

    assert chosen("attn") == {q, v}
    assert chosen("q_proj", "mlp") == {q, up}
    assert chosen(r".*.self_attn.v.*") == {v}


def test_all_linear():
    params = nested(
        {
            "embed/embedding": (V, D),
            "router/kernel": (D, 4),
            "up/kernel": (D, F),
            "head/kernel": (D, V),
            "bias": (D,),
        }
    )
    tx = lro.galore(1e-2, rank=8, select="all-linear")
    rows = {row.path: row for row in lro.selection_report(tx, params).rows}
    ranks = {path: row.matrix.rank for path, row in rows.items() if row.matrix}
    assert ranks == {"router/kernel": 4, "up/kernel": 8}


@pytest.mark.parametrize(
    ("select", "error", "says"),
    [
        ([], ValueError, "`select` is an empty list"),
        (3, TypeError, "`select` must be None, a regular expression, a list of words"),
        (["attn", 3], TypeError, "`select` must be None"),
    ],
)
def test_select_is_checked(select, error, says):
    with pytest.raises(error, match=says):
        lro.galore(1e-2, rank=2, select=select)


def test_an_integer_leaf_steps_as_in_optax():
    params = {"count": jnp.full(3, 10), "w": jnp.ones((16, 8))}
    grads = {"count": jnp.ones(3, jnp.int32), "w": jnp.ones((16, 8))}
    for tx in (lro.galore(1.0, rank=2), optax.adam(1.0)):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert optax.apply_updates(params, updates)["count"].tolist() == [9, 9, 9]
