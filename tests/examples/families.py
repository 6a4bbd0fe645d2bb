"""Random tiny models of every family: their fields, and weights drawn by name."""

import zlib

import numpy as np

TOKENS = np.random.default_rng(3).integers(3, 60, (2, 14)).astype(np.int32)
# The second row ends with padding, which only encoders are told of.
MASK = np.ones((2, 14), np.int32)
MASK[1, 9:] = 0
TYPES = np.repeat([[0] * 6 + [1] * 8], 2, axis=0).astype(np.int32)

_SHARED = dict(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=1,
)
# Pairs of a head of 8 turn once in 6, 63, 628 and 6283 positions: two of them are
# slowed down, one is not, one is between.
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=0.25,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {
    "llama": ("Llama", {}),
    "llama2": ("Llama", dict(num_key_value_heads=2, rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(num_key_value_heads=1, rope_parameters=_LLAMA3)),
    "smollm2": (
        "Llama",
        dict(
            num_key_value_heads=2,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=100_000.0),
            head_dim=12,
        ),
    ),
    "llama_bias": ("Llama", dict(attention_bias=True, num_key_value_heads=2)),
    "mistral": ("Mistral", dict(sliding_window=4, num_key_value_heads=2)),
    "mistral_full": ("Mistral", dict(sliding_window=None, num_key_value_heads=2)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2_window": (
        "Qwen2",
        dict(
            num_key_value_heads=4,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=0,
        ),
    ),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=16)),
    "gemma": ("Gemma", dict(num_key_value_heads=1, head_dim=16)),
    "bert": ("Bert", dict(pad_token_id=0)),
    "roberta": ("Roberta", dict(type_vocab_size=1, layer_norm_eps=1e-5)),
}
ENCODERS = ("bert", "roberta")


def fields(name: str) -> dict:
    """What `config.json` has beside transformers' defaults."""
    return _SHARED | FAMILIES[name][1]


def draw(name: str, shape: tuple[int, ...], gemma: bool = False) -> np.ndarray:
    """A tensor that depends on its name alone, large enough to make a difference."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape).astype(np.float32)
    if len(shape) == 2:
        return x * np.float32(0.5 if "embed" in name else 0.2)
    gain = "norm" in name.lower() and name.endswith("weight") and not gemma
    return x * np.float32(0.3) + np.float32(gain)
