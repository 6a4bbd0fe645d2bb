"""`read_config` makes a `ModelConfig` or an `EncoderConfig` of a `config.json`."""

import dataclasses
from typing import Any

from examples.convert.decoders import DECODERS, Decoder, read_decoder, write_decoder
from examples.convert.encoders import ENCODERS, read_encoder, write_encoder
from examples.convert.fields import short
from examples.encoder.model import EncoderConfig
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig

Config = ModelConfig | EncoderConfig


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
            return read_decoder(raw, family)
        return read_encoder(raw, family)
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
        found = [write_decoder(config, name) for name in DECODERS]
    else:
        found = [write_encoder(config, name) for name in ENCODERS]
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
