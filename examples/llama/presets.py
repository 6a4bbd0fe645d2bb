"""`PRESETS` and `method_defaults`: the value of a flag that is left out.

A preset is the shape of a model and the recipe of its runs. All that belongs to an
optimizer is read off its own signature.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

import lowrank_optax as lro
from examples.llama.model import ModelConfig

# The library's methods, and Optax's to compare them with.
METHODS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    **{name: method.factory for name, method in lro.METHODS.items()},
}


def parameters(optimizer: str) -> Mapping[str, inspect.Parameter]:
    """The arguments that an optimizer takes."""
    return inspect.signature(METHODS[optimizer]).parameters


# Those without a basis, and so without a side: they project nothing, or along an axis.
NO_SIDE = tuple(name for name in METHODS if not {"rank", "side"} <= {*parameters(name)})


def method_defaults(optimizer: str) -> dict[str, Any]:
    """Flags that are the method's own, with its own defaults.

    Rank and gap between refreshes are of the preset's recipe, since they go with the
    size of the model and the length of the run; but a method that is of rank one, or
    was published with another gap than GaLore, is not itself with those of the recipe.
    """
    common, own = parameters("galore"), parameters(optimizer)
    found = {
        name: own.get(name, common[name]).default for name in ("b1", "b2", "scale")
    }
    if "rank" in own and own["rank"].default == 1:
        found["rank"] = 1
    gap = own.get("update_proj_gap", common["update_proj_gap"]).default
    if gap != common["update_proj_gap"].default:
        found["update_proj_gap"] = gap
    return found


# Learning rates in multiples of the recipe's, which is GaLore's beside a scale of 0.25;
# 1 for those that are not here. From runs of the tiny preset, whose recipe has 0.01.
# AdamW: 0.01 ends behind 0.001 after 120 steps (docs/results/ablation_subtrack.json),
# 0.001 is too low for 300 (few_bits.json), and 60 steps of 8 rows end at 3.03 nats with
# 0.003, 2.93 with 0.01, 2.95 with 0.03. LDAdam: there 2.59, 2.54 and 2.76; its paper
# has 0.001. FRUGAL and SCALE step one to four times as far as AdamW (the table of step
# sizes in docs/choosing.md), and were not searched; nor were those at 1, nor SinkGD and
# RACS, which have their papers' 0.02. Even Muon ends at 1.71, 1.46 and 1.44 nats with
# 0.005, 0.01 and 0.02 after 200 steps of the whole recipe.
RATES = {
    "adamw": 0.3,
    "adamw_8bit": 0.3,
    "adamw_4bit": 0.3,
    "ldadam": 0.3,
    "frugal": 0.1,
    "column_sgd": 0.1,
    "sinkgd": 2.0,
    "racs": 2.0,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run of a preset does unless a flag says otherwise."""

    steps: int
    lr: float = 0.01
    rank: int = 128
    update_proj_gap: int = 200
    seq_len: int = 256
    batch_size: int = 512
    micro_batches: int = 8
    clip: float = 0.0
    tokenizer: str = "bpe"
    packing: str = "padded"
    dtype: str = "bfloat16"
    eval_every: int = 1000
    eval_tokens: int = 10_000_000
    eval_batch_size: int = 32
    checkpoint_every: int = 1000


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model and its recipe."""

    model: ModelConfig
    recipe: Recipe


def _llama(
    width: int,
    ff_width: int,
    layers: int,
    heads: int,
    recipe: Recipe,
    vocab_size: int = 32_000,
    max_length: int = 1024,
) -> Preset:
    model = ModelConfig(vocab_size, width, ff_width, layers, heads, max_length)
    return Preset(model, recipe)


_TINY = Recipe(
    steps=400,
    lr=0.01,
    rank=32,
    update_proj_gap=50,
    seq_len=128,
    batch_size=16,
    micro_batches=1,
    clip=1.0,
    tokenizer="bytes",
    packing="packed",
    dtype="float32",
    eval_every=100,
    eval_tokens=65_536,
    eval_batch_size=32,
    checkpoint_every=100,
)
_7B = Recipe(150_000, lr=0.005, rank=1024, update_proj_gap=500, clip=1.0)

# Widths and depths of the GaLore scripts; 13b is APOLLO's.
PRESETS: dict[str, Preset] = {
    "tiny": _llama(128, 352, 4, 4, _TINY, vocab_size=264),
    "9m": _llama(128, 352, 4, 4, Recipe(10_000, rank=32)),
    "20m": _llama(256, 688, 4, 4, Recipe(10_000, rank=64)),
    "35m": _llama(384, 1024, 6, 8, Recipe(10_000, rank=96)),
    "40m": _llama(416, 1024, 8, 8, Recipe(10_000, rank=104)),
    "60m": _llama(512, 1376, 8, 8, Recipe(10_000)),
    "71m": _llama(512, 1368, 12, 8, Recipe(10_000)),
    "100m": _llama(640, 1708, 12, 10, Recipe(20_000, rank=160), 32_100),
    "130m": _llama(768, 2048, 12, 12, Recipe(20_000, rank=256)),
    "250m": _llama(768, 2560, 24, 16, Recipe(40_000, rank=256)),
    "350m": _llama(1024, 2736, 24, 16, Recipe(60_000, rank=256)),
    "1b": _llama(2048, 5461, 24, 32, Recipe(100_000, rank=512)),
    "3b": _llama(2560, 6848, 32, 32, Recipe(120_000, lr=0.005, rank=1024)),
    "7b": _llama(4096, 11008, 32, 32, _7B, max_length=2048),
    "13b": _llama(5120, 13824, 40, 40, _7B),
}
