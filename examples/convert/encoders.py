"""`read_encoder` makes an `EncoderConfig` of an encoder's `config.json`, and back."""

from typing import Any, NamedTuple

from examples.convert.fields import Fields, short
from examples.encoder.model import EncoderConfig
from examples.llama.config import UsageError


class Kind(NamedTuple):
    """What a family of encoders has beside BERT."""

    name: str
    padding: int | None = None  # its number, which positions count from


ENCODERS = {"bert": Kind("Bert"), "roberta": Kind("Roberta", padding=1)}


def read_encoder(raw: dict[str, Any], kind: Kind) -> EncoderConfig:
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


def write_encoder(config: EncoderConfig, name: str) -> dict[str, Any]:
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
