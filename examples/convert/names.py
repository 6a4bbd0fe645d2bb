"""`Slot` says where a tensor of a file belongs in the parameters, and the other way.

Files hold a matrix `[out, in]` for every layer; parameters hold kernels `[in, out]`,
and those of all layers as one array `[L, in, out]`.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from examples.convert.configs import Config
from examples.encoder import model as encoder
from examples.llama import model as decoder
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig, Params

# Our modules, and transformers' names of them; {} is a layer's number.
_LAYER = "model.layers.{}."
_DECODER = {
    "embed": "model.embed_tokens",
    "layers/norm1": _LAYER + "input_layernorm",
    "layers/attn/q": _LAYER + "self_attn.q_proj",
    "layers/attn/k": _LAYER + "self_attn.k_proj",
    "layers/attn/v": _LAYER + "self_attn.v_proj",
    "layers/attn/o": _LAYER + "self_attn.o_proj",
    "layers/attn/q_norm": _LAYER + "self_attn.q_norm",
    "layers/attn/k_norm": _LAYER + "self_attn.k_norm",
    "layers/norm2": _LAYER + "post_attention_layernorm",
    "layers/mlp/gate": _LAYER + "mlp.gate_proj",
    "layers/mlp/up": _LAYER + "mlp.up_proj",
    "layers/mlp/down": _LAYER + "mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}


def _encoder(prefix: str, mlm: dict[str, str]) -> dict[str, str]:
    layer = prefix + "encoder.layer.{}."
    return {
        "embed": prefix + "embeddings.word_embeddings",
        "positions": prefix + "embeddings.position_embeddings",
        "types": prefix + "embeddings.token_type_embeddings",
        "norm": prefix + "embeddings.LayerNorm",
        "layers/attn/q": layer + "attention.self.query",
        "layers/attn/k": layer + "attention.self.key",
        "layers/attn/v": layer + "attention.self.value",
        "layers/attn/o": layer + "attention.output.dense",
        "layers/norm1": layer + "attention.output.LayerNorm",
        "layers/mlp/up": layer + "intermediate.dense",
        "layers/mlp/down": layer + "output.dense",
        "layers/norm2": layer + "output.LayerNorm",
        "pooler": prefix + "pooler.dense",
        **mlm,
    }


_BERT = _encoder(
    "bert.",
    {
        "mlm": "cls.predictions",
        "mlm/dense": "cls.predictions.transform.dense",
        "mlm/norm": "cls.predictions.transform.LayerNorm",
    },
)
_ROBERTA = _encoder(
    "roberta.",
    {"mlm": "lm_head", "mlm/dense": "lm_head.dense", "mlm/norm": "lm_head.layer_norm"},
)
_ENDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# Buffers that old files hold, and which are computed.
_BUFFERS = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|(bert|roberta)\.embeddings\.(position_ids|token_type_ids)"
)
# Heads that are no part of the model here.
HEADS = re.compile(
    r"score\.weight|classifier\.(dense\.|out_proj\.)?(weight|bias)"
    r"|cls\.seq_relationship\.(weight|bias)"
)


class Slot(NamedTuple):
    """A tensor of a file.

    Attributes:
      name: in the file.
      shape: in the file.
      leaf: path of the parameter.
      layer: its index in a stacked parameter, or None.
      turned: whether the file has the matrix transposed.
    """

    name: str
    shape: tuple[int, ...]
    leaf: str
    layer: int | None
    turned: bool

    def place(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor's part of the parameter, as the file has it; a view."""
        part = leaf if self.layer is None else leaf[self.layer]
        return part.T if self.turned else part


def modules(config: Config) -> dict[str, str]:
    """Transformers' names of our modules."""
    if isinstance(config, ModelConfig):
        return _DECODER
    return _BERT if config.pad_position is None else _ROBERTA


@functools.cache
def shapes(config: Config) -> dict[str, Any]:
    """The parameters' shapes by path."""
    if isinstance(config, ModelConfig):
        _, params = decoder.abstract_model(config)
    else:
        _, params = encoder.abstract_model(config)
    return flat(params)


def flat(params: Params) -> dict[str, Any]:
    """Leaves by path, whose keys are joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in leaves
    }


def nested(leaves: dict[str, Any]) -> Params:
    """The opposite of `flat`."""
    params: Params = {}
    for path, leaf in leaves.items():
        *folders, last = path.split("/")
        at = params
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = leaf
    return params


def slots(config: Config) -> list[Slot]:
    """Every tensor that a file of this model has, leaf by leaf."""
    names, found = modules(config), []
    for path, leaf in shapes(config).items():
        module, end = path.rsplit("/", 1)
        name, turned = f"{names[module]}.{_ENDS[end]}", end == "kernel"
        stacked = path.startswith("layers/")
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if turned else shape
        for layer in range(config.layers) if stacked else [None]:
            found.append(Slot(name.format(layer), shape, path, layer, turned))
    return found


def copies(config: Config) -> dict[str, str]:
    """Names under which a file may hold a tensor a second time."""
    names = modules(config)
    table = f"{names['embed']}.weight"
    if isinstance(config, ModelConfig):
        return {"lm_head.weight": table} if config.tied else {}
    if not config.mlm:
        return {}
    head = names["mlm"]
    return {f"{head}.decoder.weight": table, f"{head}.decoder.bias": f"{head}.bias"}


def canonical(names: list[str], config: Config) -> dict[str, str]:
    """Today's name of every tensor -> its name in the file.

    Old encoders call gain and bias gamma and beta, and a file of the body alone leaves
    the body's prefix out.

    Raises:
        UsageError: two tensors have the same name.
    """
    prefix, first = modules(config)["embed"].split(".", 1)
    bare = f"{first}.weight" in names
    found: dict[str, str] = {}
    for old in names:
        name = f"{prefix}.{old}" if bare else old
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if name in found:
            raise UsageError(f"{old} and {found[name]} are the same tensor")
        found[name] = old
    return found


def is_buffer(name: str) -> bool:
    """Whether it is computed and not read."""
    return _BUFFERS.fullmatch(name) is not None


def listed(what: list[str], most: int = 12) -> str:
    """Names in one line."""
    rest = len(what) - most
    return ", ".join(what[:most]) + (f" and {rest} more" if rest > 0 else "")
