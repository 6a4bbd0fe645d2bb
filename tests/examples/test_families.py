"""Every family against transformers' results, recorded by `record_families.py`."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from examples.convert.configs import read_config, same_model, write_config
from examples.convert.reading import load_model
from examples.convert.tensors import Tensor, write_tensors
from examples.encoder import model as encoder
from examples.llama import model as decoder
from tests.examples.families import ENCODERS, FAMILIES, MASK, TOKENS, TYPES, draw

RECORDED = np.load(pathlib.Path(__file__).parent / "golden" / "families.npz")
MODELS = json.loads(str(RECORDED["about"]))["models"]


def write_family(folder, name, **fields):
    """The model's folder, as transformers would write it."""
    about, gemma = MODELS[name], name == "gemma"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(about["config"] | fields))
    arrays = {key: draw(key, tuple(s), gemma) for key, s in about["tensors"].items()}
    tensors = {key: Tensor(x.dtype, x.shape) for key, x in arrays.items()}
    write_tensors(folder / "model.safetensors", tensors, arrays.__getitem__)
    return folder


def results(name, config, params):
    """Logits and hidden states at every other position."""
    if name in ENCODERS:
        definition, _ = encoder.abstract_model(config)
        tokens = np.where(MASK > 0, TOKENS, config.pad_position or 0)
        types = TYPES * (config.types > 1)

        def forward(params):
            model = nnx.merge(definition, params)
            hidden = model(tokens, MASK, types)
            return model.logits(hidden), hidden
    else:
        definition, _ = decoder.abstract_model(config)

        def forward(params):
            model = nnx.merge(definition, params)
            hidden = model.hidden(TOKENS)
            return model.logits(hidden), hidden

    # Half of the seconds are LLVM's, for a program that runs once.
    quick = {"xla_backend_optimization_level": 0}
    logits, hidden = jax.jit(forward, compiler_options=quick)(params)
    return {"logits": logits[:, ::2], "hidden": hidden[:, ::2]}


def test_every_family_is_recorded():
    assert MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_results_are_those_of_transformers(name, tmp_path):
    loaded = load_model(write_family(tmp_path, name))
    assert loaded.used == len(MODELS[name]["tensors"])
    assert not loaded.head and not loaded.copies and not loaded.buffers
    for key, found in results(name, loaded.config, loaded.params).items():
        expected = RECORDED[f"{name}/{key}"]
        # Sums in float32 in another order, of results up to 17.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_written_configuration_is_read_again(name):
    config = read_config(MODELS[name]["config"])
    if name in ENCODERS:
        config = dataclasses.replace(config, mlm=True)
    raw = write_config(config)
    assert same_model(read_config(raw), config)
