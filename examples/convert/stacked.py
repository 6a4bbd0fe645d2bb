"""`write_stacked` and `read_stacked`: parameters as they are here, in one file.

A folder has `model.json`, the fields of the configuration, and
`parameters.safetensors`, one tensor for every leaf, under its path.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from examples.convert.configs import Config
from examples.convert.files import copy_companions, new_folder, read_json
from examples.convert.names import flat, nested
from examples.convert.tensors import Tensor, open_tensors, write_tensors
from examples.convert.writing import check_leaves
from examples.encoder.model import EncoderConfig
from examples.llama.config import UsageError
from examples.llama.model import ModelConfig, Params

ABOUT, DATA = "model.json", "parameters.safetensors"


def write_stacked(
    folder: pathlib.Path,
    config: Config,
    params: Params,
    like: pathlib.Path | None = None,
) -> list[str]:
    """Writes the folder, whole or not at all; returns the names of its files."""
    leaves = flat(params)
    check_leaves(config, leaves)
    kind = "decoder" if isinstance(config, ModelConfig) else "encoder"
    fields = dataclasses.asdict(config)
    if isinstance(config, ModelConfig):
        fields = config.to_json()
    with new_folder(folder) as partial:
        copy_companions(like, partial)
        about = {"kind": kind, "config": fields}
        (partial / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        tensors = {
            path: Tensor(np.dtype(x.dtype), x.shape) for path, x in leaves.items()
        }
        write_tensors(partial / DATA, tensors, lambda path: np.asarray(leaves[path]))
    return sorted(path.name for path in folder.iterdir())


def read_stacked(folder: pathlib.Path) -> tuple[Config, Params]:
    """What `write_stacked` wrote.

    Raises:
        UsageError: it is something else.
    """
    about: dict[str, Any] = read_json(folder / ABOUT)
    try:
        if about["kind"] == "decoder":
            config = ModelConfig.from_json(about["config"])
        else:
            config = {"encoder": EncoderConfig}[about["kind"]](**about["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder / ABOUT} describes no model: {error!r}") from error
    file = open_tensors(folder / DATA)
    check_leaves(config, file.tensors)
    return config, nested({path: file.read(path) for path in file.tensors})
