"""Folders of tiny random models, as transformers would have saved them."""

import json
import pathlib

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from examples.convert import write_model
from examples.encoder.model import EncoderConfig
from examples.encoder.model import init_params as init_encoder
from examples.llama.model import ModelConfig, init_params

DECODER = ModelConfig(
    260, 32, 48, 2, 4, max_length=128, kv_heads=2, tied=True, init_std=0.1
)
ENCODER = EncoderConfig(260, 32, 48, 2, 2, max_length=64, init_std=0.1)


def byte_tokenizer(*special: str) -> tokenizers.Tokenizer:
    """A token for every byte, behind those with a name."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {token: number for number, token in enumerate([*special, *alphabet])}
    made = tokenizers.Tokenizer(models.BPE(names, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*special])
    return made


def write_decoder(folder: pathlib.Path, **settings: object) -> str:
    """A Llama with tied embeddings, and ChatML as its template by default."""
    params = jax.tree.map(np.asarray, init_params(DECODER, 0))
    write_model(folder, DECODER, params)
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def write_encoder(folder: pathlib.Path) -> str:
    """A BERT without a pooler."""
    params = jax.tree.map(np.asarray, init_encoder(ENCODER, 0))
    write_model(folder, ENCODER, params)
    tokenizer = byte_tokenizer("[CLS]", "[SEP]", "[PAD]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)
