"""`read_model` makes parameters of a folder of transformers'.

Every tensor's name and shape is checked before the first is read. Tensors are read one
by one: the model and one tensor are in memory.
"""

import dataclasses
import os
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from examples.convert.configs import Config, read_config
from examples.convert.files import (
    DTYPES,
    check_dtype,
    complaints,
    open_folder,
    read_json,
)
from examples.convert.names import (
    HEADS,
    Slot,
    canonical,
    copies,
    is_buffer,
    modules,
    nested,
    slots,
)
from examples.convert.tensors import TensorFile
from examples.encoder.model import EncoderConfig
from examples.llama.config import UsageError
from examples.llama.model import Params


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
            + complaints(wrong)
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
