"""Folders of transformers' to parameters and back: what is read, kept and refused."""

import dataclasses
import json
import pathlib
import struct
import time
import tracemalloc
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples.convert import __main__ as command
from examples.convert import read_model, write_model
from examples.convert.configs import read_config, same_model
from examples.convert.files import INDEX, SINGLE
from examples.convert.gguf_file import read_gguf
from examples.convert.names import flat, nested, shapes, slots
from examples.convert.reading import load_model
from examples.convert.stacked import read_stacked
from examples.convert.tensors import (
    DTYPES,
    Tensor,
    open_tensors,
    write_tensors,
)
from examples.encoder.model import EncoderConfig
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig
from examples.llama.placement import logical_axes
from examples.llama.positions import RopeScaling
from tests.examples.families import FAMILIES
from tests.examples.test_families import MODELS, write_family

LLAMA = MODELS["llama"]["config"]


def rewrite(folder, change):
    """The folder's weights after `change(arrays)`, in one file."""
    opened = open_tensors(folder / SINGLE)
    arrays = {name: opened.read(name) for name in opened.tensors}
    change(arrays)
    tensors = {name: Tensor(x.dtype, x.shape) for name, x in arrays.items()}
    write_tensors(folder / SINGLE, tensors, arrays.__getitem__)


def blank(config):
    """Parameters of zeros."""
    return nested({p: np.zeros(x.shape, "f4") for p, x in shapes(config).items()})


