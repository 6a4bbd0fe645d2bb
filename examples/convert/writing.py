"""`write_model` makes a folder of transformers' of parameters, tensor by tensor."""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from examples.convert.configs import Config, read_config, same_model, write_config
from examples.convert.files import (
    DTYPES,
    INDEX,
    SINGLE,
    check_dtype,
    complaints,
    copy_companions,
    new_folder,
    read_json,
)
from examples.convert.names import HEADS, Slot, flat, listed, shapes, slots
from examples.convert.tensors import Tensor, write_tensors
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig, Params

SHARD_BYTES = 5 * 10**9


def write_model(
    folder: str | os.PathLike[str],
    config: Config,
    params: Params,
    like: str | os.PathLike[str] | None = None,
    *,
    head: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    dtype: str | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes a folder that transformers loads.

    Args:
      folder: is made, whole or not at all.
      config: of the model.
      params: its parameters, of NumPy or JAX.
      like: a folder whose tokenizer, chat template and settings for generation are
        copied, and whose `config.json` is kept if it is of the same model.
      head: a classifier's tensors by transformers' names, `[out, in]`: `score.weight`
        on a decoder; `classifier.weight` and `.bias` on BERT's pooler;
        `classifier.dense` and `classifier.out_proj` on a RoBERTa.
      labels: the classifier's classes.
      dtype: of the tensors; None: each as the parameter.
      replace: whether a model that is in the folder may go.
      shard_bytes: the most that a file holds, if no tensor is larger.

    Returns:
      Names of the files.

    Raises:
      UsageError: no architecture of transformers has such a model, the parameters are
        not those of the configuration, or the folder is not free.
    """
    check_dtype(dtype)
    folder = pathlib.Path(folder)
    leaves = flat(params)
    check_leaves(config, leaves)
    kind = np.dtype(jnp.dtype(dtype or leaves["embed/embedding"].dtype))
    raw = _new_config(config, like) | {"torch_dtype": kind.name}
    heads = {name: np.asarray(tensor) for name, tensor in (head or {}).items()}
    if heads:
        raw |= _classifier(raw, heads, labels)
    with new_folder(folder, replace) as partial:
        copy_companions(like, partial)
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        own = [Slot(name, x.shape, name, None, False) for name, x in heads.items()]
        wanted = [*slots(config), *own]
        _write_leaves(partial, wanted, {**leaves, **heads}, dtype, shard_bytes)
    return sorted(path.name for path in folder.iterdir())


def _classifier(
    raw: dict[str, Any], heads: dict[str, np.ndarray], labels: Sequence[str]
) -> dict[str, Any]:
    """The fields of a classifier.

    Raises:
        UsageError: its tensors have other names than those of transformers.
    """
    wrong = [name for name in heads if not HEADS.fullmatch(name)]
    if wrong:
        raise UsageError(f"no head of transformers has the tensors {listed(wrong)}")
    family = re.sub("For.*|Model$", "", raw["architectures"][0])
    names = dict(enumerate(labels))
    return {
        "architectures": [f"{family}ForSequenceClassification"],
        "id2label": {str(number): name for number, name in names.items()},
        "label2id": {name: number for number, name in names.items()},
    }


def check_leaves(config: Config, leaves: dict[str, Any]) -> None:
    expected = shapes(config)
    wrong = {
        "missing": [path for path in expected if path not in leaves],
        "unknown": [path for path in leaves if path not in expected],
        "of another shape": [
            f"{path} {[*leaves[path].shape]} in place of {[*leaf.shape]}"
            for path, leaf in expected.items()
            if path in leaves and leaves[path].shape != leaf.shape
        ],
        "not of " + ", ".join(DTYPES): [
            f"{path} {leaf.dtype}"
            for path, leaf in leaves.items()
            if jnp.dtype(leaf.dtype).name not in DTYPES
        ],
    }
    if any(wrong.values()):
        raise UsageError(
            "the parameters are not those of the configuration: " + complaints(wrong)
        )


def _new_config(config: Config, like: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The `config.json`: that of `like`, if it is of the same model."""
    own = write_config(config)
    if like is None:
        return own
    generation = pathlib.Path(like) / "generation_config.json"
    if isinstance(config, ModelConfig) and generation.is_file():
        # Without them transformers takes the numbers of its own class.
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        own |= {k: v for k, v in read_json(generation).items() if k in ids}
    if not (pathlib.Path(like) / "config.json").exists():
        return own
    raw = read_json(pathlib.Path(like) / "config.json")
    try:
        if not same_model(read_config(raw), config):
            return own
    except UsageError:
        return own
    raw = {k: v for k, v in raw.items() if k not in ("dtype", "torch_dtype")}
    if isinstance(config, ModelConfig):
        return raw
    return raw | {"architectures": own["architectures"]}


def _write_leaves(
    folder: pathlib.Path,
    wanted: list[Slot],
    leaves: dict[str, Any],
    dtype: str | None,
    shard_bytes: int,
) -> None:
    """Leaf by leaf into as many files as it takes."""
    tensors = {
        slot.name: Tensor(
            np.dtype(jnp.dtype(dtype or leaves[slot.leaf].dtype)), slot.shape
        )
        for slot in wanted
    }
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    by_name = {slot.name: slot for slot in wanted}
    held: dict[str, np.ndarray] = {}

    def get(name: str) -> np.ndarray:
        slot = by_name[name]
        if slot.leaf not in held:  # one parameter at a time comes from its device
            held.clear()
            held[slot.leaf] = np.asarray(leaves[slot.leaf])
        part = slot.place(held[slot.leaf])
        with np.errstate(over="ignore"):
            cast = part.astype(tensors[name].dtype)
        if dtype == "float16" and not np.array_equal(
            np.isfinite(cast), np.isfinite(part)
        ):
            raise UsageError(f"{slot.leaf} has numbers beyond float16; take bfloat16")
        return cast

    if len(shards) == 1:
        write_tensors(folder / SINGLE, shards[0], get)
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard, get)
        where |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
