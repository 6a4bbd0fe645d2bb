"""What the trainer leaves behind, in transformers' files; there it is loaded and used.

The last part needs transformers and torch, and is left out where they are missing.
"""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers
from flax import nnx

from examples.convert import __main__ as convert
from examples.convert import read_model, write_model
from examples.convert.run import read_run
from examples.encoder import model as encoder
from examples.llama import train
from examples.llama.model import ModelConfig, abstract_model, init_params
from examples.llama.positions import RopeScaling
from examples.llama.tokenizer import ByteTokenizer

TEXT = "Ein Satz, 1 + 1 = 2;\tü, 漢字 🙂\n"


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers")


@pytest.fixture
def run_dir(micro_preset, shards, tmp_path, monkeypatch):
    """A few steps of training, with weights that are kept in eight bits."""
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "micro", "--data", shards, "--run-dir", "run", "--steps", "2"]
    assert train.main([*flags, "--weights", "int8"]) == 0
    return tmp_path / "run"


@pytest.mark.whole
def test_a_run_is_exported(run_dir, tmp_path, capsys):
    assert convert.main([str(run_dir), str(tmp_path / "out")]) == 0
    assert "decoder of " in capsys.readouterr().out
    config, params = read_model(tmp_path / "out")
    with ocp.StandardCheckpointer() as orbax:
        saved = orbax.restore((run_dir / "checkpoints" / "2").absolute())["params"]
    # What is not in few bits is the checkpoint's, bit for bit.
    norm = saved["layers"]["norm1"]["scale"]
    np.testing.assert_array_equal(params["layers"]["norm1"]["scale"], norm)
    _, shapes = abstract_model(config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    kept = jax.tree.map(np.asarray, read_run(run_dir)[1])
    jax.tree.map(np.testing.assert_array_equal, params, kept)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    own = ByteTokenizer()
    assert inner.encode(TEXT).ids == own.encode(TEXT)
    assert inner.decode(inner.encode(TEXT).ids) == TEXT
    assert inner.token_to_id("<end>") == own.end
    for step in (run_dir / "checkpoints").iterdir():
        next(path for path in step.rglob("d/*") if path.is_file()).write_bytes(b"x")
    assert convert.main([str(run_dir), str(tmp_path / "again")]) == 2
    assert "has no good checkpoint (2: " in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


DECODERS = {
    "llama": ModelConfig(264, 32, 48, 2, 2),
    "llama3": ModelConfig(
        264, 32, 48, 2, 4, kv_heads=2, tied=True,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
    ),
    "mistral": ModelConfig(264, 32, 48, 2, 4, kv_heads=2, window=4),
    "qwen2": ModelConfig(264, 32, 48, 2, 4, kv_heads=2, qkv_bias=True),
    "qwen3": ModelConfig(264, 32, 48, 2, 4, kv_heads=2, head_width=16, qk_norm=True),
    "gemma": ModelConfig(
        264, 32, 48, 2, 4, kv_heads=1, head_width=16, tied=True, norm_offset=1.0,
        activation="gelu_tanh", embedding_scale=32**0.5,
    ),
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DECODERS)
def test_transformers_loads_and_generates(transformers, torch, name, tmp_path):
    """Our own `config.json`, and greedy text of both."""
    config = DECODERS[name]
    # Weights that make a difference: at 0.02 every model says the same.
    drawn = init_params(ModelConfig(**{**vars(config), "init_std": 0.2}), 0)
    params = jax.tree.map(lambda x: x + 0.1, drawn)
    write_model(tmp_path / "out", config, params)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert type(model).__name__.lower().startswith(name.removesuffix("3") or name)
    assert not any(info.values())
    definition, _ = abstract_model(config)
    ids = np.random.default_rng(0).integers(0, 264, (2, 12), np.int32)
    ours = jax.jit(lambda p, x: nnx.merge(definition, p)(x))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(ours(params, ids), theirs, rtol=1e-5, atol=2e-5)
    text = model.generate(
        torch.from_numpy(ids[:1]).long(), max_new_tokens=4, min_new_tokens=4,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    row = np.concatenate([ids[:1], np.zeros((1, 4), np.int32)], axis=1)
    for at in range(12, 16):
        row[0, at] = ours(params, row)[0, at - 1].argmax()
    np.testing.assert_array_equal(text.numpy(), row)


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padding", [None, 1])
def test_transformers_loads_an_encoder(transformers, torch, padding, tmp_path):
    config = encoder.EncoderConfig(
        60, 32, 48, 2, 4, max_length=64, pad_position=padding, pooler=True, init_std=0.2
    )
    params = encoder.init_params(config, 0)
    write_model(tmp_path / "out", config, params)
    model, info = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    ids = np.random.default_rng(0).integers(2, 60, (2, 12), np.int32)
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    ids = np.where(mask > 0, ids, padding or 0)
    with torch.no_grad():
        out = model(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())
    definition, _ = encoder.abstract_model(config)

    @jax.jit
    def ours(params):
        model = nnx.merge(definition, params)
        hidden = model(ids, mask)
        return hidden, model.pooled(hidden)

    hidden, pooled = ours(params)
    np.testing.assert_allclose(hidden, out.last_hidden_state.numpy(), atol=1e-5)
    np.testing.assert_allclose(pooled, out.pooler_output.numpy(), atol=1e-5)


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
def test_transformers_speaks_what_was_trained(transformers, run_dir, tmp_path):
    """The tokenizer travels along."""
    assert convert.main([str(run_dir), str(tmp_path / "out")]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 256
    ids = tokenizer("the optimizer", return_tensors="pt")
    text = model.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=256)
    assert tokenizer.decode(text[0]).startswith("the optimizer")


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["qwen2", "bert", "roberta"])
def test_transformers_loads_a_classifier(transformers, torch, name, tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 60, (1, 12), np.int32)
    weight = rng.normal(size=(3, 32)).astype("f4")
    bias, dense = (
        rng.normal(size=3).astype("f4"),
        rng.normal(size=(32, 32)).astype("f4"),
    )
    if name == "qwen2":
        config = ModelConfig(**{**vars(DECODERS[name]), "tied": True, "init_std": 0.2})
        params = init_params(config, 0)
        definition, _ = abstract_model(config)
        head = {"score.weight": weight}
        hidden = jax.jit(lambda p: nnx.merge(definition, p).hidden(ids))(params)
        expected = hidden[:, -1] @ weight.T
    else:
        padding = 1 if name == "roberta" else None
        config = encoder.EncoderConfig(
            60, 32, 48, 2, 4, pad_position=padding, pooler=name == "bert", init_std=0.2
        )
        params = encoder.init_params(config, 0)
        definition, _ = encoder.abstract_model(config)

        @jax.jit
        def first(params):
            model = nnx.merge(definition, params)
            hidden = model(ids, np.ones_like(ids))
            return model.pooled(hidden) if config.pooler else hidden[:, 0]

        x = first(params)
        if name == "bert":
            head = {"classifier.weight": weight, "classifier.bias": bias}
        else:
            x = np.tanh(x @ dense.T + 1)
            head = {
                "classifier.dense.weight": dense,
                "classifier.dense.bias": np.ones(32, "f4"),
                "classifier.out_proj.weight": weight,
                "classifier.out_proj.bias": bias,
            }
        expected = x @ weight.T + bias
    labels = ("bad", "so so", "good")
    write_model(tmp_path / "out", config, params, head=head, labels=labels)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()) and model.config.id2label[2] == "good"
    with torch.no_grad():
        found = model(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