def same(a, b):
    """Bit for bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back(name, dtype, tmp_path):
    """Every tensor, name and field of every family."""
    source = write_family(tmp_path / "in", name)
    if dtype == "bfloat16":
        rewrite(
            source, lambda x: x.update({k: v.astype("bfloat16") for k, v in x.items()})
        )
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    config, params = read_model(source)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    assert config.param_dtype == config.compute_dtype == dtype
    files = write_model(tmp_path / "out", config, params, like=source)
    assert {"tokenizer.json", "chat_template.jinja"} <= {*files}
    before, after = (
        open_tensors(source / SINGLE),
        open_tensors(tmp_path / "out" / SINGLE),
    )
    assert before.tensors.keys() == after.tensors.keys()
    for key in before.tensors:
        assert before.read(key).tobytes() == after.read(key).tobytes(), key
    again, back = read_model(tmp_path / "out")
    assert again == config and same(back, params)
    # The source's own file, with its other fields.
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept.pop("torch_dtype") == dtype
    expected = dict(MODELS[name]["config"])
    expected.pop("dtype", None)
    assert kept == expected


def test_without_an_example_the_configuration_is_made(tmp_path):
    """In the spelling that transformers 4 reads, too."""
    config, params = read_model(write_family(tmp_path / "in", "llama3"))
    write_model(tmp_path / "out", config, params)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_theta"] == 10_000.0
    assert raw["rope_scaling"]["rope_type"] == "llama3"
    assert raw["architectures"] == ["LlamaForCausalLM"]
    again, back = read_model(tmp_path / "out")
    assert same_model(again, config) and same(back, params)


def test_many_files(tmp_path):
    source = write_family(tmp_path / "in", "qwen3")
    config, params = read_model(source)
    files = write_model(tmp_path / "out", config, params, shard_bytes=9000)
    shards = [name for name in files if name.endswith(".safetensors")]
    assert (
        len(shards) > 5 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    )
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == size
    for name in shards:
        opened = open_tensors(tmp_path / "out" / name)
        assert sum(t.nbytes for t in opened.tensors.values()) <= 9000
        assert all(index["weight_map"][key] == name for key in opened.tensors)
    assert same(read_model(tmp_path / "out")[1], params)


def test_other_dtypes(tmp_path):
    source = write_family(tmp_path / "in", "smollm2")
    _, plain = read_model(source)
    for dtype in ("bfloat16", "float16"):
        config, params = read_model(source, dtype)
        assert config.param_dtype == dtype
        # Sums in float16 overflow early.
        assert config.compute_dtype == ("float32" if dtype == "float16" else dtype)
        assert same(params, jax.tree.map(lambda x, d=dtype: x.astype(d), plain))
        write_model(tmp_path / dtype, config, plain, dtype=dtype)
        assert same(read_model(tmp_path / dtype)[1], params)
    with pytest.raises(UsageError, match=r"float32, bfloat16, float16.*got 'int8'"):
        read_model(source, "int8")

    def large(x):
        x["model.norm.weight"][3] = 1e6

    rewrite(source, large)
    with pytest.raises(
        UsageError, match=r"model\.norm\.weight has numbers beyond float"
    ):
        read_model(source, "float16")
    rewrite(source, lambda x: x.update({k: v.astype("f8") for k, v in x.items()}))
    with pytest.raises(UsageError, match="is float64: give the dtype"):
        read_model(source)
    assert read_model(source, "float32")[0].param_dtype == "float32"

    def mixed(x):
        x["model.layers.1.mlp.up_proj.weight"] = np.zeros((40, 32), "bfloat16")

    rewrite(write_family(tmp_path / "in", "smollm2"), mixed)
    with pytest.raises(
        UsageError, match=r"layers\.1\.mlp\.up_proj.*in other layers floa"
    ):
        read_model(source)
    assert read_model(source, "bfloat16")[0].param_dtype == "bfloat16"


def test_missing_superfluous_and_misshapen_tensors_are_listed(tmp_path):
    source = write_family(tmp_path, "qwen2")

    def spoil(x):
        del x["model.layers.1.self_attn.k_proj.bias"]
        x["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 32), np.float32)
        x["model.layers.0.self_attn.o_proj.bias"] = np.zeros(32, np.float32)
        x["model.norm.weight"] = np.zeros(31, np.float32)
        x["model.layers.0.mlp.down_proj.weight"] = np.zeros((32, 40), np.int8)

    rewrite(source, spoil)
    with pytest.raises(UsageError) as error:
        read_model(source)
    said = str(error.value)
    assert "does not hold the 26 tensors of its config.json: " in said
    assert "missing (1): model.layers.1.self_attn.k_proj.bias;" in said
    assert "unknown (2): model.layers.0.self_attn.o_proj.bias, model.layers.2." in said
    assert "of another shape (1): model.norm.weight [31] in place of [32]" in said
    assert "float16 (1): model.layers.0.mlp.down_proj.weight int8" in said
    assert "\n" not in said


def test_biases_are_never_dropped(tmp_path):
    """A Qwen 2 under the name of a Llama: a converter that does not look is wrong."""
    source = write_family(tmp_path, "qwen2")
    raw = json.loads((source / "config.json").read_text())
    for name in ("use_sliding_window", "max_window_layers", "layer_types"):
        raw.pop(name, None)
    raw |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    raw["sliding_window"] = None
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        UsageError, match=r"unknown \(6\): model\.layers\.0\.self_attn\.k"
    ):
        read_model(source)


def test_what_old_files_hold(tmp_path):
    """gamma and beta, buffers, a tied head that is there, a body alone, heads."""
    source = write_family(tmp_path / "bert", "bert")
    _, params = read_model(source)

    def old(x):
        for name in [*x]:
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            new = new.replace("LayerNorm.bias", "LayerNorm.beta")
            x[new] = x.pop(name)
        x["bert.embeddings.position_ids"] = np.arange(64)[None]
        x["cls.predictions.decoder.weight"] = x[
            "bert.embeddings.word_embeddings.weight"
        ]
        x["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)

    rewrite(source, old)
    loaded = load_model(source)
    assert same(loaded.params, params) and loaded.used == 42
    assert loaded.buffers == ["bert.embeddings.position_ids"]
    assert loaded.copies == ["cls.predictions.decoder.weight"]
    assert loaded.head.keys() == {"cls.seq_relationship.weight"}

    def body(x):
        for name in [*x]:
            value = x.pop(name)
            if name.startswith("bert."):
                x[name.removeprefix("bert.")] = value
        x["pooler.dense.weight"] = np.eye(32, dtype=np.float32)
        x["pooler.dense.bias"] = np.zeros(32, np.float32)

    rewrite(source, body)
    config, found = read_model(source)
    assert config.pooler and not config.mlm
    assert same(
        {k: found[k] for k in params if k != "mlm"},
        {k: v for k, v in params.items() if k != "mlm"},
    )
    rewrite(source, lambda x: x.pop("pooler.dense.bias"))
    with pytest.raises(UsageError, match=r"missing \(1\): bert\.pooler\.dense\.bias"):
        read_model(source)

    source = write_family(tmp_path / "smollm2", "smollm2")
    _, params = read_model(source)

    def tied(x):
        x["lm_head.weight"] = x["model.embed_tokens.weight"]
        x["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)

    rewrite(source, tied)
    loaded = load_model(source)
    assert same(loaded.params, params) and loaded.copies == ["lm_head.weight"]
    assert loaded.buffers == ["model.layers.0.self_attn.rotary_emb.inv_freq"]

    def untied(x):
        x["lm_head.weight"] = x["lm_head.weight"] * 2

    rewrite(source, untied)
    with pytest.raises(UsageError, match="differs from model"):
        read_model(source)
    rewrite(source, lambda x: x.update({"lm_head.weight": np.zeros(3, np.float32)}))
    with pytest.raises(UsageError, match="differs from model"):
        read_model(source)
    head = {"score.weight": np.zeros((2, 31), np.float32)}
    rewrite(source, lambda x: x.pop("lm_head.weight") is x.update(head))
    with pytest.raises(UsageError, match=r"score\.weight \[2, 31\] is no head"):
        read_model(source)


SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_both_spellings_of_rotations():
    new = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    llama3 = {"rope_type": "llama3", **SCALING}
    for raw in (
        new | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
        new | {"rope_theta": 5e5, "rope_scaling": llama3},
        new | {"rope_parameters": {"rope_theta": 5e5, **llama3}},
    ):
        config = read_config(raw)
        assert config.rope_base == 5e5
        assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    for raw in (new, new | {"rope_scaling": None}, new | {"rope_scaling": {}}):
        assert read_config(raw).rope_base == 10_000.0
        assert read_config(raw).rope_scaling is None


def test_defaults_are_those_of_the_class():
    """What a file leaves out."""
    least = {
        name: LLAMA[name]
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    }
    least |= {"hidden_size": 2048, "num_attention_heads": 32}
    names = ("llama", "mistral", "qwen2", "qwen3", "gemma")
    kinds = {name: read_config(least | {"model_type": name}) for name in names}
    assert {n: c.key_heads for n, c in kinds.items()} == {
        "llama": 32, "mistral": 8, "qwen2": 32, "qwen3": 32, "gemma": 16,
    }  # fmt: skip
    assert {n: c.window for n, c in kinds.items()} == {
        "llama": None, "mistral": 4096, "qwen2": None, "qwen3": None, "gemma": None,
    }  # fmt: skip
    assert kinds["qwen3"].head_size == 128 and kinds["gemma"].head_size == 256
    assert kinds["gemma"].tied and not kinds["llama"].tied
    assert all(c.norm_eps == 1e-6 for c in kinds.values())
    # "As many as heads" is not "the class's default".
    raw = least | {"model_type": "mistral", "num_key_value_heads": None}
    assert read_config(raw | {"sliding_window": None}).key_heads == 32


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("llama", {"model_type": "mamba"}, "model_type = 'mamba' is not supported"),
        ("llama", {"model_type": None}, "model_type = None is not supported"),
        ("llama", {"architectures": ["LlavaForCausalLM"]}, "'LlavaForCausalLM' is not"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "the kind 'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, "kind 'linear'"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "the kind 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 2}}, "kind llama3 has"),
        (
            "llama",
            {"rope_scaling": {"type": "llama3", **SCALING, "attention_factor": 2}},
            "'attention_factor': 2",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "llama3", **SCALING, "low_freq_factor": 4}},
            "low_freq_factor 4 must be below",
        ),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention"),
        ("llama", {"rope_theta": 7.0}, "rope_theta is 7.0 and"),
        ("llama3", {"rope_scaling": {"type": "yarn"}}, "'yarn' with"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported for llama"),
        ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types = "),
        ("llama", {"sliding_window": 8}, "sliding_window = 8 is not supported"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = "),
        ("llama", {"logit_scale": 0.1}, "logit_scale = 0.1"),
        ("llama", {"num_experts": 8}, "num_experts = 8"),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map = "),
        ("llama", {"attention_bias": "yes"}, "attention_bias must be true or false"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be a whole num"),
        ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers must be a whole"),
        ("llama", {"hidden_size": None}, "config.json has no hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "3 heads of keys and values do not"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be a positive number"),
        ("qwen2", {"use_sliding_window": True, "layer_types": None,
                   "sliding_window": 4, "max_window_layers": 1},
         "max_window_layers = 1 of 2 layers"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4,
                   "layer_types": ["full_attention", "sliding_attention"]},
         "layer_types = "),
        ("qwen3", {"attention_bias": True, "mlp_only_layers": [1]}, "mlp_only_layers"),
        ("bert", {"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new'"),
        ("bert", {"position_embedding_type": "relative_key"}, "'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder = True"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ("bert", {"num_attention_heads": 5}, "5 heads do not divide the width 32"),
        ("roberta", {"pad_token_id": None}, "pad_token_id must be a number"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(kind, fields, said):
    raw = MODELS[kind]["config"] | fields
    if "rope_scaling" in fields:  # one spelling or the other
        del raw["rope_parameters"]
    with pytest.raises(UsageError) as error:
        read_config(raw)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_fields_that_change_nothing_pass():
    """As they stand in published files."""
    extra = {
        "_name_or_path": "x",
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "pretraining_tp": 2,
        "attn_logit_softcapping": None,
        "partial_rotary_factor": 1.0,
        "torch_dtype": "bfloat16",
        "unsloth_fixed": True,
        "num_return_sequences": 1,
        "eos_token_id": [1, 2],
        "attention_dropout": 0.1,
    }
    assert read_config(LLAMA | extra) == read_config(LLAMA)
    window = {"sliding_window": 32768, "use_sliding_window": False}
    assert read_config(MODELS["qwen2"]["config"] | window).window is None


def test_a_model_that_transformers_has_not_is_refused(tmp_path, micro_config):
    config = dataclasses.replace(micro_config, qk_norm=True, norm_offset=1.0)
    with pytest.raises(
        UsageError, match=r"no architecture of llama.* has such a model"
    ):
        write_model(tmp_path / "out", config, blank(config))
    assert not [*tmp_path.iterdir()]


def test_folders_that_are_in_the_way(tmp_path, micro_config):
    params = blank(micro_config)
    out = tmp_path / "out"
    write_model(out, micro_config, params)
    with pytest.raises(UsageError, match="is there and not empty: give another"):
        write_model(out, micro_config, params)
    other = jax.tree.map(lambda x: x + 1, params)
    write_model(out, micro_config, other, replace=True)
    assert same(read_model(out)[1], jax.tree.map(np.asarray, other))
    (out / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="holds more than a model"):
        write_model(out, micro_config, params, replace=True)
    assert (out / "thesis.tex").exists()
    wrong = {key: value for key, value in params.items() if key != "norm"}
    with pytest.raises(UsageError, match=r"missing \(1\): norm/scale"):
        write_model(tmp_path / "new", micro_config, wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Files that may hold anything.


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more):
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end], **more}


HOSTILE = {
    "nothing": b"",
    "a length alone": b"\x08\0\0\0\0\0\0\0",
    "a length beyond the file": file_of({}, length=100),
    "an endless length": file_of({}, length=2**64 - 1),
    "a long header": file_of(b"{" + b" " * 2**23 + b"}"),
    "no JSON": file_of(b"{no"),
    "no object": file_of(b"[1]"),
    "no text": file_of(b'{"\xff": 1}'),
    "levels": file_of(b'{"a":' + b"[" * 200_000),
    "NaN": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'),
    "a name twice": file_of(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "a field twice": file_of(
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "metadata of numbers": file_of({"__metadata__": {"format": 1}}),
    "no metadata": file_of({"__metadata__": "pt"}),
    "an unknown dtype": file_of({"a": entry("F31")}, bytes(8)),
    "a list for a dtype": file_of({"a": entry(["F32"])}, bytes(8)),
    "another field": file_of({"a": entry(strides=[1])}, bytes(8)),
    "a negative size": file_of({"a": entry(shape=(-2,))}, bytes(8)),
    "a fraction": file_of({"a": entry(shape=(2.0,))}, bytes(8)),
    "a truth": file_of({"a": entry(shape=(True, 2))}, bytes(8)),
    "an endless size": file_of({"a": entry(shape=(2**62, 2**62, 2**62))}, bytes(8)),
    "a product around zero": file_of({"a": entry(shape=(2**32, 2**32))}, bytes(8)),
    "a long number": file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 9999 + b"]}}"),
    "many axes": file_of({"a": entry(shape=(1,) * 9 + (2,))}, bytes(8)),
    "ends before it begins": file_of({"a": entry(begin=8, end=0)}, bytes(8)),
    "beyond the end": file_of({"a": entry(end=16, shape=(4,))}, bytes(8)),
    "too short for its shape": file_of({"a": entry(end=4)}, bytes(4)),
    "one over another": file_of({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
    "the same twice": file_of({"a": entry(), "b": entry()}, bytes(8)),
    "a gap": file_of({"a": entry(begin=4, end=12)}, bytes(12)),
    "bytes at the end": file_of({"a": entry()}, bytes(9)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(
        UsageError, match=r"x\.safetensors is no safetensors file: "
    ) as e:
        open_tensors(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_the_worst_headers_cost_little(tmp_path):
    """Within a second and 256 MB."""
    path, most = tmp_path / "x.safetensors", 2**20 - 16
    for unit in (b"[],", b"{},"):
        path.write_bytes(file_of(b'{"a":[' + unit * (most // len(unit)) + b"0]}"))
        started = time.process_time()
        with pytest.raises(UsageError, match="has other fields than"):
            open_tensors(path)
        assert time.process_time() - started < 1
    tracemalloc.start()
    with pytest.raises(UsageError):
        open_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 256e6


GOOD = file_of(
    {
        "__metadata__": {"format": "pt"},
        "a": entry(),
        "b": entry("BF16", (3, 1), 8, 14),
        "empty": entry("F32", (0, 4), 14, 14),
        "c": entry("I8", (), 14, 15),
    },
    bytes(range(15)),
)
NUMBERS = st.one_of(
    st.integers(-2, 20), st.integers(-(2**70), 2**70), st.floats(), st.booleans()
)
JSON = st.recursive(
    st.none() | NUMBERS | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F31"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
        "more": JSON,
    },
)


def check_file(path, data):
    """It is refused in one line, or every byte of it is in one tensor."""
    path.write_bytes(data)
    try:
        opened = open_tensors(path)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    (length,) = struct.unpack("<Q", data[:8])
    arrays = [opened.read(name) for name in opened.tensors]
    assert sum(array.nbytes for array in arrays) == len(data) - 8 - length


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


@settings(max_examples=200, deadline=1000)
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4)), max_size=4)
)
@example(edits=[])
def test_files_with_changed_bytes(scratch, edits):
    data = bytearray(GOOD)
    for at, piece in edits:
        data[at : at + len(piece)] = piece
    check_file(scratch, bytes(data))


@settings(max_examples=100, deadline=1000)
@given(
    header=st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=4),
    size=st.integers(0, 40),
)
def test_files_with_made_up_headers(scratch, header, size):
    check_file(scratch, file_of(header, bytes(size)))


@settings(max_examples=50, deadline=1000)
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4),
    dtypes=st.lists(st.sampled_from([*DTYPES]), min_size=4, max_size=4),
)
def test_what_is_written_is_read(scratch, shapes, dtypes):
    rng = np.random.default_rng(0)
    arrays = {}
    for at, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False)):
        count = int(np.prod(shape)) * DTYPES[dtype].itemsize
        raw = rng.integers(0, 2, count).astype(np.uint8)
        arrays[f"t{at}"] = raw.view(DTYPES[dtype]).reshape(shape)
    tensors = {name: Tensor(x.dtype, x.shape) for name, x in arrays.items()}
    write_tensors(scratch, tensors, arrays.__getitem__)
    opened = open_tensors(scratch)
    assert opened.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        found = opened.read(name)
        assert found.dtype == array.dtype and found.shape == array.shape
        assert found.tobytes() == array.tobytes()
    # Aligned, so that others may map the file.
    assert all(t.offset % t.dtype.itemsize == 0 for t in opened.tensors.values())


@pytest.mark.parametrize(
    "where",
    [
        "../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "",
        "a\\b.safetensors", "model.bin", ".safetensors", "C:x.safetensors", 7, None,
        ["a.safetensors"], "a\0.safetensors", "../../x.safetensors",
    ],
)  # fmt: skip
def test_an_index_names_files_beside_it(where, tmp_path):
    source = write_family(tmp_path / "in", "llama")
    (source / SINGLE).rename(tmp_path / SINGLE)
    (source / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": where}}))
    with pytest.raises(UsageError, match="which is no safetensors file beside it"):
        read_model(source)


def test_an_index_that_does_not_agree(tmp_path):
    config, params = read_model(write_family(tmp_path / "in", "llama"))
    out = tmp_path / "out"
    write_model(out, config, params, shard_bytes=9000)
    index = json.loads((out / INDEX).read_text())
    names = index["weight_map"]
    first = names["lm_head.weight"]

    def refused(weights, said):
        (out / INDEX).write_text(json.dumps({"weight_map": weights}))
        with pytest.raises(UsageError, match=said):
            read_model(out)

    other = next(file for file in names.values() if file != first)
    refused(names | {"lm_head.weight": other}, r"not there \(1\): lm_head\.weight in m")
    rest = {key: file for key, file in names.items() if key != "lm_head.weight"}
    refused(rest, r"not in the index|missing \(1\): lm_head")
    refused(names | {"x": "gone.safetensors"}, r"gone\.safetensors is no file")
    refused({}, "has no weight_map")
    refused([], "has no weight_map")
    (out / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}')
    with pytest.raises(UsageError, match="the name 'a' stands there twice"):
        read_model(out)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(
        UsageError, match=r"has no config\.json: it is no folder of a m"
    ):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(UsageError, match="has neither model"):
        read_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"pytorch_model\.bin holds code and is not re"
    ):
        read_model(tmp_path)
    for text, said in (("[]", "holds no JSON object"), ("{", "cannot be read: "),
                       ('{"a": 1, "a": 2}', "stands there twice")):  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError, match=said):
            read_model(tmp_path)


# The command.


def test_command_both_ways(tmp_path, capsys):
    source = write_family(tmp_path / "in", "qwen3")
    (source / "tokenizer.json").write_text("{}")
    paths = [str(tmp_path / name) for name in ("in", "own", "out")]
    assert command.main([paths[0], paths[1]]) == 0
    said = capsys.readouterr().out
    assert "read 25 tensors of " in said and "all that the model has" in said
    assert "decoder of " in said and "float32" in said
    config, params = read_stacked(tmp_path / "own")
    assert same(params, read_model(source)[1])
    assert command.main([paths[1], paths[2], "--dtype", "bfloat16"]) == 0
    again, back = read_model(tmp_path / "out")
    assert same_model(again, config) and again.param_dtype == "bfloat16"
    assert same(back, jax.tree.map(lambda x: x.astype("bfloat16"), params))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_command_says_what_is_wrong_in_a_line(tmp_path, capsys):
    write_family(tmp_path / "in", "llama")
    full, out, none = (str(tmp_path / name) for name in ("in", "out", "none"))
    for args, said in (
        ([none, out], "none has no config.json"),
        ([full, full], "in is there and not empty"),
        ([full, out, "--dtype", "int4"], "the dtype must be one of"),
        ([none, out, "--gguf"], "none is no file"),
        ([f"{full}/{SINGLE}", out], "model.safetensors is a file: with --gguf, if"),
    ):
        assert command.main(args) == 2
        err = capsys.readouterr().err
        assert said in err and err.startswith("error: ") and err.count("\n") == 1
        assert not pathlib.Path(out).exists()


def test_every_slot_is_filled_once():
    config = ModelConfig(60, 32, 40, 2, 4, kv_heads=2, qkv_bias=True, qk_norm=True)
    found = slots(config)
    assert len({slot.name for slot in found}) == len(found)
    leaves = {p: np.zeros(x.shape, int) for p, x in flat(blank(config)).items()}
    for slot in found:
        part = slot.place(leaves[slot.leaf])
        assert part.shape == slot.shape
        part += 1
    assert all((leaf == 1).all() for leaf in leaves.values())


def test_files_are_those_of_the_package(tmp_path):
    """The well-kept reader and writer, where they are installed."""
    package = pytest.importorskip("safetensors.numpy")
    source = write_family(tmp_path, "bert")
    arrays = package.load_file(source / SINGLE)
    opened = open_tensors(source / SINGLE)
    assert arrays.keys() == opened.tensors.keys()
    for name, array in arrays.items():
        assert array.tobytes() == opened.read(name).tobytes()
    arrays["half"] = np.ones((3, 5), ml_dtypes.bfloat16)
    package.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    opened = open_tensors(tmp_path / "x.safetensors")
    assert all(opened.read(k).tobytes() == x.tobytes() for k, x in arrays.items())


HEADS = {
    "qwen2": {"score.weight": (3, 32)},
    "bert": {"classifier.weight": (3, 32), "classifier.bias": (3,)},
    "roberta": {
        "classifier.dense.weight": (32, 32),
        "classifier.dense.bias": (32,),
        "classifier.out_proj.weight": (3, 32),
        "classifier.out_proj.bias": (3,),
    },
}


@pytest.mark.parametrize("name", HEADS)
def test_classifiers(name, tmp_path):
    config, params = read_model(write_family(tmp_path / "in", name))
    rng = np.random.default_rng(0)
    head = {k: rng.normal(size=s).astype("f4") for k, s in HEADS[name].items()}
    labels = ("bad", "so so", "good")
    out = tmp_path / "out"
    like = tmp_path / "in"
    write_model(out, config, params, like=like, head=head, labels=labels)
    raw = json.loads((out / "config.json").read_text())
    family = FAMILIES[name][0]
    assert raw["architectures"] == [f"{family}ForSequenceClassification"]
    assert raw["id2label"] == {"0": "bad", "1": "so so", "2": "good"}
    loaded = load_model(out)
    assert same(loaded.params, params) and same(loaded.head, head)
    with pytest.raises(UsageError, match=r"no head of transformers has the tensors he"):
        write_model(tmp_path / "no", config, params, head={"head": head.popitem()[1]})


def test_memory_is_the_model_and_a_tensor(tmp_path):
    """NumPy tells tracemalloc of its arrays."""
    config = ModelConfig(4096, 256, 1024, 4, 4, tied=True)
    params = blank(config)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = params["embed"]["embedding"].nbytes
    tracemalloc.start()
    write_model(tmp_path / "out", config, params, shard_bytes=size // 4)
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    read_model(tmp_path / "out", "bfloat16")
    read = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    # Tracing the model's shapes takes a few megabytes.
    assert written < 2.2 * largest + 4e6
    assert read < size / 2 + 1.2 * largest + 4e6
    assert size > 4 * largest


def test_rows_of_a_gguf_file(tmp_path):
    """A Llama as llama.cpp's converter leaves it: pairs of a rotation side by side."""
    gguf = pytest.importorskip("gguf")
    source = write_family(tmp_path / "in", "smollm2")
    config, params = read_model(source)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(40)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(12)
    writer.add_token_list([str(number) for number in range(60)])
    ends = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
            "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
            "down_proj": "ffn_down", "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    opened = open_tensors(source / SINGLE)
    for name in opened.tensors:
        array, part = opened.read(name), name.split(".")
        if part[1] == "layers":
            new = f"blk.{part[2]}.{ends[part[-2]]}.weight"
        else:
            new = {"embed_tokens": "token_embd", "norm": "output_norm"}[part[1]]
            new += ".weight"
        if part[-2] in ("q_proj", "k_proj"):
            heads = 4 if part[-2] == "q_proj" else 2
            array = array.reshape(heads, 2, 6, 32).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(new, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, read = read_gguf(tmp_path / "x.gguf")
    assert same_model(found, config) and same(read, params)
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.write(tmp_path / "x.gguf", "package/x.gguf")
    assert same(read_gguf(tmp_path / "x.whl")[1], params)
    (tmp_path / "y.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:300])
    with pytest.raises(UsageError, match=r"y\.gguf cannot be read"):
        read_gguf(tmp_path / "y.gguf")


def test_every_parameter_has_a_place():
    """On a mesh, and under the rules of the trainer."""
    everything = ModelConfig(
        60, 32, 40, 2, 4, kv_heads=2, qkv_bias=True, out_bias=True, qk_norm=True
    )
    whole = EncoderConfig(60, 32, 40, 2, 4, pooler=True, mlm=True)
    for config in (everything, whole):
        for path, leaf in shapes(config).items():
            assert len(logical_axes(path)) == leaf.ndim, path
    assert logical_axes("layers/attn/k/bias") == ("layers", "heads")
