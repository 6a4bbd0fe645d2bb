"""`read_decoder` makes a `ModelConfig` of a decoder's `config.json`, and back."""

import math
from typing import Any, NamedTuple

from examples.convert.fields import Fields, is_number, short
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig
from examples.llama.positions import RopeScaling


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, in the spelling of transformers 4 or 5."""
    old, new = fields.take("rope_scaling"), fields.take("rope_parameters")
    name = "rope_scaling" if new is None else "rope_parameters"
    values = old if new is None else new
    if not isinstance(values, dict | None):
        raise UsageError(f"config.json: {name} is no table: {short(values)}")
    values = dict(values or {})
    inner = values.pop("rope_theta", None)
    base = fields.number("rope_theta", inner or 10_000.0)
    if inner is not None and inner != base:
        raise UsageError(
            f"config.json: rope_theta is {base} and, in {name}, {short(inner)}"
        )
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)  # some files have both
    if values.get("partial_rotary_factor") == 1:
        del values["partial_rotary_factor"]
    if old and new and (old.get("rope_type") or old.get("type")) != kind:
        raise UsageError("config.json: rope_scaling and rope_parameters differ")
    if kind == "default" and not values:
        return base, None
    keys = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    if kind != "llama3":
        raise UsageError(
            f"config.json: {name} of the kind {short(kind)} with {short(values)} is "
            "not supported; default and llama3 are"
        )
    found = [values.pop(key, None) for key in keys]
    if values or not all(is_number(x) and x > 0 for x in found):
        raise UsageError(
            f"config.json: {name} of the kind llama3 has the fields {', '.join(keys)}, "
            f"positive numbers; got {short(found)} and {short(values)}"
        )
    scaling = RopeScaling(*found)
    if scaling.low >= scaling.high:
        raise UsageError(
            f"config.json: low_freq_factor {scaling.low} must be below "
            f"high_freq_factor {scaling.high}"
        )
    return base, scaling


# Spellings of the functions in `examples.llama.model.ACTS`.
_ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class Decoder(NamedTuple):
    """What a family of decoders has beside Llama; its class defaults.

    Attributes:
      name: begins the names of its classes in transformers.
      qkv_bias: always; None: `attention_bias` says whether all four have one.
      window: "always", if `sliding_window` holds as it is; "flag", if only beside
        `use_sliding_window`.
    """

    name: str
    kv_heads: int | None = None
    head_width: int | None = None
    qkv_bias: bool | None = None
    qk_norm: bool = False
    window: str = ""
    tied: bool = False
    act: str = "silu"
    gemma: bool = False


DECODERS = {
    "llama": Decoder("Llama"),
    "mistral": Decoder("Mistral", kv_heads=8, qkv_bias=False, window="always"),
    "qwen2": Decoder("Qwen2", kv_heads=32, qkv_bias=True, window="flag"),
    "qwen3": Decoder("Qwen3", kv_heads=32, head_width=128, qk_norm=True, window="flag"),
    "gemma": Decoder(
        "Gemma", kv_heads=16, head_width=256, tied=True, act="gelu_tanh", gemma=True
    ),
}


def _window(fields: Fields, family: Decoder, layers: int) -> int | None:
    """The one window of all layers."""
    kinds = fields.take("layer_types")
    if not family.window:
        window, first = None, 0
    elif family.window == "always":
        window = fields.take("sliding_window", 4096)
        first = 0
    else:
        used = fields.flag("use_sliding_window", False)
        window = fields.take("sliding_window", 4096)
        first = fields.take("max_window_layers", 28)
        window = window if used else None
    if window is not None and (type(window) is not int or not 0 < window < 2**31):
        raise UsageError(
            f"config.json: sliding_window must be a positive number of positions; got "
            f"{short(window)}"
        )
    if kinds is None:
        if window is not None and (type(first) is not int or 0 < first < layers):
            raise UsageError(
                f"config.json: max_window_layers = {short(first)} of {layers} layers "
                "is not supported: the window is that of all layers or of none"
            )
        return window if window is not None and first <= 0 else None
    expected = ["full_attention" if window is None else "sliding_attention"] * layers
    if window is not None and kinds == ["full_attention"] * layers:
        return None
    if kinds != expected:
        raise UsageError(
            f"config.json: layer_types = {short(kinds)} is not supported: all "
            f"{layers} layers must be of one kind, sliding_attention beside a window"
        )
    return window


def read_decoder(raw: dict[str, Any], family: Decoder) -> ModelConfig:
    fields = Fields(raw)
    width, layers = (
        fields.size("hidden_size"),
        fields.size("num_hidden_layers", None, 4096),
    )
    heads = fields.size("num_attention_heads", None, 2**16)
    # null is "as many as heads"; no such field is the family's default.
    kv = family.kv_heads if "num_key_value_heads" not in raw else None
    head_width = family.head_width if "head_dim" not in raw else None
    act = fields.take("hidden_activation") if family.gemma else None
    act = act or fields.take("hidden_act") or family.act
    act = "gelu_tanh" if family.gemma and act == "gelu" else act  # as it was meant
    if not isinstance(act, str) or (act not in _ACTS and act != family.act):
        raise UsageError(
            f"config.json: hidden_act = {short(act)} is not supported; "
            f"{', '.join(_ACTS)} are"
        )
    fields.take("hidden_act")
    all_bias = (
        fields.flag("attention_bias", False) if family.qkv_bias is None else False
    )
    base, scaling = _rope(fields)
    config = ModelConfig(
        vocab_size=fields.size("vocab_size", None, 2**24),
        width=width,
        ff_width=fields.size("intermediate_size"),
        layers=layers,
        heads=heads,
        max_length=fields.size("max_position_embeddings", 2048, 2**31),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_base=base,
        init_std=fields.number("initializer_range", 0.02),
        kv_heads=fields.size("num_key_value_heads", kv or heads, 2**16),
        head_width=fields.size("head_dim", head_width or width // heads or 1, 2**16),
        tied=fields.flag("tie_word_embeddings", family.tied),
        qkv_bias=family.qkv_bias or all_bias,
        out_bias=all_bias,
        qk_norm=family.qk_norm,
        rope_scaling=scaling,
        window=_window(fields, family, layers),
        activation=_ACTS.get(act, act),
        norm_offset=1.0 if family.gemma else 0.0,
        embedding_scale=math.sqrt(width) if family.gemma else 1.0,
    )
    fields.close(raw["model_type"])
    return config


def write_decoder(config: ModelConfig, name: str) -> dict[str, Any]:
    family = DECODERS[name]
    raw: dict[str, Any] = {
        "architectures": [f"{family.name}ForCausalLM"],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_size,
        "hidden_act": {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[
            config.activation
        ],
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        # The spelling that transformers 4 and 5 both read.
        "rope_theta": config.rope_base,
        "rope_scaling": None,
    }
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_length,
        }
    if family.qkv_bias is None:
        raw["attention_bias"] = config.out_bias
    if family.window:
        raw["sliding_window"] = config.window
    if family.window == "flag":
        raw["use_sliding_window"] = config.window is not None
        raw["max_window_layers"] = 0 if config.window is not None else config.layers
    return raw
