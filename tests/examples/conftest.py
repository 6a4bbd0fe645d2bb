"""A model and a corpus small enough to train in a second."""

import dataclasses
import gzip
import json
import random

import pytest

from examples.llama import config
from examples.llama.model import ModelConfig
from examples.llama.presets import Preset, Recipe

MICRO = ModelConfig(vocab_size=264, width=32, ff_width=48, layers=2, heads=2)
RECIPE = Recipe(
    steps=8,
    rank=8,
    update_proj_gap=3,
    seq_len=16,
    batch_size=4,
    micro_batches=1,
    clip=1.0,
    tokenizer="bytes",
    packing="packed",
    dtype="float32",
    eval_every=4,
    eval_tokens=300,
    eval_batch_size=8,
    checkpoint_every=2,
)


@pytest.fixture(scope="session")
def micro_config() -> ModelConfig:
    return MICRO


@pytest.fixture
def micro_preset(monkeypatch):
    preset = Preset(dataclasses.replace(MICRO), RECIPE)
    monkeypatch.setitem(config.PRESETS, "micro", preset)


def write_shards(folder, documents: int = 120, shards: int = 3, seed: int = 0):
    """C4-like shards; returns the glob that names them."""
    draw = random.Random(seed)
    words = "the optimizer turns a gradient of low rank into small state".split()
    for shard in range(shards):
        with gzip.open(folder / f"c4-train.{shard:05d}-of-00003.json.gz", "wt") as file:
            for _ in range(documents // shards):
                text = " ".join(draw.choices(words, k=draw.randint(3, 30)))
                file.write(json.dumps({"text": text, "url": "", "timestamp": ""}))
                file.write("\n")
    return str(folder / "*.json.gz")


@pytest.fixture
def shards(tmp_path) -> str:
    folder = tmp_path / "text"
    folder.mkdir()
    return write_shards(folder)
