"""`read_config` makes a `ModelConfig` or an `EncoderConfig` of a `config.json`.

Every field is either understood, known to change nothing in the forward pass, or empty;
any other is an error that names it. A converter that passes over what it does not know
is silently wrong.
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

from examples.encoder.model import EncoderConfig
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig, RopeScaling

Config = ModelConfig | EncoderConfig

# Fields without a part in the forward pass of a model that is not being trained.
_NEUTRAL = re.compile(
    r"_.*|.*_token_id|.*dropout.*|.*version|torch_dtype|dtype|architectures|model_type"
    r"|use_cache|cache_implementation|pretraining_tp|unsloth.*"
    r"|transformers\.js_config|id2label|label2id|num_labels|problem_type|finetuning_task"
    r"|task_specific_params|name_or_path|return_dict|output_.*|gradient_checkpointing"
    r"|chunk_size_feed_forward|tokenizer_class|prefix|is_llama_config|use_bfloat16"
    r"|pooler_.*|directionality|classifier_.*|.*_token|keys_to_ignore_at_inference"
    r"|use_return_dict|torchscript|attn_implementation|model_max_length"
    # Old files have the settings of text generation here.
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups"
    r"|diversity_penalty|temperature|top_k|top_p|typical_p|repetition_penalty"
    r"|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids"
    r"|num_return_sequences|suppress_tokens|begin_suppress_tokens"
    r"|exponential_decay_length_penalty|remove_invalid_values"
)
# Values that say: as ever.
_AS_EVER = {"partial_rotary_factor": 1, "position_embedding_type": "absolute"}


class Fields:
    """The fields of a `config.json`, each taken once and checked."""

    def __init__(self, raw: dict[str, Any]):
        self._left = dict(raw)

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def size(self, name: str, default: int | None = None, most: int = 2**20) -> int:
        """A whole number from 1 on; without a default it must be there."""
        value = self.take(name)
        value = default if value is None else value
        if value is None:
            raise UsageError(f"config.json has no {name}")
        if type(value) is not int or not 1 <= value <= most:
            raise UsageError(
                f"config.json: {name} must be a whole number from 1 to {most:,}; got "
                f"{short(value)}"
            )
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.take(name)
        value = default if value is None else value
        if not _is_number(value) or not 0 < value < math.inf:
            raise UsageError(
                f"config.json: {name} must be a positive number; got {short(value)}"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise UsageError(
                f"config.json: {name} must be true or false; got {short(value)}"
            )
        return value

    def close(self, model_type: str) -> None:
        """Raises if a field is left that may change the result."""
        for name, value in self._left.items():
            as_ever = name in _AS_EVER and value == _AS_EVER[name]
            if value and not as_ever and not _NEUTRAL.fullmatch(name):
                raise UsageError(
                    f"config.json: {name} = {short(value)} is not supported for "
                    f"{model_type}; a field that does not change the forward pass can "
                    "be removed from the file"
                )


def short(value: Any) -> str:
    """A value of a file in a part of a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**62


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
    if values or not all(_is_number(x) and x > 0 for x in found):
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


def _read_decoder(raw: dict[str, Any], family: Decoder) -> ModelConfig:
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


class Kind(NamedTuple):
    """What a family of encoders has beside BERT."""

    name: str
    padding: int | None = None  # its number, which positions count from


ENCODERS = {"bert": Kind("Bert"), "roberta": Kind("Roberta", padding=1)}


def _read_encoder(raw: dict[str, Any], kind: Kind) -> EncoderConfig:
    fields = Fields(raw)
    if (act := fields.take("hidden_act", "gelu")) != "gelu":
        raise UsageError(
            f"config.json: hidden_act = {short(act)} is not supported; gelu is"
        )
    padding = None
    if kind.padding is not None:
        padding = fields.take("pad_token_id", kind.padding)
        if type(padding) is not int or padding < 0:
            raise UsageError(
                f"config.json: pad_token_id must be a number; got {short(padding)}"
            )
    if not fields.flag("tie_word_embeddings", True):
        raise UsageError("config.json: tie_word_embeddings = False is not supported")
    config = EncoderConfig(
        vocab_size=fields.size("vocab_size", None, 2**24),
        width=fields.size("hidden_size"),
        ff_width=fields.size("intermediate_size"),
        layers=fields.size("num_hidden_layers", None, 4096),
        heads=fields.size("num_attention_heads", None, 2**16),
        max_length=fields.size("max_position_embeddings", 512),
        types=fields.size("type_vocab_size", 2),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        pad_position=padding,
        init_std=fields.number("initializer_range", 0.02),
    )
    fields.close(raw["model_type"])
    return config


def read_config(raw: dict[str, Any]) -> Config:
    """The model that a `config.json` describes.

    An encoder's `pooler` and `mlm` are left at False: the weights say whether they are
    there.

    Raises:
        UsageError: another architecture, or a field that is not supported.
    """
    kind = raw.get("model_type")
    names = sorted({*DECODERS, *ENCODERS})
    if not isinstance(kind, str) or kind not in names:
        raise UsageError(
            f"config.json: model_type = {short(kind)} is not supported; "
            f"{', '.join(names)} are"
        )
    family = DECODERS.get(kind) or ENCODERS[kind]
    known = [family.name + end for end in _CLASSES]
    classes = raw.get("architectures") or []
    for name in classes if isinstance(classes, list) else [classes]:
        if name not in known:
            raise UsageError(
                f"config.json: the architecture {short(name)} is not supported for "
                f"{kind}; {', '.join(known)} are"
            )
    try:
        if isinstance(family, Decoder):
            return _read_decoder(raw, family)
        return _read_encoder(raw, family)
    except ValueError as error:  # sizes that do not fit together
        raise UsageError(f"config.json: {error}") from error


_CLASSES = (
    "ForCausalLM",
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "Model",
)


def write_config(config: Config) -> dict[str, Any]:
    """The `config.json` of the first family that has such models.

    Raises:
        UsageError: none has.
    """
    if isinstance(config, ModelConfig):
        found = [_write_decoder(config, name) for name in DECODERS]
    else:
        found = [_write_encoder(config, name) for name in ENCODERS]
    for raw in found:
        try:
            if same_model(read_config(raw), config):
                return raw
        except UsageError:  # the family has no such field
            continue
    names = ", ".join(raw["model_type"] for raw in found)
    raise UsageError(f"no architecture of {names} has such a model: {config}")


def same_model(a: Config, b: Config) -> bool:
    """Whether two configurations compute the same with the same parameters."""
    return normal(a) == normal(b)


def normal(config: Config) -> Config:
    """Without what two spellings of one model may differ in."""
    drop: dict[str, Any] = {"param_dtype": "", "compute_dtype": "", "init_std": 0.0}
    if isinstance(config, ModelConfig):
        drop |= {"kv_heads": config.key_heads, "head_width": config.head_size}
    else:
        drop |= {"pooler": False, "mlm": False}
    return dataclasses.replace(config, **drop)


def _write_decoder(config: ModelConfig, name: str) -> dict[str, Any]:
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


def _write_encoder(config: EncoderConfig, name: str) -> dict[str, Any]:
    kind = ENCODERS[name]
    head = "ForMaskedLM" if config.mlm else "Model"
    return {
        "architectures": [kind.name + head],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": "gelu",
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.types,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": True,
        "pad_token_id": config.pad_position if config.pad_position is not None else 0,
    }
