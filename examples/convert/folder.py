"""`read_model` and `write_model`: a folder of transformers' to parameters and back.

A folder has a `config.json`, the weights in one safetensors file or in several with an
index, and the tokenizer. Every tensor's name and shape is checked before the first is
read. Tensors are read and written one by one: the model and one tensor are in memory.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from examples.convert.configs import (
    Config,
    read_config,
    same_model,
    short,
    write_config,
)
from examples.convert.names import (
    HEADS,
    Slot,
    canonical,
    copies,
    flat,
    is_buffer,
    listed,
    modules,
    nested,
    shapes,
    slots,
)
from examples.convert.tensors import (
    Tensor,
    TensorFile,
    open_tensors,
    parse_json,
    write_tensors,
)
from examples.encoder.model import EncoderConfig
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig, Params
from examples.llama.run_folder import brief, read_text, usable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_LARGEST_JSON = 2**20  # bytes
# What belongs to a model beside its weights, and is copied as it is.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
DTYPES = ("float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """A model and what became of its files.

    Attributes:
      config: its shape; `param_dtype` is that of the embedding.
      params: NumPy arrays.
      used: number of tensors that were read.
      buffers: tensors that the model computes instead.
      copies: tensors that are there a second time, found equal.
      head: of a classifier, by transformers' names; no part of the model here.
    """

    config: Config
    params: Params
    used: int
    buffers: list[str]
    copies: list[str]
    head: dict[str, np.ndarray]


def read_model(
    folder: str | os.PathLike[str], dtype: str | None = None
) -> tuple[Config, Params]:
    """Configuration and parameters of the model in a folder.

    Args:
      folder: with `config.json` and weights in safetensors.
      dtype: of the parameters; None: each as in the file.

    Returns:
      A `ModelConfig` or an `EncoderConfig`, and nested dicts of NumPy arrays.

    Raises:
      UsageError: the architecture, a field of it or a file is not supported, or the
        tensors are not exactly those of the model.
    """
    loaded = load_model(folder, dtype)
    return loaded.config, loaded.params


def load_model(folder: str | os.PathLike[str], dtype: str | None = None) -> Loaded:
    """`read_model`, with an account of the tensors."""
    check_dtype(dtype)
    folder = pathlib.Path(folder)
    config = read_config(read_json(folder / "config.json"))
    files = open_folder(folder)
    found = canonical(list(files), config)
    if isinstance(config, EncoderConfig):
        names = modules(config)
        config = dataclasses.replace(
            config,
            pooler=any(name.startswith(names["pooler"]) for name in found),
            mlm=any(
                name.startswith(names[m] + ".")
                for name in found
                for m in ("mlm/dense", "mlm/norm")
            ),
        )
    wanted = slots(config)
    twice = {k: v for k, v in copies(config).items() if k in found}
    expected = {slot.name for slot in wanted}
    rest = [name for name in found if name not in expected and name not in twice]
    buffers = [name for name in rest if is_buffer(name)]
    heads = [name for name in rest if HEADS.fullmatch(name)]
    _check_tensors(folder, wanted, found, files, {*rest} - {*buffers} - {*heads})
    for name in heads:
        tensor = files[found[name]].tensors[found[name]]
        if tensor.dtype.name not in DTYPES or tensor.shape[1:] not in (
            (),
            (config.width,),
        ):
            raise UsageError(f"{folder}: {found[name]} {[*tensor.shape]} is no head")
    head = {name: files[found[name]].read(found[name]) for name in heads}
    _check_copies(folder, twice, found, files)
    leaves = _read_leaves(wanted, found, files, dtype)
    kept = leaves["embed/embedding"].dtype.name
    # Sums in float16 overflow where those in bfloat16 do not.
    compute = "float32" if kept == "float16" else kept
    config = dataclasses.replace(config, param_dtype=kept, compute_dtype=compute)
    return Loaded(config, nested(leaves), len(wanted), buffers, [*twice], head)


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(
            f"the dtype must be one of {', '.join(DTYPES)}, or none for the file's; "
            f"got {dtype!r}"
        )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = parse_json(read_text(path, _LARGEST_JSON))
    except FileNotFoundError as error:
        raise UsageError(
            f"{path.parent} has no {path.name}: it is no folder of a model"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {brief(error)}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object")
    return value


def open_folder(folder: pathlib.Path) -> dict[str, TensorFile]:
    """Every tensor of the folder with the file that holds it."""
    if (folder / SINGLE).exists():
        file = open_tensors(folder / SINGLE)
        return dict.fromkeys(file.tensors, file)
    if not (folder / INDEX).exists():
        others = [path.name for path in sorted(folder.glob("*.bin"))]
        note = f"; {others[0]} holds code and is not read" if others else ""
        raise UsageError(f"{folder} has neither {SINGLE} nor {INDEX}{note}")
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UsageError(f"{folder / INDEX} has no weight_map")
    for name, file in where.items():
        # A name in the same folder and nothing else, whatever the system's separators.
        plain = isinstance(file, str) and file.endswith(".safetensors")
        if not plain or {*"/\\:\0"} & {*file} or file.startswith("."):
            raise UsageError(
                f"{folder / INDEX}: {name[:80]!r} lies in {short(file)}, which is no "
                "safetensors file beside it"
            )
    files = {file: open_tensors(folder / file) for file in sorted({*where.values()})}
    absent = [f"{n} in {f}" for n, f in where.items() if n not in files[f].tensors]
    extra = [
        f"{name} in {file}"
        for file, opened in files.items()
        for name in opened.tensors
        if where.get(name) != file
    ]
    if absent or extra:
        raise UsageError(
            f"{folder / INDEX} does not agree with its files: "
            + _complaints({"not there": absent, "not in the index": extra})
        )
    return {name: files[file] for name, file in where.items()}


def _complaints(kinds: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{what} ({len(names)}): {listed(names)}"
        for what, names in kinds.items()
        if names
    )


def _check_tensors(
    folder: pathlib.Path,
    wanted: list[Slot],
    found: dict[str, str],
    files: dict[str, TensorFile],
    unknown: set[str],
) -> None:
    """Raises with a list unless the tensors are those of the model."""
    shape, kinds = [], []
    for slot in wanted:
        if slot.name in found:
            old = found[slot.name]
            tensor = files[old].tensors[old]
            if tensor.shape != slot.shape:
                shape.append(f"{old} {[*tensor.shape]} in place of {[*slot.shape]}")
            if tensor.dtype.name not in (*DTYPES, "float64"):
                kinds.append(f"{old} {tensor.dtype.name}")
    wrong = {
        "missing": [slot.name for slot in wanted if slot.name not in found],
        "unknown": sorted(found[name] for name in unknown),
        "of another shape": shape,
        f"not of {', '.join(DTYPES)}": kinds,
    }
    if any(wrong.values()):
        raise UsageError(
            f"{folder} does not hold the {len(wanted)} tensors of its config.json: "
            + _complaints(wrong)
        )


def _check_copies(
    folder: pathlib.Path,
    twice: dict[str, str],
    found: dict[str, str],
    files: dict[str, TensorFile],
) -> None:
    """Raises if a tied tensor is not the one it is tied to."""
    for copy, original in twice.items():
        where = [(files[found[name]], found[name]) for name in (copy, original)]
        a, b = (file.tensors[name] for file, name in where)
        same = a.dtype == b.dtype and a.shape == b.shape
        # Read only if they may be equal: the shape of a copy may be anything.
        if not same or not _equal(*(file.read(name) for file, name in where)):
            raise UsageError(
                f"{folder}: {copy} differs from {original}, and the model has one for "
                "both; for two, config.json needs tie_word_embeddings = false"
            )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit: a number that is none equals itself."""
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


