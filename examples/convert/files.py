"""`open_folder` finds the tensors of a folder of transformers'; `new_folder` makes one.

A folder has a `config.json`, the weights in one safetensors file or in several with an
index, and the tokenizer.
"""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from examples.convert.fields import short
from examples.convert.names import listed
from examples.convert.tensors import TensorFile, open_tensors, parse_json
from examples.llama.config import UsageError
from examples.llama.run_folder import brief, read_text, usable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
            + complaints({"not there": absent, "not in the index": extra})
        )
    return {name: files[file] for name, file in where.items()}


def complaints(kinds: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{what} ({len(names)}): {listed(names)}"
        for what, names in kinds.items()
        if names
    )


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