def _read_leaves(
    wanted: list[Slot],
    found: dict[str, str],
    files: dict[str, TensorFile],
    dtype: str | None,
) -> dict[str, np.ndarray]:
    sizes: dict[str, tuple[int, ...]] = {}
    types: dict[str, np.dtype] = {}
    for slot in wanted:
        old = found[slot.name]
        kind = files[old].tensors[old].dtype
        if dtype is None and kind.name == "float64":
            raise UsageError(f"{old} is float64: give the dtype to have it in")
        if dtype is None and types.setdefault(slot.leaf, kind) != kind:
            raise UsageError(
                f"{old} is {kind}, and in other layers {types[slot.leaf]}: give the "
                "dtype to have them in"
            )
        if dtype is not None:
            types[slot.leaf] = jnp.dtype(dtype)
        shape = slot.shape[::-1] if slot.turned else slot.shape
        layers = 1 if slot.layer is None else slot.layer + 1
        sizes[slot.leaf] = shape if slot.layer is None else (layers, *shape)
    leaves = {path: np.empty(sizes[path], types[path]) for path in sizes}
    # File by file, so that a disk reads each from its beginning to its end.
    for slot in sorted(wanted, key=lambda s: _where(found[s.name], files)):
        old, place = found[slot.name], slot.place(leaves[slot.leaf])
        tensor = files[old].read(old)
        with np.errstate(over="ignore"):
            place[...] = tensor
        if place.dtype.name == "float16" and not np.array_equal(
            np.isfinite(place), np.isfinite(tensor)
        ):
            raise UsageError(f"{old} has numbers beyond float16; take bfloat16")
    return leaves


def _where(name: str, files: dict[str, TensorFile]) -> tuple[str, int]:
    file = files[name]
    return str(file.path), file.tensors[name].offset


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


@contextlib.contextmanager
def new_folder(folder: pathlib.Path, replace: bool = False) -> Iterator[pathlib.Path]:
    """A folder to write into, which gets its name when it is complete.

    Raises:
        UsageError: there is something already, and it is not to be replaced.
    """
    held = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    if held and not replace:
        raise UsageError(f"{folder} is there and not empty: give another folder")
    if held and not (folder.is_dir() and all(map(_is_ours, folder.iterdir()))):
        raise UsageError(f"{folder} holds more than a model: give another folder")
    partial = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.partial")
    with usable(str(folder)):
        partial.mkdir(parents=True)
        try:
            yield partial
            if folder.is_dir():
                shutil.rmtree(folder)
            partial.replace(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _is_ours(path: pathlib.Path) -> bool:
    known = (*COMPANIONS, "config.json", "model.json", INDEX)
    return path.is_file() and (path.name in known or path.suffix == ".safetensors")


def copy_companions(like: str | os.PathLike[str] | None, folder: pathlib.Path) -> None:
    """Tokenizer, chat template and settings of text generation."""
    for name in COMPANIONS if like is not None else ():
        source = pathlib.Path(like or "") / name
        if source.is_file():
            shutil.copyfile(source, folder / name)


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
            "the parameters are not those of the configuration: " + _complaints(wrong)
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
